"""The log: sums over tokens and responses, their means over all processes, metrics.jsonl, and its curves.

Not here: what is measured (trainer.py and the methods), and pages of tokens (show.py).
"""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.special import stdtrit
from torch.nn.functional import pad
from tqdm.auto import tqdm

from plumbing.arguments import UserError, cannot_write


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

    def add_groups(self, groups):
        """Adds what is measured of all sampled responses."""
        for group in groups:
            measured = {"accuracy": group.accuracy, "format": group.format, "reward": group.rewards}
            for name, values in {**measured, "response_tokens": group.mask, "truncated": group.truncated}.items():
                self.add(name, values.sum(), len(group.texts))
            self.add("zero_advantage_groups", float((group.rewards == group.rewards[0]).all()), 1)

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


def evaluation_metrics(rows, accuracy, tokens, truncated):
    """What the log says of an evaluation on so many rows, from three means over them."""
    stderr = math.sqrt(accuracy * (1 - accuracy) / rows)  # binomial
    counts = {"eval_rows": rows, "eval_response_tokens": tokens, "eval_truncated": truncated}
    return {"eval_accuracy": accuracy, "eval_stderr": stderr, **counts}


def shown(line):
    """An evaluation's accuracy, in words."""
    return f"{line['eval_accuracy']:.1%} ± {line['eval_stderr']:.1%} on {line['eval_rows']} rows"


PANELS = {  # metric: (title, share of 1)
    "eval_accuracy": ("accuracy on {}", True),  # what the runs say that they were evaluated on
    "reward": ("reward of sampled responses", False),
    "entropy": ("entropy, nats per token", False),
    "response_tokens": ("response length, tokens", False),
}
STYLES = ["-", "--", "-.", ":"]


def read_runs(folders):
    """{method: [metrics of a seed]}; the method is the folder's name without -0, -1 ... at its end.

    Folders without a log (eval.py's, say) are left out, and named. Raises UserError where none is left.
    """
    runs, others = defaultdict(list), []
    for folder in {Path(folder).resolve(): Path(folder) for folder in folders}.values():
        lines = read_metrics(folder / "metrics.jsonl")
        if lines:
            runs[re.sub(r"-\d+$", "", folder.resolve().name)].append(lines)
        else:
            others.append(str(folder))
    if not runs:
        raise UserError(f"{', '.join(others)}: no metrics.jsonl with a step in it: give folders of training runs.")
    if others:
        tqdm.write(f"left out, as there is no metrics.jsonl with a step in it: {', '.join(others)}", file=sys.stderr)
    return dict(runs)


def read_metrics(path):
    """Lines of a metrics.jsonl, [] if there is none; a half-written line of a run that was killed is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def series(lines, name):
    """{step: (seconds of training so far, value)} of one run."""
    seconds, found = 0.0, {}
    for line in lines:
        seconds += line.get("seconds") or 0.0
        if line.get(name) is not None:
            found[line["step"]] = (seconds, line[name])
    return found


def pooled(seeds, name, window=1):
    """(steps, mean seconds, mean, half width of the 95 % interval) at the steps that all seeds have.

    Each seed's values are first averaged over the last `window` steps. The interval is Student's t over seeds; 0 for
    one seed.
    """
    found = [series(lines, name) for lines in seeds]
    steps = sorted(set.intersection(*(set(one) for one in found)))
    seconds, values = (torch.tensor([[one[s][i] for s in steps] for one in found], dtype=torch.float64) for i in (0, 1))
    values = running_mean(values, window)
    half = torch.zeros(len(steps), dtype=torch.float64)
    if len(found) > 1:
        half = stdtrit(len(found) - 1, 0.975) * values.std(0) / math.sqrt(len(found))
    return steps, seconds.mean(0), values.mean(0), half


def running_mean(values, window):
    """The mean of each value (..., n) and those before it, `window` of them in all, or as many as there are.

    >>> running_mean(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    tensor([1., 2., 4., 5.])
    """
    total = pad(values.cumsum(-1), (window, 0))
    return (total[..., window:] - total[..., :-window]) / torch.arange(1, values.shape[-1] + 1).clamp(max=window)


def draw_curves(runs, output, window=10):
    """Draws {method: [metrics of a seed]}, all panels, against steps and against seconds; returns a table's lines."""
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    axes = figure.subplots(2, 4)
    colours = colormaps["tab10" if len(runs) <= 10 else "tab20"].colors
    logged = [line for seeds in runs.values() for lines in seeds for line in lines]
    data = ", ".join(sorted({str(line["eval_data"]) for line in logged if "eval_data" in line})) or "test data"
    for column, (name, (title, percent)) in enumerate(PANELS.items()):
        title = title.format(data)
        steps_averaged = 1 if name == "eval_accuracy" else window
        title += (", %" if percent else "") + (f" (mean of {window} steps)" if steps_averaged > 1 else "")
        for i, (method, seeds) in enumerate(runs.items()):
            steps, seconds, mean, half = pooled(seeds, name, steps_averaged)
            scale = 100 if percent else 1
            for row, x in enumerate((steps, seconds)):
                style = {"color": colours[i % len(colours)], "linestyle": STYLES[i // 5 % 4]}
                label = f"{method} ({len(seeds)})" if len(seeds) > 1 else method
                axes[row, column].plot(x, scale * mean, label=label, linewidth=1.3, **style)
                axes[row, column].fill_between(x, scale * (mean - half), scale * (mean + half), alpha=0.15, **style)
        for row, label in enumerate(("step", "seconds of training")):
            axes[row, column].set(xlabel=label, title=title if row == 0 else "")
            axes[row, column].title.set_fontsize(10)
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    for kind in ("png", "svg"):
        figure.savefig(f"{output}.{kind}", dpi=110, format=kind)
    return summary(runs)


def summary(runs):
    lines = [f"{'method':16s}{'seeds':>6s}{'steps':>7s}{'seconds':>9s}{'first':>9s}{'last, 95 % interval':>22s}"]
    for method, seeds in runs.items():
        steps, seconds, mean, half = pooled(seeds, "eval_accuracy")
        _, total, _, _ = pooled(seeds, "reward")
        first, last = (f"{mean[0]:.1%}", f"{mean[-1]:.1%}") if steps else ("-", "-")
        if len(seeds) > 1 and steps:
            last += f" ± {half[-1]:.1%}"
        done = max(line["step"] for line in seeds[0])
        lines.append(f"{method:16s}{len(seeds):6d}{done:7d}{total[-1] if len(total) else 0:9.0f}{first:>9s}{last:>22s}")
    return lines
