"""Draws toy/picture.png: puzzles of the toy, and the accuracy of runs on it.

for seed in 0 1 2; do python grpo.py --seed $seed --output runs/grpo-$seed; done
python toy/picture.py runs/grpo-*
"""

import json
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make  # noqa: E402


def main():
    figure = plt.figure(figsize=(11, 3.6), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[1, 1, 1, 2.6])
    made = list(make.rows("picture", 140))
    full = [[p for p in made[i::7] if min(p["counts"]) > 0] for i in (0, 1, 2, 3, 4)]  # the families of one picture
    shown = [full[1][0], full[3][0], full[4][0], full[0][0], full[2][0], full[3][1]]
    for place, puzzle in enumerate(shown):
        axes = figure.add_subplot(grid[place // 3, place % 3])
        axes.imshow(puzzle["images"][0])
        axes.axis("off")
        thought, answer = puzzle["solve"](*puzzle["counts"])
        question = puzzle["problem"].replace("<image>", "").replace(", each kind counted by itself", "")
        axes.set_title(textwrap.fill(question, 34), fontsize=7)
        text = f"{thought} \u2192 {answer}"
        axes.text(0.5, -0.06, textwrap.fill(text, 36), fontsize=7, ha="center", va="top", transform=axes.transAxes)
    axes = figure.add_subplot(grid[:, 3])
    for folder in sys.argv[1:]:
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        points = [(line["step"], 100 * line["eval_accuracy"]) for line in lines if "eval_accuracy" in line]
        axes.plot(*zip(*points), marker="o", markersize=3, label=Path(folder).name)
    axes.set(xlabel="step", ylabel="test accuracy, % (sampled at T = 1)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(make.TOY / "picture.png", dpi=130)


if __name__ == "__main__":
    main()
