"""The reference of all settings, read off the dataclasses and the lines below their fields."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from typing import Any

from mlra_jax import config, execution
from mlra_jax.config import KINDS, LatentConfig, ModelConfig
from mlra_jax.data.pipeline import ORDERS
from mlra_jax.data.token_file import FORMATS
from mlra_jax.execution import ATTENTION_KERNELS, DTYPES, REMAT, Execution
from mlra_jax.training import settings
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings, OptimizerSettings

_HEAD = """# Settings

Written by `python -m mlra_jax settings > docs/settings.md`; a test compares it with the code. Each
is given as `--config.NAME=VALUE` to `train.py`, or in a file of `configs/`. Defaults are the
paper's; what has none comes from the model's preset. A number outside its range is refused in one
line.
"""
_WORDS = {
    "attention_kernel": ATTENTION_KERNELS,
    "order": ORDERS,
    "remat": REMAT,
    "token_format": FORMATS,
}
_TABLE = "| name | default | range | meaning |\n|---|---|---|---|"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A line of the reference."""

    name: str
    default: str
    """Empty if there is none."""
    within: str
    """What it may be: an interval, `from 1 on`, or words."""
    meaning: str


def all_settings() -> dict[str, list[Setting]]:
    """By heading, in the order of the dataclasses."""
    parts = (("data.", DataSettings), ("mesh.", MeshSettings), ("optimizer.", OptimizerSettings))
    sections = {"The run": _fields(Experiment, "")}
    sections |= {f"`{prefix[:-1]}`": _fields(cls, prefix) for prefix, cls in parts}
    sections["`model`"] = [*_fields(ModelConfig, "model."), *_fields(Execution, "model.")]
    sections |= {
        f"`model.attention`, kind `{kind}`": _fields(cls, "model.attention.")
        for kind, cls in KINDS.items()
        if cls.__module__ == config.__name__
    }
    return sections


def markdown() -> str:
    """The page docs/settings.md."""
    pages = [_HEAD]
    for heading, lines in all_settings().items():
        rows = "\n".join(
            f"| `{x.name}` | {x.default and f'`{x.default}`'} | {x.within} | {x.meaning} |"
            for x in lines
        )
        pages.append(f"## {heading}\n{_TABLE}\n{rows}\n")
    return "\n".join(pages)


def text() -> str:
    """For `--help`: a paragraph for each setting; of the attention, those of the latent kind."""
    shown = ["settings (default; range):"]
    for heading, lines in all_settings().items():
        if "kind" in heading and f"`{LatentConfig.kind}`" not in heading:
            continue
        for x in lines:
            facts = "; ".join(filter(None, (x.default, x.within)))
            shown.append(f"  --config.{x.name} ({facts})")
            shown += textwrap.wrap(x.meaning, 76, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(shown)


def _fields(cls: Any, prefix: str) -> list[Setting]:
    found = []
    for field in dataclasses.fields(cls):
        if field.type not in (int, float, str, bool, str | bool):
            continue
        said = _documented()
        meaning = said.get((cls.__name__, field.name)) or said["LatentConfig", field.name]
        default = "" if field.default is dataclasses.MISSING else f"{field.default!r}"
        within, meaning = _range(field.type, meaning)
        words = DTYPES if field.name.endswith("dtype") else _WORDS.get(field.name)
        within = ", ".join(words) if words else within
        found.append(Setting(prefix + field.name, default.replace("'", '"'), within, meaning))
    return found


def _range(kind: Any, meaning: str) -> tuple[str, str]:
    """(range, the rest): a meaning begins with its range where the type does not say it."""
    if found := re.match(r"(?:In )?([\[(][^\])]*[\])]|[Ff]rom \d on)[;.,] ?", meaning):
        rest = meaning[found.end() :]
        return found[1].lower(), rest[:1].upper() + rest[1:]
    return {int: "from 1 on", bool: "True, False", float: "above 0"}.get(kind, "text"), meaning


@functools.cache
def _documented() -> dict[tuple[str, str], str]:
    """The line below each field, by class and field."""
    found = {}
    for module in (settings, config, execution):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef):
                for field, below in zip(node.body, node.body[1:], strict=False):
                    match field, below:
                        case (
                            ast.AnnAssign(target=ast.Name(id=name)),
                            ast.Expr(value=ast.Constant(value=str(text))),
                        ):
                            found[node.name, name] = " ".join(text.split())
    return found
