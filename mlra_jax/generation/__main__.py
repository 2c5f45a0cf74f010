"""Continue text from a checkpoint, sharded over a mesh.

mlra-decode --checkpoint=runs/quickstart --prompt="The " --max_new_tokens=200
mlra-decode --checkpoint=DIR --prompt_file=prompts.txt --mesh=tensor=4,context=2
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from absl import logging
from tqdm import tqdm

from mlra_jax import sharding
from mlra_jax.command import Parser, Switch, compile_time, run, say, use_cpu
from mlra_jax.costs import describe_cache
from mlra_jax.data import text_reader
from mlra_jax.generation import Sampling, Stream
from mlra_jax.generation.texts import Printer, Recorder, json_prompts
from mlra_jax.loading import beyond_training, compute_line, load_model, tokenizer_of, with_tokenizer
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, can_hold_files

_MOST_PROMPTS, _MOST_CHARACTERS = 1 << 16, 64 << 20


def main(argv: list[str] | None = None) -> int:
    """Decodes as the flags say; see `command.run` for the exit codes."""
    parser = Parser(
        "mlra_jax.generation", __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder that training or conversion wrote")
    add("--step", type=int, help="of the checkpoint; default: the latest")
    add("--prompt", action="append", default=[], help="text to continue; several are a batch")
    add("--prompt_file", help="UTF-8 file, a prompt a line; .jsonl: a JSON string or object a line")
    add("--output", help="file for a JSON line a prompt (prompt, text, tokens); prints no text")
    add("--max_new_tokens", type=int, default=128, help="tokens to add to each prompt")
    add("--temperature", type=float, default=0.0, help="0 is greedy, 1 the model's distribution")
    add("--top_k", type=int, default=0, help="sample among the k most likely tokens; 0 for all")
    add("--top_p", type=float, default=1.0, help="among the likeliest that reach this probability")
    add("--seed", type=int, default=0, help="of the draws")
    add("--mesh", default="", help="devices along each axis, as in tensor=4,context=2")
    add("--virtual_cpu_devices", type=int, help="decode on so many devices made of the CPU")
    add("--cache_length", type=int, help="cache slots; by default what the prompts need")
    add(
        "--cache_policy", help="window:SLOTS or ladder:SLOTS, a cache that keeps a part of the text"
    )
    add(
        "--tokens_per_call",
        type=int,
        help="tokens of a prompt that a program makes (default: 1, over several GPUs 8)",
    )
    add("--dtype", help="bfloat16 by default on GPUs and TPUs, else the checkpoint's")
    add("--allow_nonfinite", action=Switch, default=False, help="take infinities and NaN, too")
    add("--tokenizer", help="name or tiktoken ranks file, if not the checkpoint's")
    add("--stop", action=Switch, default=True, help="end a prompt at the end-of-text token")
    flags = parser.parse_args(argv)
    return run(parser, lambda: decode(flags), "the text ends here")


def decode(flags: argparse.Namespace) -> None:
    """Loads, continues the prompts and prints the text; timings go to stderr."""
    if flags.virtual_cpu_devices:
        use_cpu(flags.virtual_cpu_devices)
    started = time.perf_counter()
    mesh = sharding.parse_mesh(flags.mesh)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p)
    prompts = read_prompts(flags.prompt, flags.prompt_file)
    output = None if flags.output is None else paths.path(flags.output)
    if output is not None and (output.is_dir() or not can_hold_files(output.absolute().parent)):
        raise ValueError(f"--output={output} is a folder or in none: name a file to write")
    dtype, why = flags.dtype, None if flags.dtype is None else "as --dtype says"
    if dtype is None and sharding.platform(mesh) != "cpu":
        dtype, why = "bfloat16", f"the default on a {sharding.platform(mesh)}"
    _say(f"loading {flags.checkpoint} ...")
    model = load_model(
        flags.checkpoint,
        mesh=mesh,
        dtype=dtype,
        step=flags.step,
        allow_nonfinite=flags.allow_nonfinite,
    )
    # From here on warnings are about kernels.
    logging.set_verbosity(logging.WARNING)
    tokenizer = tokenizer_of(model, flags.tokenizer)
    model = with_tokenizer(model, tokenizer)
    steps = Stream(
        model,
        [tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=flags.max_new_tokens,
        sampling=sampling,
        seed=flags.seed,
        cache_length=flags.cache_length,
        cache_policy=flags.cache_policy,
        stop_token=tokenizer.end_of_text if flags.stop else None,
        tokens_per_call=flags.tokens_per_call,
    )
    loading = time.perf_counter() - started
    _say(
        f"loaded in {loading:.1f} s, {compute_line(model.config, why)}; compiling the prefill for "
        f"{mesh.size} {sharding.platform(mesh)} device(s) ..."
    )
    _say(beyond_training(model.config, int(steps.lengths_B.max()) + flags.max_new_tokens))

    def make() -> Printer | Recorder:
        return Recorder(prompts, tokenizer, output) if output else Printer(prompts, tokenizer)

    end = tokenizer.end_of_text if flags.stop else None
    produced, seconds = follow(first_token(steps, loading), make, end)
    timed = produced - 1 - steps.tokens_per_call
    if timed > 0:
        step = seconds / timed
        _say(
            f"{len(prompts) / step:.1f} tokens/s ({1000 * step:.2f} ms a step, {len(prompts)} "
            f"prompt(s), {produced} steps)"
        )
    _say(describe_cache(model.config, model.mesh, len(prompts), steps.capacity))


def first_token(steps: Stream, loading: float) -> Iterator[list[int]]:
    """The steps; on stderr a bar while chunks of a prompt are prefilled, and how long that took."""
    began, several = time.perf_counter(), steps.max_new_tokens > 1
    rows, longest = len(steps.lengths_B), int(steps.lengths_B.max())
    bar = tqdm(
        desc="prefill",
        total=rows * longest,
        unit="token",
        unit_scale=True,
        disable=longest <= steps.chunk,
        leave=False,
    )
    steps.on_chunk = lambda done: bar.update(rows * done - bar.n)
    with compile_time() as compiling:
        steps_of = iter(steps)
        first = next(steps_of)
        spent = compiling()
    bar.close()
    prefill = time.perf_counter() - began - spent
    _say(
        f"first token after {loading + spent + prefill:.1f} s: loading {loading:.1f}, "
        f"compiling {spent:.1f}, prefill {prefill:.1f}"
        + ("; compiling the step ..." if several else "")
    )
    yield first
    yield from steps_of


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    """Those of the command line, then the file's lines; raises ValueError for an empty one."""
    prompts = list(prompts)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: give it at least one character")
    if file is not None:
        prompts += _lines(paths.path(file))
    if not prompts:
        raise ValueError("nothing to continue: give --prompt=TEXT or --prompt_file=FILE")
    return prompts


