"""VEPO: vision-entropy token selection (arXiv 2606.03937).

Many tokens that depend on the image have a low entropy, so entropy alone chooses badly. VEPO scores a token by how much
noise on the image changes its prediction, and by its entropy, and trains on the best 20 % of each response. P_t is the
distribution of token t, over the full vocabulary, by the policy that sampled, and Q_t the same under the noised image:

    j_t = JSD(P_t, Q_t),  H_t = H(P_t),  g_t = |H(Q_t) - H(P_t)|
    score_t = [1 - (1 - j'_t)^alpha (1 - g'_t)^(1 - alpha)] H'_t          ' : min-max within the response
    loss = - 1/|K| sum_{t in K} min(rho_t A, clip(rho_t) A) - 1e-3 mean_t H_t

K: the ceil(k T) best tokens of each response of a mini-batch. The bonus has the H_t of the policy that is trained.

The formulas follow the released code (Leonnnnnn929/VEPO), except:
  1. The code adds N(0, 2^2) to normalised pixels once for each of the 12 responses of a prompt, which share one array:
     it adds up to a standard deviation of 6.9. Here it is added once per prompt and step (`--noise_std 2`), and scaled
     for models that normalise otherwise. `--noise diffusion`, step 500 of 1,000, has 3.4 times less noise to signal.
  2. A divergence below 1e-6 is rounding and counts as 0, or min-max would amplify it.
  3. The entropy bonus, over all tokens, appears only in the code, not in the paper.
  4. A prompt without an image has no divergence: its tokens are chosen by entropy.

One more forward pass, without gradient: the hidden states under the clean image come out of a pass that is made anyway.

    python vepo.py                                                                  # the toy, minutes on a laptop CPU
    torchrun --nproc_per_node=8 vepo.py --model Qwen/Qwen2.5-VL-7B-Instruct         # 8 GPUs
    ... vepo.py --group_size 12 --freeze_vision                                     # the paper's setting
    ... vepo.py --select entropy                                                    # its baseline
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.image_utils import OPENAI_CLIP_STD

from common import aggregate, forward, group_advantages, kl_penalty, pack_rows, policy_loss, rollout, stack_rewards
from plumbing.arguments import SharedArgs, parse_args
from trainer import Trainer
from common import compare_logits, kept_tokens, min_max, normal_noise, quantiles, seeded, select_top, still_noise
from common import token_uniforms, with_image
from plumbing.arguments import flag


@dataclass
class Args(SharedArgs):
    keep_ratio: float = flag(0.2, "k: share of a response's tokens in the policy loss; 1: all", gt=0, max=1)
    alpha: float = flag(0.7, "weight of the divergence against the change in entropy", min=0, max=1)
    select: Literal["vepo", "entropy", "jsd", "random"] = flag("vepo", "choose tokens by VEPO's score, or by these")
    noise: Literal["normalised", "diffusion"] = flag("normalised", "Gaussian on normalised pixels, or a diffusion step")
    noise_std: float = flag(2.0, "of --noise normalised, as Qwen2.5-VL normalises: 0.54 of pixels in [0, 1]", min=0)
    noise_step: int = flag(500, "of --noise diffusion, of 1,000", min=0, max=999)
    entropy_coef: float = flag(1e-3, "weight of the entropy bonus, over all tokens", min=-1e6, max=1e6)


def add_noise(pixel_values, generator, std=2.0):
    """Gaussian noise on the processor's normalised pixels, independent in each entry, unclipped (VEPO's code)."""
    return pixel_values + std * normal_noise(pixel_values.shape, generator, pixel_values.device)


def diffuse(pixel_values, generator, step=500):
    """Forward diffusion: sqrt(abar) x + sqrt(1 - abar) noise after `step` of 1,000 steps (arXiv 2311.16922).

    step 500: 0.863 x + 0.505 noise, on normalised pixels; both copies of an image get the same noise.
    """
    betas = torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = (1 - betas).cumprod(0)[step].item()
    return kept**0.5 * pixel_values + (1 - kept) ** 0.5 * still_noise(pixel_values, generator)


def noised_pixels(pixel_values, image_std, generator, args):
    """Pixels (patches, C) with `--noise`, which is meant for Qwen2.5-VL's image_std (CLIP's) and scaled for others."""
    to_own = torch.tensor(OPENAI_CLIP_STD) / torch.tensor(image_std)  # (3,) pixels by CLIP's std to the model's own
    to_own = to_own.repeat_interleave(pixel_values.shape[1] // 3).to(pixel_values.device)  # (C,): channel first
    if args.noise == "normalised":
        return to_own * add_noise(pixel_values / to_own, generator, args.noise_std)
    return to_own * diffuse(pixel_values / to_own, generator, args.noise_step)


@torch.no_grad()
def divergences(logits, noised_logits):
    """JSD in [0, ln 2], entropy, and entropy under the noised image, in nats: each (...) from logits (..., V).

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
def token_scores(jsd, entropy, noised_entropy, mask, alpha=0.7, has_image=None):
    """VEPO's score in [0, 1] of each valid token, 0 on padding; all (B, T), mask bool.

    has_image (B, 1) bool: a response whose prompt has none is scored by entropy alone; None: all have one.

    >>> jsd, entropy = torch.tensor([[0.0, 0.2, 0.4]]), torch.tensor([[1.0, 2.0, 0.0]])
    >>> token_scores(jsd, entropy, entropy, torch.ones(1, 3, dtype=torch.bool))  # no gap: [1 - (1 - j')^0.7] H'
    tensor([[0.0000, 0.3844, 0.0000]])
    """
    j, g = min_max(jsd, mask), min_max((noised_entropy - entropy).abs(), mask)  # (B, T)
    dependence = 1 - (1 - j) ** alpha * (1 - g) ** (1 - alpha)
    dependence = dependence if has_image is None else torch.where(has_image, dependence, 1.0)
    return dependence * min_max(entropy, mask)


