"""The package's own import graph: downward only, without circles, in rooms of bounded size."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mlra_jax"


def modules(root: Path = PACKAGE) -> dict[str, Path]:
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The package's own modules that a file imports, also those imported late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known.keys()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began, or nothing."""
    done: set[str] = set()

    def walk(at: str, path: list[str]) -> list[str]:
        if at in path:
            return [*path[path.index(at) :], at]
        if at in done:
            return []
        for to in sorted(graph[at]):
            if found := walk(to, [*path, at]):
                return found
        done.add(at)
        return []

    return next((found for start in sorted(graph) if (found := walk(start, []))), [])


def rooms(known: dict[str, Path]) -> dict[str, set[str]]:
    """What each room imports: a folder is one room, and so is each file beside the folders.

    `__main__` and the package itself stand above all rooms.
    """

    def room(module: str) -> str:
        path = known[module]
        inside = path.parent.relative_to(PACKAGE).parts
        return ".".join(inside) if inside else module.removeprefix("mlra_jax.")

    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        if module == "mlra_jax" or path.name == "__main__.py":
            continue
        graph.setdefault(room(module), set()).update(
            room(to) for to in imports(path, known) if to != "mlra_jax"
        )
    return {name: wanted - {name} for name, wanted in graph.items()}


def test_modules_import_each_other_without_circles():
    known = modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    # A package's __init__ gathers what is inside it.
    graph = {
        name: {to for to in wanted if not to.startswith(name + ".")}
        for name, wanted in graph.items()
    }
    assert not circle(graph), " -> ".join(circle(graph))
