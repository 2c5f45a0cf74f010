"""Continues text from a checkpoint, sharded over a mesh.

python decode.py --checkpoint=runs/quickstart --prompt="The " --max_new_tokens=200
python decode.py --checkpoint=DIR --prompt_file=prompts.txt --mesh=tensor=4,context=2
"""

import sys
import time
from pathlib import Path

import jax
from absl import app, flags, logging

import mlra_jax
from mlra_jax import sharding
from mlra_jax.config import LatentConfig
from mlra_jax.costs import cache_bytes_per_device
from mlra_jax.data.tokenizers import StreamDecoder
from mlra_jax.generation import Sampling, Stream
from mlra_jax.loading import tokenizer_of, with_tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Folder that training or conversion wrote.", required=True)
flags.DEFINE_multi_string("prompt", [], "Text to continue; give it again for a batch.")
flags.DEFINE_string("prompt_file", None, "File with one prompt a line.")
flags.DEFINE_integer("max_new_tokens", 128, "Tokens to add to each prompt.")
flags.DEFINE_float("temperature", 0.0, "0 is greedy, 1 the model's distribution.")
flags.DEFINE_integer("top_k", 0, "Sample among the k most likely tokens; 0 for all.")
flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest tokens that reach this probability.")
flags.DEFINE_integer("seed", 0, "Of the draws.")
flags.DEFINE_string("mesh", "", "Devices along each axis, as in tensor=4,context=2.")
flags.DEFINE_integer("virtual_cpu_devices", None, "Decode on this many devices made of the CPU.")
flags.DEFINE_integer("cache_length", None, "Cache slots; by default what the prompts need.")
flags.DEFINE_string("dtype", None, "bfloat16 by default on GPUs and TPUs, else the checkpoint's.")
flags.DEFINE_string("tokenizer", None, "Name or tiktoken ranks file, if not the checkpoint's.")
flags.DEFINE_bool("stop", True, "Stop a prompt at the end-of-text token.")


def read_prompts() -> list[str]:
    prompts = list(FLAGS.prompt)
    if FLAGS.prompt_file is not None:
        path = Path(FLAGS.prompt_file)
        if not path.is_file():
            raise ValueError(f"--prompt_file={path} is not a file")
        try:
            prompts += path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt_file={path} is not UTF-8 text ({error})") from None
    if not prompts:
        raise ValueError("nothing to continue: give --prompt=TEXT or --prompt_file=FILE")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: give it at least one character")
    return prompts


class Printer:
    """Streams one prompt as it comes; several by whole lines, each with its prompt's number."""

    def __init__(self, prompts: list[str], tokenizer):
        self.decoders = [StreamDecoder(tokenizer) for _ in prompts]
        self.many = len(prompts) > 1
        self.lines = [""] * len(prompts)
        for row, prompt in enumerate(prompts):
            self.text(row, prompt)

    def push(self, row: int, token: int) -> None:
        self.text(row, self.decoders[row].push(token))

    def text(self, row: int, text: str) -> None:
        if not self.many:
            print(text, end="", flush=True)
            return
        *whole, self.lines[row] = (self.lines[row] + text).split("\n")
        for line in whole:
            print(f"[{row}] {line}", flush=True)

    def close(self) -> None:
        for row, decoder in enumerate(self.decoders):
            self.text(row, decoder.flush() + ("\n" if self.lines[row] or not self.many else ""))


def describe_cache(model, batch: int, capacity: int) -> str:
    """Bytes per device of the decoding cache, beside what MLA of the same widths would hold."""
    ways = {axis: model.mesh.shape[axis] for axis in ("tensor", "context")}
    rows = batch // sharding.size(model.mesh, sharding.BATCH)
    held = cache_bytes_per_device(model.config, batch=rows, capacity=capacity, **ways)
    line = f"cache: {held:,} bytes per device ({batch} x {capacity} positions)"
    a = model.config.attention
    if isinstance(a, LatentConfig) and a.num_latents > 1:
        width = (a.latent_dim + a.rope_dim) * jax.numpy.dtype(model.config.dtype).itemsize
        mla = rows * capacity // ways["context"] * width * model.config.num_layers
        line += f"; MLA would hold {mla:,}, {mla / held:.2f} times as much"
    return line


def main(_) -> None:
    logging.set_verbosity(logging.ERROR)  # the checkpoint library says much
    if FLAGS.virtual_cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", FLAGS.virtual_cpu_devices)
    started = time.perf_counter()
    mesh = sharding.parse_mesh(FLAGS.mesh)
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
    prompts = read_prompts()
    dtype = FLAGS.dtype
    if dtype is None and sharding.platform(mesh) != "cpu":
        dtype = "bfloat16"
    print(f"loading {FLAGS.checkpoint} ...", file=sys.stderr, flush=True)
    model = mlra_jax.load_model(FLAGS.checkpoint, mesh=mesh, dtype=dtype)
    logging.set_verbosity(logging.WARNING)
    tokenizer = tokenizer_of(model, FLAGS.tokenizer)
    model = with_tokenizer(model, tokenizer)
    ids = [tokenizer.encode(p) for p in prompts]
    steps = Stream(
        model,
        ids,
        max_new_tokens=FLAGS.max_new_tokens,
        sampling=sampling,
        seed=FLAGS.seed,
        cache_length=FLAGS.cache_length,
    )
    print(
        f"loaded in {time.perf_counter() - started:.1f} s; compiling for "
        f"{mesh.size} {sharding.platform(mesh)} device(s) ...",
        file=sys.stderr,
        flush=True,
    )
    going = [True] * len(prompts)
    produced, first, printer = 0, None, None
    for tokens in steps:
        now = time.perf_counter()
        if printer is None:
            printer = Printer(prompts, tokenizer)
        for row, token in enumerate(tokens):
            going[row] = going[row] and not (FLAGS.stop and token == tokenizer.end_of_text)
            if going[row]:
                printer.push(row, token)
        produced += 1
        # The first two tokens wait for the compiler.
        if produced == 2:
            first = now
        if not any(going):
            break
    printer.close()
    if produced > 2:
        step = (now - first) / (produced - 2)
        print(
            f"{len(prompts) / step:.1f} tokens/s ({1000 * step:.2f} ms a step, {len(prompts)} "
            f"prompt(s), {produced} steps)",
            file=sys.stderr,
        )
    print(describe_cache(model, len(prompts), steps.capacity), file=sys.stderr)


def run(argv) -> None:
    try:
        main(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"decode.py: {' '.join(str(error).split())}")


if __name__ == "__main__":
    app.run(run)
