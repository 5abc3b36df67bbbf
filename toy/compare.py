"""Every method in both embedded worlds, several seeds each: reruns what toy/comparison.jsonl does not hold yet.

    python toy/compare.py --world toy-faint       # hours on 2 cores; stop and start it as you like
    python toy/compare.py --report                # the tables and toy/comparison.png, from what is there

Every run: 150 steps of 16 prompts, 8 responses each (12 for SaEI, 6 + 6, and for the GRPO that it is compared with),
the toy's learning rate (LoRA's is ten times as high), and each method's own constants as its paper has them: nothing
was tuned. DAPO leaves groups of one mind out and does not replace them, so that all arms sample as many responses. Two
runs at a time, one core each.

The main figure is online accuracy: of the sampled responses over the whole run, on prompts that were not seen before,
the same ones in the same order in every arm with that seed (of the toy's 2,002 the last 25 steps see some again; SaEI:
of the half that saw the clean image). It comes for free, and paired by seed it is the least noisy one. Test accuracy
stands beside it.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue

import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from scipy.special import stdtr, stdtrit

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))
from plumbing.arguments import EMBEDDED, UserError  # noqa: E402
from plumbing.checkpoints import write_text  # noqa: E402

ARMS = {  # name: (arm of toy/arm.py and flags, the arm that it is compared with)
    "GRPO": ("grpo.py", "GRPO"),
    "DAPO": ("grpo.py --clip_high 0.28 --filter_groups --filter_tries 1 --drop_truncated", "GRPO"),
    "VEPO": ("vepo.py", "GRPO"),
    "VGPO": ("vgpo.py", "GRPO"),
    "PRPO": ("prpo.py", "GRPO"),
    "PEPO": ("pepo.py", "GRPO"),
    "top entropy": ("vepo.py --select entropy", "GRPO"),
    "random 20 %": ("vepo.py --select random", "GRPO"),
    "PRPO shuffled": ("prpo.py --shuffle", "GRPO"),
    "oracle: reads alone": ("oracle", "GRPO"),
    "GRPO, LoRA rank 8": ("grpo.py --lora_rank 8", "GRPO"),
    "GRPO, 12": ("grpo.py --group_size 12", "GRPO, 12"),
    "SaEI, 6 + 6": ("saei.py", "GRPO, 12"),
}
CONTROLS = [("VEPO", "random 20 %"), ("VEPO", "top entropy"), ("PRPO", "PRPO shuffled")]
CONTROLS += [("oracle: reads alone", "top entropy"), ("oracle: reads alone", "VEPO")]
RESULTS, RUNS = TOY / "comparison.jsonl", TOY.parent / "runs" / "comparison"
COLUMNS = ["accuracy", "perception", "reasoning", "entropy"]
recording = threading.Lock()
WINDOW = 30  # the last steps, that perception and reasoning are averaged over


def compact(lines):
    """What is kept of a run's metrics, with four digits: {column: [value of each step]} and the evaluations."""
    steps = [line | {"accuracy": line.get("accuracy_clean", line["accuracy"])} for line in lines if "reward" in line]
    columns = {name: [line[name] and float(f"{line[name]:.4g}") for line in steps] for name in COLUMNS}
    tests = [[line["step"], round(line["eval_accuracy"], 4)] for line in lines if "eval_accuracy" in line]
    return columns | {"evaluations": tests}


def records():
    """All that was recorded. The first 55 runs, of the toy, hold no accuracy but rewards: 0.9 accuracy + 0.1 format."""
    found = [json.loads(line) for line in (RESULTS.read_text().splitlines() if RESULTS.exists() else [])]
    for record in found:
        if "accuracy" not in record:
            record["accuracy"] = [(reward - 0.1) / 0.9 for reward in record["reward"]]  # 99.9 % are in the right format
    return found


def one(world, arm, seed, core):
    """Runs an arm with a seed on one core; adds its record to the others, and returns it."""
    script, *flags = ARMS[arm][0].split()
    name = "".join(c if c.isalnum() else "_" for c in arm)
    output = RUNS / f"{world}-{name}-{seed}"
    command = [sys.executable, str(Path(__file__).with_name("arm.py")), script, *flags]
    command += ["--model", world, "--seed", str(seed), "--output", str(output), "--eval_every", "75"]
    command += ["--show_every", "0"] + ["--resume"] * (output / "last").exists()
    with open(output.parent / f"{output.name}.log", "a") as log:
        pin = {"preexec_fn": lambda: os.sched_setaffinity(0, {core})} if hasattr(os, "sched_setaffinity") else {}
        pin |= {"env": os.environ | {"OMP_NUM_THREADS": "1"}}
        code = subprocess.run(command, stdout=log, stderr=log, **pin).returncode
    if code:
        raise UserError(f"{arm}, seed {seed} ended with exit code {code}: {log.name} says why; then start again.")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    if "eval_accuracy" not in lines[-1]:  # it was stopped in its last step
        raise UserError(f"{arm}, seed {seed} ended without its last evaluation: remove {output}, then start again.")
    with recording:  # before the run's folder goes, and whatever happens to the other runs
        record = {"world": world, "arm": arm, "seed": seed, **compact(lines)}
        known = RESULTS.read_text() if RESULTS.exists() else ""
        known += "\n" if known and not known.endswith("\n") else ""
        write_text(RESULTS, known + json.dumps(record, separators=(",", ":")) + "\n")
    shutil.rmtree(output)
    return record


