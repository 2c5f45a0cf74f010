"""Perplexity of a checkpoint on token files.

`mlra-evaluate --checkpoint=DIR --tokens=FILE.bin[,'*.bin'...] --output=FILE.json`
"""

import sys

from mlra_jax.command import Parser, Switch, run, use_cpu
from mlra_jax.data import token_file
from mlra_jax.evaluate.perplexity import MAX_TOKENS, evaluate, table
from mlra_jax.sharding import parse_mesh


def main(argv: list[str] | None = None) -> int:
    """Evaluates as the flags say; see `command.run` for the exit codes."""
    parser = Parser("mlra_jax.evaluate", "Perplexity of a checkpoint on token files.")
    parser.add_argument("--checkpoint", required=True, help="training run or converted checkpoint")
    parser.add_argument(
        "--tokens", required=True, help="token files, folders, patterns, with commas"
    )
    parser.add_argument(
        "--window", type=int, help="tokens the model sees at once (default: as in training)"
    )
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS, help="of each file")
    parser.add_argument("--output", help="JSON file; interrupted runs go on from beside it")
    parser.add_argument("--mesh", default="", help="devices along each axis, as in data=4")
    parser.add_argument(
        "--virtual_cpu_devices", type=int, help="evaluate on so many devices made of the CPU"
    )
    parser.add_argument("--batch", type=int, help="windows at a time (default: 4 per device)")
    parser.add_argument("--dtype", help="of parameters and products (default: the checkpoint's)")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the latest)")
    parser.add_argument(
        "--token_format",
        default="header",
        choices=token_file.FORMATS,
        help="uint16 or uint32 for files without a header, as nanoGPT writes them",
    )
    parser.add_argument(
        "--allow_nonfinite", action=Switch, default=False, help="take infinities and NaN, too"
    )
    flags = parser.parse_args(argv)

    def work():
        if flags.virtual_cpu_devices:
            use_cpu(flags.virtual_cpu_devices)
        result = evaluate(
            flags.checkpoint,
            [file for file in flags.tokens.split(",") if file],
            window=flags.window,
            max_tokens=flags.max_tokens,
            output=flags.output,
            mesh=parse_mesh(flags.mesh),
            batch=flags.batch,
            dtype=flags.dtype,
            step=flags.step,
            token_format=flags.token_format,
            allow_nonfinite=flags.allow_nonfinite,
        )
        print(table(result))

    kept = "the same command goes on from here" if flags.output else "nothing kept (no --output)"
    return run(parser, work, kept)


if __name__ == "__main__":
    sys.exit(main())
