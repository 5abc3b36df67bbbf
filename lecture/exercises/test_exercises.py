"""Graders of exercises.py, one for each exercise. They compare numbers, so any way to the right answer passes.

They grade the file that the environment variable EXERCISES names, or else exercises.py in this folder.
"""

import functools
import importlib.util
import inspect
import itertools
import math
import os
from pathlib import Path

import torch

import pepo
import prpo
import saei
import vepo
import vgpo
import vppo
from common import aggregate, group_advantages, kl_penalty, policy_loss


def given_copies(function):
    """The function, which may change its tensors: the graders' own stay as they are."""

    @functools.wraps(function)
    def call(*args, **options):
        copy = lambda x: x.clone() if isinstance(x, torch.Tensor) else x  # noqa: E731
        return function(*map(copy, args), **{name: copy(x) for name, x in options.items()})

    return call


def load(path):
    """A Python file as a module, outside sys.modules: exercises and solutions have the same name."""
    spec = importlib.util.spec_from_file_location("answers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, function in inspect.getmembers(module, inspect.isfunction):
        setattr(module, name, given_copies(function))
    return module


student = load(os.environ.get("EXERCISES", Path(__file__).with_name("exercises.py")))


def check(got, want, why, tolerance=1e-5):
    """The two are equal numbers of one shape; or the test fails, and says why."""
    assert got is not None, "The answer is None. Does the function return?"
    got, want = (torch.as_tensor(x).detach().double() for x in (got, want))
    assert got.shape == want.shape, f"The shape is {tuple(got.shape)}, and should be {tuple(want.shape)}."
    assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), f"{why}\nyour answer:\n{got}\nexpected:\n{want}"


def pair(got):
    assert isinstance(got, tuple | list | torch.Tensor) and len(got) == 2, "Return two values."
    return got


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def lengths(*valid, width):
    """Mask (B, T) of responses with so many valid tokens."""
    return torch.arange(width) < torch.tensor(valid)[:, None]


