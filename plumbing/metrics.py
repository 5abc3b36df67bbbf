"""The log: sums over tokens and responses, their means over all processes, and the lines of metrics.jsonl.

Not here: what is measured (run.py and the methods), and when a log is cut back to a checkpoint's step (checkpoints.py).
"""

import contextlib
import json
import math

import torch
from accelerate.utils import gather_object

from plumbing.commandline import UserError, cannot_write
from plumbing.files import write_text


class Metrics:
    """What is measured in a step, on this process, until `sums` joins it with the others."""

    def __init__(self, accelerator, path):
        self.accelerator, self.path, self.own = accelerator, path, {}

    def add(self, name, value, weight):
        """Adds to a sum and its weight; the log holds their quotient over all processes."""
        total, weights = self.own.get(name, (0.0, 0.0))
        self.own[name] = (total + double(value), weights + double(weight))  # tensors, until the step is over

    def add_means(self, means, mask):
        """Adds what are means over a row's tokens, with as much weight as it has tokens in `mask`."""
        for name, value in means.items():
            self.add(name, value * mask.sum(), mask.sum())

    def sums(self, names=()):
        """{name: (sum, weight)} over all processes since the last call; weight 0 for `names` that nobody measured."""
        sums, own = {}, {name: (float(value), float(weight)) for name, (value, weight) in self.own.items()}
        for part in gather_object([own]):  # one for each process
            for name, (value, weight) in part.items():
                value_so_far, weight_so_far = sums.get(name, (0.0, 0.0))
                sums[name] = (value_so_far + value, weight_so_far + weight)
        self.own = {}
        return dict.fromkeys(names, (0.0, 0.0)) | sums

    def write(self, line):
        """A line of metrics.jsonl, floats with six digits, null where one is not finite; the same to the trackers."""
        floats = {name: value for name, value in line.items() if isinstance(value, float)}
        line = line | {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in floats.items()}
        if self.accelerator.is_main_process:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise UserError(f"{cannot_write(self.path, error)}, then go on with --resume.") from None
        numbers = {name: value for name, value in line.items() if name != "step" and not isinstance(value, dict | str)}
        self.accelerator.log(numbers, step=line["step"])


def double(value):
    return value.detach().double() if isinstance(value, torch.Tensor) else value


def means(sums):
    """{name: mean} of {name: (sum, weight)}; NaN, which the log writes as null, where nothing was measured.

    >>> means({"reward": (6.0, 4.0), "entropy": (0.0, 0.0)})
    {'reward': 1.5, 'entropy': nan}
    """
    return {name: value / weight if weight else math.nan for name, (value, weight) in sums.items()}


def restore_log(output, step):
    """metrics.jsonl as it was after `step`: later lines, and half a line at the end, are of a run that was killed."""
    path, kept = output / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if found["step"] < step or (found["step"] == step and "changed" not in found):  # that is written anew
                kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))
