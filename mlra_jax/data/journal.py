"""What `prepare` has finished: a file beside the shards, replaced after each of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from mlra_jax.data import token_file
from mlra_jax.data.tokenizers import RANKS_FILE, meet_ranks
from mlra_jax.files import whole_file
from mlra_jax.storage.paths import AnyPath

_ENDING = "_prepare.json"
_SHARD = re.compile(r"(.+)_(?:val|train)_(\d+)\.bin")


def tokenizer_of(path: AnyPath) -> str | None:
    """Name of the tokenizer that a token file was prepared with, None if no journal tells of it.

    Raises ValueError for a damaged journal.
    """
    shard = _SHARD.fullmatch(path.name)
    journal = path.with_name(f"{shard[1]}{_ENDING}") if shard else None
    if journal is None or not journal.is_file():
        return None
    try:
        saved = json.loads(journal.read_text())
        number, name = int(shard[2]), saved["settings"]["tokenizer"]
        meet_ranks(str(name), path.with_name(f"{shard[1]}_{RANKS_FILE}"))
        return str(name) if number < len(saved["shards"]) else None
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{journal} is damaged, so that nothing says which tokenizer {path} was prepared with; "
            "delete it if you know"
        ) from None


def one_tokenizer(
    files: Iterable[AnyPath], name: str | None = None, whose: str = "", remedy: str = ""
) -> str | None:
    """The tokenizer of all of these token files that say, `name` if none does.

    Args:
      files: token files.
      name: of the tokenizer that they should have, if that is known.
      whose: that one is, for the message.
      remedy: what to do if they have another.

    Raises:
      ValueError: a file has another than `name`, or than a file before it; or as `tokenizer_of`.
    """
    for path in files:
        found = tokenizer_of(path)
        if found is not None and name not in (None, found):
            raise ValueError(
                f"{path} was prepared with tokenizer {found}, and {whose} is {name}: the same ids "
                f"would mean other text; {remedy or 'prepare all with one'}"
            )
        if found is not None and name is None:
            name, whose = found, f"that of {path}"
    return name


class Journal:
    """The shards `NAME_train_000000.bin`, … of a folder that are finished, and where to go on.

    Attributes:
      path: the journal's own file, `NAME_prepare.json`.
      counts: the number of tokens of each finished shard.
      position, used: the next token lies `used` tokens after the piece that begins at `position`.
      complete: nothing is left to do.

    Args:
      folder: an existing folder.
      name: what the files' names begin with.
      settings: JSON values on which the shards depend; `validation_first_shard` among them calls
        the first shard `NAME_val_000000.bin`.

    Raises:
      ValueError: it was begun with other settings, it is damaged, or a shard is not as it says.
      FileExistsError: there are such shards and no journal.
    """

    def __init__(self, folder: AnyPath, name: str, settings: dict[str, Any]):
        self.path = folder / f"{name}{_ENDING}"
        self.counts: list[int] = []
        self.position = (0, 0)
        self.used = 0
        self.complete = False
        self._name, self._settings = name, settings
        if self.path.exists():
            self._read()
        else:
            self._check_free()
        for path, count in zip(self.shards, self.counts, strict=True):
            if len(token_file.read(path)) != count:
                raise ValueError(f"{path} is not the shard that {self.path} tells of; delete both")

    @property
    def shards(self) -> list[AnyPath]:
        """The finished shards."""
        return [self._shard(number) for number in range(len(self.counts))]

    @property
    def next_shard(self) -> AnyPath:
        """The shard to write."""
        return self._shard(len(self.counts))

    def add(self, count: int, position: tuple[int, int], used: int) -> None:
        """The next shard is finished and has `count` tokens."""
        self.counts.append(count)
        self.position, self.used = position, used
        self.save()

    def finish(self) -> None:
        """The shards are all there."""
        self.complete = True
        self.save()

    def save(self) -> None:
        """Replaces the file."""
        state = {
            "settings": self._settings,
            "shards": self.counts,
            "position": self.position,
            "used": self.used,
            "complete": self.complete,
        }
        with whole_file(self.path) as file:
            json.dump(state, file, indent=1)

    def _shard(self, number: int) -> AnyPath:
        part = "val" if self._settings["validation_first_shard"] and number == 0 else "train"
        return self.path.with_name(f"{self._name}_{part}_{number:06d}.bin")

    def _read(self) -> None:
        try:
            saved = json.loads(self.path.read_text())
            for key, value in self._settings.items():
                if saved["settings"][key] != value:
                    raise ValueError(
                        f"{self.path} was begun with another {key} ({saved['settings'][key]}, now "
                        f"{value}); take another destination or name"
                    )
            self.counts = saved["shards"]
            self.position = tuple(saved["position"])
            self.used = saved["used"]
            self.complete = saved["complete"]
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"{self.path} is damaged; take another destination or name") from None

    def _check_free(self) -> None:
        for path in sorted(self.path.parent.iterdir()):
            shard = _SHARD.fullmatch(path.name)
            if shard and shard[1] == self._name:
                raise FileExistsError(f"{path} is there already; take another destination or name")
