"""The log: sums over tokens and responses, their means over all processes, metrics.jsonl, and its curves.

Not here: what is measured (trainer.py and the methods), and pages of tokens (show.py).
"""

import json
import math
import re
import sys
from pathlib import Path

import pandas
import torch
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from scipy.special import stdtrit

from plumbing.arguments import UserError


class Metrics:
    """What is measured in a step, on this process, until `sums` joins it with the others."""

    def __init__(self, accelerator, path):
        self.accelerator, self.path, self.own = accelerator, path, {}

    def add(self, name, value, weight):
        """Adds to a sum and its weight; the log holds their quotient over all processes."""
        value, weight = (x.detach().double() if isinstance(x, torch.Tensor) else x for x in (value, weight))
        total, weights = self.own.get(name, (0.0, 0.0))
        self.own[name] = (total + value, weights + weight)  # tensors, until the step is over

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
        own = {name: (float(value), float(weight)) for name, (value, weight) in self.own.items()}
        sums, self.own = dict.fromkeys(names, (0.0, 0.0)), {}
        for part in gather_object([own]):  # one for each process
            for name, (value, weight) in part.items():
                total, weights = sums.get(name, (0.0, 0.0))
                sums[name] = (total + value, weights + weight)
        return sums

    def write(self, line):
        """A line of metrics.jsonl, floats with six digits, null where one is not finite; the same to the trackers."""
        floats = {name: value for name, value in line.items() if isinstance(value, float)}
        line = line | {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in floats.items()}
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if name != "step" and not isinstance(value, dict | str)}
        self.accelerator.log(numbers, step=line["step"])


def means(sums):
    """{name: mean} of {name: (sum, weight)}; NaN, which the log writes as null, where nothing was measured."""
    return {name: value / weight if weight else math.nan for name, (value, weight) in sums.items()}


def evaluation_metrics(rows, accuracy, tokens, truncated):
    """What the log says of an evaluation on so many rows, from three means over them."""
    stderr = math.sqrt(accuracy * (1 - accuracy) / rows)  # binomial
    measured = {"eval_accuracy": accuracy, "eval_stderr": stderr, "eval_rows": rows}
    return {**measured, "eval_response_tokens": tokens, "eval_truncated": truncated}


def shown(line):
    """An evaluation's accuracy, in words."""
    return f"{line['eval_accuracy']:.1%} ± {line['eval_stderr']:.1%} on {line['eval_rows']} rows"


PANELS = {  # metric: (title, factor of its values)
    "eval_accuracy": ("accuracy on {}, %", 100),  # what the runs say that they were evaluated on
    "reward": ("reward of sampled responses", 1),
    "entropy": ("entropy, nats per token", 1),
    "response_tokens": ("response length, tokens", 1),
}


def read_runs(folders):
    """The logs of runs as one table: PANELS, `eval_data` and `seconds` of training so far, by `step`, `run`, `method`.

    A run is a folder; its method is the folder's name without -0, -1 ... at its end. Folders without a log (eval.py's,
    say) are left out, and named. Raises UserError where none is left.
    """
    logs, others = [], []
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        file = folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        lines = [json.loads(line) for line in lines if line.endswith("}")]  # a run that was killed ends in half a line
        if lines:
            log = pandas.DataFrame(lines).groupby("step").last()  # a step and its evaluation are two lines
            log = log.reindex(columns=[*PANELS, "seconds", "eval_data"]).astype(dict.fromkeys(PANELS, float))
            log["seconds"] = log["seconds"].fillna(0).cumsum()
            logs.append(log.reset_index().assign(run=str(folder), method=re.sub(r"-\d+$", "", folder.name)))
        else:
            others.append(str(folder))
    if not logs:
        raise UserError(f"{', '.join(others)}: no metrics.jsonl with a step in it: give folders of training runs.")
    if others:
        print(f"left out, as there is no metrics.jsonl with a step in it: {', '.join(others)}", file=sys.stderr)
    return pandas.concat(logs)


def pooled(logs, name, window=1):
    """A table of a metric over a method's runs, by step: `mean`, `half` width of its 95 % interval, mean `seconds`.

    Only of steps that all runs have. Each run's values are first averaged over the last `window` of these. The interval
    is Student's t over runs; 0 for one run.
    """
    values = logs.pivot(index="step", columns="run", values=name).dropna().rolling(window, min_periods=1).mean()
    half = stdtrit(values.shape[1] - 1, 0.975) * values.sem(axis=1)
    seconds = logs.groupby("step")["seconds"].mean()[values.index]
    return pandas.DataFrame({"mean": values.mean(axis=1), "half": half.fillna(0), "seconds": seconds})


def draw_curves(logs, output, window=10):
    """Draws the table of `read_runs`, against steps and against seconds; returns the lines of `summary`."""
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    axes = figure.subplots(2, len(PANELS))
    methods = dict(iter(logs.groupby("method", sort=False)))
    data = ", ".join(sorted(logs["eval_data"].dropna().unique())) or "test data"
    for (top, bottom), (name, (title, factor)) in zip(axes.T, PANELS.items()):
        averaged = 1 if name == "eval_accuracy" else window  # steps
        title = title.format(data) + (f" (mean of {window} steps)" if averaged > 1 else "")
        top.set_title(title, fontsize=10)
        for i, (method, own) in enumerate(methods.items()):
            seeds, curve = own["run"].nunique(), pooled(own, name, averaged)
            mean, half = factor * curve["mean"], factor * curve["half"]
            style = {"color": f"C{i}", "linestyle": ["-", "--", "-.", ":"][i // 5 % 4]}
            for panel, x in ((top, curve.index), (bottom, curve["seconds"])):
                panel.plot(x, mean, label=f"{method} ({seeds})" if seeds > 1 else method, linewidth=1.3, **style)
                panel.fill_between(x, mean - half, mean + half, alpha=0.15, **style)
        top.set_xlabel("step")
        bottom.set_xlabel("seconds of training")
        top.grid(alpha=0.3)
        bottom.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(f"{output}.png", dpi=110)
    figure.savefig(f"{output}.svg")
    return [HEADER, *(table_row(method, own) for method, own in methods.items())]


HEADER = f"{'method':16s}{'seeds':>6s}{'steps':>7s}{'seconds':>9s}{'first':>9s}{'last, 95 % interval':>22s}"


def table_row(method, logs):
    """A method's seeds, steps, seconds, and accuracy at the first and last evaluation, as a line of a table."""
    seeds, accuracy, seconds = logs["run"].nunique(), pooled(logs, "eval_accuracy"), pooled(logs, "seconds")["mean"]
    first = last = "-"
    if len(accuracy):
        first, last = (f"{accuracy['mean'].iloc[i]:.1%}" for i in (0, -1))
        last += f" ± {accuracy['half'].iloc[-1]:.1%}" if seeds > 1 else ""
    return f"{method:16s}{seeds:6d}{logs['step'].max():7d}{seconds.iloc[-1]:9.0f}{first:>9s}{last:>22s}"
