"""Released checkpoints, converted once."""

from pathlib import Path

import pytest

from mlra_jax.convert import convert

RELEASED = Path(__file__).parents[1] / "data" / "released"


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A function from a released folder's name to its converted checkpoint."""
    folder, made = tmp_path_factory.mktemp("converted"), {}

    def converted(name: str) -> Path:
        if name not in made:
            variant = name if name.endswith("_no_scale") else None
            made[name] = folder / name
            convert(RELEASED / name, made[name], variant=variant, quiet=True)
        return made[name]

    return converted
