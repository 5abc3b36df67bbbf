"""lecture/exercises: the graders accept the solutions, and reject empty stubs and typical mistakes."""

import ast
import inspect
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import common
import prpo

FOLDER = ROOT / "lecture/exercises"
sys.path.append(str(FOLDER))

import test_exercises as graders  # noqa: E402

STUBS, SOLUTIONS = graders.load(FOLDER / "exercises.py"), graders.load(ROOT / "lecture/solutions/exercises.py")


def names_of(module):
    return [name for name, value in vars(module).items() if inspect.isfunction(value)]


NAMES = names_of(STUBS)


def causal(prompt, lengths):
    L = prompt + sum(lengths)
    return torch.ones(L, L, dtype=torch.bool).tril()


def blocks(prompt, lengths):
    return torch.block_diag(*(torch.ones(n, n).tril() for n in (prompt, *lengths))).bool()


def to_itself_in_full(prompt, lengths):
    found = torch.block_diag(*(torch.ones(n, n) for n in (prompt, *lengths))).bool()
    found[:, :prompt] = True
    return found


def k3_without_chain_rule(logits, ref_logits):
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    return 1 - q / p, SOLUTIONS.k3(logits, ref_logits)[1]


def papo_with(**changes):
    """The solution with some of its arguments changed: each is a function of all arguments, by name."""

    def papo(*args, **settings):
        bound = inspect.signature(SOLUTIONS.papo).bind(*args, **settings)
        bound.apply_defaults()
        given = bound.arguments
        return SOLUTIONS.papo(**(given | {name: change(SimpleNamespace(**given)) for name, change in changes.items()}))

    return papo


def another_papo(limit=20, replace=True, of_the_mean=False):
    """PAPO in other words; with other arguments than these a wrong one."""

    def papo(rewards, logps, old_logps, masked_logps, mask, gamma=0.01, cap=1.0, clip_low=0.2, clip_high=0.2):
        logps, old_logps, masked_logps = (x[mask] if replace else x for x in (logps, old_logps, masked_logps))
        A = SOLUTIONS.advantages(rewards).flatten()[:, None].expand(mask.shape)
        A, rho = A[mask] if replace else A, (logps - old_logps).exp()
        policy = torch.max(-rho * A, -rho.clamp(1 - clip_low, 1 + clip_high) * A)
        d = (masked_logps - logps).clamp(-limit, limit)
        kl = d.expm1() - d
        kl = kl if of_the_mean else kl.clamp(max=cap)
        policy, kl = (x.mean() if replace else torch.where(mask, x, 0.0).sum() / mask.sum() for x in (policy, kl))
        return policy - gamma * (kl.clamp(max=cap) if of_the_mean else kl)

    return papo


RIGHT = {  # other ways to the right answer
    "advantages": common.group_advantages,
    "leave_one_out": lambda c: c - (c.sum(1, keepdim=True) - c) / (c.shape[1] - 1),
    "positions": lambda prompt, n: [*prompt.tolist(), *(max(prompt.tolist()) + 1 + t for k in n for t in range(k))],
    "packed_mask": lambda *row: SOLUTIONS.packed_mask(*row).float(),
    "no_gradient": lambda ratio, A, low, high: (
        (ratio.clamp(1 - low, 1 + high) * A[:, None] < ratio * A[:, None]) | (A == 0)[:, None]
    ),
    "psi": lambda T: (0.3 + 0.5 * torch.eye(T)[-1], (2 * T - 1) / T),
    "alpha_mean": lambda G: sum(max(0.9, 0.5 + k / (G - 1)) for k in range(G)) / G,
    "no_score": lambda entropy, mask: mask & (common.min_max(entropy, mask) == 0),
    "heaviest": lambda *row: prpo.robust_visual_dependency(*row).masked_fill(~row[-1], -1).argmax(1),
    "tau_limits": lambda s, mask: torch.stack(
        [(s / tau).masked_fill(~mask, -torch.inf).softmax(1) * mask.sum(1, keepdim=True) for tau in (1e-4, 1e9)]
    ),
    "largest_factor": lambda B: (5.0 - 4.0 * (torch.arange(B) > 0), (9 + B) / 10),
    "papo": another_papo(),
}

