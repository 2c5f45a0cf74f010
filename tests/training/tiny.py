"""The smallest experiment that has everything, for runs of the command line in tests."""

from mlra_jax.config import Execution, LatentConfig, ModelConfig
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings, OptimizerSettings


def experiment() -> Experiment:
    attention = LatentConfig(
        num_heads=4, groups=1, branches=4, latent_dim=16, q_latent_dim=16, nope_dim=4, rope_dim=4
    )
    model = ModelConfig(
        attention=attention,
        vocab_size=260,
        num_layers=1,
        embed_dim=16,
        mlp_dim=24,
        context_length=12,
        execution=Execution(dtype="float32", remat=False),
    )
    return Experiment(
        model=model,
        data=DataSettings(source="pydoc", tokenizer="bytes", global_batch=8, validation_tokens=200),
        mesh=MeshSettings(data=2, tensor=4),
        # A constant rate after the warm-up: runs of different lengths share their beginning.
        optimizer=OptimizerSettings(peak_learning_rate=1e-2, warmup_steps=3, final_fraction=1.0),
        steps=60,
        log_every=1,
        validate_every=20,
        save_every=4,
        virtual_cpu_devices=8,
    )


def get_config():
    return experiment().to_config_dict()
