"""PRPO: perception-reinforced policy optimisation (arXiv 2606.08708), in OUR READING.

No code has been released and the paper's exact formulas were not available to us. Stated: the visual dependency of a
token is S_t = KL(P || P'), with P' its distribution when the IMAGE is perturbed; a second KL, S'_t, under a WEAK
perturbation, says how brittle it is (after the Fisher information); RVD finds tokens that are grounded and stable, and
PAR amplifies their advantage while it preserves the gradients of the others. Everything else below is our choice, and
an argument. With P_t the policy's distribution of token t over the full vocabulary:

    S_t   = KL(P_t || P_t with patches of the image blackened)          strong: with probability 0.6, as in PAPO
    S'_t  = KL(P_t || P_t with noise of std 0.1 on the pixels)            weak: Fisher information is local
    RVD_t = VD_t (1 - VI_t)          VD, VI: min-max within the response of log(1 + S), log(1 + S'), as in PGPO
    w_t   = 1 + strength RVD_t,  A_it = A_i w_it                          strength 2; w >= 1 preserves the other tokens

Min-max gives VI = 1 to the least stable token of every response, however stable it is: in bf16, where S' below 1e-3
is rounding, VI is noise if the weak view changes nothing. `--shuffle` is the control:
the same weights at random positions of the response. A prompt without an image has w = 1: plain GRPO.

Two more forward passes, without gradient: the states under the clean image come out of a pass that is made anyway.

    python prpo.py                                                                  # the toy, minutes on a laptop CPU
    torchrun --nproc_per_node=8 prpo.py --model Qwen/Qwen2.5-VL-7B-Instruct         # 8 GPUs
    ... prpo.py --clip_high 0.28 --filter_groups --prompts_per_step 384             # the paper's setting, on DAPO,
                --data PAPOGalaxy/PAPO_ViRL39K_train
"""

import math
from dataclasses import dataclass

import torch

from common import aggregate, forward, group_advantages, kl_penalty, pack_rows, policy_loss, rollout, stack_rewards
from plumbing.arguments import SharedArgs, parse_args
from trainer import Trainer
from common import blacken, compare_logits, min_max, quantiles, seeded, still_noise, token_uniforms, with_image
from plumbing.arguments import flag
from plumbing.families import patch_places


@dataclass
class Args(SharedArgs):
    blacken: float = flag(0.6, "strong view: the share of patches that are blackened", min=0, max=1)
    weak_std: float = flag(0.1, "weak view: standard deviation of the noise on pixels in [0, 1]", min=0)
    strength: float = flag(2.0, "the largest weight is 1 + strength; 0: GRPO", min=0)
    shuffle: bool = flag(False, "control: shuffle RVD within each response")


