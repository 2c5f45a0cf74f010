"""Trains all variants alike and compares them.

`python -m studies.variants --config=studies/configs/small.py --workdir=runs/study --minutes=20`

Each finished run is a file of `WORKDIR/runs`; the same command does what is missing, and after
`--minutes` it stops with nothing half done. The report is written anew each time.
"""

import json
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

from mlra_jax.command import Parser, run, say
from mlra_jax.data.sources import describe, fingerprint
from mlra_jax.files import whole_file
from mlra_jax.settings_tree import ConfigError, flatten
from mlra_jax.training.__main__ import read_settings
from mlra_jax.training.feed import load_data
from studies import report
from studies.settings import Study
from studies.training import OutOfTime, Result, train


def conduct(
    study: Study, workdir: str | Path, minutes: float, say: Callable[[str], None] = print
) -> bool:
    """Trains what is missing in `workdir`, as long as there is time; whether all is there.

    Args:
      study: the settings.
      workdir: a folder, made if it does not exist: `study.json`, `runs/`, and the report.
      minutes: after which a run that is under way is given up.
      say: prints a line.

    Raises:
      ConfigError: the folder holds runs of other settings or tokens; nothing is changed then.
      TrainingError, FileNotFoundError, ValueError: as training.
    """
    began, workdir = time.monotonic(), Path(workdir)
    deadline = began + 60 * minutes
    _, source = load_data(study.data, study.vocab_size)
    _claim(workdir, study.identity() | {"tokens": fingerprint(source.train + source.validation)})
    for line in describe(source, study.data.validation_tokens):
        say(line)
    longest, complete = 0.0, True
    for name in study.names:
        missing = [s for s in range(study.seeds) if not _file(workdir, name, s).exists()]
        for first in range(0, len(missing), study.side_by_side):
            seeds, now = missing[first : first + study.side_by_side], time.monotonic()
            if now + longest > deadline:
                complete = False
                break
            try:
                results = train(study, name, seeds, source, say, deadline)
            except OutOfTime:
                complete = False
                break
            for result in results:
                with whole_file(_file(workdir, name, result["seed"])) as file:
                    json.dump(result, file)
            longest = max(longest, time.monotonic() - now)
    say("all runs are there" if complete else "out of time; the same command goes on")
    return complete


def _claim(workdir: Path, settings: dict) -> None:
    """Writes down what all runs of the folder share, or compares."""
    path = workdir / "study.json"
    if path.exists():
        try:
            there = flatten(json.loads(path.read_text()))
        except (ValueError, AttributeError):
            raise ConfigError(f"{path} is damaged; use another workdir") from None
        here = flatten(settings)
        for name in sorted(there.keys() | here.keys()):
            old, new = there.get(name, "absent"), here.get(name, "absent")
            if old != new:
                raise ConfigError(
                    f"{workdir} holds another study: {name} is {old!r} there and {new!r} here; "
                    "use another workdir or those settings"
                )
        return
    (workdir / "runs").mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        json.dump(settings, file, indent=2)


def _file(workdir: Path, name: str, seed: int) -> Path:
    return workdir / "runs" / f"{name}_{seed}.json"


def finished(study: Study, workdir: str | Path) -> dict[str, list[Result]]:
    """The results of the study's variants by name, in order of their seeds."""
    found = {}
    for name in study.names:
        files = [_file(Path(workdir), name, seed) for seed in range(study.seeds)]
        if results := [_read(file) for file in files if file.exists()]:
            found[name] = results
    return found


def _read(file: Path) -> Result:
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise ConfigError(f"{file} is damaged; delete it, and the run is made again") from None


def main(argv: list[str] | None = None) -> int:
    """Studies as the flags say; see `command.run` for the exit codes."""
    parser = Parser("studies.variants", __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of studies/configs/")
    parser.add_argument("--workdir", required=True, help="folder for runs and report")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which to stop")
    flags, overrides = parser.parse_known_args(argv)
    settings = read_settings(parser, flags.config, overrides)

    def work():
        study = Study.from_dict(settings.to_dict())
        conduct(study, flags.workdir, flags.minutes, say)
        if results := finished(study, flags.workdir):
            print(report.write(study, results, flags.workdir))

    return run(parser, work, "the same command goes on behind the last finished run")


if __name__ == "__main__":
    sys.exit(main())
