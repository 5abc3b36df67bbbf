"""Compares all methods on both toy tasks, over several seeds; trains the runs that toy/comparison.jsonl lacks.

    python toy/compare.py --toy toy-faint         # hours on 2 cores; may be stopped and started again
    python toy/compare.py --search                # GRPO and LoRA at four learning rates each, on toy-faint
    python toy/compare.py --report                # only the tables and the two figures, from the recorded runs

Every run: 150 steps of 16 prompts with 8 responses each. SaEI samples 6 + 6, and is compared with a GRPO that samples
12. The learning rate is the default (LoRA's is ten times as high), and each method has the constants of its paper:
nothing was tuned, but of four rates these are the best (--search). DAPO leaves out groups that are all correct or all
wrong and does not replace them, so that all variants sample as many responses.

The main figure is online accuracy: of all responses sampled during the run, on prompts that are new (of the 2,002 of
`toy` some come again in the last 25 steps), the same prompts in the same order for every variant of a seed. It costs
no extra evaluation, and paired by seed it is the figure with the least noise. Test accuracy is printed next to it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy
import pandas
from matplotlib.figure import Figure
from scipy.special import stdtrit
from scipy.stats import ttest_1samp

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))
from plumbing.arguments import EMBEDDED, UserError  # noqa: E402

ORACLE = "oracle: perception tokens only"
VARIANTS = {  # name: (script of toy/variant.py and its flags, the variant that it is compared with)
    "GRPO": ("grpo.py", "GRPO"),
    "DAPO": ("grpo.py --clip_high 0.28 --filter_groups --filter_tries 1 --drop_truncated", "GRPO"),
    "VEPO": ("vepo.py", "GRPO"),
    "VGPO": ("vgpo.py", "GRPO"),
    "PRPO": ("prpo.py", "GRPO"),
    "PEPO": ("pepo.py", "GRPO"),
    "VPPO": ("vppo.py", "GRPO"),
    "VPPO without entropy penalty": ("vppo.py --entropy_coef 0", "GRPO"),
    "GRPO with entropy penalty": ("grpo.py --entropy_coef -0.06", "GRPO"),
    "top entropy": ("vepo.py --select entropy", "GRPO"),
    "random 20 %": ("vepo.py --select random", "GRPO"),
    "PRPO shuffled": ("prpo.py --shuffle", "GRPO"),
    ORACLE: ("oracle", "GRPO"),
    "GRPO, LoRA rank 8": ("grpo.py --lora_rank 8", "GRPO"),
    "GRPO, 12": ("grpo.py --group_size 12", "GRPO, 12"),
    "SaEI, 6 + 6": ("saei.py", "GRPO, 12"),
}
CONTROLS = [("VEPO", "random 20 %"), ("VEPO", "top entropy"), ("PRPO", "PRPO shuffled"), ("VEPO", "VPPO")]
CONTROLS += [("VPPO", "GRPO with entropy penalty"), (ORACLE, "top entropy"), (ORACLE, "VEPO")]
TOKEN_LEVEL = ["VEPO", "VGPO", "PRPO", "PEPO", "VPPO", "SaEI, 6 + 6"]
SEARCH = {"GRPO": [3e-5, 1e-4, 3e-4, 1e-3], "GRPO, LoRA rank 8": [1e-4, 3e-4, 1e-3, 3e-3]}  # learning rates
SEARCH_SEEDS = range(100, 104)  # which no other table has
RESULTS, RUNS = TOY / "comparison.jsonl", TOY.parent / "runs" / "comparison"
COLUMNS = ["accuracy", "perception", "reasoning", "entropy"]
MEASURES = ["online", "test", "perception", "reasoning"]
WINDOW = 30  # the last steps, over which perception and reasoning are averaged
writing = threading.Lock()


# ---- runs -----------------------------------------------------------------------------------------------------------


def compact(lines):
    """The recorded part of a run's metrics, with four digits: {column: [value of each step]} and the evaluations."""
    steps = [line | {"accuracy": line.get("accuracy_clean", line["accuracy"])} for line in lines if "reward" in line]
    columns = {name: [line[name] and float(f"{line[name]:.4g}") for line in steps] for name in COLUMNS}
    tests = [[line["step"], round(line["eval_accuracy"], 4)] for line in lines if "eval_accuracy" in line]
    return columns | {"evaluations": tests}


def read_records():
    """All recorded runs.

    The first 50, on `toy`, logged no accuracy. Theirs was computed from the reward, 0.9 accuracy + 0.1 format, as
    99.9 % of the responses have the right format.
    """
    return [json.loads(line) for line in (RESULTS.read_text().splitlines() if RESULTS.exists() else [])]


