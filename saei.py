"""SaEI: selective-adversarial entropy intervention (arXiv 2512.10414).

Exploration comes from what the policy sees, not from a term of the loss: sample n1 responses from the image, move the
image one small step towards higher entropy, sample n2 more from that, and train on all of them with the clean image.
H_t is the entropy of the policy at token t of a response to the clean image I:

    K_i   = the middle third of response i's tokens by entropy                                      TsEC
    H     = mean_i mean_{t in K_i} H_t
    I_adv = clamp(I + step sign(dH / dI), 0, 1)                                                     EgAS
    A_i   = (r_i - mean_j r_j) / (std_j r_j + 1e-6)              one group of n1 + n2; then GRPO's loss on I

With two steps instead of one the paper's entropy and accuracy break down: `--iterations 2 --epsilon 0.0157`.

No code has been released. The paper states the above, n1 = n2 = 6, step 2/255, no random start. Our choices:
  1. Tokens are ranked within a response, by an ascending stable sort; fewer than 3 tokens are all kept.
  2. The step is taken on the image as the vision tower gets it, after resizing, in [0, 1], in fp32, clamped there.
  3. The ratio begins at 1, as in NoisyRollout: old log-probs of both halves are those of the clean image.
  4. Without an image, or if the gradient is not finite (counted), all responses are sampled from the clean prompt.

The fair comparison is GRPO with n1 + n2 responses; `--step 0` is bit-identical to it. The attack costs a forward and a
backward pass over n1 responses, in which no parameter gets a gradient.

    python saei.py                                                                  # the toy, minutes on a laptop CPU
    torchrun --nproc_per_node=8 saei.py --model Qwen/Qwen2.5-VL-7B-Instruct         # 8 GPUs, 60 steps of 512 prompts
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch.nn.functional import pad

from common import aggregate, forward, group_advantages, kl_penalty, pack_rows, policy_loss, rollout, stack_rewards
from plumbing.arguments import SharedArgs, parse_args
from trainer import Trainer
from common import Group, split_group, with_image
from plumbing.arguments import UserError, flag
from plumbing.families import unpatchify
from plumbing.kernels import send


@dataclass
class Args(SharedArgs):
    n1: int = flag(6, "responses sampled from the image", gt=0)
    n2: int = flag(6, "responses sampled from the attacked image", gt=0)
    group_size: int | None = flag(None, "is n1 + n2")
    step: float = flag(2 / 255, "of the attack, on pixels in [0, 1]; 0: GRPO with n1 + n2 responses", min=-1, max=1)
    iterations: int = flag(1, "steps of the attack", gt=0)
    epsilon: float | None = flag(None, "largest change of a pixel over all steps (default: one step)", min=0)
    measure_every: int = flag(16, "log the entropy after the attack of one in so many prompts", gt=0)
    save_images: int = flag(0, "write the images of so many prompts, clean, attacked and 10 x their difference", min=0)

    def __post_init__(self):
        if self.group_size not in (None, self.n1 + self.n2):
            raise UserError(f"--group_size {self.group_size} is not --n1 {self.n1} + --n2 {self.n2}: leave it out.")
        self.group_size = self.n1 + self.n2
        if self.reshard_while_sampling:
            raise UserError("--reshard_while_sampling: the attack needs unsharded weights: leave it out, on more GPUs.")
        super().__post_init__()


@torch.no_grad()
def middle_third(entropy, mask):
    """(B, T) True on the tokens of rank floor(T / 3) to floor(2 T / 3) - 1 by entropy (B, T), ascending; all if T < 3.

    >>> middle_third(torch.tensor([[0.9, 0.1, 0.5, 0.4, 0.8, 0.0]]), torch.ones(1, 6, dtype=torch.bool))
    tensor([[False, False,  True,  True, False, False]])
    """
    length = mask.sum(1, keepdim=True)  # (B, 1)
    order = entropy.masked_fill(~mask, torch.inf).sort(dim=1, stable=True).indices
    rank = order.argsort(1)  # (B, T)
    return mask & ((length < 3) | ((rank >= length // 3) & (rank < 2 * length // 3)))


def adversarial_step(image, gradient, step=2 / 255):
    """The image, in [0, 1], one signed step up the gradient, clamped to [0, 1]. A pixel of gradient 0 stays.

    >>> adversarial_step(torch.tensor([0.5, 0.5, 0.5, 1.0]), torch.tensor([3.0, -0.1, 0.0, 2.0]), step=0.1)
    tensor([0.6000, 0.4000, 0.5000, 1.0000])
    """
    return (image + step * gradient.sign()).clamp(0, 1)


def both_copies(gradient):
    """The gradient with respect to pixel_values (patches, 3 x 2 x p x p), summed over the two copies of an image.

    >>> both_copies(torch.tensor([[1.0, 2.0, 3.0, -4.0, 0.0, 5.0]]))  # a patch of one pixel: the sum stands in both
    tensor([[ 3.,  3., -1., -1.,  5.,  5.]])
    """
    copies = gradient.view(len(gradient), 3, 2, -1)
    return copies.sum(2, keepdim=True).expand_as(copies).flatten(1)


def to_pixels(pixel_values, image_processor):
    """pixel_values (patches, C) before the normalisation: in [0, 1], in 8-bit levels; and its mean and std (C,)."""
    constants = torch.tensor([image_processor.image_mean, image_processor.image_std])  # (2, 3)
    mean, std = send(constants.repeat_interleave(pixel_values.shape[1] // 3, 1), pixel_values.device)
    return ((pixel_values * std + mean) * 255).round() / 255, mean, std


def entropy_gradient(pixel_values, entropies, G, model):
    """H of G responses, its gradient (patches, C), and its tokens: a list of masks, as `entropies` yields them.

    `entropies(pixel_values)` yields the entropy (B, T), at the sampler's temperature, and the mask of some responses
    under these normalised pixels, until all G had their turn; gradients must flow back to its argument.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:  # or a compiled layer would compute their gradients, asked for or not
        p.requires_grad_(False)
    leaf = pixel_values.detach().requires_grad_()
    H, gradient, kept = 0.0, 0.0, []
    for entropy, mask in entropies(leaf):
        kept.append(middle_third(entropy, mask))
        share = aggregate(entropy, kept[-1], "sequence", G)  # of the mean over the group's responses
        gradient = gradient + torch.autograd.grad(share, leaf)[0]
        H += share.detach()
    for p in trained:
        p.requires_grad_(True)
    return H, both_copies(gradient), kept


