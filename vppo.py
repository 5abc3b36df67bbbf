"""VPPO: visually-perceptive policy optimisation (arXiv 2510.09285).

Few tokens depend on the image, and few responses do. VPPO measures how much the probability of a sampled token changes
when patches of the image are black. It trains on the 40 % of each response that depend most, and gives more advantage
to responses that depend more. With p the probability of the sampled token under the image, by the policy that sampled,
and q under the blackened one:

    d_it = clamp(log q_it - log p_it, -20, 20)
    S_it = clamp(exp(d_it) - d_it - 1, 0, 10)                         visual dependency: one sample of KL(p || q)
    f_i  = 0.9 + 0.1 n_i / mean_j n_j        n: min-max of mean_t S_it over the mini-batch; 1 where all are within 1e-6
    loss = - 1/N sum_i sum_{t in K_i} min(rho_it A_i f_i, clip(rho_it) A_i f_i) + 0.06 mean_it H_it

K_i: the ceil(0.4 T) tokens of the largest S of response i. N: all tokens of the mini-batch. The mean of f over all its
sampled responses is 1. The last term is an entropy PENALTY. A patch is black with probability 0.5, drawn again for each
different response. In bf16 an S below about 1e-4 is rounding, and may choose tokens where few depend on the image.

What the paper and its code (huaixuheqing/VPPO-RL) say, and what is done here:
  1. The paper has the full KL of the two distributions. The code has the sampled token's, and so has this file.
  2. The code takes min and max over a device, and mean n over a micro-batch of 16, so that f is at most 2.5; here over
     the mini-batch of all processes, and f has no such limit.
  3. The code's penalty is the mean of -log p of the sampled tokens; here it is that of their entropy H.
  4. The code clips a negative advantage a second time, at a ratio of 3; here it is clipped once.
  5. A prompt without an image has no dependency: all its tokens are trained, with f = 1, and it is not in n.

A response has an image of its own, so the second pass has as many prompts as responses; and n needs all responses of a
mini-batch before its first gradient. So a step costs two passes without gradient more, one of them over G prompts.

    python vppo.py                                                                  # the toy, minutes on a laptop CPU
    torchrun --nproc_per_node=8 vppo.py --model Qwen/Qwen2.5-VL-7B-Instruct         # 8 GPUs
    ... vppo.py --clip_high 0.28 --filter_groups --prompts_per_step 384 --updates_per_step 3 --top_p 0.99
                                                                                    # the code's setting for a 7B
"""

import math
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object

from common import aggregate, forward, group_advantages, kl_penalty, pack_rows, policy_loss, rollout, stack_rewards
from plumbing.arguments import SharedArgs, parse_args
from trainer import Trainer
from common import blacken, quantiles, seeded, select_top, with_image
from plumbing.arguments import flag
from plumbing.families import patch_places


@dataclass
class Args(SharedArgs):
    keep_ratio: float = flag(0.4, "share of a response's tokens in the policy loss; 1: all", gt=0, max=1)
    blacken: float = flag(0.5, "the share of patches that are blackened", min=0, max=1)
    floor: float = flag(0.9, "f of the response that depends least on the image; 1: f is 1 for all", min=0, max=1)
    entropy_coef: float = flag(-0.06, "weight of the entropy bonus; below 0: a penalty", min=-1e6, max=1e6)


@torch.no_grad()
def visual_dependency(logps, blackened_logps):
    """S (B, T) in [0, 10] of the sampled tokens: the k3 estimate of KL(p || q), from their log-probs (B, T).

    >>> visual_dependency(torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log())  # 1/2 - 1 + ln 2
    tensor([[0.1931]])
    """
    d = (blackened_logps - logps).clamp(-20, 20)
    return (d.expm1() - d).clamp(0, 10)


