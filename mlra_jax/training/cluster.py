"""Which process of which cluster this is, and how it joins the others."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

import mlra_jax
from mlra_jax.settings_tree import flatten
from mlra_jax.training.peers import Member, PeerError, Peers
from mlra_jax.training.settings import Experiment


@contextlib.contextmanager
def joined(
    flags: Any,
    experiment: Experiment,
    say: Callable[[str], None],
    end: Callable[[str], object],
) -> Iterator[Peers | None]:
    """Joins the processes of a run, if there are several; before anything touches a device.

    Args:
      flags: with `distributed`, `coordinator`, `num_processes`, `process_id`, `join_seconds` and
        `workdir`.
      experiment: which must be the same on all.
      say: prints a line, on process 0.
      end: ends this process with a line, because another one has ended.

    Raises:
      PeerError: no cluster where one was asked for, and as `Peers`.
    """
    found = _detected(flags)
    if found is None:
        yield None
        return
    me, devices = found
    with Peers(me, _facts(experiment, flags.workdir), say, end, flags.join_seconds) as peers:
        jax.distributed.initialize(
            me.coordinator, me.count, me.index, devices, cluster_detection_method="deactivate"
        )
        yield peers


def _detected(flags: Any) -> tuple[Member, list[int] | None] | None:
    """This process and its devices, by the flags or else by JAX; None if it is the only one."""
    given = (flags.coordinator, flags.num_processes, flags.process_id)
    if None not in given:
        return Member(flags.process_id, flags.num_processes, flags.coordinator), None
    asked = flags.distributed or any(x is not None for x in given)
    if not asked and (flags.distributed is False or not _started_together()):
        return None
    # JAX shows what it detects only by joining.
    from jax._src.clusters import ClusterEnv

    seconds = int(flags.join_seconds)
    try:
        coordinator, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            *given, None, None, seconds
        )
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        told = " ".join(str(error).split())
        raise PeerError(
            f"the cluster is not understood ({told}); say --coordinator=HOST:PORT, "
            "--num_processes and --process_id, or --nodistributed"
        ) from None
    if None not in (coordinator, count, index) and (count > 1 or asked):
        return Member(index, count, coordinator), devices
    if asked:
        raise PeerError(
            "no cluster is detected; say --coordinator=HOST:PORT, --num_processes and --process_id"
        )
    return None


def _started_together() -> bool:
    """Whether a cluster has started several processes, by the variables that it gives them."""
    said = lambda name: os.environ.get(name, "")
    counts = [said("MEGASCALE_NUM_SLICES"), said("OMPI_COMM_WORLD_SIZE")]
    # Also without srun there is a number of tasks, and one process.
    counts += [said("SLURM_NTASKS")] if said("SLURM_STEP_NODELIST") else []
    hosts = said("TPU_WORKER_HOSTNAMES") + said("TPU_PROCESS_ADDRESSES")
    listed = "," in hosts or bool(said("TPU_PROCESS_ADDRESSES_PATH"))
    return listed or any(count not in ("", "1") for count in counts)


def _facts(experiment: Experiment, workdir: str) -> dict[str, Any]:
    """What must be the same on all processes, by name."""
    package, digest = Path(mlra_jax.__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return flatten(experiment.to_config_dict().to_dict()) | {
        "workdir": str(Path(workdir).absolute()),
        "the program's code": digest.hexdigest()[:12],
        "Python": sys.version.split()[0],
        "JAX": jax.__version__,
    }
