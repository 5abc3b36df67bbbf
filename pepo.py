"""PEPO: perception-exploration policy optimisation (arXiv 2603.22847).

Good reasoning with an image alternates between perception and exploration. Perception tokens have hidden states like
the image's; exploration tokens have high entropy. PEPO weights the tokens of a response by the first, gated softly by
the second, with mean 1: the advantage moves among the tokens of a response. With h^l_t the state of response token t
before layer l (last: after the final norm), v^l_n that of image token n, u(x) = x / |x|:

    VS_t = mean_l u(h^l_t) . mean_n u(v^l_n)                                   visual similarity
    g_t  = (VS' + H')_t - mean_t (VS' + H')          ' : min-max within the response; H: the token's entropy
    w_t  = T softmax_t(VS_t (1 + alpha tanh g_t) / tau)                        weight, mean 1
    A_it = ((1 - lambda) + lambda w_it) A_i          lambda: from 0 to 1 over the run

Formulas follow the released code (xzxxntxdy/PEPO). What differs, or is silent in the paper:
  1. The paper averages over "all layers"; the code, and this file, count the embeddings too: 37 states of its
     Qwen2.5-VL-3B, of 36 layers, and 29 of its InternVL3-2B, of 28: `--no_embedding_layer`.
  2. The paper's softmax has no temperature; every released script divides by tau = 1.8.
  3. The state before a layer of Qwen3-VL is the layer's input, with the image's deep features added.
  4. A prompt without an image has w = 1: plain GRPO.
  5. The released script of PEPO_D with InternVL3-2B sets `--use_vision_weights false`: that run is DAPO.

The scores come out of a forward pass that is made anyway: no extra one.

    python pepo.py                                                                  # the toy, minutes on a laptop CPU
    torchrun --nproc_per_node=8 pepo.py --model Qwen/Qwen2.5-VL-7B-Instruct         # 8 GPUs
    torchrun --nproc_per_node=8 pepo.py --model OpenGVLab/InternVL3-2B-hf           # the other model of the paper
    ... pepo.py --aggregation sequence --kl_coef 0.001                              # PEPO_G of the paper, on GRPO
    ... pepo.py --clip_high 0.28 --filter_groups --drop_truncated                   # PEPO_D of the paper, on DAPO
    both with --prompts_per_step 8 --updates_per_step 1 --steps 262 --max_response_tokens 1024 --top_k 50
              --schedule cosine --weight_decay 0.1 --beta2 0.95 --freeze_vision --accuracy_weight 1 --format_weight 1
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import normalize

from common import aggregate, forward, group_advantages, kl_penalty, pack_rows, policy_loss, rollout, stack_rewards
from plumbing.arguments import SharedArgs, parse_args
from trainer import Trainer
from common import min_max, quantiles, response_and_image_states
from plumbing.arguments import flag


@dataclass
class Args(SharedArgs):
    alpha: float = flag(0.05, "how far perception and exploration together move a token's similarity", min=0, max=1)
    weight_temperature: float = flag(1.8, "tau of the softmax over a response; higher: weights nearer to 1", min=1e-3)
    embedding_layer: bool = flag(True, "average the similarity over the embeddings too, not over the layers alone")
    strength: float = flag(1.0, "lambda at the end of the run; 0: GRPO", min=0, max=1)
    weight_schedule: Literal["linear", "constant"] = flag("linear", "lambda rises from 0, or is --strength at once")


@torch.no_grad()
def visual_similarity(layer_hidden, layer_image_hidden):
    """Mean over layers of the cosine between a token's state and the image's: mean_l u(h) . mean_n u(v), in fp32.

    Args: iterables over layers, the embeddings first, of (B, T, D), states of the response tokens themselves (their
    entropy comes from the position before), and (B or 1, N, D), those of one prompt's image tokens, of all its images.
    Returns (B, T) in [-1, 1]; 0 where there is no image (N = 0) and where a state is 0.

    >>> tokens, image = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    >>> visual_similarity([tokens], [image])
    tensor([[0.8000, 0.4000]])
    """
    total, layers = 0.0, 0
    for hidden, image in zip(layer_hidden, layer_image_hidden, strict=True):
        prior = normalize(image.float(), dim=-1).sum(1, keepdim=True) / max(image.shape[1], 1)  # (B, 1, D)
        total = total + (normalize(hidden.float(), dim=-1) * prior).sum(-1)  # (B, T)
        layers += 1
    return total / layers


@torch.no_grad()
def token_weights(similarity, entropy, mask, alpha=0.05, temperature=1.8, eps=1e-6):
    """Weights (B, T) of mean 1 over the valid tokens of a response, 0 on padding, from similarity and entropy (B, T).

    >>> similarity, entropy = torch.tensor([[0.30, 0.10, 0.25, 0.15]]), torch.tensor([[0.0, 2.0, 1.0, 0.5]])
    >>> token_weights(similarity, entropy, torch.ones(1, 4, dtype=torch.bool))
    tensor([[1.0563, 0.9449, 1.0290, 0.9697]])
    """
    length = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    similarity, entropy = similarity.float(), entropy.float()
    both = min_max(similarity, mask, eps) + min_max(entropy, mask, eps)  # (B, T)
    gate = 1 + alpha * torch.tanh(both - both.sum(1, keepdim=True) / length)  # (B, T)
    z = torch.where(mask, similarity * gate / temperature, -torch.inf)
    exp = torch.where(mask, (z - z.amax(1, keepdim=True)).exp(), 0.0)
    return torch.where(mask, exp * length / exp.sum(1, keepdim=True), 0.0)


def mixing_strength(progress, final=1.0, schedule="linear"):
    """lambda in A_it = ((1 - lambda) + lambda w_it) A_i; progress: the share of the run's updates that are done.

    >>> mixing_strength(0.25), mixing_strength(0.25, schedule="constant")
    (0.25, 1.0)
    """
    return final * (min(1.0, progress) if schedule == "linear" else 1.0)


def scoring_forward(row, trainer, args):
    """`forward` of a row: logps, entropy (B, T). The first, of the policy that sampled, sets `row.weights` (B, T)."""
    layers = []

    def layer_hook(hidden):  # (L, D), layer by layer: no two are kept
        own, image = response_and_image_states(hidden, row)  # (B, T, D), (N, D)
        layers.append(visual_similarity([own], [image[None]]))

    logps, entropy, _ = forward(trainer.model, row, args.temperature, layer_hook if row.weights is None else None)
    if row.weights is None:
        row.scores = torch.stack(layers if args.embedding_layer else layers[1:]).mean(0)  # (B, T)
        row.weights = token_weights(row.scores, entropy, row.mask, args.alpha, args.weight_temperature)
    return logps, entropy


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
                    row.old_logps, _ = scoring_forward(row, trainer, args)  # PEPO: and the weights (B, T)
                if args.kl_coef:
                    row.ref_logps, _, _ = forward(trainer.reference, row, args.temperature)  # (B, T)

        with trainer.phase("update"):
            for minibatch in trainer.minibatches(rows):
                progress = trainer.scheduler.last_epoch / (args.steps * args.updates_per_step)  # PEPO
                strength = mixing_strength(progress, args.strength, args.weight_schedule)  # lambda
                denominator = trainer.denominator(minibatch)  # its tokens (or responses), over all processes
                for row in trainer.with_gradient(minibatch):
                    logps, entropy = scoring_forward(row, trainer, args)  # PEPO: (B, T), sets the weights once
                    old_logps = logps.detach() if row.old_logps is None else row.old_logps
                    token_advantages = row.advantages[:, None] * ((1 - strength) + strength * row.weights)  # PEPO
                    mask = row.loss_mask  # (B, T)
                    loss, info = policy_loss(
                        logps, old_logps, token_advantages, mask, *clip, args.aggregation, denominator
                    )
                    info["entropy"] = aggregate(entropy.detach(), mask)
                    info |= quantiles("weight", row.weights, row.mask)  # PEPO
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
