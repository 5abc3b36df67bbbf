"""Solutions of lecture/exercises/exercises.py: same names, same arguments. Each docstring is the answer in words."""

import torch


def advantages(rewards):
    """In fp32 the mean of eight 0.9 is not 0.9: it is off by 6e-8. Divided by a std of 6e-8 + 1e-6 that is 0.06."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(equal, 0.0, centred / (std + 1e-6))


def leave_one_out(centred):
    """The mean of the others is (G mean - r_i) / (G - 1), so r_i minus it is (r_i - mean) G / (G - 1): a constant."""
    return centred * centred.shape[1] / (centred.shape[1] - 1)


def filtered(p, G):
    """All correct or all wrong: the two exclude each other. The number of draws is geometric."""
    removed = p**G + (1 - p) ** G
    return removed, 1 / (1 - removed)


def positions(prompt_positions, lengths):
    """Every response starts again, one after the largest position of the prompt (which is not its last index)."""
    start = prompt_positions.max() + 1
    return torch.cat([prompt_positions, *(start + torch.arange(n) for n in lengths)])


def packed_mask(prompt, lengths):
    """Number the segments: 0 is the prompt. Causal, and the key is in the prompt or in the segment of the query."""
    segments = torch.tensor([0, *range(1, len(lengths) + 1)])
    segment = segments.repeat_interleave(torch.tensor([prompt, *lengths]))  # (L,)
    causal = torch.ones(len(segment), len(segment), dtype=torch.bool).tril()
    same = segment[:, None] == segment[None]
    return causal & (same | (segment[None] == 0))


def predictors(prompt, lengths):
    """The first token of every response is predicted by the last token of the prompt; all others as usual."""
    found, start = [], prompt
    for n in lengths:
        found += [prompt - 1, *range(start, start + n - 1)][:n]
        start += n
    return torch.tensor(found, dtype=torch.long)


def token_weight(mask):
    """1 / N against 1 / (B |o_i|): with the sequence mean, a token of a long response weighs less."""
    length = mask.sum(1)  # (B,)
    valid = length > 0
    token = torch.where(valid, 1 / length.sum(), 0.0)
    return token, torch.where(valid, 1 / (valid.sum() * length.clamp(min=1)), 0.0)


def no_gradient(ratio, advantages, clip_low, clip_high):
    """Too likely already for A > 0, too unlikely already for A < 0, or A = 0. The other two ends are not clipped."""
    A = advantages[:, None]  # (B, 1)
    raised = (A > 0) & (ratio > 1 + clip_high)
    lowered = (A < 0) & (ratio < 1 - clip_low)
    return raised | lowered | (A == 0)


def first_update(advantages, mask):
    """The ratio is 1, inside the clip range, and d ratio / d logp = ratio = 1: the policy gradient, -A / N."""
    return -advantages[:, None] * mask / mask.sum()


def k3(logits, ref_logits):
    """p - q is the gradient of KL(q || p), the other direction. That of KL(p || q) is p (log(p / q) - KL)."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    # d k3_v / d log p_v = 1 - q_v / p_v, and d log p_v / d logits_k = [v = k] - p_k; the sum over v of p - q is 0
    kl = (p * (log_p - log_q)).sum()
    return p - q, p * (log_p - log_q - kl)


def entropy_bonus(logits):
    """-p (log p + H): the bonus lowers words of a log-prob above -H and raises the others."""
    log_p = logits.log_softmax(-1)
    H = -(log_p.exp() * log_p).sum()
    return -log_p.exp() * (log_p + H)


def psi(T):
    """One token at 1 and all others at 0: psi = 1 + 1 - 1 / T. It is below 2 for every T: the clamp never binds."""
    focus = torch.zeros(T)
    focus[0] = 1.0
    return focus, 2 - 1 / T


def alpha_mean(G):
    """Before the clamps alpha is 0.5 + k / (G - 1); the lower one raises all k up to 0.4 (G - 1), so the mean rises."""
    n = int(0.4 * (G - 1)) + 1  # responses at the clamp
    raised = 0.4 * n - n * (n - 1) / 2 / (G - 1)  # sum of 0.9 - (0.5 + k / (G - 1)) over k < n
    return 1 + raised / G  # 1.08 for G -> infinity


def no_score(entropy, mask):
    """H' is 0 on the token (or tokens) of the lowest entropy of a response; all others score if dependence is 1."""
    lowest = entropy.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    return mask & (entropy == lowest)


def heaviest(kl_strong, kl_weak, mask):
    """A large strong divergence is not enough: the least stable token of a response has the smallest weight, 1."""

    def distance(values):  # to the smallest valid value; min-max divides it by a number that no argmax sees
        return values - values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)

    strong, weak = kl_strong.log1p(), -kl_weak.log1p()
    return (distance(strong) * distance(weak)).masked_fill(~mask, -1.0).argmax(1)


def tau_limits(similarity, mask):
    """tau -> 0: all n on the best token, shared if there are several. tau -> infinity: 1 on every token, as in GRPO."""
    best = similarity.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    top = (mask & (similarity == best)).float()
    length = mask.sum(1, keepdim=True)
    return top * length / top.sum(1, keepdim=True).clamp(min=1), mask.float()


def entropy_gain(image, gradient, step):
    """gradient . (step sign(gradient)) = step |gradient|_1. A clamped pixel moves less: multiply by the real change."""
    moved = (image + step * gradient.sign()).clamp(0, 1) - image
    return (gradient * moved).sum().item()


def largest_factor(B):
    """n of the response that depends most is 1; f is largest if the mean is smallest: all others have n = 0."""
    dependency = torch.zeros(B)
    dependency[0] = 1.0
    return dependency, 0.9 + 0.1 * B


def papo(rewards, logps, old_logps, masked_logps, mask, gamma=0.01, cap=1.0, clip_low=0.2, clip_high=0.2):
    """GRPO, and one line more. A group of equal rewards has no advantage, but its KL term still has a gradient."""
    A = advantages(rewards).flatten()[:, None]  # (B, 1)
    N = mask.sum().clamp(min=1)

    def mean(values):
        return torch.where(mask, values, 0.0).sum() / N

    # padding is replaced before exp: a NaN that is masked afterwards still has a NaN gradient
    rho = torch.where(mask, logps - old_logps, 0.0).exp()  # (B, T)
    policy = -mean(torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A))
    d = torch.where(mask, masked_logps - logps, 0.0).clamp(-20, 20)  # (B, T)
    kl = (d.exp() - d - 1).clamp(max=cap)
    return policy - gamma * mean(kl)
