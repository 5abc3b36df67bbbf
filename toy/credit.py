"""Where a method's gradient comes from, and how well it points: why the arms of the comparison differ, or do not.

    python toy/credit.py                    # both worlds, an hour on one core; writes toy/credit.json
    python toy/credit.py --world toy-faint --prompts 128 --output credit.json

From the model before reinforcement learning: 8 responses to each of --prompts training prompts with an image (12,
and 6 + 6, for SaEI). A batch is 16 prompts, as in a step of the comparison; groups of equal rewards stay in it, with
a gradient of 0. It is the gradient of the policy term alone, without VEPO's entropy bonus. Of an arm's gradient g of
a batch, the sum of the parts g_k from tokens of kind k:

    share     sum <g_k, g> / sum |g|^2 over all batches: the parts of reads, derived and words sum to 1
    cosine    of g and the gradient of GRPO with 12 responses on all other batches: is it near the policy gradient?
              That one has noise of its own, less with more --prompts, so compare arms with each other
    signal    |mean g|^2 / variance of g, for one batch: a ratio of two unbiased estimates, from products of batches

Intervals are 95 %, by the jackknife over batches.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from scipy.special import stdtrit
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from arm import kind_masks  # noqa: E402
from compare import measured  # noqa: E402

import pepo  # noqa: E402
import prpo  # noqa: E402
import saei  # noqa: E402
import vepo  # noqa: E402
import vgpo  # noqa: E402
from common import (  # noqa: E402  # noqa: E402
    Reward,
    compare_logits,
    forward,
    group_advantages,
    load_model,
    load_processor,
    rollout,
    token_uniforms,
)
from plumbing.arguments import (  # noqa: E402
    EMBEDDED,
    TOY,
    SharedArgs,
    UserError,  # noqa: E402
    model_source,
)
from plumbing.checkpoints import write_text  # noqa: E402
from plumbing.data import Data  # noqa: E402
from show import run_of, writable  # noqa: E402
from toy.kinds import KINDS  # noqa: E402

BATCH = 16  # prompts of a step
REFERENCE = "GRPO, 12"


def arm_weights(row, run, hidden, entropy):
    """{arm: (G, T)}: what each arm of the comparison, with its default constants, makes of a response's advantage."""
    mask = row.mask
    noised = vepo.noised_hidden(row, run, vepo.Args(), 0)
    jsd, _, noised_entropy = compare_logits(vepo.divergences, run.model, row, hidden, noised)
    views = prpo.perturbed_hidden(row, run, prpo.Args(), 0)
    rvd = prpo.robust_visual_dependency(*compare_logits(prpo.divergences, run.model, row, hidden, *views), mask)
    uniforms = token_uniforms(row, 0, 0)
    focused, weighed = dataclasses.replace(row), dataclasses.replace(row)
    focused.scores = vgpo.row_focus(hidden, row, vgpo.Args())
    vgpo.set_weights([focused], run, vgpo.Args())
    pepo.scoring_forward(weighed, run, pepo.Args())
    return {
        "GRPO": mask,
        "VEPO": vepo.select_top(vepo.token_scores(jsd, entropy, noised_entropy, mask), mask),
        "VGPO": focused.weights,
        "PRPO": prpo.token_weights(rvd, mask),
        "PEPO": weighed.weights,  # as at the end of a run
        "top entropy": vepo.select_top(entropy, mask),
        "random 20 %": vepo.select_top(uniforms, mask),
        "PRPO shuffled": prpo.token_weights(prpo.shuffled(rvd, mask, uniforms), mask),
        "oracle: reads alone": kind_masks(row, run.tokenizer.decode)["read"],
    }


class Gradients:
    """An arm's gradients, batch by batch: the whole g (N,), and <g_k, g> of each kind of token."""

    def __init__(self, parameters, batch):
        self.parameters, self.batch, self.batches, self.parts = parameters, batch, [], []
        self.start()

    def start(self):
        self.prompts, self.sums = 0, torch.zeros(len(KINDS), sum(p.numel() for p in self.parameters))

    def add(self, logps, advantages, weights, kinds):
        """A group's: of -sum_t A w_t log p_t over the tokens of each kind; advantages (G,), the others (G, T)."""
        for total, kind in zip(self.sums, KINDS):
            loss = -(advantages[:, None] * weights * logps * kinds[kind]).sum()
            slopes = torch.autograd.grad(loss, self.parameters, retain_graph=True, materialize_grads=True)
            total += torch.cat([slope.flatten() for slope in slopes]).cpu()

    def end_prompt(self):
        self.prompts += 1
        if self.prompts == self.batch:
            self.batches.append(self.sums.sum(0))
            self.parts.append(self.sums @ self.batches[-1])
            self.start()


