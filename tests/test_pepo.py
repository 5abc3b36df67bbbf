"""PEPO's similarity and weights: the vectors of its released code, loops, and what may not change them."""

import pytest
import torch
from helpers import SHAPES, assert_row_wise, plain_states, random_signals, tiny_group, tiny_model, tiny_prompt

from pepo import Args, scoring_forward, token_weights, visual_similarity
from show import run_of

SIMILARITY, ENTROPY = torch.tensor([[0.30, 0.10, 0.25, 0.15]]), torch.tensor([[0.0, 2.0, 1.0, 0.5]])
ALL = torch.ones(1, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    "alpha, temperature, want",
    [
        (0.05, 1.8, [1.056339, 0.944926, 1.029027, 0.969709]),
        (0.05, 1.0, [1.102106, 0.901765, 1.051345, 0.944783]),
        (0.00, 1.8, [1.056109, 0.945048, 1.027176, 0.971667]),
    ],
)
def test_weights_of_the_released_code(alpha, temperature, want):
    got = token_weights(SIMILARITY, ENTROPY, ALL, alpha, temperature)
    assert torch.allclose(got, torch.tensor([want]), atol=1e-6)


def test_equal_similarity_leaves_the_gate():
    got = token_weights(torch.full((1, 3), 0.2), torch.tensor([[0.0, 1.0, 2.0]]), ALL[:, :3])
    assert torch.allclose(got, torch.tensor([[0.9974, 1.0, 1.0026]]), atol=5e-5)


def test_weights_by_hand():
    """Two tokens, alpha 0: z = 0.9 / 1.8 and 0, w = 2 e^0.5 / (e^0.5 + 1) and the rest."""
    got = token_weights(torch.tensor([[0.9, 0.0]]), torch.zeros(1, 2), ALL[:, :2], alpha=0.0)
    assert torch.allclose(got, torch.tensor([[1.244919, 0.755081]]), atol=1e-6)


def test_mean_one_and_each_response_for_itself():
    similarity, entropy, mask = random_signals(2)
    weights = token_weights(similarity - 0.3, 3 * entropy, mask)
    assert torch.allclose(weights.sum(1), mask.sum(1).float(), atol=1e-5)
    assert (weights[mask] > 0).all() and weights[2, 0] == 1  # one token
    assert_row_wise(token_weights, similarity - 0.3, 3 * entropy, mask=mask)


def test_equal_scores_and_no_image_weigh_exactly_one():
    entropy, mask = random_signals(1)
    assert torch.equal(token_weights(torch.full((4, 9), 0.3), torch.full((4, 9), 0.7), mask), mask.float())
    nothing = visual_similarity([torch.randn(4, 9, 8)], [torch.empty(1, 0, 8)])
    assert torch.equal(token_weights(nothing, entropy, mask), mask.float())


def test_similarity_against_loops():
    torch.manual_seed(0)
    layers = [(torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)) for _ in range(3)]
    got = visual_similarity(*zip(*layers))
    for b in range(2):
        for t in range(3):
            means = []
            for hidden, image in layers:
                h = hidden[b, t] / hidden[b, t].norm()
                means.append(sum(h @ v / v.norm() for v in image[b]) / len(image[b]))
            assert got[b, t].item() == pytest.approx(sum(means).item() / 3, abs=1e-6)
    assert visual_similarity([torch.zeros(1, 2, 5)], [torch.randn(1, 4, 5)]).tolist() == [[0, 0]]
    assert visual_similarity([layers[0][0].bfloat16()], [layers[0][1].bfloat16()]).dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("images", SHAPES)
def test_weights_of_a_packed_row_equal_those_of_padded_rows(family, images):
    """Layer by layer out of the packed pass, against all hidden states of the usual padded batch."""
    embedding_layer = images != "one image"
    model, args = tiny_model(family), Args(embedding_layer=embedding_layer, temperature=0.8)
    group = tiny_group(tiny_prompt(model, SHAPES[images]), [7, 1, 4, 12])
    logps, entropy = scoring_forward(group, run_of(model), args)
    layers, image_layers = plain_states(model, group)
    first = 0 if embedding_layer else 1
    similarity = visual_similarity(layers[first:], image_layers[first:])
    assert torch.allclose(group.weights, token_weights(similarity, entropy, group.mask), atol=2e-5)
    assert (group.weights[group.mask] != 1).any() == bool(SHAPES[images])

    weights = group.weights
    assert torch.equal(logps, scoring_forward(group, run_of(model), args)[0]) and group.weights is weights


def test_gradient_checkpointing_changes_no_weight():
    model = tiny_model("qwen2_5_vl")
    plain, again = (tiny_group(tiny_prompt(model, [(4, 4)]), [5, 2]) for _ in range(2))
    scoring_forward(plain, run_of(model), Args())
    model.activation_checkpointing_enable({"use_reentrant": False})
    scoring_forward(again, run_of(model), Args())[0].sum().backward()
    assert torch.equal(plain.weights, again.weights)
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


def test_on_policy_the_gradient_through_the_weights_cancels():
    similarity, entropy, mask = random_signals(2)
    x = torch.randn(4, 9).requires_grad_()
    attached = token_weights.__wrapped__(similarity + x, entropy + x.square(), mask)
    ratio = (x - x.detach()).exp()
    (with_weights,) = torch.autograd.grad((ratio * attached)[:3].sum(), x, retain_graph=True)
    (without,) = torch.autograd.grad((ratio * attached.detach())[:3].sum(), x)
    assert torch.allclose(with_weights, without, atol=1e-6)
    assert not token_weights(similarity + x, entropy, mask).requires_grad
