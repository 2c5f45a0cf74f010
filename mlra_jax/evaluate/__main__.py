"""Perplexity of a checkpoint on token files.

python -m mlra_jax.evaluate --checkpoint=DIR --tokens=FILE.bin[,FILE.bin...] --output=FILE.json
"""

import signal
import sys

from absl import logging

from mlra_jax import sharding
from mlra_jax.command import Parser
from mlra_jax.evaluate.perplexity import MAX_TOKENS, WINDOW, evaluate, table


def main(arguments: list[str] | None = None) -> int:
    """Evaluates as the flags say; errors are one line on stderr and exit code 2."""
    parser = Parser("python -m mlra_jax.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="training run or converted checkpoint")
    parser.add_argument("--tokens", required=True, help="token files, joined by commas")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens the model sees at once")
    parser.add_argument("--max_tokens", type=int, default=MAX_TOKENS, help="of each file")
    parser.add_argument("--output", help="JSON file; interrupted runs go on from beside it")
    parser.add_argument("--mesh", default="", help="devices along each axis, as in data=4")
    parser.add_argument("--batch", type=int, help="windows at a time (default: 4 per device)")
    parser.add_argument("--dtype", help="of parameters and products (default: the checkpoint's)")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the latest)")
    flags = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    # Ends like Ctrl-C does: what was summed so far is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = evaluate(
            flags.checkpoint,
            [file for file in flags.tokens.split(",") if file],
            window=flags.window,
            max_tokens=flags.max_tokens,
            output=flags.output,
            mesh=sharding.parse_mesh(flags.mesh),
            batch=flags.batch,
            dtype=flags.dtype,
            step=flags.step,
        )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        rest = (
            "the same command goes on from here" if flags.output else "nothing kept (no --output)"
        )
        print(f"\n{parser.prog}: interrupted; {rest}", file=sys.stderr)
        return 130
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
