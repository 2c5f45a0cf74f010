"""Two tiny variants with two seeds on the language reference inside every CPython: a minute."""

from mlra_jax.training.settings import DataSettings, OptimizerSettings
from studies.settings import Study


def get_config():
    return Study(
        data=DataSettings(
            source="pydoc", tokenizer="bytes", global_batch=4, validation_tokens=8_192
        ),
        optimizer=OptimizerSettings(peak_learning_rate=3e-3, warmup_steps=5),
        variants="mla,mlra_4",
        seeds=2,
        side_by_side=2,
        shrink=32,
        num_layers=1,
        vocab_size=264,
        context_length=64,
        steps=60,
        validate_every=20,
        dtype="float32",
    ).to_config_dict()