def scoring_forward(row, trainer, args, step):
    """`forward` of a row by the policy that sampled, which sets `row.weights` (B, T). Returns logps, entropy (B, T)."""
    seen = row.prompt.pixel_values is not None
    compared = args.select in ("vepo", "jsd") and (seen or trainer.world_size > 1)  # processes make all passes together
    if compared:
        noised = noised_hidden(row, trainer, args, step)  # before the pass whose graph is kept: not both in memory
    logps, entropy, hidden = forward(trainer.model, row, args.temperature)  # (B, T), (B, T), (L, D)
    row.scores, signals = entropy.detach(), {}  # of --select entropy, and without an image
    if args.select == "random":
        row.scores = token_uniforms(row, args.seed, step)
    if compared:
        found = compare_logits(divergences, trainer.model, row, hidden.detach(), noised, temperature=args.temperature)
        if seen:
            jsd, clean_entropy, noised_entropy = found  # (B, T)
            signals = {"jsd": jsd, "entropy_gap": (noised_entropy - clean_entropy).abs()}
            row.scores = jsd if args.select == "jsd" else token_scores(*found, row.mask, args.alpha)
    row.weights = select_top(row.scores, row.mask, args.keep_ratio)
    record_choice(row, entropy.detach(), signals, trainer, args)
    return logps, entropy


def record_choice(row, entropy, signals, trainer, args):
    """For the log: the share of chosen tokens, that of these which entropy alone would choose, and the signals."""
    both = row.weights & select_top(entropy, row.mask, args.keep_ratio)
    info = {"kept_tokens": row.weights.sum() / row.mask.sum(), "kept_top_entropy": both.sum() / row.weights.sum()}
    for name, values in signals.items():
        info |= quantiles(name, values, row.mask)
    trainer.metrics.add_means(info, row.loss_mask)


