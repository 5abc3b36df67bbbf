"""Draws toy/image.png: puzzles of both worlds, each with a right response.

python toy/image.py
"""

import random
import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
from worlds import WORLDS  # noqa: E402


def main():
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    for row, world in zip(figure.subplots(2, 5), WORLDS.values()):
        made = [puzzle for puzzle in world.puzzles("picture", 140) if len(puzzle.images) == 1]
        several = len(made) // 20  # families of one image, in turn
        full = [next(p for p in made[i % several :: several] if min(p.counts) > 0) for i in range(5)]
        for axes, puzzle in zip(row, full):
            axes.imshow(puzzle.images[0])
            axes.axis("off")
            question = puzzle.problem.replace("<image>", "").replace(", each kind counted by itself", "")
            axes.set_title(textwrap.fill(question, 36), fontsize=7)
            thought = puzzle.response(puzzle.counts, random.Random(0), world.words)
            text = thought.replace("<think>", "").replace("</think>", "").replace("\\boxed", "\u2192 ")
            axes.text(0.5, -0.06, textwrap.fill(text, 40), fontsize=7, ha="center", va="top", transform=axes.transAxes)
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=110)


if __name__ == "__main__":
    main()
