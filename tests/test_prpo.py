"""PRPO's divergences, RVD and weights (our reading): hand-computed numbers and the invariants of its page."""

import math

import pytest
import torch
from helpers import MEAN_ROW, SCALE, STD_ROW, assert_row_wise, normalised_pixels, random_signals, times_agree

from common import seeded
from prpo import add_pixel_noise, blacken, divergences, robust_visual_dependency, shuffled, token_weights

ALL = torch.ones(1, 4, dtype=torch.bool)


def test_noise_on_normalised_pixels():
    clean = normalised_pixels()
    before, noised = clean.clone(), add_pixel_noise(clean, seeded(1), **SCALE)
    unit, was = noised * STD_ROW + MEAN_ROW, clean * STD_ROW + MEAN_ROW
    assert unit.min() > -1e-6 and unit.max() < 1 + 1e-6 and times_agree(noised) and torch.equal(clean, before)
    inside = (was - 0.5).abs() < 0.1  # far from the ends nothing is clipped
    assert (unit - was)[inside].std().item() == pytest.approx(0.1, abs=0.001)


def test_blackened_patches():
    clean = normalised_pixels()
    before, dark = clean.clone(), blacken(clean, seeded(1), **SCALE, probability=0.6)
    black = ((dark * STD_ROW + MEAN_ROW).abs() < 1e-6).all(1)
    assert black.float().mean().item() == pytest.approx(0.6, abs=0.03) and torch.equal(clean, before)
    assert torch.equal(dark[~black], clean[~black])  # a patch is black or untouched


def test_divergences_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.1, 0.1, 0.8]])
    strong, weak = divergences(p.log() + 3, q.log() - 5, p.log() + 1)
    assert strong.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)
    assert weak.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("distance", [1e-4, 1.0, 30.0])
def test_small_divergences_keep_their_digits(distance):
    """The plain sum in float32 is wrong by more than the whole value at the first of these distances."""
    torch.manual_seed(0)
    logits = torch.randn(200, 300) * 5
    other = logits + distance * torch.randn_like(logits)
    p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    want = (p.exp() * (p - q)).sum(-1)
    strong, weak = divergences(logits, other, logits)
    assert torch.allclose(strong.double(), want, rtol=0.02) and (weak == 0).all() and (strong >= 0).all()
    assert not divergences(logits.requires_grad_(), other, other)[0].requires_grad


def test_divergence_from_what_is_impossible_is_large_and_finite():
    strong, _ = divergences(torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]]), torch.zeros(1, 2))
    assert strong.item() == pytest.approx(200, rel=1e-4)
    strong, _ = divergences(torch.tensor([[0.0, -1e9]]), torch.zeros(1, 2), torch.zeros(1, 2))
    assert strong.item() == pytest.approx(math.log(2), abs=1e-6)


def test_rvd_by_hand():
    e = math.e
    strong = torch.tensor([[0.0, e - 1, e**2 - 1, e**2 - 1]])  # log(1 + S) = 0, 1, 2, 2: VD = 0, 1/2, 1, 1
    weak = torch.tensor([[0.0, 0.0, e**0.5 - 1, e - 1]])  # VI = 0, 0, 1/2, 1
    rvd = robust_visual_dependency(strong, weak, ALL)
    assert torch.allclose(rvd, torch.tensor([[0.0, 0.5, 0.5, 0.0]]), atol=1e-6)
    assert torch.allclose(token_weights(rvd, ALL), torch.tensor([[1.0, 2.0, 2.0, 1.0]]), atol=1e-6)


def test_bounds_and_padding():
    strong, weak, mask = random_signals(2, scale=2)
    weights = token_weights(robust_visual_dependency(strong, weak, mask), mask)
    assert (weights[mask] >= 1).all() and (weights[mask] <= 3).all()
    assert (weights[mask] > 1.01).any() and weights[2, 0] == 1  # one token
    assert_row_wise(robust_visual_dependency, strong, weak, mask=mask)
    assert_row_wise(token_weights, strong, mask=mask)


def test_no_dependency_no_instability_no_strength():
    strong, weak, mask = random_signals(2, scale=2)
    nothing = torch.zeros_like(strong)
    assert torch.equal(token_weights(robust_visual_dependency(nothing, weak, mask), mask), mask.float())
    stable = robust_visual_dependency(strong, nothing, mask)
    log = strong.log1p()
    for row in range(2):
        valid = log[row][mask[row]]
        dependency = (valid - valid.min()) / (valid.max() - valid.min())
        assert torch.allclose(token_weights(stable, mask)[row][mask[row]], 1 + 2 * dependency, atol=1e-6)
    assert torch.equal(token_weights(torch.rand(4, 9), mask, strength=0.0), mask.float())


def test_the_control_arm_keeps_the_weights_and_loses_their_places():
    strong, weak, mask = random_signals(2, scale=2)
    rvd = robust_visual_dependency(strong, weak, mask)
    moved = shuffled(rvd, mask, torch.rand(4, 9, generator=torch.Generator().manual_seed(3)))
    assert (moved[~mask] == 0).all() and not torch.equal(moved, rvd)
    for a, b, valid in zip(moved, rvd, mask):
        assert torch.equal(a[valid].sort().values, b[valid].sort().values)
    holes = torch.tensor([[True, False, True, False, True]])
    got = shuffled(torch.tensor([[1.0, 0.0, 2.0, 0.0, 3.0]]), holes, torch.tensor([[0.9, 0.0, 0.1, 0.0, 0.5]]))
    assert got.tolist() == [[2.0, 0.0, 3.0, 0.0, 1.0]]
    firsts = [shuffled(torch.eye(1, 4), ALL, torch.rand(1, 4)).argmax().item() for _ in range(400)]
    assert all(60 < firsts.count(place) < 140 for place in range(4))
