"""The configs that come with the package: beside it in a checkout, inside it where installed."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def config_files() -> list[Path]:
    """All of them, by name."""
    inside = _PACKAGE / "configs"
    folder = inside if inside.is_dir() else _PACKAGE.parent / "configs"
    return sorted(folder.glob("*.py"))


def find_config(spec: str) -> str:
    """`FILE[:NAME]` where FILE is there, else with the shipped file that FILE means, if one does.

    `configs/paper.py`, `paper.py` and `paper` mean the same one, from any folder.
    """
    file, colon, name = spec.partition(":")
    path = Path(file)
    if path.is_file() or str(path.parent) not in (".", "configs"):
        return spec
    wanted = path.name.removesuffix(".py")
    found = next((shipped for shipped in config_files() if shipped.stem == wanted), path)
    return f"{found}{colon}{name}"
