"""Convert released weights to a checkpoint.

`mlra-convert --source=DIR --destination=DIR [--variant=NAME] [--dtype=DTYPE] [--mesh=tensor=4]`
"""

import sys

from mlra_jax.command import Parser, Switch, run, use_cpu
from mlra_jax.convert.conversion import convert
from mlra_jax.sharding import mesh_sizes


def main(argv: list[str] | None = None) -> int:
    """Converts as the flags say; see `command.run` for the exit codes."""
    parser = Parser("mlra_jax.convert", "Convert released weights to a checkpoint.")
    parser.add_argument("--source", required=True, help="folder, or owner/name/folder on the hub")
    parser.add_argument("--destination", required=True, help="folder to make; must not exist")
    parser.add_argument("--variant", help="released name where weights cannot tell: *_no_scale")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as in the files")
    parser.add_argument("--mesh", help="lay chunks out for this mesh, as in tensor=4,fsdp=2")
    parser.add_argument(
        "--allow_nonfinite", action=Switch, default=False, help="take infinities and NaN, too"
    )
    flags = parser.parse_args(argv)

    def work():
        use_cpu()
        convert(
            flags.source,
            flags.destination,
            variant=flags.variant,
            dtype=flags.dtype,
            mesh=None if flags.mesh is None else mesh_sizes(flags.mesh),
            allow_nonfinite=flags.allow_nonfinite,
        )
        print(f"{flags.destination}: written and read back")

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
