"""How good a model is: perplexity, and scores of given text for downstream tasks."""

from mlra_jax.evaluate.perplexity import evaluate
from mlra_jax.evaluate.scoring import generate_until, loglikelihood, rolling_windows

__all__ = ["evaluate", "generate_until", "loglikelihood", "rolling_windows"]
