"""Fine-tune a run's or a converted checkpoint: `--config=configs/fine_tune.py:DIR`.

The model is the checkpoint's own, held in float32 for training; only its weights are taken. Give
the text with `--config.data.source=FILE` and the mesh as for any run. A step is 32 sequences; the
peak learning rate is a fifth of pretraining's.
"""

import dataclasses

from mlra_jax.checkpoints import open_checkpoint
from mlra_jax.config import ConfigError
from mlra_jax.training.settings import DataSettings, Experiment, OptimizerSettings


def get_config(checkpoint: str = ""):
    if not checkpoint:
        raise ConfigError("name a checkpoint's folder, as in --config=configs/fine_tune.py:DIR")
    found = open_checkpoint(checkpoint)
    return Experiment(
        model=dataclasses.replace(found.model, param_dtype="float32"),
        data=DataSettings(source="my_text.txt", tokenizer=found.tokenizer or "", global_batch=32),
        optimizer=OptimizerSettings(peak_learning_rate=3e-5, warmup_steps=50),
        init_from=checkpoint,
        steps=1000,
        validate_every=100,
        save_every=100,
    ).to_config_dict()
