"""VGPO: visually-guided policy optimisation (arXiv 2604.09349).

Vision-language models attend to the image less and less as a response goes on. VGPO measures how close each token's
last hidden state h_t is to the mean state mu of the image tokens, and moves advantage to tokens that are close: in a
response by a token factor psi, in a group by a rollout factor alpha. For t = 0 .. T - 1:

    rho_t   = (cos(h_t, mu) - floor) / (1 - floor)                                      visual focus, eq. 4
    omega_t = rho_t (1 + beta t / (T - 1)) for the best kappa of t >= [gamma T], else rho_t      compensated, eq. 5-6
    psi_t   = clamp(1 + omega'_t - mean_t omega', 0.1, 2)     ' : min-max in the response      token factor, eq. 7-8
    alpha_i = clamp(1 + Phi'_i - mean_i Phi', 0.9, 2)         ' : min-max in the group         rollout factor, eq. 9-10
    A_it    = A_i alpha_i psi_it                              Phi_i = sum_t omega_it           eq. 11

The formulas follow the released code (wzb-bupt/VGPO); the clamps appear only there: psi never reaches 2, and the lower
clamp of 0.9 makes alpha's mean larger than 1 (1.10 for evenly spread Phi and G = 8). Deviations:
  1. The code's floor is min(0, smallest cosine of a micro-batch); here -1, which depends on no batch: `--floor`.
  2. Phi sums omega as the paper does; the code sums omega': `--accumulate normalised`.
  3. The code's groups are 8 consecutive rows of a shuffled micro-batch; here, as in the paper, the G of one prompt.
  4. A prompt without an image has psi = alpha = 1: plain GRPO.

No extra pass, but a scoring pass where a group is cut into several rows, since alpha compares whole responses.

    python vgpo.py                                                                  # the toy, minutes on a laptop CPU
    torchrun --nproc_per_node=8 vgpo.py --model Qwen/Qwen2.5-VL-7B-Instruct         # 8 GPUs
    ... vgpo.py --clip_high 0.28 --filter_groups --top_p 0.99 --max_pixels 4194304 --accuracy_weight 1 --format_weight 0
                --data PAPOGalaxy/PAPO_ViRL39K_train                                # the paper's setting, on DAPO
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cosine_similarity

from common import aggregate, forward, group_advantages, kl_penalty, pack_rows, policy_loss, rollout, stack_rewards
from plumbing.arguments import SharedArgs, parse_args
from trainer import Trainer
from common import quantiles, response_and_image_states
from plumbing.arguments import flag


@dataclass
class Args(SharedArgs):
    intra: bool = flag(True, "token factors, inside a response")
    inter: bool = flag(True, "rollout factors, inside a group")
    strength: float = flag(0.3, "beta: what the last token gains when it is gated", min=0)
    start: float = flag(0.5, "gamma: the share of a response before the first token that may gain", min=0, max=1)
    top: float = flag(0.2, "kappa: the share of the tokens after it that do", min=0, max=1)
    floor: float = flag(-1.0, "the cosine that counts as no focus", min=-1, max=0.99)
    accumulate: Literal["raw", "normalised"] = flag("raw", "sum focus over a response as it is, or after min-max")


@torch.no_grad()
def visual_focus(hidden, image_hidden, floor=-1.0):
    """Visual focus (eq. 4): the cosine of a token's state and the image's mean state, from [floor, 1] to [0, 1].

    Args: hidden (B, T, D), of the response tokens themselves, after the final norm; image_hidden (B or 1, N, D), of one
    prompt's image tokens, of all its images. Returns (B, T), fp32; 0 without an image (N = 0).

    >>> tokens, image = torch.tensor([[[3.0, 4.0], [0.0, -2.0]]]), torch.tensor([[[2.0, 1.0], [0.0, 1.0]]])
    >>> visual_focus(tokens, image)  # mu = (1, 1), cosines 0.99 and -0.71
    tensor([[0.9950, 0.1464]])
    """
    if image_hidden.shape[1] == 0:
        return hidden.new_zeros(hidden.shape[:2], dtype=torch.float)
    mean = image_hidden.float().mean(1, keepdim=True)  # (B, 1, D)
    return (cosine_similarity(hidden.float(), mean, dim=-1) - floor) / (1 - floor)


def late_gate(focus, mask, start=0.5, top=0.2):
    """(B, T) True on the best `top` of the tokens from `start` of each response on; ties pass (eq. 5)."""
    length = mask.sum(1, keepdim=True)  # (B, 1)
    begin = (length.double() * start).floor().long()
    tail = mask & (mask.cumsum(1) - 1 >= begin)
    count = ((length - begin).double() * top).floor().long().clamp(min=1)
    ranked = focus.masked_fill(~tail, -torch.inf).sort(1, descending=True).values
    return tail & (focus >= ranked.gather(1, (count - 1).clamp(max=mask.shape[1] - 1)))


@torch.no_grad()
def compensate(focus, mask, strength=0.3, start=0.5, top=0.2):
    """Focus (B, T) with a ramp of up to 1 + strength on late tokens of high focus (eq. 5-6), 0 on padding.

    >>> compensate(torch.tensor([[0.8, 0.7, 0.6, 0.5, 0.4]]), torch.ones(1, 5, dtype=torch.bool))
    tensor([[0.8000, 0.7000, 0.6900, 0.5000, 0.4000]])
    """
    ramp = strength * (mask.cumsum(1) - 1) / (mask.sum(1, keepdim=True) - 1).clamp(min=1)  # (B, T)
    return torch.where(mask, focus * (1 + late_gate(focus, mask, start, top) * ramp), 0.0)


def rescaled(values, mask, eps=1e-8):
    """As `min_max` of common.py, (B, T) to [0, 1], but for eps: the released code adds it to the range."""
    low = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return torch.where(mask, (values - low) / (high - low + eps), 0.0)


@torch.no_grad()
def token_factors(compensated, mask):
    """psi (B, T), of mean 1 before it is clamped to [0.1, 2]; 0 on padding (eq. 7-8).

    >>> token_factors(torch.tensor([[0.8, 0.4, 0.6]]), torch.ones(1, 3, dtype=torch.bool))
    tensor([[1.5000, 0.5000, 1.0000]])
    """
    scaled = rescaled(compensated, mask)  # (B, T)
    mean = scaled.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, (1 + scaled - mean).clamp(0.1, 2.0), 0.0)


@torch.no_grad()
def rollout_factors(accumulated):
    """alpha (P, G) from the focus accumulated over each response, (P, G), within [0.9, 2] (eq. 9-10).

    >>> rollout_factors(torch.tensor([[3.0, 1.0, 2.0, 1.0]]))
    tensor([[1.6250, 0.9000, 1.1250, 0.9000]])
    """
    scaled = rescaled(accumulated, torch.ones_like(accumulated, dtype=torch.bool))  # (P, G)
    return (1 + scaled - scaled.mean(1, keepdim=True)).clamp(0.9, 2.0)


@torch.no_grad()
def group_factors(focus, mask, strength=0.3, start=0.5, top=0.2, accumulate="raw"):
    """alpha (G,), psi (G, T) and the compensated focus (G, T) of a group's responses, from their focus (G, T).

    >>> focus, mask = torch.tensor([[0.8, 0.4, 0.6], [0.2, 0.1, 0.2]]), torch.ones(2, 3, dtype=torch.bool)
    >>> alpha, psi, _ = group_factors(focus, mask, strength=0.0)
    >>> alpha, psi[0]
    (tensor([1.5000, 0.9000]), tensor([1.5000, 0.5000, 1.0000]))
    """
    compensated = compensate(focus, mask, strength, start, top)
    accumulated = (compensated if accumulate == "raw" else rescaled(compensated, mask)).sum(1)  # (G,)
    return rollout_factors(accumulated[None])[0], token_factors(compensated, mask), compensated


def row_focus(hidden, row, args):
    """Visual focus (B, T) of a row's tokens, from the hidden states (L, D) of its forward pass."""
    own, image = response_and_image_states(hidden.detach(), row)  # (B, T, D), (N, D)
    return visual_focus(own, image[None], args.floor)


