"""Trains one variant of the comparison: a method's script on a toy task, with more metrics.

    python toy/variant.py vepo.py --model toy-faint --seed 3     # the flags are those of the script
    python toy/variant.py oracle --model toy-faint               # grpo.py on the perception tokens only

Two metrics of the sampled responses to prompts with an image (SaEI: to the clean image) are added to metrics.jsonl:
`perception`, the share whose counts are all right, and `reasoning`, the share whose answer follows from their counts.
The oracle is an upper reference for methods that select tokens. It knows the grammar of the responses
(toy/kinds.py): only the numbers that a response reads off the image, or off the text, are in its loss.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from puzzles import conclude  # noqa: E402

import trainer  # noqa: E402
from plumbing.answers import extract_answer  # noqa: E402
from toy.kinds import KINDS, kinds_of, reads  # noqa: E402


def kind_masks(group, decode):
    """{kind: (G, T) bool} of a group's tokens."""
    masks = {kind: torch.zeros_like(group.mask) for kind in KINDS}
    for i, (response, valid) in enumerate(zip(group.responses, group.mask)):
        for t, kind in enumerate(kinds_of([decode([token]) for token in response[valid].tolist()])):
            masks[kind][i, t] = True
    return masks


def assess(text, family, counts):
    """(perception, reasoning) of a response: are all its counts right, and does its answer follow from its counts?

    >>> assess("<think>I count 2 red shapes and 1 circles. So 2 + 1 = 3.</think> \\\\boxed{3}", "sum", [2, 2])
    (False, True)
    """
    numbers, answer = reads(text), extract_answer(text)
    if len(numbers) != len(counts):
        return False, False
    if family == "choice":  # where several are the most common, each is right
        return numbers == counts, answer in [letter for letter, n in zip("ABC", numbers) if n == max(numbers)]
    return numbers == counts, answer == conclude(family, numbers)


class ToyTrainer(trainer.Trainer):
    """A trainer that knows the grammar of its toy task."""

    oracle = False

    def keep_groups(self, groups, sampled):
        for group in sampled:
            if group.prompt.pixel_values is not None:
                row = self.data.rows[group.prompt.index]
                for text in group.texts[: getattr(self.args, "n1", None)]:  # SaEI: those that saw the clean image
                    perception, reasoning = assess(text, row["family"], row["reads"])
                    self.metrics.add("perception", perception, 1)
                    self.metrics.add("reasoning", reasoning, 1)
        return super().keep_groups(groups, sampled)

    def minibatches(self, rows):
        if self.oracle:
            for row in rows:
                row.loss_mask = row.loss_mask & kind_masks(row, self.tokenizer.decode)["read"]
        return super().minibatches(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scripts = ["grpo.py", "vepo.py", "vgpo.py", "prpo.py", "pepo.py", "saei.py", "vppo.py"]
    parser.add_argument("script", choices=[*scripts, "oracle"])
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    ToyTrainer.oracle = options.script == "oracle"
    trainer.Trainer = ToyTrainer  # before the script imports it
    name = Path(options.script).stem
    sys.argv = [f"{name}.py", *options.flags]  # --resume and the default --output go by the name of the script
    importlib.import_module("grpo" if ToyTrainer.oracle else name).main()


if __name__ == "__main__":
    main()
