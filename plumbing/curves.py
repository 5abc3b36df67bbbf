"""What a run draws at its end, and show.py draws again: curves of all metrics, pooled over seeds, and a table.

Not here: pages and pictures of tokens (show.py).
"""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.special import stdtrit
from torch.nn.functional import pad
from tqdm.auto import tqdm

from plumbing.commandline import UserError, cannot_write

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
    """Lines of a metrics.jsonl, [] where there is none; the last may be half written. Raises UserError."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in (lines if not lines or lines[-1].endswith("}") else lines[:-1])]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): mend that line, or leave the run out.") from None


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
        beside = Path(f"{output}.{kind}.unfinished")
        try:
            figure.savefig(beside, dpi=110, format=kind)
            beside.replace(f"{output}.{kind}")
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UserError(f"{cannot_write(f'{output}.{kind}', error)}.") from None
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
