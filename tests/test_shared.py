"""common.py, what several methods share: views of an image, random numbers, distributions compared in chunks."""

import dataclasses
import importlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import padded_inputs, tiny_group, tiny_model, tiny_prompt

from common import compare_logits, forward, token_uniforms, with_image
from plumbing.data import Data


@pytest.mark.parametrize("name", ["vepo", "prpo"])
def test_a_prompt_sees_one_draw_a_step(name, toy, monkeypatch):
    """The same for any number of responses, rows and processes; another in another step and for another prompt."""
    model, processor = toy
    module = importlib.import_module(name)
    args = module.Args()
    data = Data("toy", "test", args, processor, model)
    seen = []
    monkeypatch.setattr(module, "forward", lambda _, row, __: [seen.append(row.prompt.pixel_values)] * 3)
    run = SimpleNamespace(world_size=1, model=model, processor=processor, phase=lambda _: nullcontext())
    views = module.noised_hidden if name == "vepo" else module.perturbed_hidden

    def draw(index, responses, step=1, **more):
        group = tiny_group(dataclasses.replace(data.prompt(index), **more), [3] * responses)
        seen.clear()
        views(group, run, args, step)
        return torch.cat(seen)

    first = draw(0, 8)
    assert torch.equal(first, draw(0, 1)) and torch.equal(first, draw(0, 12))
    assert not torch.equal(first, draw(0, 8, step=2))
    assert not torch.equal(first, draw(0, 8, prompt_id=5))


def test_heads_are_compared_in_chunks_as_with_plain_logits():
    model = tiny_model("qwen2_5_vl")
    group = tiny_group(tiny_prompt(model, [(4, 6)]), [7, 1, 4])
    other = with_image(group, lambda pixels: pixels + 1)
    assert other.prompt.pixel_values is not group.prompt.pixel_values and other.mask is group.mask
    assert other.packed is group.packed  # whichever is packed first, the other one is not packed again
    hidden = [forward(model, row)[2] for row in (group, other)]

    def first_and_product(p, q):
        assert p.dtype == torch.float32 and len(p) <= 3
        return p[:, 0], (p * q).sum(-1)

    got = compare_logits(first_and_product, model, group, *hidden, temperature=0.7, chunk=6)
    shared = len(group.prompt.input_ids)
    with torch.no_grad():
        p, q = (model(**padded_inputs(model, row)).logits[:, shared - 1 : -1] / 0.7 for row in (group, other))
    for a, b in zip(got, (p[..., 0], (p * q).sum(-1))):
        assert torch.allclose(a[group.mask], b[group.mask], atol=1e-4) and (a[~group.mask] == 0).all()


def test_a_prompt_without_an_image_is_left_alone():
    group = tiny_group(tiny_prompt(tiny_model("qwen2_5_vl"), []), [3, 2])
    assert with_image(group, lambda pixels: pixels + 1) is group


def test_token_uniforms_depend_on_the_response_alone():
    group = tiny_group(tiny_prompt(tiny_model("qwen2_5_vl"), []), [3, 2, 4])
    group.texts = ["a", "b", "c"]
    whole = token_uniforms(group, 0, 1)
    assert torch.equal(token_uniforms(group[1:], 0, 1), whole[1:])
    assert whole.min() >= 0 and whole.max() < 1 and not torch.equal(whole[0], whole[1])
    assert not torch.equal(token_uniforms(group, 0, 2), whole)
