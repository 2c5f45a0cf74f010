"""The paper's runs: 2.9B parameters, FineWeb-Edu, 98.3B tokens. `--config=configs/paper.py:NAME`.

NAME is a published model (`mlra_4`, `mla_gated`, `gqa`, ... see `mlra_jax.config.PRESETS`). The
recipe is the default of `mlra_jax.training.settings`: 480 sequences of 2048 tokens a step, AdamW
(0.9, 0.95), warm-up over 2000 steps to 1.6e-4, cosine to a tenth of it at step 100,000.

The mesh is for 16 devices, a v5e slice: set it to yours, for example
  v5e-64         --config.mesh.fsdp=16 --config.mesh.tensor=4 --config.data.accumulate=5
  v5p-64 chips   --config.mesh.fsdp=32 --config.mesh.tensor=2 --config.data.accumulate=1
  8 GPUs         --config.mesh.fsdp=8 --config.mesh.tensor=1 --config.data.accumulate=15
480 must be a multiple of data * fsdp * accumulate.
"""

from mlra_jax.config import preset
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings


def get_config(name: str = "mlra_4"):
    return Experiment(
        model=preset(name),
        # Folder of fineweb_train_*.bin and fineweb_val_000000.bin (GPT-2 byte pairs).
        data=DataSettings(source="data/fineweb_edu", tokenizer="gpt2", accumulate=30),
        mesh=MeshSettings(fsdp=4, tensor=4),
    ).to_config_dict()