def noised_hidden(row, trainer, args, step):
    """Hidden states (L, D) of the row under its noised images: one draw for each prompt and step."""
    generator = seeded(args.seed, step, row.prompt.index, row.prompt.prompt_id, "noise")
    image_std = trainer.processor.image_processor.image_std
    noised = with_image(row, lambda pixels: noised_pixels(pixels, image_std, generator, args))
    with trainer.phase("noised"), torch.no_grad():
        return forward(trainer.model, noised, args.temperature)[2]


def main():
    args = parse_args(Args)
    trainer = Trainer(args)
    model, clip = trainer.model, (args.clip_low, args.clip_high)
    for step in trainer.steps():
        groups = []  # of this process: P prompts, each with G responses and their rewards
        with trainer.phase("rollout"):
            while prompts := trainer.draw_prompts(groups):  # once; with --filter_groups until the step is full
                sampled = rollout(model, trainer.tokenizer, prompts, args, step)  # a group for each prompt
                sampled = trainer.reward(sampled)  # with rewards (G,)
                groups = trainer.keep_groups(groups, sampled)

        rewards = stack_rewards(groups, args.group_size)  # (P, G)
        advantages = group_advantages(rewards)  # (P, G)
        rows = pack_rows(groups, advantages, args)  # packed rows, one or more per group: B responses

        with trainer.phase("score"), torch.no_grad():  # a step with one update is on-policy: it needs no old log-probs
            for row in trainer.with_gradient(rows):
                if args.updates_per_step > 1:
                    row.old_logps, _ = scoring_forward(row, trainer, args, step)  # VEPO: and the weights (B, T)
                if args.kl_coef:
                    row.ref_logps, _, _ = forward(trainer.reference, row, args.temperature)  # (B, T)

        with trainer.phase("update"):
            for minibatch in trainer.minibatches(rows):
                denominator = trainer.denominator(minibatch)  # its tokens (or responses), over all processes
                # VEPO: the policy term is a mean over the chosen tokens, as many as the lengths say (or the responses)
                count = trainer.all_reduce(sum(kept_tokens(x.loss_mask, args.keep_ratio).sum() for x in minibatch))
                chosen_denominator = count if args.aggregation == "token" else denominator
                for row in trainer.with_gradient(minibatch):
                    # VEPO: the policy that sampled also chooses the tokens
                    if args.updates_per_step == 1:
                        logps, entropy = scoring_forward(row, trainer, args, step)  # (B, T)
                    else:
                        logps, entropy, _ = forward(model, row, args.temperature)  # (B, T)
                    old_logps = logps.detach() if row.old_logps is None else row.old_logps
                    token_advantages = row.advantages[:, None].expand_as(logps)  # (B, T): the same for every token
                    mask = row.loss_mask  # (B, T)
                    chosen = mask & row.weights.bool()  # VEPO: (B, T)
                    loss, info = policy_loss(
                        logps, old_logps, token_advantages, chosen, *clip, args.aggregation, chosen_denominator
                    )
                    info["entropy"] = aggregate(entropy.detach(), mask)
                    if args.entropy_coef:
                        loss = loss - args.entropy_coef * aggregate(entropy, mask, args.aggregation, denominator)
                    if args.kl_coef:
                        kl = kl_penalty(logps, row.ref_logps)  # (B, T)
                        loss = loss + args.kl_coef * aggregate(kl, mask, args.aggregation, denominator)
                        info["kl"] = aggregate(kl.detach(), mask)
                    loss.backward()  # summed over rows and processes; LoRA's processes: in clip_gradients
                    trainer.record(loss, info, mask)
                grad_norm = trainer.clip_gradients()  # over all processes; clipped to --max_grad_norm
                if math.isfinite(grad_norm):  # otherwise this update is skipped
                    trainer.optimizer.step()
                trainer.scheduler.step()
                trainer.optimizer.zero_grad()


if __name__ == "__main__":
    main()