def set_weights(rows, trainer, args):
    """Sets `row.weights` (B, T) to alpha psi, in the rows that make up one group, and logs alpha."""
    focus, mask = torch.cat([row.scores for row in rows]), torch.cat([row.mask for row in rows])  # (G, T)
    alpha, psi, compensated = group_factors(focus, mask, args.strength, args.start, args.top, args.accumulate)
    alpha = alpha if args.inter else torch.ones_like(alpha)
    psi = psi if args.intra else mask.float()
    for row, weights in zip(rows, (alpha[:, None] * psi).split([len(row.mask) for row in rows])):
        row.weights = weights
    trainer.metrics.add("gated_tokens", (compensated > focus).sum(), mask.sum())
    trainer.metrics.add("rollout_factor", alpha.sum(), len(alpha))
    trainer.metrics.add("rollout_factor_clamped", ((alpha <= 0.9) | (alpha >= 2.0)).sum(), len(alpha))
    correlation = torch.corrcoef(torch.stack([alpha, mask.sum(1)]).double())[0, 1]  # NaN where all are equal
    trainer.metrics.add("rollout_factor_length_correlation", correlation.nan_to_num(), correlation.isfinite())


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
        groups_are_cut = trainer.all_reduce(len(rows) > len(groups)) > 0  # VGPO: on any process

        with trainer.phase("score"), torch.no_grad():  # a step with one update is on-policy: it needs no old log-probs
            for row in trainer.with_gradient(rows):
                if args.updates_per_step > 1 or (args.inter and groups_are_cut):  # VGPO: alpha needs whole groups
                    row.old_logps, _, hidden = forward(model, row, args.temperature)  # (B, T)
                    row.scores = row_focus(hidden, row, args)  # (B, T)
                if args.kl_coef:
                    row.ref_logps, _, _ = forward(trainer.reference, row, args.temperature)  # (B, T)
            for group in groups:  # VGPO
                if parts := [row for row in rows if row.prompt is group.prompt and row.scores is not None]:
                    set_weights(parts, trainer, args)

        with trainer.phase("update"):
            for minibatch in trainer.minibatches(rows):
                denominator = trainer.denominator(minibatch)  # its tokens (or responses), over all processes
                for row in trainer.with_gradient(minibatch):
                    logps, entropy, hidden = forward(model, row, args.temperature)  # (B, T)
                    if row.weights is None:  # VGPO: not set by the score phase
                        row.scores = row_focus(hidden, row, args)  # (B, T)
                        set_weights([row], trainer, args)
                    old_logps = logps.detach() if row.old_logps is None else row.old_logps
                    token_advantages = row.advantages[:, None] * row.weights  # VGPO: (B, T)
                    mask = row.loss_mask  # (B, T)
                    loss, info = policy_loss(
                        logps, old_logps, token_advantages, mask, *clip, args.aggregation, denominator
                    )
                    info["entropy"] = aggregate(entropy.detach(), mask)
                    info |= quantiles("weight", row.weights, row.mask)  # VGPO
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
