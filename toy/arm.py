"""One arm of the comparison: a method's own script, in an embedded world, which also says what is read and derived.

    python toy/arm.py vepo.py --model toy-faint --seed 3     # the flags are the script's own
    python toy/arm.py oracle --model toy-faint               # grpo.py on the reads alone

Into metrics.jsonl, of the sampled responses to prompts with an image (SaEI: to the clean one): `perception`, those
whose reads are all right, and `reasoning`, those whose answer follows from what they read. The oracle is a yardstick
for choices of tokens. It knows the grammar (plumbing/kinds.py): its loss is over the numbers that a response reads,
also off the text where there is no image, and over no other token.
"""

import importlib
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from worlds import conclude  # noqa: E402

import trainer  # noqa: E402
from plumbing.answers import extract_answer  # noqa: E402
from plumbing.arguments import EMBEDDED, UserError  # noqa: E402
from toy.kinds import KINDS, kinds_of, reads  # noqa: E402


def kind_masks(group, decode):
    """{kind: (G, T) bool} of a group's tokens."""
    masks = {kind: torch.zeros_like(group.mask) for kind in KINDS}
    for i, (response, valid) in enumerate(zip(group.responses, group.mask)):
        for t, kind in enumerate(kinds_of([decode([token]) for token in response[valid].tolist()])):
            masks[kind][i, t] = True
    return masks


def judged(text, family, counts):
    """Of a response: are all its reads right, and does its answer follow from what it read?

    >>> judged("<think>I count 2 red shapes and 1 circles. So 2 + 1 = 3.</think> \\\\boxed{3}", "sum", [2, 2])
    (False, True)
    """
    said, answer = reads(text), extract_answer(text)
    if len(said) != len(counts):
        return False, False
    if family == "choice":  # of several that are the most, any
        return said == counts, answer in [letter for letter, n in zip("ABC", said) if n == max(said)]
    return said == counts, answer == conclude(family, said)


class WorldRun(trainer.Trainer):
    """A run that knows the grammar of its world."""

    oracle = False

    def load_data(self):
        super().load_data()
        if self.args.data not in EMBEDDED:
            raise UserError(f"--data {self.args.data} is none of the embedded worlds: {', '.join(EMBEDDED)}.")
        self.truth = self.data.rows.select_columns(["family", "reads"])

    def keep_groups(self, groups, sampled):
        for group in sampled:
            if group.prompt.pixel_values is not None:
                truth = self.truth[group.prompt.index]
                for text in group.texts[: getattr(self.args, "n1", None)]:  # the first half of SaEI's
                    right, follows = judged(text, truth["family"], truth["reads"])
                    self.metrics.add("perception", right, 1)
                    self.metrics.add("reasoning", follows, 1)
        return super().keep_groups(groups, sampled)

    def minibatches(self, rows):
        for row in rows if self.oracle else []:
            row.loss_mask = row.loss_mask & kind_masks(row, self.tokenizer.decode)["read"]
        return super().minibatches(rows)


def main():
    script, *flags = sys.argv[1:] or [""]
    if script in ("-h", "--help"):
        print(__doc__)
        return
    name = "grpo" if script == "oracle" else script.removesuffix(".py")
    if name not in ("grpo", "vepo", "vgpo", "prpo", "pepo", "saei"):
        raise UserError(
            f"'{script}' is no arm: name one of the six scripts, such as vepo.py, or oracle, then its flags."
        )
    WorldRun.oracle = script == "oracle"
    trainer.Trainer = WorldRun  # before the script takes it from there
    sys.argv = [f"{Path(script).stem}.py", *flags]  # what --resume and the default --output go by
    importlib.import_module(name).main()


if __name__ == "__main__":
    main()