def add_pixel_noise(pixel_values, generator, image_mean, image_std, std=0.1):
    """Gaussian noise on pixels in [0, 1], clipped to [0, 1]; both copies of an image get the same noise."""
    constants = torch.tensor([image_mean, image_std]).repeat_interleave(pixel_values.shape[1] // 3, 1)  # (2, C)
    mean, scale = constants.to(pixel_values.device)
    pixels = pixel_values * scale + mean + std * still_noise(pixel_values, generator)
    return (pixels.clamp(0, 1) - mean) / scale


@torch.no_grad()
def divergences(logits, strong_logits, weak_logits):
    """KL(P || strong) and KL(P || weak) in nats, each (...) from logits (..., V).

    >>> strong, weak = divergences(torch.tensor([[0.0, -1e9]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -1e9]]))
    >>> [round(x.item(), 4) for x in (strong, weak)]  # P = (1, 0) against (1/2, 1/2) and itself
    [0.6931, 0.0]
    """
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()

    def kl(other):  # sum_v p (e^d - 1 - d), d = log q - log p: no term is negative, so a small sum keeps its digits
        log_q = other.float().log_softmax(-1)
        d = log_q - log_p
        near = d.clamp(max=1)
        return torch.where(d < 1, p * (near.expm1() - near), log_q.exp() - p * (1 + d)).sum(-1)

    return kl(strong_logits), kl(weak_logits)


@torch.no_grad()
def robust_visual_dependency(kl_strong, kl_weak, mask):
    """RVD (B, T) in [0, 1] from the two divergences (B, T): near 1 where grounded and stable; 0 on padding.

    >>> robust_visual_dependency(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1, 3) > 0)
    tensor([[0., 1., 0.]])
    """
    return torch.where(mask, min_max(kl_strong.log1p(), mask) * (1 - min_max(kl_weak.log1p(), mask)), 0.0)


@torch.no_grad()
def token_weights(rvd, mask, strength=2.0):
    """w (B, T): 1 + strength RVD, 0 on padding.

    >>> token_weights(torch.tensor([[0.0, 0.5, 1.0]]), torch.ones(1, 3, dtype=torch.bool))
    tensor([[1., 2., 3.]])
    """
    return torch.where(mask, 1 + strength * rvd, 0.0)


def shuffled(values, mask, noise):
    """Values (B, T) at other valid places of their response, in the order of `noise` (B, T)."""
    valid = (~mask).long().sort(dim=1, stable=True).indices  # valid places first, in their order,
    drawn = noise.masked_fill(~mask, torch.inf).argsort(1)  # and in a random one
    return torch.zeros_like(values).scatter(1, valid, values.gather(1, drawn))


def scoring_forward(row, trainer, args, step):
    """`forward` of a row by the policy that sampled, which sets `row.weights` (B, T). Returns logps, entropy (B, T)."""
    seen = row.prompt.pixel_values is not None
    if seen or trainer.world_size > 1:  # several processes gather sharded weights together: all make every pass
        views = perturbed_hidden(row, trainer, args, step)  # before a pass whose graph is kept
    logps, entropy, hidden = forward(trainer.model, row, args.temperature)  # (B, T), (B, T), (L, D)
    row.weights = row.mask.float()
    if seen or trainer.world_size > 1:
        states = (hidden.detach(), *views)
        strong, weak = compare_logits(divergences, trainer.model, row, *states, temperature=args.temperature)
    if seen:
        row.scores = robust_visual_dependency(strong, weak, row.mask)
        if args.shuffle:
            row.scores = shuffled(row.scores, row.mask, token_uniforms(row, args.seed, step))
        row.weights = token_weights(row.scores, row.mask, args.strength)
        info = quantiles("kl_strong", strong, row.mask) | quantiles("kl_weak", weak, row.mask)
        trainer.metrics.add_means(info, row.loss_mask)
    trainer.metrics.add_means(quantiles("weight", row.weights, row.mask), row.loss_mask)
    return logps, entropy


def perturbed_hidden(row, trainer, args, step):
    """Hidden states (L, D) of the row under the strong and the weak view: one draw for each prompt and step."""
    images = trainer.processor.image_processor
    scale = {"image_mean": images.image_mean, "image_std": images.image_std}
    generator = seeded(args.seed, step, row.prompt.index, row.prompt.prompt_id, "views")
    how = {"probability": args.blacken, "places": patch_places(trainer.model.config, row.prompt.image_grid_thw)}
    strong = with_image(row, lambda pixels: blacken(pixels, generator, **scale, **how))
    weak = with_image(row, lambda pixels: add_pixel_noise(pixels, generator, **scale, std=args.weak_std))
    with trainer.phase("perturbed"), torch.no_grad():
        return [forward(trainer.model, view, args.temperature)[2] for view in (strong, weak)]


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
                    row.old_logps, _ = scoring_forward(row, trainer, args, step)  # PRPO: and the weights (B, T)
                if args.kl_coef:
                    row.ref_logps, _, _ = forward(trainer.reference, row, args.temperature)  # (B, T)

        with trainer.phase("update"):
            for minibatch in trainer.minibatches(rows):
                denominator = trainer.denominator(minibatch)  # its tokens (or responses), over all processes
                for row in trainer.with_gradient(minibatch):
                    # PRPO: the policy that sampled also weights the tokens
                    if args.updates_per_step == 1:
                        logps, entropy = scoring_forward(row, trainer, args, step)  # (B, T)
                    else:
                        logps, entropy, _ = forward(model, row, args.temperature)  # (B, T)
                    old_logps = logps.detach() if row.old_logps is None else row.old_logps
                    token_advantages = row.advantages[:, None] * row.weights  # PRPO: (B, T)
                    mask = row.loss_mask  # (B, T)
                    loss, info = policy_loss(
                        logps, old_logps, token_advantages, mask, *clip, args.aggregation, denominator
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