WRONG = {  # typical mistakes, by exercise
    "advantages": [
        lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6),  # 0.9 is not exact
        lambda r: (r - r.mean()) / (r.std() + 1e-6),  # over all groups
        lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6),
    ],
    "leave_one_out": [lambda c: c, lambda c: c * (c.shape[1] - 1) / c.shape[1]],
    "filtered": [lambda p, G: (p**G, 1 / (1 - p**G)), lambda p, G: (p**G + (1 - p) ** G, 1 / (p**G + (1 - p) ** G))],
    "positions": [
        lambda prompt, n: torch.arange(len(prompt) + sum(n)),  # response 2 follows response 1
        lambda prompt, n: torch.cat([prompt, *(len(prompt) + torch.arange(k) for k in n)]),  # images share positions
        lambda prompt, n: torch.cat([prompt, *(prompt[-1] + torch.arange(k) for k in n)]),
    ],
    "packed_mask": [causal, blocks, to_itself_in_full, lambda *row: SOLUTIONS.packed_mask(*row).T],
    "predictors": [lambda prompt, n: torch.arange(prompt - 1, prompt - 1 + sum(n))],
    "token_weight": [
        lambda mask: SOLUTIONS.token_weight(mask)[::-1],
        lambda mask: (SOLUTIONS.token_weight(mask)[0], 1 / (len(mask) * mask.sum(1))),  # counts empty responses
        lambda mask: (torch.full((len(mask),), 1 / mask.numel()), SOLUTIONS.token_weight(mask)[1]),  # and padding
    ],
    "no_gradient": [
        lambda ratio, A, low, high: (ratio < 1 - low) | (ratio > 1 + high),  # whatever the sign
        lambda ratio, A, low, high: SOLUTIONS.no_gradient(ratio, A, low, high) & (A != 0)[:, None],
        lambda ratio, A, low, high: SOLUTIONS.no_gradient(ratio, -A, low, high),
    ],
    "first_update": [
        lambda A, mask: A[:, None] * mask / mask.sum(),
        lambda A, mask: -A[:, None] * mask / mask.numel(),
        lambda A, mask: -A[:, None].expand(mask.shape) / mask.sum(),
        lambda A, mask: 0.0 * mask,  # the loss itself is often near 0
    ],
    "k3": [
        k3_without_chain_rule,
        lambda z, ref: SOLUTIONS.k3(z, ref)[::-1],
        lambda z, ref: [SOLUTIONS.k3(z, ref)[1]] * 2,  # as if k3 were an unbiased loss
        lambda z, ref: [SOLUTIONS.k3(z, ref)[0]] * 2,
        lambda z, ref: [-x for x in SOLUTIONS.k3(z, ref)],
    ],
    "entropy_bonus": [
        lambda z: -SOLUTIONS.entropy_bonus(z),
        lambda z: -z.softmax(-1) * (z.log_softmax(-1) + 1),  # the gradient by the probabilities, times p
        lambda z: -z.softmax(-1) * z.log_softmax(-1),
    ],
    "psi": [
        lambda T: (torch.arange(T) / T, 1.5),
        lambda T: (torch.eye(T)[0], 2.0),  # never reached
        lambda T: (torch.ones(T), 1.0),
        lambda T: (1 - torch.eye(T)[0], 2 - 1 / T),
    ],
    "alpha_mean": [lambda G: 1.0, lambda G: 1.1, lambda G: 1.08, lambda G: 1 + 0.4**2 / 2 * G / (G - 1)],
    "no_score": [
        lambda entropy, mask: mask & (entropy == 0),
        lambda entropy, mask: mask & (entropy == entropy.amin(1, keepdim=True)),  # the lowest may be padding
        lambda entropy, mask: (
            torch.arange(mask.shape[1])  # the first of equal ones alone
            == entropy.masked_fill(~mask, torch.inf).argmin(1, keepdim=True)
        ),
    ],
    "heaviest": [
        lambda strong, weak, mask: strong.masked_fill(~mask, -1).argmax(1),
        lambda strong, weak, mask: (strong - weak).masked_fill(~mask, -9).argmax(1),
        lambda strong, weak, mask: SOLUTIONS.heaviest(strong, weak, torch.ones_like(mask)),
        lambda strong, weak, mask: SOLUTIONS.heaviest(strong.expm1(), weak.expm1(), mask),  # no log
    ],
    "tau_limits": [
        lambda s, mask: SOLUTIONS.tau_limits(s, mask)[::-1],
        lambda s, mask: [x / mask.sum(1, keepdim=True) for x in SOLUTIONS.tau_limits(s, mask)],  # softmax, mean 1 / n
        lambda s, mask: (SOLUTIONS.tau_limits(s, mask)[0], torch.ones(mask.shape)),  # padding
        lambda s, mask: ((s == s.amax(1, keepdim=True)) * mask.sum(1, keepdim=True), mask),  # ties, padding
    ],
    "entropy_gain": [
        lambda image, gradient, step: step * gradient.norm(),
        lambda image, gradient, step: step * gradient.abs().sum(),  # without the clamp
        lambda image, gradient, step: step * gradient.sum(),
        lambda image, gradient, step: (  # a pixel that is clamped on its way counts as 0
            step * gradient.abs() * ((image + step * gradient.sign()).clamp(0, 1) == image + step * gradient.sign())
        ).sum(),
    ],
    "largest_factor": [
        lambda B: (torch.eye(B)[0], 1.0),
        lambda B: (torch.eye(B)[0], 1.1),
        lambda B: (torch.arange(B) / (B - 1), 0.9 + 0.1 * B),  # evenly spread: twice the mean
        lambda B: (-torch.eye(B)[0], 0.9 + 0.1 * B),
        lambda B: (torch.ones(B), 0.9 + 0.1 * B),
    ],
    "papo": [
        papo_with(gamma=lambda given: -given.gamma),
        papo_with(cap=lambda given: torch.inf),
        papo_with(masked_logps=lambda given: given.masked_logps.detach()),
        papo_with(rewards=lambda given: given.rewards.flatten()[None]),  # one group
        papo_with(rewards=lambda given: given.rewards + torch.tensor([0, 0, 1e-7])),  # 0.9 is not exact
        papo_with(clip_high=lambda given: given.clip_low),
        papo_with(old_logps=lambda given: given.logps.detach()),
        another_papo(limit=1e9),  # exp overflows
        another_papo(replace=False),  # NaN on padding
        another_papo(of_the_mean=True),
    ],
}