@torch.no_grad()
def response_factors(dependency, of_all, floor=0.9):
    """f (B,) of responses from their mean S (B,) and that of all responses of the mini-batch (n,); of mean 1 over all.

    >>> means = torch.tensor([0.1, 0.3, 0.2])
    >>> response_factors(means, means), response_factors(means[:1], means[:1])
    (tensor([0.9000, 1.1000, 1.0000]), tensor([1.]))
    """
    low = of_all.min()
    f = floor + (1 - floor) * (dependency - low) / (of_all.mean() - low)
    return torch.where(of_all.max() - low > 1e-6, f, 1.0)


def blackened(row, trainer, args, step):
    """The row of one response with patches of its images blackened: one draw for each response and step."""
    images, places = trainer.processor.image_processor, patch_places(trainer.model.config, row.prompt.image_grid_thw)
    generator = seeded(args.seed, step, row.prompt.index, row.prompt.prompt_id, row.texts[0], "blackened")
    settings = generator, images.image_mean, images.image_std, args.blacken, places
    return with_image(row, lambda pixels: blacken(pixels, *settings))


@torch.no_grad()
def set_scores(rows, trainer, args, step):
    """Sets `row.scores` (B, T), S of its tokens, in rows with an image and old log-probs: a pass for each response."""
    rows = [row for row in rows if row.prompt.image_grid_thw is not None]
    parts = [[row[i : i + 1] for i in range(len(row.mask))] for row in rows]
    for single in trainer.with_gradient(sum(parts, []), keep_zero_advantage=True):
        blackened_logps, _, _ = forward(trainer.model, blackened(single, trainer, args, step), args.temperature)
        single.scores = visual_dependency(single.old_logps, blackened_logps)  # (1, T), 0 on padding
    for row, singles in zip(rows, parts):
        row.scores = torch.cat([single.scores for single in singles])


def set_weights(minibatch, trainer, args):
    """Sets `row.weights` (B, T) of a mini-batch: f on the chosen tokens of a response, 0 on the others."""
    means = {id(row): row.scores.sum(1) / row.mask.sum(1) for row in minibatch if row.prompt.image_grid_thw is not None}
    of_all = torch.tensor(gather_object(sum([x.tolist() for x in means.values()], [])) or [0.0])
    for row in minibatch:
        chosen, factors = row.mask, torch.ones(len(row.mask), device=row.mask.device)  # without an image
        if id(row) in means:
            factors = response_factors(means[id(row)], of_all.to(row.mask.device), args.floor)
            chosen = select_top(row.scores, row.mask, args.keep_ratio)
            trainer.metrics.add_means(quantiles("dependency", row.scores, row.mask), row.loss_mask)
        row.weights = factors[:, None] * chosen
        trainer.metrics.add("kept_tokens", (chosen & row.loss_mask).sum(), row.loss_mask.sum())


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

        with trainer.phase("score"), torch.no_grad():
            # VPPO: log-probs of all responses, also of those without an advantage: they count in min and max
            for row in trainer.with_gradient(rows, keep_zero_advantage=True):
                row.old_logps, _, _ = forward(model, row, args.temperature)  # (B, T)
                if args.kl_coef:
                    row.ref_logps, _, _ = forward(trainer.reference, row, args.temperature)  # (B, T)
            set_scores(rows, trainer, args, step)  # VPPO: of each token, (B, T)
            if args.updates_per_step == 1:  # VPPO: as in grpo.py, the ratio is exactly 1
                for row in rows:
                    row.old_logps = None

        with trainer.phase("update"):
            for minibatch in trainer.minibatches(rows):
                denominator = trainer.denominator(minibatch)  # its tokens (or responses), over all processes
                set_weights(minibatch, trainer, args)  # VPPO: (B, T)
                for row in trainer.with_gradient(minibatch):
                    logps, entropy, _ = forward(model, row, args.temperature)  # (B, T)
                    old_logps = logps.detach() if row.old_logps is None else row.old_logps
                    token_advantages = row.advantages[:, None] * row.weights  # VPPO: (B, T), 0 where not chosen
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
