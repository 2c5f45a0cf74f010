"""Where the weights are: a local folder, or a folder of a repository on the Hugging Face hub."""

import re
from pathlib import Path

from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.weights import WEIGHT_FILES
from mlra_jax.extras import install_line
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike

_REPOSITORY = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<sub>(/[\w-][\w.-]*)*)/?")
_FILES = ("config.json", *WEIGHT_FILES, "pytorch_model-*.bin", "model-*.safetensors")


def find_source(source: PathLike) -> AnyPath:
    """The local folder of `source`, after a download if it is `owner/name[/subfolder]`.

    Downloads are resumed and kept in the hub's cache by huggingface_hub, which is needed only here.

    Raises:
      CheckpointFileError: no such folder, huggingface_hub not installed, or no network.
    """
    given = paths.path(source)
    if given.is_dir():
        return given
    named = _REPOSITORY.fullmatch(str(source))
    if given.exists() or not named:
        raise CheckpointFileError(f"--source={source}: no such folder")
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointFileError(
            f"--source={source}: no such folder; to fetch it from the Hugging Face hub: "
            f"{install_line('hub')}"
        ) from None
    subfolder = named["sub"].strip("/")
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        local = huggingface_hub.snapshot_download(
            named["repo"], allow_patterns=[prefix + name for name in _FILES]
        )
    # Each kind of failure (network, name, permission, disk) has its own exception there.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointFileError(
            f"--source={source}: not fetched from the Hugging Face hub ({reason}); check the name "
            "and the network"
        ) from None
    folder = Path(local) / subfolder
    if not folder.is_dir():
        raise CheckpointFileError(f"--source={source}: the repository has no folder {subfolder!r}")
    return folder
