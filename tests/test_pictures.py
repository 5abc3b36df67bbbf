"""Perturbed pictures, measured; and distributions compared in chunks against plain logits."""

import dataclasses

import pytest
import torch
from conftest import padded_inputs, tiny_group, tiny_model, tiny_prompt

import common
from common import add_noise, add_pixel_noise, blacken, compare_heads, diffuse, forward, seeded, token_noise

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]  # CLIP's, as Qwen-VL's
SCALE = {"image_mean": MEAN, "image_std": STD}
MEAN_ROW, STD_ROW = (torch.tensor(x).repeat_interleave(392) for x in (MEAN, STD))


def pixels(count=2000, seed=0):
    """Normalised pixel_values (count, 1176) of random pictures in [0, 1], the same at both times."""
    still = torch.rand(count, 3, 1, 196, generator=torch.Generator().manual_seed(seed))
    return (still.expand(-1, -1, 2, -1).flatten(1) - MEAN_ROW) / STD_ROW


def times_agree(values):
    values = values.view(len(values), 3, 2, -1)
    return torch.equal(values[:, :, 0], values[:, :, 1])


def test_noise_on_normalised_pixels():
    clean = pixels()
    before = clean.clone()
    noise = add_noise(clean, seeded(1)) - clean
    assert noise.std().item() == pytest.approx(2.0, abs=0.01) and noise.mean().item() == pytest.approx(0, abs=0.01)
    assert torch.equal(clean, before) and add_noise(clean, seeded(1), std=0.5).sub(clean).std() < 0.51
    assert torch.equal(add_noise(clean, seeded(1), std=0.0), clean)


def test_diffusion():
    clean = torch.zeros(2000, 1176)
    noise = diffuse(clean, seeded(1))
    assert noise.std().item() == pytest.approx(0.505, abs=0.002) and times_agree(noise)
    ones = diffuse(clean + 1, seeded(1)) - noise
    assert torch.allclose(ones, torch.full_like(ones, 0.863), atol=1e-3)
    assert (diffuse(clean + 1, seeded(1), step=0) - 1).abs().max() < 0.05 and not clean.any()


def test_noise_on_pixels():
    clean = pixels()
    before, noised = clean.clone(), add_pixel_noise(clean, seeded(1), **SCALE)
    unit, was = noised * STD_ROW + MEAN_ROW, clean * STD_ROW + MEAN_ROW
    assert unit.min() > -1e-6 and unit.max() < 1 + 1e-6 and times_agree(noised) and torch.equal(clean, before)
    inside = (was - 0.5).abs() < 0.1  # far from the ends nothing is clipped
    assert (unit - was)[inside].std().item() == pytest.approx(0.1, abs=0.001)
    assert torch.allclose(add_pixel_noise(clean, seeded(1), **SCALE, std=0.0), clean, atol=1e-6)


def test_blackened_patches():
    clean = pixels()
    before, dark = clean.clone(), blacken(clean, seeded(1), **SCALE)
    black = ((dark * STD_ROW + MEAN_ROW).abs() < 1e-6).all(1)
    assert black.float().mean().item() == pytest.approx(0.6, abs=0.03) and torch.equal(clean, before)
    assert torch.equal(dark[~black], clean[~black])  # a patch is black or untouched
    assert torch.equal(blacken(clean, seeded(1), **SCALE, probability=0.0), clean)
    assert (blacken(clean, seeded(1), **SCALE, probability=1.0) * STD_ROW + MEAN_ROW).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["vepo", "prpo"])
def test_a_prompt_sees_one_draw_a_step(name, toy, monkeypatch):
    """The same for any number of responses, rows and processes; another in another step and for another prompt."""
    import importlib
    from contextlib import nullcontext
    from types import SimpleNamespace

    model, processor = toy
    module = importlib.import_module(name)
    args = module.Args()
    data = common.Data("toy", "test", args, processor, model.model.get_rope_index)
    seen = []
    empty = torch.zeros(1)
    monkeypatch.setattr(module, "forward", lambda _, row, __: [seen.append(row.prompt.pixel_values)] * 3)
    run = SimpleNamespace(world=1, model=model, processor=processor, phase=lambda _: nullcontext())
    views = module.noised_hidden if name == "vepo" else module.perturbed_hidden

    def draw(index, responses, step=1, **more):
        group = tiny_group(dataclasses.replace(data.prompt(index), **more), [3] * responses)
        seen.clear()
        views(group, run, args, step)
        return torch.cat([*seen, empty.expand(1, seen[0].shape[1])])

    first = draw(0, 8)
    assert torch.equal(first, draw(0, 1)) and torch.equal(first, draw(0, 12))
    assert not torch.equal(first, draw(0, 8, step=2))
    assert not torch.equal(first, draw(0, 8, place=5))


def test_heads_are_compared_in_chunks_as_with_plain_logits():
    model = tiny_model("qwen2_5_vl")
    group = tiny_group(tiny_prompt(model, [(4, 6)]), [7, 1, 4])
    other = common.with_picture(group, lambda pixels: pixels + 1)
    assert other.prompt.pixel_values is not group.prompt.pixel_values and other.mask is group.mask
    hidden = [forward(model, row)[2] for row in (group, other)]

    def first_and_product(p, q):
        assert p.dtype == torch.float32 and len(p) <= 3
        return p[:, 0], (p * q).sum(-1)

    got = compare_heads(first_and_product, model, group, *hidden, temperature=0.7, chunk=6)
    shared = len(group.prompt.input_ids)
    with torch.no_grad():
        p, q = (model(**padded_inputs(model, row)).logits[:, shared - 1 : -1] / 0.7 for row in (group, other))
    for a, b in zip(got, (p[..., 0], (p * q).sum(-1))):
        assert torch.allclose(a[group.mask], b[group.mask], atol=1e-4) and (a[~group.mask] == 0).all()


def test_a_prompt_without_a_picture_is_left_alone():
    model = tiny_model("qwen2_5_vl")
    group = tiny_group(tiny_prompt(model, []), [3, 2])
    assert common.with_picture(group, lambda pixels: pixels + 1) is group


def test_token_noise_depends_on_the_response_alone():
    model = tiny_model("qwen2_5_vl")
    group = tiny_group(tiny_prompt(model, []), [3, 2, 4])
    whole = token_noise(group, 0, 1)
    assert torch.equal(token_noise(group[1:], 0, 1), whole[1:]) and not torch.equal(token_noise(group, 0, 2), whole)
    assert whole.min() >= 0 and whole.max() < 1 and not torch.equal(whole[0], whole[1])
