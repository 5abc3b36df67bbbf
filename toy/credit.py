"""Where the gradient of each variant of the comparison comes from, and how well it points.

    python toy/credit.py                    # both toy tasks, an hour on one core; writes toy/credit.json
    python toy/credit.py --toy toy-faint --batches 8 --output credit.json

From the model before reinforcement learning: 8 responses to each training prompt with an image (12, and 6 + 6, for
SaEI), 16 prompts a batch, as in a step of the comparison. Groups with equal rewards count with a gradient of 0. The
gradient is that of the policy term alone, without VEPO's entropy bonus and VPPO's penalty; VPPO's factors f are those
of one group. With g the gradient of a batch, the sum of the parts g_k from tokens of kind k:

    share     sum <g_k, g> / sum |g|^2 over all batches; the shares of all kinds sum to 1
    cosine    of g and the gradient of GRPO with 12 responses on all other batches, an estimate of the policy gradient.
              More batches make it less noisy, so compare variants of one run only
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

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))
from compare import ORACLE, VARIANTS  # noqa: E402
from variant import kind_masks  # noqa: E402

import pepo  # noqa: E402
import prpo  # noqa: E402
import saei  # noqa: E402
import vepo  # noqa: E402
import vgpo  # noqa: E402
import vppo  # noqa: E402
from common import Reward, forward, group_advantages, load_model, load_processor, rollout  # noqa: E402
from plumbing.arguments import EMBEDDED, SharedArgs, model_source  # noqa: E402
from plumbing.data import Data  # noqa: E402
from show import run_of, vppo_row  # noqa: E402
from toy.kinds import KINDS  # noqa: E402

BATCH = 16  # prompts of a step
REFERENCE = "GRPO, 12"
SCORED = {  # variant: the method that sets the weights of its tokens, and what its `scoring_forward` is given
    "VEPO": (vepo, vepo.Args(), 0),
    "PRPO": (prpo, prpo.Args(), 0),
    "top entropy": (vepo, vepo.Args(select="entropy"), 0),
    "random 20 %": (vepo, vepo.Args(select="random"), 0),
    "PRPO shuffled": (prpo, prpo.Args(shuffle=True), 0),
    "PEPO": (pepo, pepo.Args()),  # weights of the end of a run
}


def variant_weights(row, run, logps, hidden):
    """{variant: (G, T)}: the factors by which each variant multiplies the advantage of a response."""
    weights = {"GRPO": row.mask, ORACLE: kind_masks(row, run.tokenizer.decode)["read"]}
    for name, (method, *settings) in SCORED.items():
        scored = dataclasses.replace(row)
        method.scoring_forward(scored, run, *settings)
        weights[name] = scored.weights
    focused = dataclasses.replace(row, scores=vgpo.row_focus(hidden, row, vgpo.Args()))
    vgpo.set_weights([focused], run, vgpo.Args())
    return weights | {"VGPO": focused.weights, "VPPO": vppo_row(row, logps, run, vppo.Args()).weights}


class Gradients:
    """Gradients of a variant, batch by batch: g (N,), and <g_k, g> of each kind of token."""

    def __init__(self, parameters, batch):
        self.parameters, self.batch, self.batches, self.parts = parameters, batch, [], []
        self.prompts, self.sums = 0, torch.zeros(len(KINDS), sum(p.numel() for p in parameters))

    def add(self, logps, advantages, weights, kinds):
        """Adds those of a group: of -sum_t A w_t log p_t, by kind of token; advantages (G,), the others (G, T)."""
        for total, kind in zip(self.sums, KINDS):
            loss = -(advantages[:, None] * weights * logps * kinds[kind]).sum()
            slopes = torch.autograd.grad(loss, self.parameters, retain_graph=True, materialize_grads=True)
            total += torch.cat([slope.flatten() for slope in slopes]).cpu()

    def end_prompt(self):
        self.prompts += 1
        if self.prompts % self.batch == 0:
            self.batches.append(self.sums.sum(0))
            self.parts.append(self.sums @ self.batches[-1])
            self.sums.zero_()


def jackknife(function, n):
    """`function(kept)` of all n batches, and the half width of its interval, by leaving out each batch in turn."""
    every = torch.arange(n)
    left = torch.tensor([function(every[every != i]) for i in range(n)], dtype=torch.float64)
    half = stdtrit(n - 1, 0.975) * math.sqrt((n - 1) / n * (left - left.mean()).square().sum().item())
    return [round(function(every), 6), round(half, 6)]


def summary(own, reference):
    """{name: [value, half width]} of a variant's gradients; cosines with those of the reference."""
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

    measures = {**{f"share_{kind}": share(k) for k, kind in enumerate(KINDS)}, "cosine": cosine, "signal": signal}
    return {name: jackknife(measure, len(G)) for name, measure in measures.items()}


def credit(toy, batches):
    """{variant: its summary} of so many batches, and how many of their groups had unequal rewards."""
    args = SharedArgs(model=toy, group_size=12)
    processor, model = load_processor(model_source(args)), load_model(model_source(args))
    run, reward = run_of(model, processor), Reward(args)
    data = Data(toy, "train", args, processor, model)
    rows = [index for index in data.indices if data.rows[index]["images"]][: batches * BATCH]
    gradients, unequal = {}, 0
    for prompt_id, index in enumerate(tqdm(rows, desc=toy, unit="prompt")):
        prompt = dataclasses.replace(data.prompt(index), prompt_id=prompt_id)
        (twelve,) = rollout(model, processor.tokenizer, [prompt], args, "credit")
        clean = twelve[: saei.Args.n1]
        attack = saei.attack(clean, run, saei.Args())
        (attacked,) = rollout(model, processor.tokenizer, [attack], args, "credit", slice(saei.Args.n1, None))
        groups = {"GRPO": twelve[:8], REFERENCE: twelve, "SaEI, 6 + 6": saei.join(clean, attacked)}
        for name, group in groups.items():
            advantages = group_advantages(reward([group])[0].rewards[None])[0]  # (G,), 0 where all rewards are equal
            logps, _, hidden = forward(model, group)
            weights, kinds = {name: group.mask}, kind_masks(group, processor.tokenizer.decode)
            if name == "GRPO":
                unequal += bool(advantages.any())
                with torch.no_grad():
                    weights = variant_weights(group, run, logps.detach(), hidden.detach())
            for variant, weight in weights.items():
                own = gradients.setdefault(variant, Gradients(list(model.parameters()), BATCH))
                if advantages.any():
                    own.add(logps, advantages, weight, kinds)
                own.end_prompt()
    reward.check.close()
    reference = gradients[REFERENCE]
    variants = {name: summary(gradients[name], reference) for name in VARIANTS if name in gradients}
    return {"prompts": BATCH * len(reference.batches), "groups": unequal, "variants": variants}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", choices=[*EMBEDDED], help="one toy task (default: both)")
    parser.add_argument("--batches", type=int, default=48, help="of 16 prompts with an image")
    parser.add_argument("--output", type=Path, default=TOY / "credit.json")
    options = parser.parse_args()
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    for toy in [options.toy] if options.toy else EMBEDDED:
        known[toy] = credit(toy, options.batches)
        columns = [f"share_{kind}" for kind in KINDS] + ["cosine", "signal"]
        print(f"| {toy} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for variant, values in known[toy]["variants"].items():
            print(f"| {variant} | {' | '.join('{:.3f} ± {:.3f}'.format(*values[name]) for name in columns)} |")
        options.output.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
