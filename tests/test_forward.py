"""The packed row against a plain padded batch, and the chunked head against plain logits."""

import copy
import gc
from random import Random

import pytest
import torch
from helpers import SHAPES, padded_inputs, tiny_group, tiny_model, tiny_prompt
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from common import forward, pack, response_and_image_states, split_group, token_logps, unpack
from plumbing import kernels

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "internvl3_5"]


def padded(model, group, temperature=1.0):
    """The same numbers the usual way: G copies of prompt and pictures, right-padded, all logits in memory."""
    inputs, shared = padded_inputs(model, group), len(group.prompt.input_ids)
    out = model(**inputs, output_hidden_states=True, use_cache=False)
    logps = (out.logits[:, shared - 1 : -1].float() / temperature).log_softmax(-1)
    chosen = logps.gather(-1, group.responses[..., None])[..., 0]
    entropy = -(logps.exp() * logps).sum(-1)
    return chosen, entropy, out.hidden_states[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_row_equals_padded_batch(family, images, temperature):
    model = tiny_model(family)
    prompt = tiny_prompt(model, SHAPES[images])
    group = tiny_group(prompt, [7, 1, 4, 12])
    other = copy.deepcopy(model)
    logps, entropy, hidden = forward(model, group, temperature)
    want_logps, want_entropy, want_hidden = padded(other, group, temperature)
    mask = group.mask
    assert torch.allclose(logps[mask], want_logps[mask], atol=2e-5)
    assert torch.allclose(entropy[mask], want_entropy[mask], atol=2e-5)
    assert (logps[~mask] == 0).all() and (entropy[~mask] == 0).all()

    shared = len(prompt.input_ids)
    own, image = response_and_image_states(hidden, group)
    assert torch.allclose(own[mask], want_hidden[:, shared:][mask], atol=2e-5)
    assert torch.allclose(image, want_hidden[0, :shared][prompt.image_mask], atol=2e-5)
    assert (own[~mask] == 0).all()

    weights = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
    (logps * weights + 0.1 * entropy)[mask].sum().backward()
    (want_logps * weights + 0.1 * want_entropy)[mask].sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        if q.grad is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            assert torch.allclose(p.grad, q.grad, atol=1e-4 * max(1, q.grad.abs().max())), name


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """Flex attention, traced and differentiated as on a GPU, its kernel replaced by plain operations."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    compiled = torch.compile(flex_attention, backend="aot_eager", dynamic=True, fullgraph=True)
    monkeypatch.setattr(kernels, "flex", lambda: compiled)
    monkeypatch.setattr(kernels, "takes_block_mask", lambda _: True)
    torch._dynamo.reset()
    counters.clear()


def outputs_and_gradients(model, group):
    model.zero_grad()
    logps, entropy, _ = forward(model, group)
    (logps.sum() + entropy.sum()).backward()
    return [logps, entropy, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flex_attention_equals_the_boolean_mask(family, checkpointing, request):
    """Forward and backward; a row longer than the blocks of 128 tokens."""
    model, checkpointed = tiny_model(family), {"use_reentrant": False}
    if checkpointing:
        model.activation_checkpointing_enable(checkpointed)
    group = tiny_group(tiny_prompt(model, SHAPES["one image"]), [130, 1, 140, 150])
    want = outputs_and_gradients(model, group)
    request.getfixturevalue("flex_on_cpu")
    assert pack(group, model.device)["attention_mask"].sparsity() > 10  # blocks that are skipped, in percent
    for ours, theirs in zip(outputs_and_gradients(model, group), want, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * max(1, theirs.abs().max().item()))
    assert counters["stats"]["unique_graphs"] <= 2


def test_the_block_mask_is_that_of_every_pair_of_tokens():
    random = Random(0)
    for _ in range(60):
        lengths = [random.randint(1, 600), *(random.randint(1, 400) for _ in range(random.randint(1, 8)))]
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

        def sees(batch, head, q, k, owner=owner):
            return ((owner[q] == owner[k]) | (owner[k] == 0)) & (q >= k)

        ours = kernels.block_mask(owner, sees)
        plain = create_block_mask(sees, None, None, len(owner), len(owner), device="cpu")
        assert torch.equal(ours.to_dense(), plain.to_dense()) and ours.shape == plain.shape
        pairs = sees(None, None, torch.arange(len(owner))[:, None], torch.arange(len(owner)))
        for q, count in enumerate(ours.full_kv_num_blocks[0, 0].tolist()):  # where no mask is looked at, all is seen
            for k in ours.full_kv_indices[0, 0, q, :count].tolist():
                assert pairs[128 * q : 128 * q + 128, 128 * k : 128 * k + 128].all()


def test_rows_of_any_length_share_few_compilations(flex_on_cpu):
    """As a run meets them: passes with and without gradients, each with a mask of its own."""
    random, model = Random(0), tiny_model("qwen2_5_vl")
    for i in range(100):
        row = tiny_group(tiny_prompt(model, SHAPES["one image"]), [random.randint(1, 60) for _ in range(1 + i % 6)])
        with torch.set_grad_enabled(i % 3 != 0):
            logps, _, _ = forward(model, row)
        if i % 3:
            logps.sum().backward()
    assert counters["stats"]["unique_graphs"] <= 6 < torch._dynamo.config.recompile_limit


def test_the_oracle_notices_a_wrong_position():
    """The comparison above is sharp: shifting one position by one moves the log-probs by far more than 2e-5."""
    model = tiny_model("qwen2_5_vl")
    prompt = tiny_prompt(model, [(4, 6)])
    group = tiny_group(prompt, [7, 3])
    right = forward(model, group)[0]
    prompt.position_ids[0, 5] += 1
    assert (forward(model, group)[0] - right).abs().max() > 1e-3


def test_garbage_on_the_padding_changes_nothing():
    model = tiny_model("qwen2_5_vl")
    group = tiny_group(tiny_prompt(model, [(4, 4)]), [5, 2, 1])
    clean = forward(model, group)
    group.responses[~group.mask] = 11  # an image token, the worst garbage
    assert all(torch.equal(a, b) for a, b in zip(clean, forward(model, group)))


def test_the_order_of_responses_is_only_an_order():
    model = tiny_model("qwen2_5_vl")
    group = tiny_group(tiny_prompt(model, [(4, 4)]), [5, 2, 1, 6])
    order = torch.tensor([2, 0, 3, 1])
    turned = copy.copy(group)
    turned.responses, turned.mask = group.responses[order], group.mask[order]
    assert torch.allclose(forward(model, group)[0][order], forward(model, turned)[0], atol=1e-5)


def test_a_group_cut_into_rows_is_the_same_group():
    model = tiny_model("qwen2_5_vl")
    prompt = tiny_prompt(model, [(4, 4)])
    group = tiny_group(prompt, [5, 2, 1, 6, 3])
    shared = len(prompt.input_ids)
    rows = split_group(group, shared + 8)
    assert [row.mask.sum(1).tolist() for row in rows] == [[5, 2, 1], [6], [3]]
    assert all(shared + row.mask.sum() <= shared + 8 for row in rows)
    whole = forward(model, group)[0]
    assert torch.allclose(torch.cat([forward(model, row)[0] for row in rows]), whole, atol=1e-5)
    assert [len(row.mask) for row in split_group(group, 1)] == [1] * 5  # nothing fits: one response each
    assert [len(row.mask) for row in split_group(group, 10**6)] == [5]


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model("qwen2_5_vl")
    group = tiny_group(tiny_prompt(model, [(4, 4)]), [5, 2])
    plain = forward(model, group)[0]
    plain.sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = forward(model, group)[0]
    again.sum().backward()
    assert torch.equal(plain, again)
    assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(model.parameters(), want))


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
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

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, torch.Tensor):
                    self.size = max(self.size, value.numel())
            return out

    sizes = []
    for tokens in (64, 640):
        hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
        with Largest() as largest:
            logps, entropy = token_logps(hidden, weight, torch.zeros(tokens, dtype=torch.long), chunk=64)
            (logps.sum() + entropy.sum()).backward()
        sizes.append(largest.size)
    assert sizes == [64 * 1000, 64 * 1000]


def test_unpack():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert unpack(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1, 2, 0], [3, 0, 0]]
    wide = unpack(torch.arange(6.0).view(3, 2), mask)
    assert wide.shape == (2, 3, 2) and wide[1, 0].tolist() == [4, 5] and not wide[~mask].any()


@pytest.mark.parametrize("part", [0, 1])
def test_what_has_no_part_in_the_loss_keeps_no_logits(part):
    """While it is still referred to, as a script does until its next row."""
    N, V, chunk = 60, 3001, 20
    hidden, weight = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    values = token_logps(hidden, weight, torch.randint(V, (N,)), chunk=chunk)
    values[part].sum().backward()
    gc.collect()
    assert [x.shape for x in gc.get_objects() if type(x) is torch.Tensor and x.shape[-1:] == (V,)] == []
