"""A model class for the lm-evaluation-harness: `lm_eval` knows it as `mlra_jax`.

Needs the library (`command.EXTRAS`). The text goes to tokens and back here; the scores are those of
`mlra_jax.evaluate.scoring`.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from mlra_jax import checkpoints, sharding
from mlra_jax.evaluate import scoring
from mlra_jax.evaluate.stored import Answers, checkpoint_identity
from mlra_jax.execution import DTypeLike
from mlra_jax.generation import Sampling
from mlra_jax.loading import load_model, tokenizer_of, with_tokenizer

_MAX_NEW_TOKENS = 256
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens")


@register_model("mlra_jax")
class HarnessModel(TemplateLM):
    """A checkpoint as the harness wants models.

    Args:
      checkpoint: folder of a training run or a conversion.
      tokenizer: ranks file, where the checkpoint's tokenizer cannot be fetched.
      mesh: as in "data=4"; the batch is split over `data` and `fsdp`.
      batch_size: sequences at a time, a multiple of the devices that split the batch.
      dtype: of parameters and products, by default the checkpoint's.
      max_length: tokens that the model sees, by default its `context_length`.
      cache: answers are kept in the database `<cache>_rank0.db`, batch by batch, and those that are
        there are not computed again. It is of one checkpoint, dtype, tokenizer and `max_length`.
      allow_nonfinite: as for `load_model`.
      **_: what the harness gives every model (device and the like).

    Raises:
      CheckpointError, ConfigError, ValueError, OSError: one line.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        tokenizer: str | None = None,
        mesh: str = "",
        batch_size: int | str = 8,
        dtype: DTypeLike | None = None,
        max_length: int | None = None,
        cache: str | Path | None = None,
        allow_nonfinite: bool = False,
        **_: Any,
    ):
        super().__init__()
        opened = None if cache is None else checkpoints.open_checkpoint(checkpoint)
        # A command line in which `mesh=` comes more than once is cut at its commas by the harness.
        step = opened and opened.step
        places = sharding.parse_mesh(str(mesh))
        model = load_model(checkpoint, places, dtype, step, allow_nonfinite=allow_nonfinite)
        self.text = tokenizer_of(model, tokenizer)
        self.model = with_tokenizer(model, self.text)
        self.batch_size = int(batch_size)
        scoring.check_batch(self.model, self.batch_size)
        self.max_length = int(max_length or self.model.config.context_length)
        self.kept = None
        if opened is not None:
            config = self.model.config
            identity = {
                "checkpoint": checkpoint_identity(opened.folder),
                "step": opened.step,
                "param_dtype": config.param_dtype,
                "dtype": config.execution.dtype,
                "tokenizer": self.text.name,
                "max_length": self.max_length,
            }
            self.kept = Answers(cache, identity)

    @property
    def eot_token_id(self) -> int:
        return self.text.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return self.text.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.text.encode(string)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in scoring.rolling_windows(tokens, self.prefix_token_id, self.max_length):
                windows.append(window)
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_prob, _) in zip(owners, self._score(windows, disable_tqdm), strict=True):
            totals[i] += log_prob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        # One call of the model per way of sampling.
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_generation(request.args[1])].append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for (until, max_new_tokens, sampling), group in groups.items():
                found = scoring.generate_until(
                    self.model,
                    self.text,
                    [self._prompt(requests[i].args[0]) for i in group],
                    until=until,
                    max_new_tokens=max_new_tokens,
                    batch=self.batch_size,
                    max_length=self.max_length,
                    sampling=sampling,
                    progress=bar.update,
                    kept=self.kept,
                )
                for i, text in zip(group, found, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_):
        pairs = [(context or [self.prefix_token_id], rest) for _, context, rest in requests]
        answers = self._score(pairs, disable_tqdm)
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def _score(self, pairs, disable_tqdm):
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm) as bar:
            return scoring.loglikelihood(
                self.model,
                pairs,
                batch=self.batch_size,
                max_length=self.max_length,
                progress=bar.update,
                kept=self.kept,
            )

    def _prompt(self, context: str) -> list[int]:
        return self.tok_encode(context) or [self.prefix_token_id]


def _generation(options: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
    """(stop strings, most new tokens, sampling) from the harness's generation options."""
    until = options.get("until") or []
    until = (until,) if isinstance(until, str) else tuple(until)
    lengths = [int(options[name]) for name in _LENGTH_NAMES if options.get(name)]
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        temperature = 0.0
    sampling = Sampling(
        temperature, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0)
    )
    return until, lengths[0] if lengths else _MAX_NEW_TOKENS, sampling
