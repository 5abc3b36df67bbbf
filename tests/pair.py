"""Two processes that wait for jobs: runs of the scripts over gloo, without starting Python for each.

`Pair().run(job)` is what `torchrun --nproc_per_node=2 script.py ...` would do, in processes that stay. A job is a
dictionary: script, output, flags, and `patch`, lines of Python that replace a part of the code for this run alone by
`patch(module, name, value)`. `run_job` does the same in one process. Run as a script, this file is one of the two.
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve()


def run_job(job):
    """Runs a job in this process; returns its exit code and what it wrote on the console."""
    from helpers import main_of

    import common
    import trainer

    console = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(console),
        contextlib.redirect_stdout(console),
    ):
        names = {"common": common, "trainer": trainer, "torch": torch, "os": os, "patch": patch.setattr}
        exec(job.get("patch", ""), names)  # lines of a test
        try:
            main_of(job["script"], job["output"], job["flags"])
            code = 0
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
            code = 1
    return code, console.getvalue()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Pair:
    def __init__(self):
        self.processes = []
        for rank in range(2):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            own |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            own |= {"PYTHONPATH": str(HERE.parent.parent)}
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen([sys.executable, HERE], env=environment | own, **pipes))

    def run(self, job):
        """(code, console) of both processes."""
        port = free_port()
        for process in self.processes:
            process.stdin.write(json.dumps(job | {"port": port}) + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in self.processes]

    def close(self):
        for process in self.processes:
            process.stdin.close()
            process.wait(timeout=60)


def main():
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        os.environ["MASTER_PORT"] = job["port"]
        result = run_job(job)
        if torch.distributed.is_initialized():  # after a failure; a run that ends takes it down itself
            torch.distributed.destroy_process_group()
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
