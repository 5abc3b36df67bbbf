"""VEPO: vision-entropy token selection (arXiv 2606.03937).

Training on the most uncertain tokens alone is a poor choice where there is a picture: many tokens that depend on it are
certain. VEPO scores each token by how much a noised picture moves its prediction and by how uncertain it is, trains on
the best 20 % of each response, and leaves the advantage as it is. With P_t the policy's distribution of token t, over
the full vocabulary, and Q_t that of the same policy and response when the picture is noised:

    j_t = JSD(P_t, Q_t),  H_t = H(P_t),  g_t = |H(Q_t) - H(P_t)|
    score_t = [1 - (1 - j'_t)^alpha (1 - g'_t)^(1 - alpha)] H'_t          ' : min-max within the response
    loss = - 1/|K| sum_{t in K} min(rho_t A, clip(rho_t) A) - 1e-3 mean_t H_t     K: the ceil(k T) best of each response

The factor H' outside means that a token of entropy 0 scores 0 whatever its JSD: the uncertain tokens are ranked anew.

Formulas follow the released code (Leonnnnnn929/VEPO). What differs, or is described in several ways:
  1. The noise. The code adds N(0, 2^2) to normalised pixels, once for each of the 12 responses of a prompt, which share
     one array: a standard deviation of 6.9. Here one draw per prompt and step, of 2.0: `--noise_std`; for models that
     divide pixels by another standard deviation it is scaled, so that the image gets the same noise. The paper is said
     to use step 500 of a forward diffusion, which is 3.4 times weaker (0.505 / 0.863 = 0.59): `--noise diffusion`.
  2. A divergence below 1e-6 is rounding and counts as 0, or min-max would blow it up.
  3. The entropy bonus, over all tokens, stands in the code only.
  4. A prompt without a picture has no divergence: its tokens are chosen by entropy.

One more forward pass, without gradient: the clean distributions come out of a pass that is made anyway.

    python vepo.py                                                                  # the toy, minutes on a laptop CPU
    torchrun --nproc_per_node=8 vepo.py --model Qwen/Qwen2.5-VL-7B-Instruct         # 8 GPUs
    ... vepo.py --group_size 12 --freeze_vision                                     # the paper's setting
    ... vepo.py --select entropy                                                    # what it is compared with
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.image_utils import OPENAI_CLIP_STD

from common import aggregate, forward, group_advantages, kl_penalty, policy_loss, rollout
from plumbing.arguments import SharedArgs
from plumbing.commandline import parse_args
from run import Run
from common import compare_logits, min_max, quantiles, seeded, still_noise, token_uniforms, with_picture
from plumbing.commandline import flag


@dataclass
class Args(SharedArgs):
    keep_ratio: float = flag(0.2, "k: share of a response's tokens in the policy loss; 1: all", above=0, most=1)
    alpha: float = flag(0.7, "weight of the divergence against the change in entropy", least=0, most=1)
    select: Literal["vepo", "entropy", "jsd", "random"] = flag("vepo", "choose tokens by VEPO's score, or by these")
    noise: Literal["normalised", "diffusion"] = flag("normalised", "Gaussian on normalised pixels, or a diffusion step")
    noise_std: float = flag(2.0, "of --noise normalised, as Qwen2.5-VL normalises: 0.54 of pixels in [0, 1]", least=0)
    noise_step: int = flag(500, "of --noise diffusion, of 1,000", least=0, most=999)
    entropy_coef: float = flag(1e-3, "weight of the entropy bonus, over all tokens", least=-1e6, most=1e6)


def add_noise(pixel_values, generator, std=2.0):
    """Gaussian noise on the processor's normalised pixels, each entry for itself, nothing clipped (VEPO's code)."""
    return pixel_values + std * torch.randn(pixel_values.shape, generator=generator)


def diffuse(pixel_values, generator, step=500):
    """Forward diffusion: sqrt(abar) x + sqrt(1 - abar) noise after `step` of 1,000 steps (arXiv 2311.16922).

    step 500: 0.863 x + 0.505 noise, on normalised pixels; both copies of a picture get the same noise.
    """
    betas = torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = (1 - betas).cumprod(0)[step].item()
    return kept**0.5 * pixel_values + (1 - kept) ** 0.5 * still_noise(pixel_values, generator)


def noised_pixels(pixel_values, image_std, generator, args):
    """Pixels (patches, C) with `--noise`, which is meant for Qwen2.5-VL's image_std (CLIP's) and scaled for others."""
    unit = torch.tensor(OPENAI_CLIP_STD) / torch.tensor(image_std)  # (3,)
    unit = unit.repeat_interleave(pixel_values.shape[1] // 3)  # (C,)
    if args.noise == "normalised":
        return unit * add_noise(pixel_values / unit, generator, args.noise_std)
    return unit * diffuse(pixel_values / unit, generator, args.noise_step)


@torch.no_grad()
def divergences(logits, noised_logits):
    """JSD in [0, ln 2], entropy, and entropy under the noised picture, in nats: each (...) from logits (..., V).

    >>> jsd, entropy, noised_entropy = divergences(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log())
    >>> [round(x.item(), 4) for x in (jsd, entropy, noised_entropy)]  # P = (3/4, 1/4), Q = (1/2, 1/2)
    [0.0338, 0.5623, 0.6931]
    """
    p, q = logits.float().log_softmax(-1), noised_logits.float().log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    jsd = 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))
    jsd = torch.where(jsd < 1e-6, 0.0, jsd)
    return jsd, -(p.exp() * p).sum(-1), -(q.exp() * q).sum(-1)


@torch.no_grad()
def token_scores(jsd, entropy, noised_entropy, mask, alpha=0.7):
    """VEPO's score in [0, 1] of each valid token, 0 on padding; all (B, T).

    >>> jsd, entropy = torch.tensor([[0.0, 0.2, 0.4]]), torch.tensor([[1.0, 2.0, 0.0]])
    >>> token_scores(jsd, entropy, entropy, torch.ones(1, 3, dtype=torch.bool))  # no gap: [1 - (1 - j')^0.7] H'
    tensor([[0.0000, 0.3844, 0.0000]])
    """
    j, g = min_max(jsd, mask), min_max((noised_entropy - entropy).abs(), mask)  # (B, T)
    return (1 - (1 - j) ** alpha * (1 - g) ** (1 - alpha)) * min_max(entropy, mask)


def kept_tokens(mask, ratio=0.2):
    """(B,) how many tokens of each response are kept: ceil(ratio T), at least 1 where there is one."""
    length = mask.sum(1)
    wanted = (length.double() * ratio - 1e-9).ceil().long()  # in floats 0.07 x 100 is above 7
    return wanted.clamp(min=1).minimum(length)


@torch.no_grad()
def select_top(scores, mask, ratio=0.2):
    """(B, T) True on the `kept_tokens` best of each response; of equal ones the earlier. Padding is never chosen.

    >>> select_top(torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.9]]), torch.ones(1, 5, dtype=torch.bool), ratio=0.4)
    tensor([[False,  True, False, False,  True]])
    """
    order = scores.float().masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.shape[1], device=order.device).expand_as(order))
    return mask & (rank < kept_tokens(mask, ratio)[:, None])


def chosen_denominator(rows, run, args):
    """What the policy loss of a mini-batch is divided by: the tokens that it will be made of, or its responses."""
    if args.aggregation == "sequence":
        return run.denominator(rows)
    return run.all_reduce(sum(kept_tokens(row.loss_mask, args.keep_ratio).sum() for row in run.whole(rows)))


def scoring_forward(row, run, args, step):
    """`forward` of a row by the policy that sampled, which also sets `row.weights` (B, T): True on tokens to train on.

    Returns logps and entropy (B, T).
    """
    vision = args.select in ("vepo", "jsd")
    noised = noised_hidden(row, run, args, step) if vision else None  # before a pass whose graph is kept
    logps, entropy, hidden = forward(run.model, row, args.temperature)  # (B, T), (B, T), (L, D)
    mask, uncertainty = row.mask, entropy.detach()
    row.scores = token_uniforms(row, args.seed, step) if args.select == "random" else uncertainty
    if noised is not None:
        states = (hidden.detach(), noised)
        jsd, _, noised_entropy = compare_logits(divergences, run.model, row, *states, temperature=args.temperature)
        if row.prompt.pixel_values is not None:
            vepo = token_scores(jsd, uncertainty, noised_entropy, mask, args.alpha)
            row.scores = vepo if args.select == "vepo" else jsd
            gap = (noised_entropy - uncertainty).abs()
            run.metrics.add_means(quantiles("jsd", jsd, mask) | quantiles("entropy_gap", gap, mask), row.loss_mask)
    row.weights = select_top(row.scores, mask, args.keep_ratio)
    agreed = row.weights & select_top(uncertainty, mask, args.keep_ratio)
    shares = {"kept_tokens": row.weights.sum() / mask.sum(), "kept_top_entropy": agreed.sum() / row.weights.sum()}
    run.metrics.add_means(shares, row.loss_mask)
    return logps, entropy


def noised_hidden(row, run, args, step):
    """Hidden states (L, D) of the row under its noised pictures: one draw for each prompt and step.

    None where there is no picture, on one process; several gather sharded weights together and all make the pass.
    """
    if row.prompt.pixel_values is None and run.world_size == 1:
        return None
    generator = seeded(args.seed, step, row.prompt.index, row.prompt.serial, "noise")
    image_std = run.processor.image_processor.image_std
    noised = with_picture(row, lambda pixels: noised_pixels(pixels, image_std, generator, args))
    with run.phase("noised"), torch.no_grad():
        return forward(run.model, noised, args.temperature)[2]


def main():
    args = parse_args(Args)
    run = Run(args)
    for step in run.steps():
        with run.phase("rollout"):  # prompts -> G responses each -> rewards, until the step is full
            while prompts := run.draw_prompts():
                groups = rollout(run.model, run.tokenizer, prompts, args, step)
                run.reward_groups(groups)
                run.add_groups(groups)

        rewards = run.rewards()  # (P, G)
        advantages = group_advantages(rewards)  # (P, G)
        rows = run.pack_rows(advantages)  # one packed row per group

        with run.phase("score"), torch.no_grad():  # a step with one update is on-policy: it needs no old log-probs
            for row in rows:
                if args.updates_per_step > 1:
                    row.old_logps, _ = scoring_forward(row, run, args, step)  # (B, T)
                if args.kl_coef:
                    row.ref_logps, _, _ = forward(run.reference, row, args.temperature)  # (B, T)

        with run.phase("update"):
            for minibatch in run.minibatches(rows):
                averaging = {"aggregation": args.aggregation, "denominator": run.denominator(minibatch)}
                averaging_chosen = averaging | {"denominator": chosen_denominator(minibatch, run, args)}
                for row in minibatch:
                    if args.updates_per_step == 1:
                        logps, entropy = scoring_forward(row, run, args, step)  # (B, T)
                    else:
                        logps, entropy, _ = forward(run.model, row, args.temperature)  # (B, T)
                    old_logps = logps.detach() if row.old_logps is None else row.old_logps
                    token_advantages = row.advantages[:, None].expand_as(logps)  # (B, T): the same for every token
                    mask = row.loss_mask  # (B, T)
                    chosen = mask & (row.weights > 0)  # (B, T)
                    loss, info = policy_loss(
                        logps, old_logps, token_advantages, chosen, args.clip_low, args.clip_high, **averaging_chosen
                    )
                    info["entropy"] = aggregate(entropy.detach(), mask)
                    if args.entropy_coef:
                        loss = loss - args.entropy_coef * aggregate(entropy, mask, **averaging)
                    if args.kl_coef:
                        kl = kl_penalty(logps, row.ref_logps)  # (B, T)
                        loss = loss + args.kl_coef * aggregate(kl, mask, **averaging)
                        info["kl"] = aggregate(kl.detach(), mask)
                    run.backward(loss, info, row, mask)
                run.update()


if __name__ == "__main__":
    main()
