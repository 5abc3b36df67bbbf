"""Draws toy/picture.png: puzzles of the toy, each with a right response.

python toy/picture.py
"""

import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make  # noqa: E402


def main():
    made = list(make.rows("picture", 140))
    full = [[p for p in made[i::7] if min(p["counts"]) > 0] for i in (0, 1, 2, 3, 4)]  # the families of one picture
    shown = [full[1][0], full[3][0], full[4][0], full[0][0], full[2][0], full[3][1]]
    figure = Figure(figsize=(13, 2.4), layout="constrained")
    row = figure.subplots(1, len(shown))
    for axes, puzzle in zip(row, shown):
        axes.imshow(puzzle["images"][0])
        axes.axis("off")
        thought, answer = puzzle["solve"](*puzzle["counts"])
        question = puzzle["problem"].replace("<image>", "").replace(", each kind counted by itself", "")
        axes.set_title(textwrap.fill(question, 30), fontsize=7)
        text = f"{thought} \u2192 {answer}"
        axes.text(0.5, -0.06, textwrap.fill(text, 32), fontsize=7, ha="center", va="top", transform=axes.transAxes)
    figure.savefig(make.TOY / "picture.png", dpi=130)


if __name__ == "__main__":
    main()
