"""Sampling from a prompt computed once, against plain `generate` on G copies of the prompt."""

import pytest
import torch
from helpers import END, chooser, plain_images, tiny_model, tiny_prompt
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList

import common
from common import Group, compare_logits, forward, generate, rollout, seeded
from plumbing import kernels
from plumbing.arguments import SharedArgs
from plumbing.data import Data

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "internvl3_5"]
ENDS = [*END, *range(40, 56)]  # so many that responses, and then whole groups, end at different lengths


class FollowUniforms(LogitsProcessor):
    """Makes plain `generate` draw with our random numbers: only the token that they pick is left."""

    def __init__(self, choose, uniforms, start):
        self.choose, self.uniforms, self.start = choose, uniforms, start

    def __call__(self, input_ids, scores):
        token = self.choose(scores, self.uniforms[:, input_ids.shape[1] - self.start])
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def plain(model, prompt, G, max_tokens, choose, uniforms):
    """`generate` as a textbook would call it, on G copies of one prompt."""
    ids = prompt.input_ids.expand(G, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= plain_images(model, prompt, G)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = prompt.image_mask.int().expand(G, -1)
    model.model.rope_deltas = None
    follow = FollowUniforms(choose, uniforms, ids.shape[1])
    fixed = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}
    out = model.generate(**inputs, **fixed, logits_processor=LogitsProcessorList([follow]))[:, ids.shape[1] :]
    return pad(out, (0, max_tokens - out.shape[1]))


class Waits(TorchDispatchMode):
    """Counts operations whose result has a shape or a Python value that depends on data: no CUDA graph has them."""

    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put_") else []
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def as_a_graph(function, *inputs):
    """What a CUDA graph does: the recorded inputs are read, and the recorded output is written, in their place."""
    with Waits() as waits:
        out = function(*inputs)
    assert not waits.found

    def replay():
        return out.copy_(function(*inputs))

    return replay


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "temperature, top_p, top_k, graphs, between",
    [(1.0, 1.0, 0, False, 1), (0.8, 0.9, 0, True, 1), (1.2, 1.0, 5, True, 7), (0.0, 1.0, 0, False, 100)],
)
def test_same_tokens_as_plain_generate(family, temperature, top_p, top_k, graphs, between, monkeypatch):
    """Through several windows of the cache and a batch that gets smaller, and as CUDA graphs would go through them."""
    monkeypatch.setattr(kernels, "tokens_between_checks", lambda device: between)
    monkeypatch.setattr(kernels, "recorded", as_a_graph)
    aligned = kernels.aligned
    if graphs:  # prompts padded to a multiple of 8, as on a GPU
        monkeypatch.setattr(kernels, "aligned", lambda tokens, _: aligned(tokens, torch.device("cuda")))
    assert [aligned(tokens, torch.device("cuda")) for tokens in (1, 8, 9)] == [8, 8, 16]
    model, G, max_tokens = tiny_model(family).eval(), 5, 16
    prompts = [  # different lengths, sizes and numbers of images, one without
        tiny_prompt(model, [(4, 6)]),
        tiny_prompt(model, [], words=(20, 21, 22, 23, 24)),
        tiny_prompt(model, [(2, 4), (6, 4)], seed=1),
        tiny_prompt(model, [(2, 2)], words=(50,), seed=2),
    ]
    choose = chooser(model, temperature, top_p, top_k)
    uniforms = torch.rand(len(prompts) * G, max_tokens, generator=seeded(1, 3))
    responses, mask = generate(model, prompts, G, choose, uniforms, ENDS, 0, capacity=5, graphs=graphs)
    responses, mask = (pad(x, (0, max_tokens - x.shape[1])) for x in (responses, mask))
    for i, prompt in enumerate(prompts):
        part = slice(i * G, (i + 1) * G)
        want = plain(model, prompt, G, max_tokens, choose, uniforms[part])
        assert torch.equal(responses[part][mask[part]], want[mask[part]]), i
        ended = torch.isin(want, torch.tensor(ENDS))
        assert torch.equal(mask[part], ended.cumsum(1) - ended.long() == 0)
    if temperature > 0:  # groups did leave the batch while others went on
        longest = mask.view(len(prompts), G, -1).sum(2).amax(1)
        assert len(set(mask.sum(1).tolist())) > 3 and longest.min() < longest.max()


