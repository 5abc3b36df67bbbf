"""Exercises. Replace each `raise NotImplementedError` by your answer; in brackets: the lines that it takes.

    python -m pytest -n 0 lecture/exercises -k psi      # grades exercise psi; without -k: all
    EXERCISES=lecture/solutions/exercises.py python -m pytest -n 0 lecture/exercises      # grades another file

P prompts, G responses to each (a group), B responses, T tokens, V: vocabulary; mask (B, T) bool: True on valid tokens.
"""

import torch  # noqa: F401 (for your answers)

# ---------------------------------------------------------------------------------------------------------------------
# Rewards and advantages
# ---------------------------------------------------------------------------------------------------------------------


def advantages(rewards):
    """GRPO's advantages (P, G) from rewards (P, G), fp32. [4]

    A_i = (r_i - mean r) / (std r + 1e-6) in each group, std with G - 1. A group of equal rewards must get exactly 0.
    The formula alone does not give that: compute it for eight rewards of 0.9. Why?
    """
    raise NotImplementedError


def leave_one_out(centred):
    """Rewards minus the mean of the OTHER rewards of the group, (P, G). [1]

    GRPO subtracts the mean of all G rewards of a group, the own one included. RLOO subtracts the mean of the other
    G - 1. You get centred (P, G), which is r_i - mean r, but not the rewards. It is enough.
    """
    raise NotImplementedError


def filtered(p, G):
    """How much DAPO's filter costs, as two floats: (probability, draws). [2]

    DAPO removes groups that are all correct or all wrong, and draws new prompts instead. Each of the G responses is
    correct with probability p, 0 < p < 1, independently. Return the probability that a group is removed, and the
    expected number of groups that are drawn until one is kept.
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# The packed row [prompt | response 1 | response 2 | ...]
# ---------------------------------------------------------------------------------------------------------------------


def positions(prompt_positions, lengths):
    """Position ids (L,) of a packed row, long. [3]

    prompt_positions (S,) are those of the prompt. They are not always 0 .. S - 1, as the tokens of an image can share a
    position. lengths: a list with the number of tokens of each response; L = S + sum(lengths). Every response must get
    the positions that it has when it follows the prompt alone.
    """
    raise NotImplementedError


def packed_mask(prompt, lengths):
    """Attention mask (L, L) of a packed row, bool: True where the query of the row may attend to the key. [6]

    prompt: the number of prompt tokens; lengths: a list with the number of tokens of each response. The mask is causal,
    and a response attends to the prompt and to itself, but to no other response. First index: query; second: key.
    """
    raise NotImplementedError


def predictors(prompt, lengths):
    """Indices (N,) in the row, long: the state that predicts each response token, response by response. [5]

    N = sum(lengths). A language model predicts a token from the state of the token before it. In a packed row this is
    not always the index before it. Which tokens are the exception?
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# The loss and its gradient
# ---------------------------------------------------------------------------------------------------------------------


def token_weight(mask):
    """What one valid token of each response weighs in the two means: (token, sequence), each (B,). [4]

    token: the mean over all valid tokens. sequence: the mean over the tokens of a response, then over responses. A
    response without a valid token has weight 0 in both, and is not counted as a response.
    """
    raise NotImplementedError


def no_gradient(ratio, advantages, clip_low, clip_high):
    """Tokens (B, T) bool that give the clipped loss no gradient; ratio (B, T), advantages (B,). [4]

    The loss of a token is -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A). There are three cases.
    """
    raise NotImplementedError


def first_update(advantages, mask):
    """Gradient (B, T) of GRPO's loss by logps (B, T), in the first update of a step; advantages (B,). [2]

    The loss is the mean of -min(ratio A, clip(ratio) A) over all valid tokens, ratio = exp(logps - old_logps). In the
    first update the policy is still the one that sampled. So what is the ratio, and can clipping change anything? Write
    the gradient by hand, without autograd.
    """
    raise NotImplementedError


def k3(logits, ref_logits):
    """Two gradients by logits (V,): (of k3 as a loss, of KL(p || q)), each (V,). Write both by hand. [6]

    p = softmax(logits) is the policy, q = softmax(ref_logits) the reference. Tokens v are sampled from p, and the code
    minimises k3_v = q_v / p_v - log(q_v / p_v) - 1 on them. Sampling has no gradient. So the first answer is the
    expectation of the gradient, sum_v p_v (d k3_v / d logits): the factor p_v is not differentiated. The second answer
    is the gradient of KL(p || q) = sum_v p_v log(p_v / q_v). Of which other divergence is the first one the gradient?
    """
    raise NotImplementedError


