"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300), the base that every other file changes.

Sample G responses to each prompt, reward them, and compare each with the others of its group: no value model. With
r_i the reward of response i, o_i its tokens, pi_old the policy that sampled and pi the one being trained:

    A_i    = (r_i - mean_j r_j) / (std_j r_j + 1e-6)                                                advantage
    rho_it = pi(o_it | image, question, o_i<t) / pi_old(o_it | image, question, o_i<t)              ratio
    loss   = - 1/N sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i)       N: all tokens

Deviations from the paper, as the field trains today:
  1. The loss is a mean over all tokens of the mini-batch (DAPO, 2503.14476); `--aggregation sequence` is the paper's.
  2. No KL term; `--kl_coef 0.001` brings it back, with the paper's k3 estimator and a reference model.
  3. The standard deviation has Bessel's correction (G - 1) and eps is 1e-6, as in EasyR1 and verl.

    python grpo.py                                                                  # the toy, minutes on a laptop CPU
    torchrun --nproc_per_node=8 grpo.py --model Qwen/Qwen2.5-VL-7B-Instruct         # 8 GPUs
    python grpo.py --clip_high 0.28 --filter_groups --drop_truncated                # DAPO
"""

from dataclasses import dataclass

import torch

from common import aggregate, forward, group_advantages, kl_penalty, policy_loss, rollout
from plumbing.arguments import SharedArgs
from plumbing.commandline import parse_args
from run import Run


@dataclass
class Args(SharedArgs):
    """GRPO adds nothing to the shared arguments."""


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
                    row.old_logps, _, _ = forward(run.model, row, args.temperature)  # (B, T)
                if args.kl_coef:
                    row.ref_logps, _, _ = forward(run.reference, row, args.temperature)  # (B, T)

        with run.phase("update"):
            for minibatch in run.minibatches(rows):
                averaging = {"aggregation": args.aggregation, "denominator": run.denominator(minibatch)}
                for row in minibatch:
                    logps, entropy, _ = forward(run.model, row, args.temperature)  # (B, T)
                    old_logps = logps.detach() if row.old_logps is None else row.old_logps
                    token_advantages = row.advantages[:, None].expand_as(logps)  # (B, T): the same for every token
                    mask = row.loss_mask  # (B, T)
                    loss, info = policy_loss(
                        logps, old_logps, token_advantages, mask, args.clip_low, args.clip_high, **averaging
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