def jackknife(function, n):
    """`function(kept)` of all n batches, and the half width of its 95 % interval by leaving each out in turn."""
    every = torch.arange(n)
    left = torch.tensor([function(every[every != i]) for i in range(n)], dtype=torch.float64)
    half = stdtrit(n - 1, 0.975) * math.sqrt((n - 1) / n * (left - left.mean()).square().sum().item())
    return [round(function(every), 6), round(half, 6)]


def summary(own, reference):
    """{name: [value, half width]} of an arm's gradients; cosines with those of the reference."""
    G, R, parts = torch.stack(own.batches), torch.stack(reference.batches), torch.stack(own.parts).double()
    gram, cross, plain = ((a @ b.T).double() for a, b in ((G, G), (G, R), (R, R)))

    def share(k):
        return lambda kept: (parts[kept, k].sum() / parts[kept].sum()).item()

    def cosine(kept):  # of each batch, and the reference's sum over the others
        inner, squares = cross[kept][:, kept], plain[kept][:, kept]
        products = inner.sum(1) - inner.diagonal()
        lengths = squares.sum() - 2 * squares.sum(1) + squares.diagonal()
        return (products / (gram[kept, kept] * lengths).sqrt()).mean().item()

    def signal(kept):
        n, square = len(kept), gram[kept, kept].mean()
        mean = (gram[kept][:, kept].sum() - n * square) / (n * (n - 1))  # of products of different batches
        return (mean / (square - mean)).item()

    measures = {f"share_{kind}": share(k) for k, kind in enumerate(KINDS)} | {"cosine": cosine, "signal": signal}
    return {name: jackknife(measure, len(G)) for name, measure in measures.items()}


def credit(world, wanted):
    """{arm: its summary} over so many prompts, and how many of their groups had unequal rewards."""
    args = SharedArgs(model=world, group_size=12)
    processor, model = load_processor(model_source(args)), load_model(model_source(args))
    run, reward = run_of(model, processor), Reward(args)
    data = Data(world, "train", args, processor, model)
    rows = [index for index in data.indices if data.rows[index]["images"]]
    if len(rows) < wanted:
        raise UserError(f"--prompts {wanted}: {world} has {len(rows)} training prompts with an image.")
    found, unequal = {}, 0
    for prompt_id, index in enumerate(tqdm(rows[:wanted], desc=world, unit="prompt")):
        prompt = dataclasses.replace(data.prompt(index), prompt_id=prompt_id)
        (twelve,) = rollout(model, processor.tokenizer, [prompt], args, "credit")
        moved = saei.attack(twelve[: saei.Args.n1], run, saei.Args())
        (attacked,) = rollout(model, processor.tokenizer, [moved], args, "credit", slice(saei.Args.n1, None))
        groups = {"GRPO": twelve[:8], REFERENCE: twelve, "SaEI, 6 + 6": saei.join(twelve[: saei.Args.n1], attacked)}
        for name, group in groups.items():
            advantages = group_advantages(reward([group])[0].rewards[None])[0]  # (G,), 0 where all rewards are equal
            logps, entropy, hidden = forward(model, group)
            weights, kinds = {name: group.mask}, kind_masks(group, processor.tokenizer.decode)
            if name == "GRPO":
                unequal += bool(advantages.any())
                with torch.no_grad():
                    weights = arm_weights(group, run, hidden.detach(), entropy.detach())
            for arm, weight in weights.items():
                own = found.setdefault(arm, Gradients(list(model.parameters()), BATCH))
                if advantages.any():
                    own.add(logps, advantages, weight, kinds)
                own.end_prompt()
    reward.check.close()
    arms = {arm: summary(own, found[REFERENCE]) for arm, own in found.items()}
    return {"prompts": wanted, "groups": unequal, "arms": arms}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=[*EMBEDDED], help="one of them alone")
    parser.add_argument("--prompts", type=int, default=768, help="with an image, in each world; a multiple of 16")
    parser.add_argument("--output", type=Path, default=TOY / "credit.json")
    options = parser.parse_args()
    if options.prompts < 3 * BATCH or options.prompts % BATCH:
        raise UserError(f"--prompts {options.prompts} must be a multiple of {BATCH}, and three of them or more.")
    writable("--output", options.output)
    known = measured(options.output)
    for world in [options.world] if options.world else EMBEDDED:
        known[world] = credit(world, options.prompts)
        write_text(options.output, json.dumps(known, indent=1) + "\n")
        columns = [f"share_{kind}" for kind in KINDS] + ["cosine", "signal"]
        print(f"| {world} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for arm, values in known[world]["arms"].items():
            print(f"| {arm} | {' | '.join('{:.3f} ± {:.3f}'.format(*values[name]) for name in columns)} |")


if __name__ == "__main__":
    main()