def derivative(function, x):
    """The gradient of a scalar function, by autograd."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and advantages
# ---------------------------------------------------------------------------------------------------------------------


def test_advantages():
    got = student.advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    check(got, [[1.5, -0.5, -0.5, -0.5]], "Rewards 1, 0, 0, 0 have mean 0.25 and, with G - 1, std 0.5.")
    rewards = uniform(3, 5).float()
    check(student.advantages(rewards), group_advantages(rewards), "Each row is a group: mean and std are per row.")
    for value, G in itertools.product((0.1, 0.3, 0.7, 0.9, 1.0), (3, 7, 8, 12)):
        got = torch.as_tensor(student.advantages(torch.full((2, G), value)))
        assert (got == 0).all(), f"{G} rewards of {value} get {got[0].tolist()}, not exactly 0: compare the rewards."
    mixed = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    check(student.advantages(mixed), group_advantages(mixed), "A group of equal rewards must not change others.")


def test_leave_one_out():
    check(student.leave_one_out(torch.tensor([[0.5, -0.5]])), [[1.0, -1.0]], "Rewards 1 and 0: 1 - 0 and 0 - 1.")
    for G in (3, 8):
        rewards = uniform(4, G, seed=G)
        others = (rewards.sum(1, keepdim=True) - rewards) / (G - 1)
        got = student.leave_one_out(rewards - rewards.mean(1, keepdim=True))
        check(got, rewards - others, f"G = {G}: write the mean of the others with the mean of all and r_i.")


def test_filtered():
    check(pair(student.filtered(0.5, 2)), [0.5, 2.0], "Two responses at p = 0.5: right-right or wrong-wrong, 1 / 2.")
    for p, G in ((0.5, 8), (0.9, 4), (0.1, 3), (0.7, 5)):
        removed = 0.0
        for outcome in itertools.product((True, False), repeat=G):
            if all(outcome) or not any(outcome):
                removed += math.prod(p if right else 1 - p for right in outcome)
        probability, draws = pair(student.filtered(p, G))
        check(probability, removed, f"p = {p}, G = {G}: the sum over all 2^G outcomes is another one.")
        check(draws, 1 / (1 - removed), "If a draw succeeds with probability s, how many draws are expected?")


# ---------------------------------------------------------------------------------------------------------------------
# The packed row
# ---------------------------------------------------------------------------------------------------------------------

ROWS = ((3, [2, 4]), (1, [1]), (5, [3, 1, 2]))  # prompt tokens, tokens of each response


def test_positions():
    for S, rows in ROWS:
        want = [*range(S), *(S + t for n in rows for t in range(n))]
        got = student.positions(torch.arange(S), rows)
        check(got, want, f"{S} prompt tokens, responses of {rows}: each response follows the prompt.")
    image = torch.tensor([0, 1, 2, 2, 2, 2, 4, 5])  # a 2 x 2 image: 8 tokens, largest position 5
    want = [*image.tolist(), 6, 7, 6]
    check(student.positions(image, [2, 1]), want, "The next position after the prompt is not the number of its tokens.")


def test_packed_mask():
    for prompt, rows in ROWS:
        owner = [0] * prompt + [i + 1 for i, n in enumerate(rows) for _ in range(n)]
        L = len(owner)
        got = student.packed_mask(prompt, rows)
        check(torch.as_tensor(got).shape, (L, L), "One row and one column for each token.")
        for query, key in itertools.product(range(L), repeat=2):
            want = key <= query and owner[key] in (0, owner[query])
            names = ["the prompt", *(f"response {i + 1}" for i in range(len(rows)))]
            assert bool(got[query][key]) == want, (
                f"Prompt of {prompt}, responses of {rows}: token {query} (in {names[owner[query]]}) must "
                f"{'' if want else 'not '}attend to token {key} (in {names[owner[key]]})."
            )


def test_predictors():
    for prompt, rows in ROWS:
        want, start = [], prompt
        for n in rows:
            want += [prompt - 1 if t == 0 else start + t - 1 for t in range(n)]
            start += n
        why = f"Prompt of {prompt}, responses of {rows}: which state predicts the first token of a response?"
        check(student.predictors(prompt, rows), want, why)


# ---------------------------------------------------------------------------------------------------------------------
# The loss and its gradient
# ---------------------------------------------------------------------------------------------------------------------


def test_token_weight():
    for valid in ((4, 1), (2, 5, 3), (3, 0, 1)):
        mask = lengths(*valid, width=6)
        answers = pair(student.token_weight(mask))
        for kind, got in zip(("token", "sequence"), answers):
            ones = torch.ones(mask.shape, dtype=torch.double)
            slope = derivative(lambda values, kind=kind, mask=mask: aggregate(values, mask, kind), ones)
            check(got, slope.amax(1), f"The {kind} mean, with {valid} valid tokens in the responses.")


def test_no_gradient():
    ratio = torch.tensor([[0.5, 1.0, 1.25, 1.5]]).repeat(3, 1)
    got = student.no_gradient(ratio, torch.tensor([1.0, -1.0, 0.0]), 0.2, 0.28)
    want = [[False, False, False, True], [True, False, False, False], [True] * 4]
    check(got, want, "Ratios 0.5, 1, 1.25, 1.5; A = 1, -1, 0; clip to [0.8, 1.28]. min takes the smaller product.")
    ratio, A = 0.3 + 1.5 * uniform(5, 7), torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0], dtype=torch.double)
    mask = torch.ones(5, 7, dtype=torch.bool)
    slope = derivative(lambda logps: policy_loss(logps, torch.zeros_like(logps), A, mask, 0.3, 0.1)[0], ratio.log())
    check(student.no_gradient(ratio, A, 0.3, 0.1), slope == 0, "Autograd of policy_loss says otherwise.")


def test_first_update():
    mask, A = lengths(4, 1, 3, width=5), torch.tensor([1.5, -0.5, 0.0], dtype=torch.double)
    old = normal(3, 5) - 2
    got = student.first_update(A, mask)
    assert not torch.as_tensor(got)[~mask].any(), "A token of the padding has a gradient."
    why = "Autograd of policy_loss at ratio 1 says otherwise. How many tokens is the mean over, and what is the sign?"
    check(got, derivative(lambda logps: policy_loss(logps, old, A, mask)[0], old), why)


def test_k3():
    for seed, V in ((0, 2), (1, 5)):
        z, ref = normal(V, seed=seed), normal(V, seed=seed + 9)
        p, q = z.softmax(0), ref.softmax(0)
        as_loss, exact = pair(student.k3(z, ref))

        def expected(z, p=p, ref=ref):  # over the tokens that p samples, as the code does it
            return (p * kl_penalty(z.log_softmax(0)[None], ref.log_softmax(0)[None])[0]).sum()

        def kl(z, q=q):
            return (z.softmax(0) * (z.log_softmax(0) - q.log())).sum()

        def reverse(z, q=q):
            return (q * (q.log() - z.log_softmax(0))).sum()

        check(as_loss, derivative(expected, z), "First answer: d k3_v / d log p_v is 1 - q_v / p_v. Then sum over v.")
        check(exact, derivative(kl, z), "Second answer: here the factor p_v in the sum is not a constant.")
        check(as_loss, derivative(reverse, z), "First answer: it is the gradient of KL(q || p).")


def test_entropy_bonus():
    check(student.entropy_bonus(torch.zeros(4)), torch.zeros(4), "At the uniform distribution the entropy is highest.")
    for seed, V in ((0, 2), (1, 6)):
        z = normal(V, seed=seed)
        want = derivative(lambda z: -(z.softmax(0) * z.log_softmax(0)).sum(), z)
        check(student.entropy_bonus(z), want, "Autograd says otherwise. Every logit changes all V probabilities.")


# ---------------------------------------------------------------------------------------------------------------------
# The methods
# ---------------------------------------------------------------------------------------------------------------------


def test_psi():
    for T in (2, 3, 10, 100):
        focus, largest = pair(student.psi(T))
        focus = torch.as_tensor(focus).detach().float()
        assert focus.shape == (T,), f"T = {T}: one focus value for each token, (T,)."
        reached = vgpo.token_factors(focus[None], torch.ones(1, T, dtype=torch.bool)).max().item()
        why = f"T = {T}: with your focus the largest psi is {reached:.4f}"
        assert reached > 2 - 1 / T - 1e-3, f"{why}. The best token has w' = 1; what makes the mean of w' small?"
        check(largest, 2 - 1 / T, f"{why}, but you give another value.", 1e-4)


def test_alpha_mean():
    check(student.alpha_mean(2), 1.2, "G = 2: alpha is 0.5 and 1.5 before the clamps, and 0.9 and 1.5 after them.")
    for G in (3, 6, 8, 12, 64):
        alpha = vgpo.rollout_factors(torch.linspace(0, 1, G)[None])
        check(student.alpha_mean(G), alpha.mean(), f"G = {G}: alpha is {[round(x, 2) for x in alpha[0].tolist()]}.")


def test_no_score():
    entropy = torch.tensor([[0.5, 0.2, 0.9, 0.2, 0.0], [0.7, 0.0, 0.0, 0.0, 0.0], [0.3, 0.1, 0.4, 0.1, 0.6]])
    mask = lengths(4, 1, 5, width=5)
    best = torch.zeros(3, 5)
    for t in range(5):  # the noised image changes token t most
        jsd = 0.1 * uniform(3, 5, seed=t).float()
        jsd[:, t] = 0.6
        best = torch.maximum(best, vepo.token_scores(jsd, entropy, entropy + 0.5 * jsd, mask))
    why = "Min-max gives 0 to the lowest valid value: can several tokens have it? Is padding left out?"
    check(student.no_score(entropy, mask), mask & (best == 0), why)


def test_heaviest():
    strong = torch.tensor([[0.1, 2.0, 1.5, 0.2, 9.0], [4.0, 0.5, 3.0, 3.5, 1.0], [0.3, 0.0, 0.0, 0.0, 0.0]])
    weak = torch.tensor([[0.0, 0.5, 0.1, 0.0, 9.0], [0.9, 0.0, 0.1, 0.8, 0.5], [0.3, 0.0, 0.0, 0.0, 0.0]])
    batches = [(strong, weak, lengths(4, 5, 1, width=5))]
    for seed in range(3):
        batches.append((3 * uniform(20, 9, seed=seed), uniform(20, 9, seed=seed + 9), lengths(*[9, 4] * 10, width=9)))
    for strong, weak, mask in batches:
        weights = prpo.token_weights(prpo.robust_visual_dependency(strong, weak, mask), mask)
        got = torch.as_tensor(student.heaviest(strong, weak, mask)).long()
        check(got.shape, (len(mask),), "One index for each response.")
        reached, best = weights.gather(1, got[:, None])[:, 0], weights.amax(1)
        assert torch.allclose(reached, best, atol=1e-4), (
            f"The tokens that you name have the weights\n{reached}\nbut the largest ones are\n{best}\n"
            "Is a token with a large weak divergence up-weighted? Do log and min-max come in this order?"
        )


def test_tau_limits():
    similarity = torch.tensor([[0.1, 0.4, 0.2, 0.9], [0.3, 0.1, 0.3, 0.2], [0.5, 0.0, 0.0, 0.0]])
    mask = lengths(3, 4, 1, width=4)
    for name, tau, got in zip(("0", "infinity"), (1e-6, 1e9), pair(student.tau_limits(similarity, mask))):
        got = torch.as_tensor(got).double()
        check(got.shape, mask.shape, "One weight for each token.")
        check((got * mask).sum(1) / mask.sum(1), torch.ones(3), f"tau -> {name}: the mean is not 1.")
        want = pepo.token_weights(similarity, similarity, mask, alpha=0.0, temperature=tau)
        check(got, want, f"tau -> {name}: it is not what pepo.token_weights gives for tau = {tau}.", 1e-4)


def test_entropy_gain():
    inside, gradient = 0.1 + 0.8 * uniform(3, 4, 4), normal(3, 4, 4, seed=1)
    for where, image in (
        ("inside (0, 1)", inside),
        ("at 0 and 1", inside.round()),
        ("near 0 and 1", 0.98 * inside.round() + 0.01),
    ):
        for step in (2 / 255, 0.05):
            attacked = saei.adversarial_step(image, gradient, step)
            slope = torch.linalg.vecdot(gradient.flatten(), (attacked - image).flatten())
            check(student.entropy_gain(image, gradient, step), slope, f"Pixels {where}: gradient times real change.")


def test_largest_factor():
    for B in (2, 8, 128):
        dependency, largest = pair(student.largest_factor(B))
        dependency = torch.as_tensor(dependency).detach().float()
        assert dependency.shape == (B,), f"B = {B}: one dependency for each response, (B,)."
        assert (dependency >= 0).all(), "A dependency is not below 0."
        reached = vppo.response_factors(dependency, dependency).max().item()
        why = f"B = {B}: with your dependencies the largest f is {reached:.4f}"
        assert reached > 0.9 + 0.1 * B - 1e-3, f"{why}. The best response has n = 1; what makes the mean of n small?"
        check(largest, 0.9 + 0.1 * B, f"{why}, but you give another value.", 1e-4)


def test_papo():
    B, T, mask = 9, 8, lengths(8, 2, 6, 1, 5, 3, 7, 4, 8, width=8)
    rewards = torch.tensor([[1.0, 0.0, 0.2], [0.9, 0.9, 0.9], [0.0, 0.4, 1.0]])
    old = normal(B, T) - 2
    new, masked = old + 0.4 * normal(B, T, seed=1), old + 0.6 * normal(B, T, seed=2)

    def graded(function, padding=0.0, **settings):
        """The loss, and its gradients by logps and masked_logps."""
        leaves = [torch.where(mask, x, padding).requires_grad_() for x in (new, masked)]
        loss = function(rewards, leaves[0], torch.where(mask, old, padding), leaves[1], mask, **settings)
        assert isinstance(loss, torch.Tensor) and loss.dim() == 0, "The loss is a tensor without dimensions."
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)
        return loss, *(torch.zeros_like(new) if x is None else x for x in found)

    def wanted(rewards, logps, old, masked, mask, gamma=0.01, cap=1.0, clip_low=0.2, clip_high=0.2):
        loss, _ = policy_loss(logps, old, group_advantages(rewards).flatten(), mask, clip_low, clip_high)
        return loss - gamma * aggregate(kl_penalty(logps, masked).clamp(max=cap), mask)

    for why, settings in (
        ("gamma = 0 is GRPO: look at the advantages, at the clipping, and at the mean over tokens.", dict(gamma=0.0)),
        ("clip_low and clip_high have a side each.", dict(gamma=0.0, clip_low=0.1, clip_high=0.4)),
        ("Look at the KL term: its sign, its direction (masked - clean in d), its mean.", dict(gamma=0.5, cap=1e12)),
        ("Look at the cap: it bounds the KL of each token, not the mean.", dict(gamma=0.5, cap=0.05)),
        ("The default settings.", dict()),
        ("A token has d = 900, and exp(900) is infinite: clamp d first.", dict()),
    ):
        masked[0, 0] += 900 * ("900" in why)
        results = zip(("loss", "gradient by logps", "gradient by masked_logps"), graded(student.papo, **settings))
        for (name, got), want in zip(results, graded(wanted, **settings)):
            check(got, want, f"{why} ({name}, {settings})")
    for padding in (math.nan, 1e30):
        for got, want in zip(graded(student.papo, padding), graded(student.papo)):
            check(got, want, f"{padding} on padding changes the loss or a gradient: replace padding BEFORE exp.")
