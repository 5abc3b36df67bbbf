"""VPPO's dependency, choice and factors: hand-computed numbers, and what may not change them."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import SHAPES, assert_row_wise, random_signals, tiny_group, tiny_model, tiny_prompt, train

import common
import vppo
from common import forward, seeded
from show import run_of
from vppo import Args, blackened, response_factors, set_scores, set_weights, visual_dependency

SCALE = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.2] * 3))


@pytest.mark.parametrize(
    "p, q, want",
    [
        (0.5, 0.25, 0.5 - 1 + math.log(2)),
        (0.25, 0.5, 2 - 1 - math.log(2)),
        (0.3, 0.3, 0.0),
        (0.01, 0.9, 10.0),  # 90 - 1 - ln 90, cut at 10
        (1.0, 1e-20, 10.0),  # d = -46, cut at -20: e^-20 + 19, then at 10
        (1.0, math.exp(-5), math.exp(-5) + 4),
    ],
)
def test_dependency_by_hand(p, q, want):
    got = visual_dependency(torch.tensor([[p]]).log(), torch.tensor([[q]]).log())
    assert got.item() == pytest.approx(want, abs=2e-6)


def test_a_small_dependency_keeps_its_digits():
    got = visual_dependency(torch.zeros(1, 1), torch.full((1, 1), 1e-4))
    assert got.item() == pytest.approx(5e-9, rel=1e-3)  # d^2 / 2


def test_factors_by_hand():
    """n = 0, 1, 1/4: f = 0.9 + 0.1 n / (5/12)."""
    means = torch.tensor([0.1, 0.5, 0.2])
    assert torch.allclose(response_factors(means, means), torch.tensor([0.9, 1.14, 0.96]))
    assert torch.allclose(response_factors(means[1:], means), torch.tensor([1.14, 0.96]))  # rows of one mini-batch
    assert torch.equal(response_factors(means, means, floor=1.0), torch.ones(3))
    for equal in (torch.zeros(2), torch.tensor([0.5, 0.5, 0.5 + 6e-8])):  # or rounding would be amplified
        assert torch.equal(response_factors(equal, equal), torch.ones(len(equal)))


@pytest.mark.parametrize("seed", range(4))
def test_the_mean_of_the_factors_is_one(seed):
    means = torch.rand(9, generator=torch.Generator().manual_seed(seed))
    f = response_factors(means, means)
    assert f.mean().item() == pytest.approx(1, abs=1e-6) and f.min().item() == pytest.approx(0.9)


def weighed(rows, **settings):
    for row in rows:
        row.loss_mask = row.mask
    set_weights(rows, run_of(None), Args(**settings))
    return [row.weights for row in rows]


def test_weights_by_hand():
    """ceil(0.4 x 3) = 2 and ceil(0.4 x 1) = 1 tokens; means 0.2 and 0.6: n = 0 and 1, f = 0.9 and 1.1."""
    group = tiny_group(tiny_prompt(tiny_model("qwen2_5_vl"), [(2, 2)]), [3, 1])
    group.scores = torch.tensor([[0.1, 0.3, 0.2], [0.6, 0.0, 0.0]])
    (weights,) = weighed([group])
    assert torch.allclose(weights, torch.tensor([[0.0, 0.9, 0.9], [1.1, 0.0, 0.0]]))
    halves = [group[:1], group[1:]]
    assert torch.equal(torch.cat(weighed(halves)), weights)  # cut into rows
    text_only = tiny_group(tiny_prompt(tiny_model("qwen2_5_vl"), []), [3, 1])
    weights, plain = weighed([group, text_only])
    assert torch.allclose(weights[1, 0], torch.tensor(1.1)) and torch.equal(plain, text_only.mask.float())


def test_dependency_is_row_wise():
    logps, other, mask = random_signals(2)
    assert_row_wise(lambda a, b, m: torch.where(m, visual_dependency(-a, -b), 0.0), logps, other, mask=mask)


@pytest.mark.parametrize("images", SHAPES)
def test_scores_of_a_row_are_those_of_its_responses_one_by_one(images):
    """Each response has a draw of its own; without an image nothing depends on it."""
    model = tiny_model("qwen2_5_vl")
    group = tiny_group(tiny_prompt(model, SHAPES[images]), [5, 1, 3])
    group.texts = ["a", "b", "c"]
    run, args = run_of(model, SCALE), Args()
    with torch.no_grad():
        group.old_logps = forward(model, group)[0]
        set_scores([group], run, args, 1)
        cut = [group[:1], group[1:]]
        set_scores(cut, run, args, 1)
    assert (group.scores is None) == (not SHAPES[images])
    if SHAPES[images]:
        assert torch.allclose(torch.cat([row.scores for row in cut]), group.scores, atol=1e-5)
        assert not group.scores[~group.mask].any() and (group.scores[group.mask] > 1e-6).any()
        first, second = (blackened(group[i : i + 1], run, args, 1).prompt.pixel_values for i in (0, 1))
        assert not torch.equal(first, second)
        assert not torch.equal(first, blackened(group[:1], run, args, 2).prompt.pixel_values)  # another step
        black = (first != group.prompt.pixel_values).any(1).float().mean()
        assert 0.2 < black < 0.8


def test_half_of_the_patches_are_black():
    assert common.blacken(torch.rand(4000, 1176), seeded(0), **vars(SCALE.image_processor), probability=0.5).eq(
        -2.5
    ).all(1).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert vppo.Args().blacken == 0.5 and vppo.Args().entropy_coef == -0.06


def test_factors_reach_the_loss(trained):
    """With a floor of 1 they are 1: another gradient, of the same chosen tokens."""
    usual, off = (trained("vppo", "--steps", 1, "--floor", floor)[1][0]["grad_norm"] for floor in (0.9, 1.0))
    assert usual != off


def test_each_mini_batch_has_factors_of_its_own(monkeypatch, tmp_path):
    seen, plain = [], vppo.set_weights

    def weighed_rows(minibatch, *more):
        seen.append({row.prompt.prompt_id for row in minibatch})
        plain(minibatch, *more)

    monkeypatch.setattr(vppo, "set_weights", weighed_rows)
    train("vppo", tmp_path / "run", "--steps", 1, "--updates_per_step", 2)
    assert [len(prompts) for prompts in seen] == [2, 2] and not seen[0] & seen[1]