def _lines(path: AnyPath) -> list[str]:
    """The lines of a UTF-8 file that are not blank; of .jsonl, the prompts in them."""
    if not path.is_file():
        raise ValueError(f"--prompt_file={path} is not a file")
    prompts, numbers, number, size = [], [], 1, 0
    for number, (_, content) in enumerate(text_reader.read_lines(path), 1):
        try:
            line = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--prompt_file={path} is not UTF-8 text (line {number}: {error.reason})"
            ) from None
        if line.strip():
            prompts.append(line)
            numbers.append(number)
        size += len(line)
        if len(prompts) > _MOST_PROMPTS or size > _MOST_CHARACTERS:
            raise ValueError(
                f"--prompt_file={path} has more than {_MOST_PROMPTS:,} prompts or "
                f"{_MOST_CHARACTERS >> 20} Mi characters; all are one batch, so give it in parts"
            )
    if not prompts:
        raise ValueError(
            f"--prompt_file={path} has no prompt: it is blank from line 1 to line {number}"
        )
    if path.suffix == ".jsonl":
        return json_prompts(path, zip(numbers, prompts, strict=True))
    return prompts


def follow(
    steps: Iterable[list[int]], make: Callable[[], Printer | Recorder], end_of_text: int | None
) -> tuple[int, float]:
    """Hands tokens on as they come, until all prompts have ended or `steps` does.

    Args:
      steps: lists [B] of tokens.
      make: gives what takes them, called when the first have come.
      end_of_text: the token that ends its prompt, if one does.

    Returns the number of steps and the seconds of all but the first two, which wait for the
    compiler.
    """
    going: list[bool] = []
    produced, second, last = 0, 0.0, 0.0
    taker: Printer | Recorder | None = None
    try:
        for tokens in steps:
            last = time.perf_counter()
            taker, going = taker or make(), going or [True] * len(tokens)
            for row, token in enumerate(tokens):
                going[row] = going[row] and token != end_of_text
                if going[row]:
                    taker.push(row, token)
                else:
                    taker.end(row)
            produced += 1
            if produced == 2:
                second = last
            if not any(going):
                break
    except BaseException:
        # Of what was interrupted, people want to read what there is; a file is whole or not there.
        if isinstance(taker, Printer):
            taker.close()
        raise
    if taker is not None:
        taker.close()
    return produced, last - second


def _say(line: str) -> None:
    if line:
        say(line, sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
