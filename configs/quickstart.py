"""A byte-level MLRA-4 on the language reference inside every CPython, in minutes on a laptop.

Eight virtual CPU devices, data 2 x tensor 4: each of the four tensor shares holds one latent head.
`--config=configs/quickstart.py:SOURCE` trains on other text, or on token files of any tokenizer.
"""

from mlra_jax.config import GPT2_VOCABULARY, Execution, LatentConfig, ModelConfig
from mlra_jax.data.journal import one_tokenizer
from mlra_jax.data.sources import PYDOC, token_files
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings, OptimizerSettings


def get_config(source: str = PYDOC):
    tokens = token_files(source)
    tokenizer = (one_tokenizer(tokens) or "gpt2") if tokens else "bytes"
    attention = LatentConfig(
        num_heads=4,
        groups=1,
        branches=4,
        latent_dim=128,
        q_latent_dim=64,
        nope_dim=32,
        rope_dim=16,
    )
    model = ModelConfig(
        attention=attention,
        vocab_size=264 if tokenizer == "bytes" else GPT2_VOCABULARY,
        num_layers=3,
        embed_dim=256,
        mlp_dim=768,
        context_length=256,
        execution=Execution(dtype="float32", remat=False),
    )
    return Experiment(
        model=model,
        data=DataSettings(source=source, tokenizer=tokenizer, global_batch=8),
        mesh=MeshSettings(data=2, tensor=4),
        optimizer=OptimizerSettings(peak_learning_rate=2e-3, warmup_steps=40, final_fraction=0.05),
        steps=450,
        log_every=20,
        validate_every=150,
        save_every=150,
        virtual_cpu_devices=8,
    ).to_config_dict()
