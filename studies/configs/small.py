"""The published models at an eighth of their width, on documentation (`python -m studies.text`).

About 12 million parameters, 8 million tokens a run, for one GPU: well under a minute a variant with
three seeds side by side. `--config.steps=3000` uses more of the tokens.
"""

from mlra_jax.training.settings import DataSettings, OptimizerSettings
from studies.settings import Study


def get_config():
    return Study(
        data=DataSettings(
            source="data/documentation/documentation_train_000000.bin",
            tokenizer="data/documentation/ranks.tiktoken",
            validation_fraction=0.02,
            validation_tokens=262_144,
            global_batch=16,
        ),
        optimizer=OptimizerSettings(peak_learning_rate=1.5e-3, warmup_steps=100),
    ).to_config_dict()
