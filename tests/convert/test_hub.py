"""Which folder a source is: one that is here, or one of a repository."""

import sys
import types

import pytest

from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.hub import find_source


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose every repository is one folder; it notes what it is asked for."""
    asked = []
    local = tmp_path / "cache"
    (local / "mlra" / "large").mkdir(parents=True)

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(local)

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return local, asked


FILES = [
    "config.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model-*.bin",
    "model-*.safetensors",
]


@pytest.mark.parametrize(
    ("source", "repo", "subfolder"),
    [
        ("owner/name", "owner/name", ""),
        ("owner/name/", "owner/name", ""),
        ("own-er/na.me_2", "own-er/na.me_2", ""),
        ("owner/name/mlra", "owner/name", "mlra"),
        ("owner/name/mlra/", "owner/name", "mlra"),
        ("owner/name/mlra/large", "owner/name", "mlra/large"),
    ],
)
def test_repositories(hub, source, repo, subfolder):
    local, asked = hub
    assert find_source(source) == local / subfolder
    prefix = f"{subfolder}/" if subfolder else ""
    assert asked == [(repo, [prefix + name for name in FILES])]


@pytest.mark.parametrize(
    "source",
    [
        *("name", "/owner/name", "owner//name", "../name", "owner/..", "./owner/name", "a\\b/c"),
        *("owner/name/..", "owner/name/../x", "owner/name//x", "owner/name/.x", "own er/name"),
        *("owner/.name", ".owner/name", "owner/name/x y"),
    ],
)
def test_what_is_no_repository_is_asked_of_nobody(hub, source):
    _, asked = hub
    with pytest.raises(CheckpointFileError, match="no such folder"):
        find_source(source)
    assert not asked


def test_a_folder_here_is_taken_first(hub, tmp_path):
    _, asked = hub
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert str(find_source("owner/name")) == "owner/name" and not asked
    (tmp_path / "owner" / "file").write_text("")
    with pytest.raises(CheckpointFileError, match="--source=owner/file: no such folder"):
        find_source("owner/file")
    assert not asked


def test_a_repository_without_the_folder(hub):
    with pytest.raises(CheckpointFileError, match="the repository has no folder 'mlra/small'"):
        find_source("owner/name/mlra/small")
