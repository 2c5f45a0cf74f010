"""Starts train.py command lines at once, having imported everything before.

In: a line of JSON for each, {"arguments": [...], "out": FILE, "err": FILE, "environment": {...}};
what the environment has is added to its own. Out: a line {"started": PID} for each, and
{"ended": PID, "code": EXIT} when one has ended. When its input ends, so do all that it started.
"""

import gc
import json
import os
import select
import signal
import sys

# A run imports these when it uses them.
import grain  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
from jax._src.clusters import cloud_tpu_cluster, cluster

from mlra_jax.training.__main__ import main as train


def tell(**message):
    print(json.dumps(message), flush=True)


def start(arguments, out, err, environment):
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        # JAX has looked for a TPU when it was imported.
        for module in (cluster, cloud_tpu_cluster):
            module.running_in_cloud_tpu_vm = "TPU_WORKER_HOSTNAMES" in environment
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["train.py", *arguments]
        sys.exit(train(arguments))
    return child


def main():
    running, unread = set(), b""
    # The end of a process would look through all that was imported.
    gc.freeze()
    while True:
        readable, _, _ = select.select([0], [], [], 0.02 if running else None)
        if readable:
            if not (read := os.read(0, 1 << 16)):
                break
            *lines, unread = (unread + read).split(b"\n")
            for line in lines:
                running.add(child := start(**json.loads(line)))
                tell(started=child)
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                running.remove(child)
                tell(ended=child, code=os.waitstatus_to_exitcode(status))
    for child in running:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
