"""The packed row against a plain padded batch, and the chunked head against plain logits."""

import copy
import gc

import pytest
import torch
from helpers import SHAPES, padded_inputs, tiny_group, tiny_model, tiny_prompt
from torch.utils._python_dispatch import TorchDispatchMode

from common import Group, forward, pack, response_and_image_states, seeded, split_group, token_logps, unpack
from plumbing.adapters import adapters_of, add_adapters
from plumbing.arguments import SharedArgs

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "internvl3_5"]


def padded(model, group, temperature=1.0):
    """The same numbers the usual way: G copies of prompt and images, right-padded, all logits in memory."""
    inputs, shared = padded_inputs(model, group), len(group.prompt.input_ids)
    out = model(**inputs, output_hidden_states=True, use_cache=False)
    logps = (out.logits[:, shared - 1 : -1].float() / temperature).log_softmax(-1)
    chosen = logps.gather(-1, group.responses[..., None])[..., 0]
    entropy = -(logps.exp() * logps).sum(-1)
    return chosen, entropy, out.hidden_states[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", SHAPES)
def test_packed_row_equals_padded_batch(family, images, temperature=0.7):
    model = tiny_model(family)
    group = tiny_group(tiny_prompt(model, SHAPES[images]), [7, 1, 4, 12])
    other = copy.deepcopy(model)
    logps, entropy, hidden = forward(model, group, temperature)
    want_logps, want_entropy, want_hidden = padded(other, group, temperature)
    mask = group.mask
    assert torch.allclose(logps[mask], want_logps[mask], atol=2e-5)
    assert torch.allclose(entropy[mask], want_entropy[mask], atol=2e-5)
    assert (logps[~mask] == 0).all() and (entropy[~mask] == 0).all()

    shared = len(group.prompt.input_ids)
    own, image = response_and_image_states(hidden, group)
    assert torch.allclose(own[mask], want_hidden[:, shared:][mask], atol=2e-5)
    assert torch.allclose(image, want_hidden[0, :shared][group.prompt.image_mask], atol=2e-5)
    assert (own[~mask] == 0).all()

    weights = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
    (logps * weights + 0.1 * entropy)[mask].sum().backward()
    (want_logps * weights + 0.1 * want_entropy)[mask].sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        if q.grad is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            assert torch.allclose(p.grad, q.grad, atol=1e-4 * max(1, q.grad.abs().max())), name


def with_boolean_mask(row, device):
    """The row packed as usual, but for one mask of all pairs of tokens in place of segments."""
    packed = dict(pack(row, device))
    lengths = torch.tensor([len(row.prompt.input_ids), *row.lengths])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    place = torch.arange(len(owner))
    sees = (((owner[:, None] == owner) | (owner == 0)) & (place[:, None] >= place)).to(device)
    inputs = {name: value for name, value in packed["inputs"].items() if name != "segments"}
    masked = copy.copy(row)
    masked.packed = packed | {"inputs": inputs | {"attention_mask": sees[None, None]}}
    return masked


def states_and_gradients(model, row):
    model.zero_grad()
    _, _, hidden = forward(model, row)
    (hidden * torch.randn(hidden.shape, generator=seeded(0)).to(hidden)).sum().backward()
    return [hidden, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


RAGGED = [[1], [130, 1, 140, 150], [5, 1, 1, 7, 2, 9, 5, 1, 4]]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize(
    "how, lengths",
    [*(("plain", lengths) for lengths in RAGGED), *((how, RAGGED[2]) for how in ("checkpointing", "adapters", "text"))],
)
def test_segments_equal_the_boolean_mask(family, how, lengths):
    """States and gradients, in fp64; those with checkpointing equal those without."""
    model = tiny_model(family).double()
    if how == "adapters":
        add_adapters(model, SharedArgs(lora_rank=2))
        for p in adapters_of(model).values():
            p.data = torch.randn(p.shape, generator=seeded(1), dtype=torch.float64) / 10
    prompt = tiny_prompt(model, SHAPES["no image" if how == "text" else "two images of different sizes"])
    if prompt.pixel_values is not None:
        prompt.pixel_values = prompt.pixel_values.double()
    row = tiny_group(prompt, lengths)
    want = states_and_gradients(model, with_boolean_mask(row, model.device))
    if how == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    for ours, theirs in zip(states_and_gradients(model, row), want, strict=True):
        assert ours.dtype == torch.float64 and (ours - theirs).abs().max() < 1e-12 * max(1, theirs.abs().max().item())


def test_a_wrong_position_changes_the_log_probs():
    """The comparison above is sharp: shifting one position by one moves the log-probs by far more than 2e-5."""
    model = tiny_model("qwen2_5_vl")
    prompt = tiny_prompt(model, [(4, 6)])
    right = forward(model, tiny_group(prompt, [7, 3]))[0]
    prompt.position_ids[0, 5] += 1
    assert (forward(model, tiny_group(prompt, [7, 3]))[0] - right).abs().max() > 1e-3


def test_garbage_on_the_padding_and_the_order_of_responses_change_nothing():
    model = tiny_model("qwen2_5_vl")
    group, order = tiny_group(tiny_prompt(model, [(4, 4)]), [5, 2, 1, 6]), torch.tensor([2, 0, 3, 1])
    dirty = group.responses.masked_fill(~group.mask, 11)  # an image token, the worst garbage
    dirty = Group(group.prompt, dirty, group.mask, group.truncated, group.texts)
    turned = Group(group.prompt, group.responses[order], group.mask[order], group.truncated, group.texts)
    clean = forward(model, group)
    assert all(torch.equal(a, b) for a, b in zip(clean, forward(model, dirty)))
    assert torch.allclose(clean[0][order], forward(model, turned)[0], atol=1e-5)


def test_a_group_split_into_rows_has_the_same_log_probs():
    model = tiny_model("qwen2_5_vl")
    group = tiny_group(tiny_prompt(model, [(4, 4)]), [5, 2, 1, 6, 3])
    shared = len(group.prompt.input_ids)
    rows = split_group(group, shared + 8)
    assert [row.mask.sum(1).tolist() for row in rows] == [[5, 2, 1], [6], [3]]
    whole = forward(model, group)[0]
    assert torch.allclose(torch.cat([forward(model, row)[0] for row in rows]), whole, atol=1e-5)
    assert [len(row.mask) for row in split_group(group, 1)] == [1] * 5  # nothing fits: one response each
    assert [len(row.mask) for row in split_group(group, 10**6)] == [5]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_head_in_chunks_equals_plain_logits(chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    targets = torch.randint(50, (7,))
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    logps, entropy = token_logps(*inputs, targets, 0.8, chunk)
    plain = [x.clone().requires_grad_() for x in (hidden, weight)]
    want = (plain[0] @ plain[1].T / 0.8).float().log_softmax(-1)
    want_logps, want_entropy = want.gather(1, targets[:, None])[:, 0], -(want.exp() * want).sum(-1)
    assert torch.allclose(logps, want_logps, atol=1e-6) and torch.allclose(entropy, want_entropy, atol=1e-6)
    (logps.sum() + entropy.square().sum()).backward()
    (want_logps.sum() + want_entropy.square().sum()).backward()
    assert all(torch.allclose(a.grad, b.grad, atol=1e-5) for a, b in zip(inputs, plain))


def test_logits_of_the_whole_row_never_exist():
    """The largest tensor of the head's forward and backward pass is that of one chunk, for any number of tokens."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    sizes = []
    hidden, weight = torch.randn(640, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with Sizes():
        logps, entropy = token_logps(hidden, weight, torch.zeros(640, dtype=torch.long), chunk=64)
        (logps.sum() + entropy.sum()).backward()
    assert max(sizes) == 64 * 1000


def test_unpack():
    row = tiny_group(tiny_prompt(tiny_model("qwen2_5_vl"), []), [2, 1, 3])
    assert unpack(torch.arange(1.0, 7), row).tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    wide = unpack(torch.arange(12.0).view(6, 2), row)
    assert wide.shape == (3, 3, 2) and wide[1, 0].tolist() == [4, 5] and not wide[~row.mask].any()


@pytest.mark.parametrize("part", [0, 1])
def test_values_outside_the_loss_keep_no_logits(part):
    """While the values are still referred to, as a script does until its next row."""
    N, V, chunk = 60, 3001, 20
    hidden, weight = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    values = token_logps(hidden, weight, torch.randint(V, (N,)), chunk=chunk)
    values[part].sum().backward()
    gc.collect()
    assert [x.shape for x in gc.get_objects() if type(x) is torch.Tensor and x.shape[-1:] == (V,)] == []
