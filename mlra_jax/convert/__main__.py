"""`python -m mlra_jax.convert --source=DIR --destination=DIR [--variant=NAME] [--dtype=DTYPE]`."""

import sys

from mlra_jax.command import Parser, run
from mlra_jax.convert.conversion import convert
from mlra_jax.sharding import mesh_sizes


def main(argv: list[str] | None = None) -> int:
    """Converts as the flags say; errors are one line on stderr and exit code 2."""
    parser = Parser("python -m mlra_jax.convert", description="Convert released weights.")
    parser.add_argument("--source", required=True, help="folder, or owner/name/folder on the hub")
    parser.add_argument("--destination", required=True, help="folder to make; must not exist")
    parser.add_argument("--variant", help="released name where weights cannot tell: *_no_scale")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as in the files")
    parser.add_argument("--mesh", help="lay chunks out for this mesh, as in tensor=4,fsdp=2")
    flags = parser.parse_args(argv)

    def work():
        convert(
            flags.source,
            flags.destination,
            variant=flags.variant,
            dtype=flags.dtype,
            mesh=None if flags.mesh is None else mesh_sizes(flags.mesh),
        )

    return run(parser.prog, work, f"{flags.destination}: written and read back")


if __name__ == "__main__":
    sys.exit(main())
