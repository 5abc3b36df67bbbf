"""VGPO's focus, compensation and factors: hand-computed numbers, loops, and what may not change them."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import SHAPES, assert_row_wise, lengths, plain_states, random_signals, tiny_group, tiny_model, tiny_prompt

from common import forward
from vgpo import Args, compensate, rollout_factors, row_focus, set_weights, token_factors, visual_focus


def test_focus_by_hand():
    hidden, image = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0]]]), torch.tensor([[[2.0, 0.0], [4.0, 0.0]]])
    assert visual_focus(hidden, image).tolist() == [[1.0, 0.0, 0.5]]  # cosines 1, -1, 0
    assert visual_focus(hidden, image, floor=0.0).tolist() == [[1.0, -1.0, 0.0]]
    # the mean state is raw, not of unit vectors: (3, 4) and (0, 4) have the mean (1.5, 4)
    got = visual_focus(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0, 4.0], [0.0, 4.0]]]))
    assert got.item() == pytest.approx((1 + 1.5 / math.hypot(1.5, 4)) / 2, abs=1e-6)


def test_compensation_by_hand():
    """T = 10: the tail is t = 5 .. 9, k = 1; t = 7 is the best of it: 0.6 (1 + 0.3 * 7 / 9) = 0.74."""
    focus = torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.5, 0.6, 0.3, 0.2]])
    want = focus.clone()
    want[0, 7] = 0.74
    assert torch.allclose(compensate(focus, lengths(10)), want, atol=1e-6)
    want[0, 6] = 0.5 * (1 + 0.3 * 6 / 9)  # k = 2
    assert torch.allclose(compensate(focus, lengths(10), top=0.4), want, atol=1e-6)


def slow(focus, mask, strength, start, top):
    """The page's definition, one token at a time."""
    out = torch.zeros_like(focus)
    for row in range(len(focus)):
        T = int(mask[row].sum())
        begin = math.floor(T * start)
        tail = sorted(focus[row, begin:T].tolist(), reverse=True)
        for t in range(T):
            gated = t >= begin and focus[row, t].item() >= tail[max(1, math.floor((T - begin) * top)) - 1]
            out[row, t] = focus[row, t] * (1 + gated * strength * t / (T - 1) if T > 1 else 1)
    return out


@pytest.mark.parametrize("strength, start, top", [(0.3, 0.5, 0.2), (1.0, 0.0, 1.0), (0.3, 0.9, 0.5)])
def test_compensation_against_loops(strength, start, top):
    torch.manual_seed(0)
    mask = lengths(40, 35, 15, 5, 3, 2, 1)
    focus = (torch.rand(7, 40) * 20).round() / 20  # with ties
    want = slow(focus, mask, strength, start, top)
    assert torch.allclose(compensate(focus, mask, strength, start, top), want, atol=1e-6)


def test_factors_by_hand():
    mask = lengths(4, 3, width=4)
    psi = token_factors(torch.tensor([[2.0, 6.0, 4.0, 4.0], [1.0, 1.0, 5.0, 99.0]]), mask)
    want = torch.tensor([[0.5, 1.5, 1.0, 1.0], [2 / 3, 2 / 3, 5 / 3, 0.0]])  # 1 + [0, 1, .5, .5] - .5 and - 1/3
    assert torch.allclose(psi, want, atol=1e-6)
    assert torch.allclose(psi.sum(1), mask.sum(1).float(), atol=1e-5)
    low = torch.ones(1, 20)
    low[0, 0] = 0.0  # 1 + 0 - 0.95 is under the clamp
    assert token_factors(low, lengths(20))[0, 0].item() == pytest.approx(0.1)
    alpha = rollout_factors(torch.tensor([[10.0, 30.0, 20.0, 20.0], [5.0, 5.0, 5.0, 5.0]]))
    assert torch.allclose(alpha, torch.tensor([[0.9, 1.5, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]), atol=1e-6)


def test_one_token_constant_scores_and_no_image_give_one():
    assert token_factors(compensate(torch.tensor([[0.7]]), lengths(1)), lengths(1)).tolist() == [[1.0]]
    mask = lengths(5, 2)
    assert torch.equal(token_factors(torch.full((2, 5), 0.3), mask), mask.float())
    nothing = compensate(visual_focus(torch.randn(2, 5, 4), torch.empty(1, 0, 4)), mask)
    assert torch.equal(token_factors(nothing, mask), mask.float())
    assert rollout_factors(nothing.sum(1)[None]).tolist() == [[1.0, 1.0]]


def test_without_compensation_the_floor_does_not_matter():
    torch.manual_seed(0)
    hidden, image, mask = torch.randn(3, 9, 8), torch.randn(1, 5, 8), lengths(9, 4, 6)
    factors = [
        token_factors(compensate(visual_focus(hidden, image, floor=floor), mask, strength=0.0), mask)
        for floor in (-1.0, -0.2, 0.0)
    ]
    assert all(torch.allclose(factors[0], other, atol=1e-5) for other in factors[1:])
    biting = [token_factors(compensate(visual_focus(hidden, image, floor=floor), mask), mask) for floor in (-1.0, 0.0)]
    assert not torch.allclose(*biting, atol=1e-3)


def test_factors_depend_on_their_own_response_alone():
    focus, mask = random_signals(1)
    assert_row_wise(compensate, focus, mask=mask)
    assert_row_wise(token_factors, focus, mask=mask)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("images", SHAPES)
def test_focus_on_a_packed_row_equals_that_on_padded_rows(family, images):
    model = tiny_model(family)
    group = tiny_group(tiny_prompt(model, SHAPES[images]), [7, 1, 4, 12])
    focus = row_focus(forward(model, group)[2], group, Args())
    layers, image_layers = plain_states(model, group)
    want = visual_focus(layers[-1], image_layers[-1])
    assert torch.allclose(focus[group.mask], want[group.mask], atol=2e-5) and not focus.requires_grad
    assert (focus[group.mask] != 0).all() == bool(SHAPES[images])


@pytest.mark.parametrize(
    "totals, want",
    [
        ([3.0, 2.0, 1.0], -0.8486),  # alpha 1.5, 1, 0.9: -0.8333 of products over 0.4546 x 2.1602
        ([1.0, 2.0, 3.0], 0.9843),  # alpha 0.9, 1, 1.5
        ([1.0, 1.0, 1.0], math.nan),  # alpha 1 for all
    ],
)
def test_the_correlation_of_alpha_and_length_by_hand(totals, want):
    """Focus adds up to `totals` over 1, 2 and 4 tokens; where all alpha are equal, nothing is logged."""
    group, log = tiny_group(tiny_prompt(tiny_model("qwen2_5_vl"), []), [1, 2, 4]), {}
    group.scores = (torch.tensor(totals) / torch.tensor([1.0, 2.0, 4.0]))[:, None] * group.mask
    run = SimpleNamespace(metrics=SimpleNamespace(add=lambda name, *pair: log.update({name: pair})))
    set_weights([group], run, Args(strength=0.0))
    value, weight = (float(x) for x in log["rollout_factor_length_correlation"])
    assert (value, weight) == ((0, 0) if math.isnan(want) else (pytest.approx(want, abs=1e-4), 1))
