"""What a traced function holds: its equations, those inside of its loops and branches too."""

from collections.abc import Iterator

import jax


def equations(function, *args) -> Iterator:
    """Every equation of `function` traced for `args`, inner ones included."""
    yield from _within(jax.make_jaxpr(function)(*args).jaxpr)


def _within(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from _within(getattr(value, "jaxpr", value))


def products(function, *args) -> set:
    """(precision, dtype of the result) of every matrix product."""
    return {
        (equation.params["precision"], equation.outvars[0].aval.dtype.name)
        for equation in equations(function, *args)
        if equation.primitive.name == "dot_general"
    }


HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
