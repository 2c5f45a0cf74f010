"""`python -m mlra_jax.export --checkpoint=DIR --destination=DIR [--step=N] [--dtype=DTYPE]`."""

import sys

from mlra_jax.command import Parser, run
from mlra_jax.convert.exporting import export


def main(argv: list[str] | None = None) -> int:
    """Exports as the flags say; errors are one line on stderr and exit code 2."""
    parser = Parser("python -m mlra_jax.export", description="Write .safetensors as released.")
    parser.add_argument("--checkpoint", required=True, help="folder of a run or a conversion")
    parser.add_argument("--destination", required=True, help="folder to make; must not exist")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the latest")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as stored")
    flags = parser.parse_args(argv)
    return run(
        parser.prog,
        lambda: export(flags.checkpoint, flags.destination, step=flags.step, dtype=flags.dtype),
        f"{flags.destination}: written",
    )


if __name__ == "__main__":
    sys.exit(main())