def test_the_solutions_pass():
    """As a student runs it, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "lecture/exercises"]
    env = os.environ | {"EXERCISES": "lecture/solutions/exercises.py"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    passed = re.search(r"^(\d+) passed in", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and passed, done.stdout + done.stderr
    assert int(passed[1]) == len(NAMES) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_fails(name, monkeypatch):
    monkeypatch.setattr(graders, "student", STUBS)
    with pytest.raises(NotImplementedError):
        getattr(graders, f"test_{name}")()


@pytest.mark.parametrize("name", RIGHT)
def test_another_right_answer_passes(name, monkeypatch):
    monkeypatch.setattr(graders, "student", SimpleNamespace(**{name: RIGHT[name]}))
    getattr(graders, f"test_{name}")()


@pytest.mark.parametrize("name, i", [(name, i) for name in WRONG for i in range(len(WRONG[name]))])
def test_a_typical_mistake_fails(name, i, monkeypatch):
    monkeypatch.setattr(graders, "student", SimpleNamespace(**{name: WRONG[name][i]}))
    with pytest.raises(AssertionError):
        getattr(graders, f"test_{name}")()


def test_every_exercise_has_a_question_a_grader_a_solution_and_a_mistake():
    assert [name.removeprefix("test_") for name in names_of(graders) if name.startswith("test_")] == NAMES
    assert NAMES == names_of(SOLUTIONS) == list(WRONG)
    for name in NAMES:
        stub, solution = getattr(STUBS, name), getattr(SOLUTIONS, name)
        assert inspect.signature(stub) == inspect.signature(solution)
        assert stub.__doc__ and solution.__doc__ != stub.__doc__
        places = [*NAMES, "lecture/exercises/test_exercises.py"]
        assert [place for place in places if name in place] == [name]  # `pytest -k name` grades this one alone


def test_an_answer_may_change_its_tensors(monkeypatch):
    """It is given copies: what it does to them changes no expected number."""

    def nonsense(similarity, mask):
        similarity.zero_()
        return mask.double(), mask.double()

    monkeypatch.setattr(graders, "student", SimpleNamespace(tau_limits=graders.given_copies(nonsense)))
    with pytest.raises(AssertionError):
        graders.test_tau_limits()


def test_a_question_says_how_long_its_answer_is():
    """In brackets: at least the lines of code of the solution."""
    for name in NAMES:
        said = int(re.search(r"\[(?:\d+ to )?(\d+)\]", getattr(STUBS, name).__doc__)[1])
        lines = inspect.getsource(getattr(SOLUTIONS, name)).splitlines()
        body = ast.parse("\n".join(lines)).body[0].body[1]  # after the docstring
        code = [line for line in lines[body.lineno - 1 :] if line.strip() and not line.strip().startswith("#")]
        assert len(code) <= said <= 50, (name, len(code))
