"""What the documentation runner does with the blocks of the pages: the one place to say so.

A new block needs a line here only if it cannot run as it stands.
"""

NOT_RUN = (
    (r"^make\b", "runs in the gate by itself"),
    (r"\bpip3? (install|download)\b", "needs the network"),
    (r"^(git|curl|wget|apt|apt-get|brew|uv|conda)\b", "needs the network"),
    (r"^(gcloud|gsutil|aws|kubectl|docker|xpk)\b", "needs an account in a cloud"),
    (r"^(sbatch|squeue|scancel|srun|sinfo|salloc)\b", "needs Slurm"),
    (r"^(launch/|envsubst\b)", "starts runs on a cluster"),
    (r"^tail -F\b", "follows a log until it is stopped"),
    (r"^(ssh|scp|rsync|mpirun|torchrun)\b", "needs other hosts"),
    (r"^(nvidia-smi|tpu-info)\b", "needs an accelerator"),
    (r"^tensorboard\b", "serves until it is stopped"),
    (r"-m pytest\b", "is a test by itself"),
    (r"-m venv\b", "makes an environment"),
    (r"-m mkdocs\b", "`make docs` builds the site"),
    (r"--coordinator|--distributed|--process_id", "needs several processes"),
    (r"-m mlra_jax\.evaluate\.tasks\b", "the harness needs the network"),
    (r"--source=hf:", "needs the network"),
    (r"(gs|s3)://", "needs a bucket"),
    (r"-m mlra_jax\.plan\b|^mlra-plan\b", "compiles for minutes"),
    (r"-m studies\.text\b", "needs packages of the step before"),
    (r"-m benchmarks\.", "needs an accelerator or much time"),
    (r"-m tests\.mutants\b", "runs in the gate by itself"),
)
"""(what stands in a command, why it is not run here); flags and settings are still checked."""

OTHER_FLAGS = (
    "zone",
    "project",
    "worker",
    "command",
    "nodes",
    "gres",
    "gpus",
    "partition",
    "logdir",
    "location",
    "requeue",
    "signal",
    "spot",
)
"""Flags of other programs that sentences name; those with a `-` inside are never ours."""

NO_SETTINGS = ("lr", "key")
"""Names that stand for any setting, or in messages that pages quote."""

SUBSTITUTIONS = (
    (r"=configs/(paper|small)\.py(:\w+)?", "=configs/quickstart.py", "a small model"),
    (r"studies/configs/small\.py", "studies/configs/quick.py", "the smaller study"),
    (r"--preset=\S+ (?=--layers)", "--checkpoint=runs/mlra_4 ", "a small model"),
    (r"--preset=\S+", "--preset=mlra_4_small", "one of the smallest presets"),
    (r"max_new_tokens=\d+", "max_new_tokens=4", "few tokens"),
    (r"--virtual_cpu_devices=\d+", "", "the runner has eight already"),
    (r"--minutes=\d+", "--minutes=1", "little time"),
    (r"--shard_tokens=100000000", "--shard_tokens=5000", "two shards of little text"),
    (r"--tokenizer=gpt2(?!\.)", "--tokenizer=bytes", "GPT-2's pairs need the network"),
)
"""(pattern, what stands there instead, why), on the text of commands and Python that run."""

_TINY_RUN = (
    "--config.steps=2 --config.log_every=1 --config.validate_every=2 --config.save_every=2 "
    "--config.optimizer.warmup_steps=1 --config.data.validation_tokens=256 "
    "--config.data.tokenizer=bytes --config.data.global_batch=2 --config.data.accumulate=1 "
    "--config.mesh.data=1 --config.mesh.fsdp=1 --config.mesh.tensor=2 --config.mesh.context=1 "
    "--config.model.context_length=64 --config.virtual_cpu_devices=0"
)
APPENDED = (
    (r"mlra_jax\.(training|profile) ", _TINY_RUN),
    (
        # The fine-tuned model keeps its own sizes.
        r"mlra_jax\.(training|profile) .*configs/quickstart\.py",
        "--config.model.num_layers=1 --config.model.attention.num_heads=8",
    ),
    (r"mlra_jax\.profile ", "--config.data.source=pydoc --steps=1"),
    (r"mlra_jax\.evaluate ", "--window=32 --max_tokens=64 --batch=1"),
    (r"mlra_jax\.analysis\.equivariance ", "--layers=1 --rows=3 --length=16"),
    (r"mlra_jax\.analysis\.variance ", "--length=16"),
    (r"mlra_jax\.analysis\.branches ", "--layers=1 --rows=1 --length=32"),
    (
        r"studies\.variants ",
        "--config.variants=mlra_4 --config.steps=2 --config.validate_every=2 --config.seeds=1 "
        "--config.side_by_side=1 "
        "--config.optimizer.warmup_steps=1 --config.data.validation_tokens=512",
    ),
    (
        r"studies\.recovery ",
        "--starts=gqa --percents=50 --config.steps=4 --config.validate_every=4 "
        "--config.optimizer.warmup_steps=1 --config.data.validation_tokens=512",
    ),
)
"""(pattern of module and flags, flags put behind them). The later of two flags counts."""

LEFT_OUT = {"mlra_jax.training": ("--config=configs/quickstart.py", "--workdir=runs/mine")}
"""Flags that `...` stands for in a page's command."""

PYTHON_NOT_RUN = {
    "import lm_eval": "needs the harness and its data",
    "from mlra_jax.kernels import absorbed_decode as op": "tunes a kernel on the accelerator",
}
"""First line of a Python block, and why it is not run; its imports are still checked."""

PRELUDES = {
    "README.md": (
        "import numpy as np\ntokens, prompts = np.zeros((1, 8), np.int32), [[1, 2, 3]]\n"
    ),
    "docs/data.md": "import numpy as np\ntokens = np.arange(40)\n",
    "docs/decoding.md": (
        "import jax.numpy as jnp, mlra_jax\n"
        "decoder = mlra_jax.load_model('runs/mlra_4')\n"
        "tokens, counts = jnp.zeros((1, 8), jnp.int32), jnp.array([8])\n"
        "_, cache = decoder.prefill(tokens, counts, 128)\n"
    ),
    "docs/evaluation.md": (
        "import mlra_jax\n"
        "model = mlra_jax.load_model('runs/mlra_4')\n"
        "context_tokens, continuation_tokens, answers = [1, 2], [3], {}\n"
        "requests = [(context_tokens, continuation_tokens)]\n"
    ),
    "docs/released_weights.md": "import mlra_jax\n",
}
"""What a page's Python blocks find defined; blocks of a page share their names."""