def run(world, seeds, jobs):
    """Makes the runs of a world that were not recorded yet, `jobs` at a time; one comparison at a time."""
    RUNS.mkdir(parents=True, exist_ok=True)
    lock = FileLock(RUNS / ".lock")  # until this function ends
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another comparison writes to {RESULTS}: wait for its end.") from None
    done = {(record["world"], record["arm"], record["seed"]) for record in records()}
    left = [(arm, seed) for seed in range(seeds) for arm in ARMS if (world, arm, seed) not in done]
    cores, free = Queue(), sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    for job in range(jobs):
        cores.put(free[job % len(free)])

    failed = threading.Event()

    def task(arm, seed):
        core = cores.get()
        try:
            return None if failed.is_set() else one(world, arm, seed, core)
        except BaseException:
            failed.set()
            raise
        finally:
            cores.put(core)

    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(task, *what) for what in left]):
            if not (record := future.result()):  # after a failure the runs that have begun end, and no other begins
                continue
            print(f"{record['arm']:20s} seed {record['seed']}  {online(record):.1f} % online", flush=True)
    finally:
        failed.set()
        pool.shutdown(cancel_futures=True)


def online(record):
    """Accuracy of the sampled responses over the whole run, %."""
    return 100 * statistics.fmean(record["accuracy"])


def at_the_end(record):
    """Test accuracy after the last step, %."""
    return 100 * record["evaluations"][-1][1]


def late(name):
    """Of a column, the mean over the last steps, %; None where it was not recorded."""
    return lambda record: 100 * statistics.fmean(record[name][-WINDOW:]) if name in record else None


def interval(values):
    """Mean and half width of its 95 % interval by Student's t."""
    values = torch.tensor(values, dtype=torch.float64)
    if len(values) == 1:
        return values.item(), math.nan
    return values.mean().item(), stdtrit(len(values) - 1, 0.975) * values.std().item() / math.sqrt(len(values))


def differences(arm, base, measure):
    """Of two arms, {seed: record}, the differences of a measure on the seeds that both have."""
    return [measure(arm[seed]) - measure(base[seed]) for seed in sorted(arm.keys() & base.keys())]


def p_value(values):
    """Two-sided, of Student's t test that the mean of some values is 0; NaN where there is only one.

    >>> round(p_value([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    values, degrees = torch.tensor(values, dtype=torch.float64), len(values) - 1
    if degrees < 1:
        return math.nan
    t = (values.mean() / values.std().clamp(min=1e-12) * math.sqrt(len(values))).abs().item()
    return 2 * float(stdtr(degrees, -t))


def holm(values):
    """Holm's correction of {name: p value} for their number; NaN is not tested, and stays.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    tested = {name: p for name, p in values.items() if not math.isnan(p)}
    found, least = {}, 0.0
    for i, name in enumerate(sorted(tested, key=tested.get)):
        least = max(least, min(1.0, (len(tested) - i) * tested[name]))
        found[name] = least
    return found | {name: p for name, p in values.items() if name not in tested}


def report():
    """Prints a Markdown table for each world, and draws both.

    `paired`: points of accuracy against the arm's GRPO, seed by seed; ±: 95 % interval, of this comparison alone; p:
    of online accuracy, after Holm's correction for all comparisons of a world, those of CONTROLS among them; perception
    and reasoning: of the last steps.
    """
    gains = {}
    for world in EMBEDDED:
        found = {arm: {} for arm in ARMS}
        for record in records():
            if record["world"] == world:
                found[record["arm"]][record["seed"]] = record
        pairs = {arm: (found[arm], found[base]) for arm, (_, base) in ARMS.items()}
        pairs = {arm: pair for arm, pair in pairs.items() if pair[0].keys() & pair[1].keys()}
        own = {arm: pair for arm, pair in pairs.items() if ARMS[arm][1] != arm}  # all but the baselines
        controls = {(arm, other): (found[arm], found[other]) for arm, other in CONTROLS}
        controls = {names: pair for names, pair in controls.items() if pair[0].keys() & pair[1].keys()}
        tests = {name: differences(*pair, online) for name, pair in (own | controls).items()}
        corrected = holm({name: p_value(values) for name, values in tests.items()})
        gains[world] = {arm: interval(differences(*pair, online)) for arm, pair in own.items()}
        if not pairs:
            continue
        print(f"\n| {world} | seeds | online, % | paired | p | test, % | paired | perception | reasoning |")
        print("|---|---|---|---|---|---|---|---|---|")
        for arm, (seeds, base) in pairs.items():
            seeds = {seed: seeds[seed] for seed in seeds if seed in base}
            paired = {online: "-", at_the_end: "-"}
            if arm in own:
                paired = {measure: shown(differences(seeds, base, measure), "+") for measure in paired}
            cells = [arm, len(seeds), mean_of(seeds, online), paired[online]]
            cells += [p_shown(corrected[arm]) if arm in own else "-", mean_of(seeds, at_the_end), paired[at_the_end]]
            cells += [mean_of(seeds, late(name)) for name in ("perception", "reasoning")]
            print(f"| {' | '.join(map(str, cells))} |")
        for names in controls:
            print(f"{' against '.join(names)}: {shown(tests[names], '+')} online, p = {p_shown(corrected[names])}")
    draw(gains)


