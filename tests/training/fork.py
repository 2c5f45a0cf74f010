"""Runs many train.py command lines, importing everything once: JSON in, JSON out.

In: a list of argument lists. Out: for each [exit code, stdout, stderr].
"""

import json
import os
import sys
import tempfile

from mlra_jax.training.__main__ import main


def run(arguments):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = ["train.py", *arguments]
            sys.exit(main(arguments))
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read(), err.read()


if __name__ == "__main__":
    print(json.dumps([run(arguments) for arguments in json.load(sys.stdin)]))