@pytest.mark.parametrize("between, questions", [(10, 6), (100, 0)])
def test_the_host_waits_for_the_device_only_to_ask_whether_all_have_ended(between, questions, monkeypatch):
    monkeypatch.setattr(kernels, "tokens_between_checks", lambda device: between)
    model = tiny_model("qwen2_5_vl").eval()
    choose, prompts = chooser(model, 1.0, 0.9, 5), [tiny_prompt(model, [(4, 6)])] * 3

    def waits(tokens, eos):
        with Waits() as waits:
            generate(model, prompts, 2, choose, torch.rand(6, tokens, generator=seeded(1)), eos, 0)
        return len(waits.found)

    assert waits(64, []) - waits(1, []) == questions


def test_the_cache_grows_in_steps_and_no_graph_is_recorded_between(monkeypatch):
    """And it ends with the responses: no memory is taken for tokens that none of them has."""
    sizes, recorded, grow = [], [], common.SharedPrefixCache.grow

    def watch(cache, group_size, capacity):
        grow(cache, group_size, capacity)
        sizes.append([tuple(x.shape[2:4]) for x in cache.suffix[0]])

    def record(function, *inputs):
        recorded.append(inputs)
        return lambda: function(*inputs)

    monkeypatch.setattr(common.SharedPrefixCache, "grow", watch)
    monkeypatch.setattr(kernels, "recorded", record)
    model, G = tiny_model("qwen2_5_vl").eval(), 3
    choose, prompts = chooser(model), [tiny_prompt(model, [], words=(20 + i,)) for i in range(4)]
    uniforms = torch.rand(4 * G, 400, generator=seeded(5))
    _, mask = generate(model, prompts, G, choose, uniforms, [13, *range(40, 45)], 0, capacity=4, graphs=True)
    longest = mask.shape[1]
    assert 8 < longest < 100
    assert sizes == [[(G, capacity)] * 2 for capacity in range(4, longest + 3, 4)]
    assert len(sizes) < len(recorded) <= len(sizes) + 2  # also when half of the prompts, then three of four, have left


@pytest.mark.parametrize("fit, sizes", [(0, [1] * 4), (1.5, [1] * 4), (3, [3, 1]), (100, [4])])
def test_prompts_are_computed_in_parts_and_only_their_last_place_has_logits(fit, sizes):
    model, G = tiny_model("qwen2_5_vl").eval(), 3
    prompts = [tiny_prompt(model, [(4, 6)] * images, seed=i) for i, images in enumerate((1, 0, 2, 1))]
    width = max(len(prompt.input_ids) for prompt in prompts)
    choose, uniforms = chooser(model), torch.rand(4 * G, 6, generator=seeded(3))
    heads, reads, decoder = [], [], model.model.language_model
    model.lm_head.register_forward_pre_hook(lambda _, args: heads.append(args[0].shape[:2]))
    decoder.register_forward_hook(lambda _, __, out: reads.append(out.last_hidden_state.shape[:2]))
    responses, mask = generate(model, prompts, G, choose, uniforms, END, 0, prefill_tokens=int(fit * width))
    assert reads[: len(sizes) + 1] == [(size, width) for size in sizes] + [(4, G)]
    assert heads[: len(sizes) + 1] == [(size, 1) for size in sizes] + [(4, G)]
    want, wanted = generate(model, prompts, G, choose, uniforms, END, 0, prefill_tokens=10**6)
    assert torch.equal(responses, want) and torch.equal(mask, wanted)


def test_a_rollout_does_not_depend_on_its_batch(toy):
    model, processor = toy
    model.train()
    args = SharedArgs(max_response_tokens=24)
    data = Data("toy", "test", args, processor, model)
    prompts = [data.prompt(i) for i in (3, 6, 5, 0)]  # one image, none, two, one
    together = rollout(model, processor.tokenizer, prompts, args, 7)
    args.rollout_prompts = 1
    alone = rollout(model, processor.tokenizer, prompts[::-1], args, 7)[::-1]
    for a, b in zip(together, alone):
        assert torch.equal(a.responses, b.responses) and torch.equal(a.mask, b.mask) and a.texts == b.texts
    later = rollout(model, processor.tokenizer, prompts, args, 8)
    assert any(a.texts != b.texts for a, b in zip(together, later))
    assert model.training  # sampling in eval mode, as it was found afterwards


def test_mask_ends_with_the_first_end_of_turn(toy):
    model, processor = toy
    args, tokenizer = SharedArgs(max_response_tokens=20), processor.tokenizer
    data = Data("toy", "test", args, processor, model)
    for group in rollout(model, tokenizer, [data.prompt(0), data.prompt(1)], args, 1):
        for response, mask, truncated in zip(group.responses, group.mask, group.truncated):
            ends = (response == tokenizer.eos_token_id)[mask]
            assert ends.sum() == (0 if truncated else 1) and (truncated or ends[-1])
            assert (response[~mask] == tokenizer.pad_token_id).all()
            assert mask.sum() == 20 or not truncated