def entropy_bonus(logits):
    """Gradient (V,) of the entropy of softmax(logits) by logits (V,), written by hand. [3]

    H = -sum_v p_v log p_v. The gradient sums to 0, and is 0 at the uniform distribution: check your answer with that.
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# The methods
# ---------------------------------------------------------------------------------------------------------------------


def psi(T):
    """VGPO's largest token factor: (focus, largest), a tensor (T,) and a float. [3]

    psi_t = clamp(1 + w'_t - mean_t w', 0.1, 2) for compensated focus w (T,); w' is w after min-max in the response.
    Find T >= 2 focus values for which the largest psi_t is as large as it can be, and give this largest value in terms
    of T. Does the upper clamp of 2 ever change anything?
    """
    raise NotImplementedError


def alpha_mean(G):
    """The mean of VGPO's rollout factors alpha in a group with evenly spread focus, a float. [4]

    alpha_i = clamp(1 + F'_i - mean_i F', 0.9, 2), where F' is the focus F of the responses after min-max in the group.
    Evenly spread: the G >= 2 values of F' are 0, 1 / (G - 1), 2 / (G - 1), ..., 1. Without the clamps the mean of alpha
    is 1. With them it is larger: 1.10 for G = 8. Find a formula in G.
    """
    raise NotImplementedError


def no_score(entropy, mask):
    """Tokens (B, T) bool that VEPO gives a score of 0 whatever the noised image does; False on padding. [3]

    score_t = dependence_t H'_t; H' is the entropy (B, T) after min-max over the valid tokens of a response, and
    dependence_t in [0, 1] comes from the noised image. For which tokens can no noised image give a positive score?
    """
    raise NotImplementedError


def heaviest(kl_strong, kl_weak, mask):
    """The index (B,) of the token to which PRPO gives the largest weight in each response, long. [6]

    w_t = 1 + 2 S'_t (1 - W'_t). S is log(1 + kl_strong), W is log(1 + kl_weak), and ' is min-max over the valid tokens
    of a response; kl_strong and kl_weak (B, T).
    """
    raise NotImplementedError


def tau_limits(similarity, mask):
    """Limits of PEPO's weights for tau -> 0 and tau -> infinity: two tensors (B, T), 0 on padding. [5]

    w_t = n softmax_t(similarity / tau), over the n valid tokens of a response; similarity (B, T). The weights of a
    response have mean 1 for every tau, so in both limits, too. Tokens can share the largest similarity.
    """
    raise NotImplementedError


def entropy_gain(image, gradient, step):
    """By how much SaEI's attack changes the entropy H, to first order, a float. [2]

    The attacked image is clamp(image + step sign(gradient), 0, 1), and gradient is dH / d image; both have any shape,
    image is in [0, 1]. As long as no pixel is clamped, the answer is step times a norm of the gradient. Which norm? A
    clamped pixel moves by less than step.
    """
    raise NotImplementedError


def largest_factor(B):
    """Dependencies (B,) >= 0 for which the largest factor f of VPPO is as large as it can be, and that f, a float. [3]

    f_i = 0.9 + 0.1 n_i / mean_j n_j, where n is the min-max of the responses' mean dependency over the mini-batch of
    B >= 2 responses. The mean of f is 1. Its smallest value is 0.9. Is its largest bounded by a constant?
    """
    raise NotImplementedError


def papo(rewards, logps, old_logps, masked_logps, mask, gamma=0.01, cap=1.0, clip_low=0.2, clip_high=0.2):
    """The loss of PAPO (arXiv 2507.06448), a scalar, written with torch alone. [15 to 50]

    PAPO adds one term to GRPO: the policy is rewarded when its prediction changes if patches of the image are masked.
    rewards (P, G); logps, old_logps, masked_logps, mask (B, T), with B = P G rows, prompt by prompt. masked_logps are
    the log-probs of the same tokens by the same policy under the masked image; logps and masked_logps have a gradient.

        A_i     = (r_i - mean r) / (std r + 1e-6) in the group, std with G - 1; exactly 0 if its rewards are equal
        rho_it  = exp(logps - old_logps)
        policy  = - 1/N sum_it min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i)     N: all valid tokens
        d_it    = clamp(masked_logps - logps, -20, 20)
        KL_it   = min(exp(d_it) - d_it - 1, cap)          k3 estimate of KL(p(. | image) || p(. | masked image))
        loss    = policy - gamma 1/N sum_it KL_it         the sign: KL is maximised; without a cap it has no bound

    Values on padding can be anything, also NaN, and must change neither the loss nor a gradient. PAPO's released code
    has more terms (KL to a reference, two entropies), makes the cap an option, and takes masked_logps as constants.
    """
    raise NotImplementedError
