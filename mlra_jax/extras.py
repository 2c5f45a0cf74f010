"""Libraries that only some uses need, and the command that installs one."""

import shlex
import sys

EXTRAS = {
    "datasets": "datasets>=4.0",
    "gcs": "gcsfs>=2026.10,<2027",
    "hub": "huggingface_hub>=0.34",
    "lm_eval": "lm_eval>=0.4.10",
    "wandb": "wandb>=0.22,<1",
    "zstd": "backports.zstd>=1.0",
}
"""What the extras of `pyproject.toml` need, each one library; that of its pages is no use's."""


def install_line(extra: str) -> str:
    """The command that installs what an extra needs into the environment of this process."""
    return shlex.join([sys.executable, "-m", "pip", "install", EXTRAS[extra]])
