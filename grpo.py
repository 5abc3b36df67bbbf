"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300), the base that every other file changes.

Sample G responses to each of P prompts, reward them, and compare each with the others of its group: no value model.
With r_i the reward of response i, o_i its tokens, pi_old the policy that sampled and pi the one being trained:

    A_i    = (r_i - mean_j r_j) / (std_j r_j + 1e-6)                                                advantage
    rho_it = pi(o_it | image, question, o_i<t) / pi_old(o_it | image, question, o_i<t)              ratio
    loss   = - 1/N sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i)       N: all tokens

Deviations from the paper, all common practice:
  1. The loss is a mean over all tokens of the mini-batch (DAPO, 2503.14476); `--aggregation sequence` is the paper's.
  2. No KL term; `--kl_coef 0.001` brings it back, with the paper's k3 estimator and a reference model.
  3. The standard deviation has Bessel's correction (G - 1) and eps is 1e-6, as in EasyR1 and verl.

    python grpo.py                                                                  # the toy, minutes on a laptop CPU
    torchrun --nproc_per_node=8 grpo.py --model Qwen/Qwen2.5-VL-7B-Instruct         # 8 GPUs
    python grpo.py --clip_high 0.28 --filter_groups --drop_truncated                # DAPO
"""

import math
from dataclasses import dataclass

import torch

from common import aggregate, forward, group_advantages, kl_penalty, pack_rows, policy_loss, rollout, stack_rewards
from plumbing.arguments import SharedArgs, parse_args
from trainer import Trainer


@dataclass
class Args(SharedArgs):
    """GRPO adds nothing to the shared arguments."""


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
                    row.old_logps, _, _ = forward(model, row, args.temperature)  # (B, T)
                if args.kl_coef:
                    row.ref_logps, _, _ = forward(trainer.reference, row, args.temperature)  # (B, T)

        with trainer.phase("update"):
            for minibatch in trainer.minibatches(rows):
                denominator = trainer.denominator(minibatch)  # its tokens (or responses), over all processes
                for row in trainer.with_gradient(minibatch):
                    logps, entropy, _ = forward(model, row, args.temperature)  # (B, T)
                    old_logps = logps.detach() if row.old_logps is None else row.old_logps
                    token_advantages = row.advantages[:, None].expand_as(logps)  # (B, T): the same for every token
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
