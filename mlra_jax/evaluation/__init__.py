"""How good a model is: perplexity, and scores of given text for downstream tasks."""

from mlra_jax.evaluation.perplexity import evaluate
from mlra_jax.evaluation.scoring import generate_until, loglikelihood, rolling_windows

__all__ = ["evaluate", "generate_until", "loglikelihood", "rolling_windows"]
