"""Every method on the toy, five seeds each, from the same prompts: reruns what toy/comparison.jsonl does not hold yet.

    python toy/compare.py                # about an hour and a half on 2 cores; stop and start it as you like
    python toy/compare.py --report       # the table and toy/comparison.png, from what is there

Every run: 150 steps of 16 prompts, 8 responses each (12 for SaEI, 6 + 6, and for the GRPO that it is compared with),
the toy's learning rate, and each method's own constants as its paper has them: nothing was tuned. DAPO leaves groups of
one mind out and does not replace them, so that all arms sample as many responses. Two runs at a time, one core each.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue

import torch
from matplotlib.figure import Figure

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))
from plumbing.commandline import UserError  # noqa: E402
from plumbing.curves import pooled, student  # noqa: E402
from plumbing.files import write_text  # noqa: E402

ARMS = {  # name: (script and flags, the arm that it is compared with)
    "GRPO": ("grpo.py", "GRPO"),
    "DAPO": ("grpo.py --clip_high 0.28 --filter_groups --filter_tries 1 --drop_truncated", "GRPO"),
    "VEPO": ("vepo.py", "GRPO"),
    "VGPO": ("vgpo.py", "GRPO"),
    "PRPO": ("prpo.py", "GRPO"),
    "PEPO": ("pepo.py", "GRPO"),
    "top entropy": ("vepo.py --select entropy", "GRPO"),
    "random 20 %": ("vepo.py --select random", "GRPO"),
    "PRPO shuffled": ("prpo.py --shuffle", "GRPO"),
    "GRPO, 12": ("grpo.py --group_size 12", "GRPO, 12"),
    "SaEI, 6 + 6": ("saei.py", "GRPO, 12"),
}
CONTROLS = [("VEPO", "random 20 %"), ("VEPO", "top entropy"), ("PRPO", "PRPO shuffled")]
SEEDS, GOAL = range(5), 0.7
RESULTS = TOY / "comparison.jsonl"


COLUMNS = ["reward", "entropy", "response_tokens", "seconds"]


def compact(lines):
    """What is kept of a run's metrics, with four digits: {column: [value of each step]} and the evaluations."""
    steps = [line for line in lines if "reward" in line]
    columns = {name: [float(f"{line[name]:.4g}") for line in steps] for name in COLUMNS}
    tests = [[line["step"], round(line["eval_accuracy"], 4)] for line in lines if "eval_accuracy" in line]
    return columns | {"evaluations": tests}


def metrics(record):
    """The lines of metrics.jsonl that a record was made of."""
    steps = [{"step": i, **dict(zip(COLUMNS, row))} for i, row in enumerate(zip(*(record[c] for c in COLUMNS)), 1)]
    tests = [{"step": step, "eval_accuracy": accuracy} for step, accuracy in record["evaluations"]]
    return sorted(steps + tests, key=lambda line: (line["step"], "eval_accuracy" in line))


def records():
    try:
        return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    except ValueError as error:
        raise UserError(f"{RESULTS} is broken ({error}): take the broken line out, its run is made again.") from None


def one(arm, seed, core):
    """Runs an arm with a seed on one core; returns its record."""
    script, *flags = ARMS[arm][0].split()
    output = TOY.parent / "runs" / "comparison" / f"{arm.replace(' ', '_')}-{seed}"
    command = [sys.executable, str(TOY.parent / script), *flags, "--seed", str(seed), "--output", str(output)]
    command += ["--show_every", "0", *(["--resume"] if (output / "last").exists() else [])]
    with open(output.parent / f"{output.name}.log", "w") as log:
        pin = {"preexec_fn": lambda: os.sched_setaffinity(0, {core})} if hasattr(os, "sched_setaffinity") else {}
        code = subprocess.run(command, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pin).returncode
    if code:
        raise UserError(f"{arm}, seed {seed} ended with exit code {code}: {log.name} says why; then start again.")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(output)
    return {"arm": arm, "seed": seed, **compact(lines)}


def run(jobs):
    (TOY.parent / "runs" / "comparison").mkdir(parents=True, exist_ok=True)
    done = {(record["arm"], record["seed"]) for record in records()}
    left = [(arm, seed) for seed in SEEDS for arm in ARMS if (arm, seed) not in done]
    cores = Queue()
    for core in range(jobs):
        cores.put(core % os.cpu_count())

    def task(arm, seed):
        core = cores.get()
        try:
            return one(arm, seed, core)
        finally:
            cores.put(core)

    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(task, *what) for what in left]):
            record = future.result()
            lines = [json.dumps(line, separators=(",", ":")) + "\n" for line in [*records(), record]]
            write_text(RESULTS, "".join(lines))
            print(f"{record['arm']:16s} seed {record['seed']}  {record['evaluations'][-1][1]:.1%}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure the runs that have begun end, and no other begins


def steps_to(goal, points):
    """The step at which accuracy first reaches the goal, between two evaluations by a straight line; None if never.

    >>> steps_to(0.75, [(0, 0.5), (20, 0.5), (40, 1.0)])
    30.0
    """
    for (a, low), (b, high) in zip(points, points[1:]):
        if low < goal <= high:
            return a + (b - a) * (goal - low) / (high - low)
    return None


def over_the_run(points):
    """The mean accuracy of a run: the area under its evaluations, joined by straight lines, over its steps.

    >>> over_the_run([(0, 0.5), (20, 0.5), (40, 1.0)])
    0.625
    """
    area = sum((b - a) * (low + high) / 2 for (a, low), (b, high) in zip(points, points[1:]))
    return area / (points[-1][0] - points[0][0])


def interval(values):
    """Mean and half width of its 95 % interval by Student's t."""
    values = torch.tensor(values, dtype=torch.float64)
    half = student(len(values) - 1) * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), half


