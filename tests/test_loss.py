"""Advantages and loss: hand-computed numbers, invariants, and TRL's own loss as oracle."""

import math
from types import SimpleNamespace

import pytest
import torch

from common import aggregate, group_advantages, kl_penalty, loss_denominator, policy_loss


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_advantages_by_hand():
    # mean 0.25, unbiased std 0.5: (1 - 0.25) / 0.5 and (0 - 0.25) / 0.5, up to eps
    got = group_advantages(tensor([1, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]))
    assert torch.allclose(got[0], tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5)
    assert (got[1] == 0).all()  # equal rewards: exactly nothing, although 0.1 has no exact mean


@pytest.mark.parametrize("value, G", [(0.1, 3), (0.9, 7), (1 / 3, 12)])  # whose mean is off by a rounding error
def test_advantages_of_equal_float32_rewards_are_exactly_zero(value, G):
    assert (group_advantages(torch.full((2, G), value)) == 0).all()


def test_one_response_is_an_error_not_a_nan():
    with pytest.raises(ValueError, match="2 or more"):
        group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: d(-ratio A)/d logp = -ratio A
        (1.5, 2.0, -2.4, 0.0),  # A > 0, above 1.2: clipped, no gradient
        (0.5, 2.0, -1.0, -1.0),  # A > 0, below 0.8: the free product is the smaller one
        (1.5, -2.0, 3.0, 3.0),  # A < 0, above 1.2: min picks the free product, the gradient flows
        (0.5, -2.0, 1.6, 0.0),  # A < 0, below 0.8: clipped
    ],
)
def test_clipped_loss_by_hand(ratio, advantage, loss, gradient):
    logps = tensor([math.log(ratio)]).requires_grad_()
    got, info = policy_loss(logps, tensor([0.0]), tensor(advantage)[:1], torch.ones(1, 1, dtype=torch.bool))
    got.backward()
    assert got.item() == pytest.approx(loss) and logps.grad.item() == pytest.approx(gradient)
    assert info["clip_fraction"] == float(gradient == 0)
    assert info["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))


def test_dapo_clips_higher_above():
    logps, mask = tensor([math.log(1.25)]), torch.ones(1, 1, dtype=torch.bool)
    assert policy_loss(logps, tensor([0.0]), tensor(1.0)[:1], mask)[0].item() == pytest.approx(-1.2)
    assert policy_loss(logps, tensor([0.0]), tensor(1.0)[:1], mask, clip_high=0.28)[0].item() == pytest.approx(-1.25)


def test_the_ratio_does_not_overflow():
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, _ = policy_loss(tensor([500.0, -500.0]), tensor([0.0, 0.0]), tensor(-1.0)[:1], mask)
    assert loss.item() == pytest.approx((math.exp(20) + 0.8) / 2)


def batch(seed=0, B=6, T=9):
    generator = torch.Generator().manual_seed(seed)
    logps = torch.randn(B, T, generator=generator, dtype=torch.float64) * 0.3 - 1
    old = logps + 0.3 * torch.randn(B, T, generator=generator, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor([9, 1, 4, 2, 7, 5])[:, None]
    return logps, old, torch.randn(B, generator=generator, dtype=torch.float64), mask


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [1e30, math.nan, -math.inf])
def test_padding_garbage_changes_nothing(aggregation, garbage):
    logps, old, advantages, mask = batch()

    def differentiated(*values):
        logps, *rest = (torch.where(mask, x, y) for x, y in zip(inputs, values))
        logps.requires_grad_()
        loss, info = policy_loss(logps, *rest, mask, aggregation=aggregation)
        loss.backward()
        assert not logps.grad[~mask].any()
        return torch.stack([loss.detach(), *info.values()]), logps.grad

    inputs = logps, old, advantages[:, None].expand_as(logps)
    want = differentiated(0.0, 0.0, 0.0)
    for values in ([garbage] * 3, [0.5, garbage, garbage]):
        assert all(map(torch.equal, differentiated(*values), want))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_uneven_micro_batches_equal_one_batch(aggregation):
    logps, old, advantages, mask = batch()
    whole = logps.clone().requires_grad_()
    policy_loss(whole, old, advantages, mask, aggregation=aggregation)[0].backward()
    denominator = loss_denominator(mask, aggregation)
    assert denominator == (28 if aggregation == "token" else 6)

    def gradients(denominator):
        split = logps.clone().requires_grad_()
        for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
            args = split[part], old[part], advantages[part], mask[part]
            loss, _ = policy_loss(*args, aggregation=aggregation, denominator=denominator)
            (loss if denominator else loss / 3).backward()
        return split.grad

    assert torch.allclose(gradients(denominator), whole.grad, atol=1e-15)
    assert not torch.allclose(gradients(None), whole.grad, atol=1e-3)  # the mean of means is another loss


def test_token_advantages_equal_to_the_sequence_advantage_change_nothing():
    logps, old, advantages, mask = batch()
    one = policy_loss(logps, old, advantages, mask)[0]
    assert one == policy_loss(logps, old, advantages[:, None].expand_as(logps), mask)[0]


def test_aggregations_by_hand():
    values, mask = tensor([1, 2, 9], [6, 9, 9]), torch.tensor([[True, True, False], [True, False, False]])
    assert aggregate(values, mask) == 3.0  # (1 + 2 + 6) / 3
    assert aggregate(values, mask, "sequence") == 3.75  # (1.5 + 6) / 2
    assert aggregate(values, mask, denominator=9) == 1.0
    assert aggregate(values, torch.tensor([[True, True, False], [False] * 3]), "sequence") == 1.5  # one response
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert aggregate(values, nothing) == 0 and loss_denominator(nothing, "sequence") == 0


def test_kl_penalty_by_hand():
    assert kl_penalty(tensor([-1.0]), tensor([-2.0])).item() == pytest.approx(math.exp(-1) + 1 - 1)
    assert kl_penalty(tensor([-2.0]), tensor([-1.0])).item() == pytest.approx(math.e - 2)
    assert kl_penalty(tensor([-2.0]), tensor([-2.0])).item() == 0


@pytest.mark.parametrize("small", [1e-3, -1e-4, 1e-6])
def test_a_small_divergence_keeps_its_digits(small):
    """x^2 / 2 in fp32, where exp(x) - x - 1 is 0 or below it."""
    logps, want = torch.tensor([[small]]), pytest.approx(small**2 / 2, rel=1e-3 + abs(small), abs=1e-13)
    _, info = policy_loss(logps, 0 * logps, torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    assert kl_penalty(logps, 0 * logps).item() == want and info["approx_kl"].item() == want


@pytest.mark.parametrize("aggregation, loss_type", [("token", "dapo"), ("token", "bnpo"), ("sequence", "grpo")])
@pytest.mark.parametrize("kl_coef, per_token", [(0.0, False), (0.04, True)])
def test_agreement_with_trl(aggregation, loss_type, kl_coef, per_token):
    """GRPOTrainer._compute_loss, run unmodified on the same random log-probs, to 1e-12."""
    from collections import defaultdict

    from trl import GRPOTrainer

    logps, old, advantages, mask = batch(seed=3)
    ref = old - 0.2
    if per_token:
        advantages = advantages[:, None] * torch.linspace(0.5, 1.5, mask.shape[1], dtype=torch.float64)
    ours, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    loss, _ = policy_loss(ours, old, advantages, mask, 0.2, 0.28, aggregation)
    if kl_coef:
        loss = loss + kl_coef * aggregate(kl_penalty(ours, ref), mask, aggregation)
    loss.backward()

    class Trainer:  # what _compute_loss reads, nothing else; attributes that are not set are off
        def __getattr__(self, name):
            return {"top_entropy_quantile": 1.0, "importance_sampling_level": "token"}.get(name)

    trainer = Trainer()
    trainer.beta, trainer.loss_type, trainer.epsilon_low, trainer.epsilon_high = kl_coef, loss_type, 0.2, 0.28
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer.model, trainer.current_gradient_accumulation_steps = SimpleNamespace(training=True), 1
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, num_processes=1, reduce=lambda x, **_: x)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (theirs, torch.zeros_like(theirs), None)
    none = torch.zeros(6, 0, dtype=torch.long)
    inputs = {"prompt_ids": none, "prompt_mask": none, "advantages": advantages}
    inputs |= {"completion_ids": mask.long(), "completion_mask": mask.double()}
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum().double()}
    oracle = GRPOTrainer._compute_loss(trainer, None, inputs)
    oracle.backward()
    assert loss.item() == pytest.approx(oracle.item(), abs=1e-12)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)
