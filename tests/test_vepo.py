"""VEPO's divergences, scores and selection: hand-computed numbers, the invariants of its page, its divisor."""

import math
from functools import partial

import pytest
import torch
from helpers import assert_row_wise, lengths, normalised_pixels, random_signals, times_agree, train
from transformers.image_utils import OPENAI_CLIP_STD

import vepo
from common import min_max, seeded
from vepo import add_noise, diffuse, divergences, kept_tokens, noised_pixels, select_top, token_scores

ALL = torch.ones(1, 4, dtype=torch.bool)


def test_noise_on_normalised_pixels():
    clean = normalised_pixels()
    before = clean.clone()
    noise = add_noise(clean, seeded(1)) - clean
    assert noise.std().item() == pytest.approx(2.0, abs=0.01) and noise.mean().item() == pytest.approx(0, abs=0.01)
    assert torch.equal(clean, before)
    plain = clean + 2.0 * torch.randn(clean.shape, generator=seeded(1))  # the released code's, for Qwen2.5-VL
    assert torch.equal(noised_pixels(clean, OPENAI_CLIP_STD, seeded(1), vepo.Args()), plain)


@pytest.mark.parametrize("noise, std", [("normalised", 2.0), ("diffusion", 0.505)])
def test_noise_is_as_strong_in_the_image_whatever_the_model_divides_by(noise, std):
    """Qwen3-VL divides by 0.5: its numbers are smaller, and so must be the noise on them."""
    made = noised_pixels(torch.zeros(2000, 1176), [0.5, 0.5, 0.5], seeded(1), vepo.Args(noise=noise))
    for channel, own in zip(made.view(2000, 3, -1).unbind(1), OPENAI_CLIP_STD):
        assert 0.5 * channel.std().item() == pytest.approx(std * own, rel=0.01)  # on pixels in [0, 1]


def test_diffusion():
    clean = torch.zeros(2000, 1176)
    noise = diffuse(clean, seeded(1))
    assert noise.std().item() == pytest.approx(0.505, abs=0.002) and times_agree(noise)
    ones = diffuse(clean + 1, seeded(1)) - noise
    assert torch.allclose(ones, torch.full_like(ones, 0.863), atol=1e-3)
    assert (diffuse(clean + 1, seeded(1), step=0) - 1).abs().max() < 0.05 and not clean.any()


def test_divergences_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.1, 0.1, 0.8])
    m = (p + q) / 2
    want = 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum()
    jsd, entropy, noised = divergences(p.log()[None] + 3, q.log()[None] - 5)  # logits are free up to a constant
    assert jsd.item() == pytest.approx(want.item(), abs=1e-6)
    assert entropy.item() == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert noised.item() == pytest.approx(-(q * q.log()).sum().item(), abs=1e-6)


def test_divergence_of_strangers_and_of_twins():
    far = divergences(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]))[0]
    assert far.item() == pytest.approx(math.log(2), abs=1e-6)
    torch.manual_seed(0)
    logits = torch.randn(500, 1000) * 8
    assert (divergences(logits, logits)[0] == 0).all()
    assert (divergences(logits, logits + torch.randn_like(logits) * 1e-5)[0] == 0).all()  # rounding is not a signal
    a, b = divergences(logits, logits.flip(0))[0], divergences(logits.flip(0), logits)[0]
    assert torch.allclose(a, b, atol=1e-6) and (a >= 0).all() and (a <= math.log(2) + 1e-6).all()
    assert not divergences(logits.requires_grad_(), logits)[0].requires_grad


def test_scores_by_hand():
    jsd = torch.tensor([[0.0, 0.1, 0.2, 0.4]])
    entropy = torch.tensor([[2.0, 1.0, 0.0, 2.0]])
    noised = torch.tensor([[2.0, 2.0, 0.0, 1.5]])  # gaps 0, 1, 0, 0.5
    j, g, h = [0, 0.25, 0.5, 1], [0, 1, 0, 0.5], [1, 0.5, 0, 1]
    want = [(1 - (1 - a) ** 0.7 * (1 - b) ** 0.3) * c for a, b, c in zip(j, g, h)]
    assert torch.allclose(token_scores(jsd, entropy, noised, ALL), torch.tensor([want]), atol=1e-6)
    assert want == pytest.approx([0, 0.5, 0, 1])  # no entropy: nothing; the largest JSD: all of it


@pytest.mark.parametrize("alpha, signal", [(0.0, 0), (1.0, 2)])
def test_alpha_ignores_the_one_or_the_other(alpha, signal):
    *signals, mask = random_signals(3)
    changed = [torch.rand(4, 9) if i == signal else x for i, x in enumerate(signals)]
    assert torch.equal(token_scores(*signals, mask, alpha=alpha), token_scores(*changed, mask, alpha=alpha))
    assert not torch.equal(token_scores(*signals, mask, alpha=0.5), token_scores(*changed, mask, alpha=0.5))


