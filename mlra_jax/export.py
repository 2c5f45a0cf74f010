"""Write a checkpoint as the released ones are named.

`mlra-export --checkpoint=DIR --destination=DIR [--step=N] [--dtype=DTYPE]`
"""

import sys

from mlra_jax.command import Parser, run, use_cpu
from mlra_jax.convert.exporting import export


def main(argv: list[str] | None = None) -> int:
    """Exports as the flags say; see `command.run` for the exit codes."""
    parser = Parser("mlra_jax.export", "Write .safetensors and config.json as released.")
    parser.add_argument("--checkpoint", required=True, help="folder of a run or a conversion")
    parser.add_argument("--destination", required=True, help="folder to make; must not exist")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the latest")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as stored")
    flags = parser.parse_args(argv)

    def work():
        use_cpu()
        export(flags.checkpoint, flags.destination, step=flags.step, dtype=flags.dtype)
        print(f"{flags.destination}: written")

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