def attack_pixels(pixel_values, entropies, G, model, image_processor, args):
    """pixel_values (patches, C) after the attack, or as they are if a gradient is not finite; entropies, G: as above.

    Then, for the log, H and its tokens before, the largest change of a pixel, and whether all gradients were finite.
    """
    clean, mean, std = to_pixels(pixel_values, image_processor)
    pixels, before, finite = clean, None, True  # finite: a tensor, so the host waits for nothing
    epsilon = abs(args.step) if args.epsilon is None else args.epsilon
    for _ in range(args.iterations):
        H, gradient, kept = entropy_gradient((pixels - mean) / std, entropies, G, model)
        before = before or (H, kept)
        finite = gradient.isfinite().all() & finite
        moved = adversarial_step(pixels, gradient, args.step)  # std > 0: by pixels the gradient has the same sign
        pixels = moved.clamp(clean - epsilon, clean + epsilon)
    change = torch.where(finite, pixels - clean, 0.0).abs().max()
    return torch.where(finite, (pixels - mean) / std, pixel_values), *before, change, finite


def entropy_of(group, trainer, args, pixel_values):
    """Yields the entropy (B, T) of a group's responses under these pixel_values, row by row, and the row's mask."""
    for row in split_group(group, args.tokens_per_row):
        yield forward(trainer.model, with_image(row, lambda _: pixel_values), args.temperature)[1], row.mask


def attack(group, trainer, args):
    """The prompt of a group with attacked images; unchanged without one, at step 0, or if a gradient is not finite."""
    prompt, processor = group.prompt, trainer.processor.image_processor
    if prompt.pixel_values is None or args.step == 0:
        return prompt
    clean, entropies = send(prompt.pixel_values, trainer.model.device), partial(entropy_of, group, trainer, args)
    attacked, *info = attack_pixels(clean, entropies, len(group.mask), trainer.model, processor, args)
    record_attack(group, attacked, trainer, args, *info)
    if prompt.prompt_id < args.save_images:
        save_images(trainer.output / "images", prompt, attacked, processor)
    return dataclasses.replace(prompt, pixel_values=attacked)


