"""The published models at an eighth of their width, on documentation (`python -m studies.text`).

16 million parameters, 20 million tokens a run: 50 to 100 s a variant on an H100, three seeds side
by side.
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
        num_layers=8,
        steps=2500,
    ).to_config_dict()
