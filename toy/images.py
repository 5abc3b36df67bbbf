"""Draws toy/picture.png: puzzles of both toy tasks, each with a right response.

python toy/images.py
"""

import random
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from puzzles import TOY_TASKS

figure = Figure(figsize=(13, 5.4), layout="constrained")
for row, task in zip(figure.subplots(2, 5), TOY_TASKS.values()):
    puzzles = [puzzle for puzzle in task.puzzles("picture", 140) if len(puzzle.images) == 1]
    families = len(puzzles) // 20  # those of one image, in turn
    for i, axes in enumerate(row):
        puzzle = next(p for p in puzzles[i % families :: families] if min(p.counts) > 0)
        axes.imshow(puzzle.images[0])
        axes.axis("off")
        question = puzzle.problem.replace("<image>", "").replace(", each kind counted by itself", "")
        axes.set_title(textwrap.fill(question, 36), fontsize=7)
        response = puzzle.response(puzzle.counts, random.Random(0), task.words)
        text = response.replace("<think>", "").replace("</think>", "").replace("\\boxed", "\u2192 ")
        axes.text(0.5, -0.06, textwrap.fill(text, 40), fontsize=7, ha="center", va="top", transform=axes.transAxes)
figure.savefig(Path(__file__).with_name("picture.png"), dpi=110)