def train(toy, variant, seed, rate=None):
    """Trains a variant with a seed in another process, appends its record to the others, and returns it.

    rate: the learning rate; None: the default.
    """
    script, *flags = VARIANTS[variant][0].split()
    flags += ["--learning_rate", str(rate)] if rate else []
    name = "".join(c if c.isalnum() else "_" for c in f"{variant} {rate or ''}".strip())
    output = RUNS / f"{toy}-{name}-{seed}"
    command = [sys.executable, str(TOY / "variant.py"), script, *flags, "--model", toy, "--seed", str(seed)]
    command += ["--output", str(output), "--eval_every", "75", "--show_every", "0"]
    if (output / "last").exists():
        command.append("--resume")
    with (RUNS / f"{output.name}.log").open("a") as file:  # says why, where a run fails
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=file, stderr=file, env=environment, check=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    if "eval_accuracy" not in lines[-1]:  # it was stopped in its last step
        raise UserError(f"{variant}, seed {seed} ended without its last evaluation: remove {output}, then start again.")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=TOY, capture_output=True, text=True
    ).stdout.strip()
    record = {"toy": toy, "variant": variant, "seed": seed, "rate": rate, "commit": commit, **compact(lines)}
    with writing, RESULTS.open("a") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")
    shutil.rmtree(output)
    return record


def train_missing(runs, jobs):
    """Trains those of the runs (toy, variant, seed, rate) that are not recorded yet, `jobs` at a time."""
    RUNS.mkdir(parents=True, exist_ok=True)
    done = {(record["toy"], record["variant"], record["seed"], record.get("rate")) for record in read_records()}
    missing = [run for run in runs if run not in done]
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(train, *run) for run in missing]):
            record = future.result()
            print(f"{record['variant']:30s} seed {record['seed']}  {measures(record)['online']:.1f} % online")
    finally:  # after a failure the runs that have begun go on to their end
        pool.shutdown(cancel_futures=True)


# ---- report ---------------------------------------------------------------------------------------------------------


def measures(record):
    """{name: %} of a run; perception and reasoning, of the last steps, are missing in old records."""
    percent = 100 * pandas.DataFrame({name: record[name] for name in COLUMNS if name in record})
    last = percent.tail(WINDOW).reindex(columns=["perception", "reasoning"]).mean()
    return {"online": percent["accuracy"].mean(), "test": 100 * record["evaluations"][-1][1], **last}


def interval(values):
    """Mean and half width of its 95 % interval by Student's t; NaN for the half width of a single value."""
    return values.mean(), stdtrit(len(values) - 1, 0.975) * values.sem()


def holm(p_values):
    """Holm's correction of {name: p value} for their number.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    ordered = pandas.Series(p_values, dtype=float).sort_values()
    return (ordered * numpy.arange(len(ordered), 0, -1)).cummax().clip(upper=1).to_dict()


def shown(values, sign=""):
    """Mean and interval of the values that are not missing, as text; a dash where there is none."""
    values = values.dropna()
    if values.empty:
        return "-"
    mean, half = interval(values)
    return f"{mean:{sign}z.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def gain(runs, measure, variant, base):
    """The differences of a measure between two variants, on the seeds that both have."""
    return (runs[measure, variant] - runs[measure, base]).dropna()


def report_search(records):
    """Prints the online accuracy of the search's seeds, a row for each learning rate."""
    found = records[records["seed"].isin(SEARCH_SEEDS)]
    if len(found):
        print("| toy-faint | learning rate | seeds | online, % | test, % |\n|---|---|---|---|---|")
    for (variant, rate), runs in found.groupby(["variant", "rate"]):
        print(f"| {variant} | {rate:g} | {len(runs)} | {shown(runs['online'])} | {shown(runs['test'])} |")


def report():
    """Prints a Markdown table for each toy task, and draws toy/comparison.png and toy/gains.png.

    `paired`: difference to GRPO on the same seeds, in points; ±: 95 % interval of this comparison alone; p: of online
    accuracy, with Holm's correction for all comparisons on a toy task, those of CONTROLS among them; perception and
    reasoning: of the last steps.
    """
    records, gains = pandas.DataFrame([{"rate": None} | x | measures(x) for x in read_records()]), {}
    report_search(records)
    records = records[records["rate"].isna()]
    pairs = [(variant, base) for variant, (_, base) in VARIANTS.items() if variant != base]
    for toy in EMBEDDED:
        runs = records[records["toy"] == toy].pivot(index="seed", columns="variant", values=MEASURES)
        runs = runs.reindex(columns=pandas.MultiIndex.from_product([MEASURES, VARIANTS]))
        online = {pair: gain(runs, "online", *pair) for pair in pairs + CONTROLS}
        p_values = holm({pair: ttest_1samp(points, 0).pvalue for pair, points in online.items() if len(points) > 1})
        p_values = {pair: f"{p:.2g}" for pair, p in p_values.items()}
        print(f"\n| {toy} | seeds | online, % | paired | p | test, % | paired | perception | reasoning |")
        print("|---|---|---|---|---|---|---|---|---|")
        for variant, (_, base) in VARIANTS.items():
            pair = (variant, base)
            own = runs[runs["online", variant].notna() & runs["online", base].notna()]
            means = [shown(own[name, variant]) for name in MEASURES]
            points = test_points = "-"
            if variant != base:
                points, test_points = shown(online[pair], "+"), shown(gain(runs, "test", *pair), "+")
            cells = [variant, str(len(own)), means[0], points, p_values.get(pair, "-"), means[1], test_points]
            if len(own):
                print(f"| {' | '.join(cells + means[2:])} |")
        for pair in CONTROLS:
            if len(online[pair]):
                print(f"{' against '.join(pair)}: {shown(online[pair], '+')} online, p = {p_values.get(pair, '-')}")
        found = {variant: interval(online[variant, base]) for variant, base in pairs if len(online[variant, base])}
        gains[toy] = pandas.DataFrame(found, index=["mean", "half"]).T
    draw(gains)
    draw_gains(gains["toy-faint"])