def record_attack(group, attacked, trainer, args, H, kept, change, finite):
    """For the log: failed attacks, the largest change of a pixel, and H before and after, on the same tokens."""
    trainer.metrics.add("attack_failed", ~finite, 1)
    trainer.metrics.add("attack_pixel_change", change, finite)
    if group.prompt.prompt_id % args.measure_every == 0:
        with torch.no_grad():
            entropy = torch.cat([entropy for entropy, _ in entropy_of(group, trainer, args, attacked)])
        after = aggregate(entropy, torch.cat(kept), "sequence", len(entropy))
        for name, value in (("before", H), ("after", after)):
            trainer.metrics.add(f"attack_entropy_{name}", torch.where(finite, value, 0.0), finite)


def save_images(folder, prompt, attacked, processor):
    """PNG files of a prompt's images: clean, attacked, and 0.5 + 10 times the difference, side by side."""
    folder.mkdir(exist_ok=True)
    pixels = (to_pixels(x, processor)[0] for x in (prompt.pixel_values, attacked.cpu()))
    for i, (before, after) in enumerate(zip(*(unpatchify(x, prompt.image_grid_thw, processor) for x in pixels))):
        shown = torch.cat([before, after, (0.5 + 10 * (after - before)).clamp(0, 1)], 2)  # (3, H, 3 W)
        image = Image.fromarray((255 * shown).round().byte().permute(1, 2, 0).numpy())
        image.save(folder / f"prompt-{prompt.prompt_id}-{i}.png")


def join(clean, attacked):
    """One group on the clean image out of two; `scores` is 1 on the tokens sampled from the attacked one."""
    T = max(clean.mask.shape[1], attacked.mask.shape[1])

    def both(name):
        return torch.cat([pad(getattr(half, name), (0, T - half.mask.shape[1])) for half in (clean, attacked)])

    texts, truncated = clean.texts + attacked.texts, torch.cat([clean.truncated, attacked.truncated])
    group = Group(clean.prompt, both("responses"), both("mask"), truncated, texts)
    group.scores = torch.zeros_like(group.mask, dtype=torch.float)
    group.scores[len(clean.mask) :] = 1
    return group


def record_sampled(groups, trainer, args):
    """For the log: accuracy and length of the two halves."""
    for group in groups:
        for name, half in (("clean", slice(args.n1)), ("attacked", slice(args.n1, None))):
            trainer.metrics.add(f"accuracy_{name}", group.accuracy[half].sum(), len(group.accuracy[half]))
            trainer.metrics.add(f"response_tokens_{name}", group.mask[half].sum(), len(group.mask[half]))


def record_trained(row, logps, old_logps, token_advantages, entropy, trainer, clip):
    """For the log: entropy and clipped share of the two halves, on the clean image."""
    for name, half in (("clean", row.scores == 0), ("attacked", row.scores > 0)):
        mask = row.loss_mask & half
        _, info = policy_loss(logps.detach(), old_logps, token_advantages, mask, *clip)
        trainer.metrics.add_means({f"clip_fraction_{name}": info["clip_fraction"]}, mask)
        trainer.metrics.add_means({f"entropy_{name}": aggregate(entropy.detach(), mask)}, mask)


def main():
    args = parse_args(Args)
    trainer = Trainer(args)
    model, clip = trainer.model, (args.clip_low, args.clip_high)
    for step in trainer.steps():
        groups = []  # of this process: P prompts, each with G responses and their rewards
        with trainer.phase("rollout"):
            while prompts := trainer.draw_prompts(groups):  # once; with --filter_groups until the step is full
                # SaEI: n1 responses from the clean image, n2 from the attacked one, one group on the clean image
                clean = rollout(model, trainer.tokenizer, prompts, args, step, slice(args.n1))
                with trainer.phase("attack"):
                    attacked_prompts = [attack(group, trainer, args) for group in clean]
                attacked = rollout(model, trainer.tokenizer, attacked_prompts, args, step, slice(args.n1, None))
                sampled = [join(*halves) for halves in zip(clean, attacked)]
                sampled = trainer.reward(sampled)  # with rewards (G,)
                record_sampled(sampled, trainer, args)  # SaEI
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
                    record_trained(row, logps, old_logps, token_advantages, entropy, trainer, clip)  # SaEI
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