def mean_of(seeds, measure):
    """Mean and interval of a measure over {seed: record}, as text; a dash where it was not recorded."""
    known = [value for value in map(measure, seeds.values()) if value is not None]
    return shown(known) if known else "-"


def shown(values, sign=""):
    """Mean and interval of some values, as text; of one value itself."""
    mean, half = interval(values)
    return f"{mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def p_shown(p):
    return "-" if math.isnan(p) else f"{p:.2g}"


PREMISES = {  # name in signals.json: what it is
    "missed_by_entropy": "top JSD missed\nby entropy",
    "read_kept_by_entropy": "reads kept\nby entropy",
    "read_kept_by_vepo": "reads kept\nby VEPO",
    "read_changed_by_noise": "reads changed\nby noise",
}
COLOURS = {"read": "#8e6bd1", "derived": "#3d8bd9", "words": "#d8d8d8"}


def draw(gains):
    """toy/comparison.png, one column a world: premises, where the gradient comes from, and {world: {arm: its gain}}."""
    figure = Figure(figsize=(11, 11), layout="constrained")
    panels, credit = figure.subplots(3, len(EMBEDDED), height_ratios=[0.8, 1, 1]), measured(TOY / "credit.json")
    for (top, middle, bottom), (world, folder) in zip(panels.T, EMBEDDED.items()):
        signals = measured(folder / "signals.json").get("signals", {})
        for i, name in enumerate(PREMISES):
            if signals.get(name, {}).get("low") is None:  # not measured, or on a single prompt
                continue
            low, mean, high = (100 * signals[name][side] for side in ("low", "mean", "high"))
            top.bar(i, mean, yerr=[[mean - low], [high - mean]], capsize=3, color="#8e6bd1")
        top.plot([-0.4, 0.4], [41, 41], color="black", linestyle=":", linewidth=1.5)  # VEPO's paper, on a 7B
        top.set_xticks(range(len(PREMISES)), PREMISES.values(), fontsize=8)
        top.set(ylim=(0, 105), title=f"{world}: premises, % (dotted: VEPO's paper, 7B)")
        arms = credit.get(world, {}).get("arms", {})
        left = [0.0] * len(arms)
        for kind, colour in COLOURS.items():
            widths = [100 * values[f"share_{kind}"][0] for values in arms.values()]
            middle.barh(range(len(arms)), widths, left=left, color=colour, label=kind)
            left = [a + b for a, b in zip(left, widths)]
        middle.set_yticks(range(len(arms)), arms, fontsize=8)
        middle.set_title("share of the squared gradient norm, %, by kind of token")
        middle.invert_yaxis()
        middle.legend(fontsize=8, loc="lower right")
        for i, (mean, half) in enumerate(gains[world].values()):
            bottom.errorbar(mean, i, xerr=half, fmt="o", color="#3d8bd9", capsize=3)
        bottom.axvline(0, color="black", linewidth=1)
        bottom.set_yticks(range(len(gains[world])), gains[world], fontsize=8)
        bottom.invert_yaxis()
        bottom.set_title("points of online accuracy against its GRPO, 95 %")
        for axes in (top, middle, bottom):
            axes.title.set_fontsize(10)
            axes.grid(alpha=0.3)
    figure.savefig(TOY / "comparison.png", dpi=130)


def measured(path):
    """A file of measurements; {} where it was not made yet. Raises UserError."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is broken: remove it, and measure again.")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=[*EMBEDDED], default="toy-faint", help="that runs are made in")
    parser.add_argument("--seeds", type=int, default=8, help="of each arm")
    parser.add_argument("--report", action="store_true", help="no run, only the tables and the image")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    options = parser.parse_args()
    for name in ("jobs", "seeds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be above 0.")
    try:
        if not options.report:
            run(options.world, options.seeds, options.jobs)
        report()
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