ASSUMPTIONS = {  # name in signals.json: its label
    "missed_by_entropy": "top JSD\nmissed by\nentropy",
    "read_kept_by_entropy": "perception\nkept by\nentropy",
    "read_kept_by_vepo": "perception\nkept by\nVEPO",
    "read_changed_by_noise": "perception\nchanged by\nnoise",
}
KINDS = {"read": ("perception", "#8e6bd1"), "derived": ("derived", "#3d8bd9"), "words": ("filler words", "#d8d8d8")}


def draw(gains):
    """toy/comparison.png, a column for each toy task: assumptions, gradient by kind of token, gains in accuracy.

    `gains`: {toy: table of mean and half width by variant}. The other values are those of signals.json and credit.json.
    """
    figure = Figure(figsize=(11, 11), layout="constrained")
    axes = figure.subplots(3, len(EMBEDDED), height_ratios=[0.8, 1, 1])
    credit = json.loads((TOY / "credit.json").read_text())
    for (top, middle, bottom), (toy, folder) in zip(axes.T, EMBEDDED.items()):
        signals = json.loads((folder / "signals.json").read_text())["signals"]
        found = 100 * pandas.DataFrame({label: signals[name] for name, label in ASSUMPTIONS.items()}).T
        errors = [found["mean"] - found["low"], found["high"] - found["mean"]]
        top.bar(found.index, found["mean"], yerr=errors, capsize=3, color="#8e6bd1")
        top.plot([-0.4, 0.4], [41, 41], color="black", linestyle=":", linewidth=1.5)  # VEPO's paper, on a 7B
        top.set(ylim=(0, 105), title=f"{toy}: assumptions, % (dotted: VEPO's paper, 7B)")

        variants, left = credit[toy]["variants"], 0.0
        for kind, (label, colour) in KINDS.items():
            widths = numpy.array([100 * values[f"share_{kind}"][0] for values in variants.values()])
            middle.barh(list(variants), widths, left=left, color=colour, label=label)
            left = left + widths
        middle.set_title("squared gradient norm by kind of token, %")
        middle.invert_yaxis()
        middle.legend(fontsize=8, loc="lower right")

        points = gains[toy]
        bottom.errorbar(points["mean"], points.index, xerr=points["half"], fmt="o", color="#3d8bd9", capsize=3)
        bottom.axvline(0, color="black", linewidth=1)
        bottom.invert_yaxis()
        bottom.set_title("points of online accuracy against its GRPO, 95 %")
        for panel in (top, middle, bottom):
            panel.title.set_fontsize(10)
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.3)
    figure.savefig(TOY / "comparison.png", dpi=130)


def draw_gains(points):
    """toy/gains.png: the gains of all variants on toy-faint, sorted; the token-level methods in blue."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    points = points.sort_values("mean")
    for i, (variant, (mean, half)) in enumerate(points.iterrows()):
        colour = "#3d8bd9" if variant in TOKEN_LEVEL else "#8a8a8a"
        axes.errorbar(mean, i, xerr=half, fmt="o", color=colour, capsize=4, markersize=7)
        place, side = (mean + half + 0.1, "left") if mean > -0.05 else (mean - half - 0.1, "right")
        axes.text(place, i, f"{mean:+z.1f}", va="center", ha=side, fontsize=9)
    axes.set_yticks(range(len(points)), points.index)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_title("Accuracy compared with GRPO, in percentage points", loc="left", fontweight="bold")
    below = "toy with faint shapes, 95 % intervals over seeds; SaEI: against GRPO with 12; blue: methods"
    axes.set_xlabel(f"← worse than GRPO     better than GRPO →\n{below}")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.1)
    figure.savefig(TOY / "gains.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", choices=[*EMBEDDED], default="toy-faint", help="toy task to train on")
    parser.add_argument("--seeds", type=int, default=8, help="of each variant")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--search", action="store_true", help="train GRPO and LoRA at several learning rates")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    runs = [(options.toy, variant, seed, None) for seed in range(options.seeds) for variant in VARIANTS]
    if options.search:
        rates = [(variant, rate) for variant, own in SEARCH.items() for rate in own]
        runs = [("toy-faint", variant, seed, rate) for seed in SEARCH_SEEDS for variant, rate in rates]
    if not options.report:
        train_missing(runs, options.jobs)
    report()


if __name__ == "__main__":
    main()