def test_scores_do_not_depend_on_scale_padding_or_other_rows():
    jsd, entropy, noised, mask = random_signals(3)
    want = token_scores(jsd, entropy, noised, mask)
    assert torch.allclose(token_scores(5 * jsd + 3, entropy, noised, mask), want, atol=1e-5)
    assert torch.allclose(token_scores(jsd, 4 * entropy + 1, 4 * noised + 1, mask), want, atol=1e-5)
    assert_row_wise(token_scores, jsd, entropy, noised, mask=mask)
    assert_row_wise(partial(select_top, ratio=0.2), jsd, mask=mask)
    assert (want >= 0).all() and (want <= 1).all()


def test_identical_images_score_zero():
    mask = lengths(5, 3)
    logits = torch.randn(2, 5, 50)
    scores = token_scores(*divergences(logits, logits), mask)
    assert (scores == 0).all() and select_top(scores, mask, 0.2).sum(1).tolist() == [1, 1]


def test_a_response_without_an_image_is_scored_by_entropy():
    mask, has_image = lengths(5, 3), torch.tensor([[True], [False]])
    signals = divergences(torch.randn(2, 5, 50), torch.randn(2, 5, 50))
    scores = token_scores(*signals, mask, has_image=has_image)
    assert torch.equal(scores[1], min_max(signals[1], mask)[1])
    assert torch.equal(scores[0], token_scores(*signals, mask)[0])


@pytest.mark.parametrize("ratio", [0.2, 0.07, 1.0])
def test_the_number_of_kept_tokens(ratio):
    mask = lengths(*range(120))
    want = [min(n, max(1, math.ceil(round(ratio * n, 6)))) for n in range(120)]
    assert kept_tokens(mask, ratio).tolist() == want
    for scores in (torch.rand(120, 119), torch.full((120, 119), torch.nan)):
        assert select_top(scores, mask, ratio).sum(1).tolist() == want


def test_selection_against_sorting():
    torch.manual_seed(0)
    scores, mask = (torch.rand(6, 30) * 10).round(), lengths(30, 29, 12, 5, 2, 1)
    for row, chosen in zip(range(6), select_top(scores, mask, 0.2)):
        T = int(mask[row].sum())
        best = sorted(range(T), key=lambda t: (-scores[row, t].item(), t))[: math.ceil(T / 5)]
        assert sorted(best) == chosen.nonzero()[:, 0].tolist()


def metrics(trained, *flags):
    return trained("vepo", "--prompts_per_step", 2, "--steps", 1, *flags)[1][-1]


@pytest.mark.parametrize("updates", [1, 2])
def test_the_divisor_is_the_number_of_kept_tokens_of_the_whole_minibatch(monkeypatch, tmp_path, updates):
    """Not the number of all tokens, not that of a row: the mask and the divisor that the loss is given."""
    calls, plain = [], vepo.policy_loss

    def spy(logps, old_logps, advantages, mask, *rest):
        calls.append((mask, rest[-1]))
        return plain(logps, old_logps, advantages, mask, *rest)

    monkeypatch.setattr(vepo, "policy_loss", spy)
    train("vepo", tmp_path / "run", "--prompts_per_step", 2, "--steps", 1, "--updates_per_step", updates)
    assert len(calls) == 2
    if updates == 1:
        assert {divisor for _, divisor in calls} == {sum(mask.sum().item() for mask, _ in calls)}
    else:
        assert all(divisor == mask.sum() for mask, divisor in calls)


def test_selections_for_comparison(trained):
    lines = {}
    for select in ("vepo", "entropy", "jsd", "random"):
        lines[select] = metrics(trained, "--select", select)
    assert len({line["kept_tokens"] for line in lines.values()}) == 1
    assert len({line["kept_top_entropy"] for line in lines.values()}) == 4  # each chooses other tokens
    assert lines["entropy"]["kept_top_entropy"] == 1 > lines["vepo"]["kept_top_entropy"]
    assert lines["random"]["kept_top_entropy"] < lines["vepo"]["kept_top_entropy"]
    assert all(("seconds_noised" in lines[select]) == (select in ("vepo", "jsd")) for select in lines)  # no pass unused
    diffusion = metrics(trained, "--noise", "diffusion")
    weaker = metrics(trained, "--noise", "diffusion", "--noise_step", 1)
    assert weaker["jsd_p95"] < diffusion["jsd_p95"] and diffusion["jsd_p95"] != lines["vepo"]["jsd_p95"]


def test_the_entropy_bonus_is_over_all_tokens(trained):
    """At one prompt's first update the loss differs by the bonus: -coef times the mean entropy of all tokens."""
    flags = ["--prompts_per_step", 1]
    without = metrics(trained, *flags, "--entropy_coef", 0)
    bonus = metrics(trained, *flags, "--entropy_coef", 0.5)
    assert bonus["loss"] - without["loss"] == pytest.approx(-0.5 * bonus["entropy"], abs=1e-5)