def gain(arm, base):
    """Points of accuracy of one arm over another, at the end and over the run: two intervals of paired differences.

    Both are {seed: record}.
    """
    pairs = [(arm[seed]["evaluations"], base[seed]["evaluations"]) for seed in sorted(arm.keys() & base.keys())]
    return (
        interval([100 * (a[-1][1] - b[-1][1]) for a, b in pairs]),
        interval([100 * (over_the_run(a) - over_the_run(b)) for a, b in pairs]),
    )


def report():
    """Prints a Markdown table of all arms, and draws it.

    `paired`: points of accuracy against the arm's GRPO, seed by seed; ±: 95 % interval; seconds: the median ratio.
    """
    found, gains = defaultdict(dict), {}
    for record in sorted(records(), key=lambda record: [*ARMS].index(record["arm"])):
        found[record["arm"]][record["seed"]] = record
    print(f"| arm | seeds | accuracy at the end | paired | over the run, paired | steps to {GOAL:.0%} | seconds |")
    print("|---|---|---|---|---|---|---|")
    for arm, (_, base) in ARMS.items():
        seeds = sorted(found[arm].keys() & found[base].keys())
        if not seeds:
            continue
        tests = [found[arm][seed]["evaluations"] for seed in seeds]
        mean, half = interval([points[-1][1] for points in tests])
        differences = ["-", "-"]
        if arm != base:
            gains[arm] = gain(found[arm], found[base])
            differences = [f"{points:+.1f} ± {error:.1f}" for points, error in gains[arm]]
        reached = [step for points in tests if (step := steps_to(GOAL, points))]
        step = f"{interval(reached)[0]:.0f} ± {interval(reached)[1]:.0f}" if len(reached) > 1 else "-"
        step += f" ({len(reached)} of {len(seeds)} seeds)" if len(reached) < len(seeds) else ""
        slower = [sum(found[arm][seed]["seconds"]) / sum(found[base][seed]["seconds"]) for seed in seeds]
        accuracy = f"{100 * mean:.1f} ± {100 * half:.1f} %"
        cells = [arm, len(seeds), accuracy, *differences, step, f"{statistics.median(slower):.2f}"]
        print(f"| {' | '.join(map(str, cells))} |")
    for arm, base in CONTROLS:
        if found[arm].keys() & found[base].keys():
            end, whole = (f"{points:+.1f} ± {error:.1f}" for points, error in gain(found[arm], found[base]))
            print(f"{arm} against {base}: {end} at the end, {whole} over the run")
    runs = {arm: [metrics(r) for r in seeds.values()] for arm, seeds in found.items() if seeds}
    draw(runs, gains)


def draw(runs, gains):
    """toy/comparison.png: accuracy of {arm: [metrics of a seed]}, and what {arm: (at the end, over the run)} gains."""
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1.25, 1])
    for i, (arm, seeds) in enumerate(runs.items()):
        colour, line = ("black", "-:"[arm == "GRPO, 12"]) if arm not in gains else (f"C{i % 10}", "-")
        steps, _, mean, half = pooled(seeds, "eval_accuracy")
        top.plot(steps, 100 * mean, line, color=colour, label=arm, linewidth=1.3)
        if arm == "GRPO":
            top.fill_between(steps, 100 * (mean - half), 100 * (mean + half), color=colour, alpha=0.12, linewidth=0)
        if arm in gains:
            for (points, error), shift, fill in zip(gains[arm], (-0.15, 0.15), ("none", "full")):
                bottom.errorbar(points, i + shift, xerr=error, fmt="o", color=colour, capsize=3, fillstyle=fill)
    top.set_title("test accuracy, %: mean of the seeds, and GRPO's 95 % band", fontsize=10)
    top.set_xlabel("step")
    top.legend(fontsize=8, ncols=2)
    bottom.axvline(0, color="black", linewidth=1)
    bottom.set_yticks([i for i, arm in enumerate(runs) if arm in gains], [arm for arm in runs if arm in gains])
    bottom.invert_yaxis()
    bottom.set_title("points against its GRPO, 95 %; full: over the run, hollow: at the end", fontsize=10)
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(TOY / "comparison.png", dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="no run, only the table and the picture")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    options = parser.parse_args()
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs} must be above 0.")
    if not options.report:
        run(options.jobs)
    report()


if __name__ == "__main__":
    main()
