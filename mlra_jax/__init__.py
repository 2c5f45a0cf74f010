"""Multi-Head Low-Rank Attention in JAX: train on a mesh, decode sharded, load released weights.

model = mlra_jax.load_model("runs/quickstart")
logits = model(tokens)                                   # int32 [B, T] -> float32 [B, T, V]
lists = mlra_jax.generate(model, prompts, max_new_tokens=100)
"""

from mlra_jax.config import ModelConfig, preset
from mlra_jax.decoder import Decoder
from mlra_jax.generation import generate
from mlra_jax.loading import load_model
from mlra_jax.model import Model
from mlra_jax.saving import load_trainable, save_model
from mlra_jax.sharding import make_mesh

__all__ = [
    "Decoder",
    "Model",
    "ModelConfig",
    "generate",
    "load_model",
    "load_trainable",
    "make_mesh",
    "preset",
    "save_model",
]