def test_groups_are_as_long_as_their_longest_response(toy, monkeypatch):
    """Two groups of one batch, cut to 3 and 4 tokens of 5; what follows an end is padding, and no text has either."""
    (model, processor), lengths = toy, torch.tensor([3, 1, 4, 2])
    responses, mask = torch.full((4, 5), 30), torch.arange(5) < lengths[:, None]
    responses[torch.arange(3), lengths[:3] - 1] = 2  # <|im_end|>; the last response is cut off
    monkeypatch.setattr(common, "generate", lambda *_, **__: (responses, mask))
    prompts = [Data("toy", "test", SharedArgs(), processor, model).prompt(i) for i in (0, 1)]
    first, second = rollout(model, processor.tokenizer, prompts, SharedArgs(group_size=2), 0)
    assert first.responses.tolist() == [[30, 30, 2], [2, 0, 0]] and second.responses.tolist() == [
        [30] * 3 + [2],
        [30, 30, 0, 0],
    ]
    assert first.lengths == [3, 1] and second.lengths == [4, 2] and second.truncated.tolist() == [False, True]
    word = processor.tokenizer.decode([30])
    assert first.texts == [word * 2, ""] and second.texts == [word * 3, word * 2] and second.prompt is prompts[1]


def test_inverse_transform_draws_from_the_softmax():
    logits = torch.randn(1, 96, generator=seeded(0)) * 2
    draws = chooser(tiny_model("qwen2_5_vl"))(logits.expand(200_000, -1), torch.rand(200_000, generator=seeded(1)))
    logits[:, [11, 12]] = -torch.inf
    probs = logits.softmax(-1)[0]
    shares = torch.bincount(draws, minlength=96) / 200_000
    assert (shares - probs).abs().max() < 0.005 and shares[[11, 12]].sum() == 0


@pytest.mark.parametrize("vocabulary", [96, 128, 5000])
def test_two_levels_choose_what_one_does(vocabulary):
    """The same tokens as by one cumulative sum in fp64, but within rounding of an edge; never a banned one."""
    banned = torch.arange(vocabulary) % 7 == 3
    logits = 3 * torch.randn(400, vocabulary, generator=seeded(0))
    logits[:200] *= 20  # of a few likely tokens; in others of many that are all unlikely
    uniforms = torch.cat([torch.rand(398, generator=seeded(1)), torch.tensor([0.0, 1 - 2**-24])])
    chosen = common.make_sampler(banned, 0.7, 1.0, 0)(logits, uniforms)
    probabilities = (logits.masked_fill(banned, -torch.inf) / 0.7).softmax(-1).double()
    cumulative = probabilities.cumsum(-1)
    plain = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    edges = (cumulative / cumulative[:, -1:] - uniforms[:, None]).abs().amin(1)
    assert ((chosen == plain) | (edges < 1e-12)).all() and (chosen == plain).float().mean() > 0.99
    assert not banned[chosen].any() and (probabilities.gather(1, chosen[:, None]) > 0).all()


def test_logits_that_are_nan_sample_a_token_of_the_vocabulary():
    """So that the run ends with its own sentence, and not with an index out of range."""
    logits = torch.randn(4, 300)
    logits[1, 3], logits[2, 5] = torch.nan, torch.inf
    tokens = common.make_sampler(torch.zeros(300, dtype=torch.bool), 1.0, 1.0, 0)(logits, torch.rand(4))
    assert ((tokens >= 0) & (tokens < 300)).all()


def test_a_temperature_next_to_zero_is_greedy():
    """Divided by it, logits would be infinite."""
    logits, uniforms = torch.randn(4, 96), torch.tensor([0.0, 0.3, 0.6, 0.99])
    greedy, nearly = (chooser(tiny_model("qwen2_5_vl"), temperature)(logits, uniforms) for temperature in (0.0, 1e-40))
    assert torch.equal(greedy, nearly)


def test_sampler_and_forward_agree_on_the_distribution():
    """Greedy tokens of the sampler are the argmax of the packed forward pass: no drift between the two."""
    model = tiny_model("qwen2_5_vl").eval()
    prompt = tiny_prompt(model, [(4, 6)])
    choose = chooser(model, 0.0, 1.0, 0)

    responses, mask = generate(model, [prompt], 2, choose, torch.zeros(2, 12), END, 0)
    group = Group(prompt, responses, mask, torch.zeros(2, dtype=torch.bool), [""] * 2)
    _, _, hidden = forward(model, group)
    (chosen,) = compare_logits(lambda logits: (choose(logits, None),), model, group, hidden)
    assert torch.equal(chosen[mask], responses[mask]) and mask.sum() > 10
