"""Models for one GPU: `--config=configs/small.py:NAME`, NAME as in `mlra_4_small`, `mla_medium`.

A step is 64 sequences of 1024 tokens in four parts; `--config.data.accumulate=8` needs less memory.
The model's own sizes are those of `preset(NAME)`: for others change the line below, as in
`preset(name, context_length=1024, num_layers=16, embed_dim=1280)`.
"""

from mlra_jax.config import preset
from mlra_jax.training.settings import DataSettings, Experiment, OptimizerSettings


def get_config(name: str = "mlra_4_small"):
    return Experiment(
        model=preset(name, context_length=1024),
        data=DataSettings(
            source="data/fineweb_edu", tokenizer="gpt2", global_batch=64, accumulate=4
        ),
        optimizer=OptimizerSettings(peak_learning_rate=6e-4, warmup_steps=700),
        steps=20_000,
    ).to_config_dict()
