"""SaEI: images from patches and back, the middle third, the attack and what it may not touch."""

import dataclasses
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_row_wise, lengths, same, times_agree, tiny_group, tiny_model, tiny_prompt, train
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

import saei
from common import forward, rollout, split_group
from plumbing.data import Data
from plumbing.families import unpatchify
from saei import (
    Args,
    adversarial_step,
    attack,
    both_copies,
    entropy_gradient,
    entropy_of,
    join,
    middle_third,
    to_pixels,
)

PROCESSORS = {  # as the three families configure it
    "qwen2_vl and qwen2_5_vl": Qwen2VLImageProcessorPil(),
    "qwen3_vl": Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
}


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("size", [(56, 84), (123, 77)])
def test_patches_are_the_processors_own(family, size):
    processor = PROCESSORS[family]
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    made = processor([Image.fromarray(noise)] * 2, return_tensors="pt")
    values, grid = made["pixel_values"], made["image_grid_thw"]
    pixels, mean, std = to_pixels(values, processor)
    assert torch.allclose((pixels - mean) / std, values, atol=1e-6)
    assert torch.equal(to_pixels((pixels - mean) / std, processor)[0], pixels)  # exact, in 255ths
    image, again = unpatchify(pixels, grid, processor)
    assert image.shape == (3, *(processor.patch_size * grid[0, 1:]).tolist()) and torch.equal(image, again)
    _, H, W = image.shape
    if size == (W, H):  # nothing was resized: the very pixels
        assert torch.equal(image, torch.tensor(noise).permute(2, 0, 1) / 255)
    drawn = processor(Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy()), return_tensors="pt")
    assert torch.allclose(drawn["pixel_values"], values[: len(values) // 2], atol=1e-6)


def test_the_gradient_of_an_image_is_the_sum_over_its_copies():
    image = torch.randn(5, 3, 1, 16).requires_grad_()
    values = image.expand(-1, -1, 2, -1).flatten(1)  # as pixel_values hold it
    found = torch.randn(values.shape)
    values.backward(found)
    assert times_agree(both_copies(found))
    assert torch.allclose(both_copies(found).view(5, 3, 2, 16)[:, :, :1], image.grad)


def test_middle_third_against_brute_force():
    torch.manual_seed(0)
    mask = lengths(*range(12))
    entropy = (torch.rand(12, 11) * 4).round()  # with ties: the earlier token has the lower rank
    got = middle_third(entropy, mask)
    for row in range(12):
        ranked = sorted(range(row), key=lambda t: (entropy[row, t].item(), t))
        want = ranked if row < 3 else ranked[row // 3 : 2 * row // 3]
        assert got[row].nonzero()[:, 0].tolist() == sorted(want), row
    assert_row_wise(middle_third, entropy, mask=mask)
    assert got.sum(1).tolist() == [0, 1, 2, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_step_by_hand():
    image = torch.tensor([0.5, 0.0, 1.0, 0.5, 0.999])
    before = image.clone()
    got = adversarial_step(image, torch.tensor([1e-9, -5.0, 2.0, 0.0, 1.0]), step=2 / 255)
    assert torch.allclose(got, torch.tensor([0.5 + 2 / 255, 0.0, 1.0, 0.5, 1.0])) and torch.equal(image, before)
    assert torch.allclose(adversarial_step(image, torch.ones(5), step=-0.1)[:2], torch.tensor([0.4, 0.0]))
    assert torch.equal(adversarial_step(image, torch.ones(5), step=0.0), image)


def fake_run(model, image_processor):
    log = {}
    return SimpleNamespace(
        model=model,
        processor=SimpleNamespace(image_processor=image_processor),
        phase=lambda _: nullcontext(),
        metrics=SimpleNamespace(add=lambda name, value, weight: log.setdefault(name, []).append(float(value))),
        log=log,
    )


def random_images(model, grids):
    """A group of responses to random images in whole 255ths, and a run."""
    processor = PROCESSORS["qwen2_vl and qwen2_5_vl"]
    prompt = tiny_prompt(model, grids)
    if grids:
        generator = torch.Generator().manual_seed(1)
        shape = (len(prompt.pixel_values), 3, 1, 14 * 14)
        pixels = torch.randint(256, shape, generator=generator).expand(-1, -1, 2, -1).flatten(1) / 255
        _, mean, std = to_pixels(pixels, processor)
        prompt = dataclasses.replace(prompt, pixel_values=(pixels - mean) / std)
    return tiny_group(prompt, [7, 1, 4, 12]), fake_run(model, processor)


def images_of(prompt, processor):
    pixels, _, _ = to_pixels(prompt.pixel_values.detach(), processor.image_processor)
    return unpatchify(pixels, prompt.image_grid_thw, processor.image_processor)


def gradient_of(group, run, args):
    """H, its gradient by the group's pixel_values, and its tokens (G, T)."""
    entropies = partial(entropy_of, group, run, args)
    H, gradient, kept = entropy_gradient(group.prompt.pixel_values, entropies, len(group.mask), run.model)
    return H, gradient, torch.cat(kept)


def H_of(group, pixel_values, kept, run):
    """The objective the plain way: mean over responses of the mean entropy of the kept tokens."""
    prompt = dataclasses.replace(group.prompt, pixel_values=pixel_values)
    entropy = forward(run.model, dataclasses.replace(group, prompt=prompt))[1]
    return sum(row[chosen].mean() for row, chosen in zip(entropy, kept)).item() / len(kept)


@pytest.mark.parametrize("grids", [[(4, 6)], [(2, 4), (6, 4)]])
def test_gradient_by_finite_differences(grids):
    model = tiny_model("qwen2_5_vl").double()
    group, run = random_images(model, grids)
    group.prompt.pixel_values = values = group.prompt.pixel_values.double()
    H, gradient, kept = gradient_of(group, run, Args())
    assert kept.sum(1).tolist() == [2, 1, 1, 4] and times_agree(gradient)
    assert H_of(group, values, kept, run) == pytest.approx(H.item(), abs=1e-6)
    for own in torch.arange(len(values)).split(group.prompt.image_grid_thw.prod(1).tolist()):  # of each image
        direction = torch.zeros_like(values).index_copy(0, own, gradient[own])
        direction /= direction.norm()
        slope = (
            H_of(group, values + 1e-3 * direction, kept, run) - H_of(group, values - 1e-3 * direction, kept, run)
        ) / 2e-3
        assert slope == pytest.approx(gradient[own].norm().item() / 2, rel=0.01)  # both copies move: half of it each


@pytest.mark.parametrize("family, grids", [("qwen2_vl", [(2, 4), (6, 4)]), ("qwen2_5_vl", [(4, 6)])])
def test_attack(family, grids):
    model = tiny_model(family)
    group, run = random_images(model, grids)
    clean = group.prompt.pixel_values.clone()
    kept = middle_third(next(entropy_of(group, run, Args(), clean))[0].detach(), group.mask)
    tiny = 0.02 / 255  # random weights of this size are far from linear over 2 / 255
    up, down = (attack(group, run, Args(step=step)).pixel_values for step in (tiny, -tiny))
    H = [H_of(group, pixels, kept, run) for pixels in (down, clean, up)]
    assert H[0] < H[1] < H[2]
    assert run.log["attack_entropy_before"][0] == pytest.approx(H[1], abs=1e-5)
    assert run.log["attack_entropy_after"][0] == pytest.approx(H[2], abs=1e-5)
    assert torch.equal(group.prompt.pixel_values, clean)
    up = attack(group, run, Args())
    assert all(p.grad is None for p in model.parameters())
    assert times_agree(up.pixel_values)
    for image, origin in zip(images_of(up, run.processor), images_of(group.prompt, run.processor)):
        change = (image - origin).abs()
        assert image.min() >= 0 and image.max() <= 1 and change.max() <= 2 / 255 + 1e-6
        assert (change > 1.9 / 255).float().mean() > 0.9
    assert attack(group, run, Args(step=0.0)) is group.prompt


def test_attack_does_not_depend_on_how_the_group_is_cut():
    model = tiny_model("qwen2_5_vl")
    group, run = random_images(model, [(4, 6)])
    budget = len(group.prompt.input_ids) + 8
    assert len(split_group(group, budget)) == 3
    whole, cut = (gradient_of(group, run, Args(tokens_per_row=n)) for n in (10**6, budget))
    assert whole[0].item() == pytest.approx(cut[0].item(), abs=1e-6) and torch.equal(whole[2], cut[2])
    assert torch.allclose(whole[1], cut[1], atol=1e-6)


@pytest.mark.parametrize("epsilon, largest", [(None, 2), (5 / 255, 5), (1.0, 6)])
def test_several_steps_stay_in_the_ball(epsilon, largest):
    group, run = random_images(tiny_model("qwen2_5_vl"), [(4, 6)])
    after = attack(group, run, Args(iterations=3, epsilon=epsilon))
    assert run.log["attack_entropy_before"] == pytest.approx([gradient_of(group, run, Args())[0].item()], abs=1e-6)
    change = images_of(after, run.processor)[0] - images_of(group.prompt, run.processor)[0]
    assert change.abs().max().item() * 255 == pytest.approx(largest, abs=0.01)


def test_gradient_checkpointing_attacks_the_same():
    model = tiny_model("qwen2_5_vl")
    group, run = random_images(model, [(4, 6)])
    plain = attack(group, run, Args()).pixel_values
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(plain, attack(group, run, Args()).pixel_values)
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_not_finite_leaves_the_clean_image(monkeypatch):
    group, run = random_images(tiny_model("qwen2_5_vl"), [(4, 6)])
    calls = []

    def bad_once(values, *_):  # in the first of two steps, at one pixel
        gradient = torch.ones_like(values)
        gradient[0, 0] = torch.inf if not calls else 1
        calls.append(1)
        return torch.tensor(torch.nan), gradient, [group.mask]

    monkeypatch.setattr(saei, "entropy_gradient", bad_once)
    assert torch.equal(attack(group, run, Args(iterations=2)).pixel_values, group.prompt.pixel_values)
    assert run.log["attack_failed"] == [1.0] and run.log["attack_entropy_before"] == [0.0]
    assert run.log["attack_pixel_change"] == [0.0]


def test_text_only_prompts_are_not_attacked():
    group, run = random_images(tiny_model("qwen2_5_vl"), [])
    assert attack(group, run, Args()) is group.prompt and not run.log


def test_join():
    prompt = tiny_prompt(tiny_model("qwen2_5_vl"), [])
    clean, attacked = tiny_group(prompt, [3, 2]), tiny_group(dataclasses.replace(prompt, index=1), [5, 1, 4], seed=1)
    group = join(clean, attacked)
    assert group.prompt is clean.prompt and group.lengths == [3, 2, 5, 1, 4]
    assert torch.equal(group.responses[:2, :3], clean.responses)
    assert torch.equal(group.responses[2:], attacked.responses)
    assert group.scores.amax(1).tolist() == [0, 0, 1, 1, 1] and len(group.texts) == len(group.truncated) == 5


@pytest.mark.parametrize("part", [slice(3), slice(2, 5)])
def test_a_part_of_a_group_is_sampled_as_in_the_whole(toy, part):
    model, processor = toy
    args = Args(max_response_tokens=24)
    data = Data("toy", "test", args, processor, model)
    prompts = [data.prompt(i) for i in (3, 6)]
    whole = rollout(model, processor.tokenizer, prompts, args, 7)
    some = rollout(model, processor.tokenizer, prompts, args, 7, part)
    assert [group.texts for group in some] == [group.texts[part] for group in whole]


@pytest.mark.parametrize("flags", [[], ["--updates_per_step", 2, "--tokens_per_row", 130, "--kl_coef", 0.01]])
def test_step_zero_is_grpo_with_all_responses_to_the_bit(trained, flags):
    base, _ = trained("grpo", "--steps", 1, "--group_size", 7, *flags)
    off, lines = trained("saei", "--steps", 1, "--n1", 4, "--n2", 3, "--step", 0, *flags)
    assert same(base, off) and "attack_pixel_change" not in lines[0]


def test_log_and_images(tmp_path):
    """In bf16, whose attack has a leaf in fp32: the step is exact."""
    flags = ["--steps", 2, "--n1", 3, "--n2", 2, "--measure_every", 1, "--save_images", 3, "--dtype", "bfloat16"]
    for line in train("saei", tmp_path, *flags):
        assert line["attack_pixel_change"] == pytest.approx(2 / 255, abs=1e-5) and line["attack_failed"] == 0
        assert line["attack_entropy_after"] > line["attack_entropy_before"] and line["seconds_attack"] > 0
        total = 0.6 * line["accuracy_clean"] + 0.4 * line["accuracy_attacked"]
        assert total == pytest.approx(line["accuracy"], abs=1e-5) and line["approx_kl"] == 0
        parts = line["response_tokens_clean"] * 0.6, line["response_tokens_attacked"] * 0.4
        entropy = (line["entropy_clean"] * parts[0] + line["entropy_attacked"] * parts[1]) / sum(parts)
        assert entropy == pytest.approx(line["entropy"], rel=1e-4)
    for path in (tmp_path / "images").glob("prompt-*-0.png"):
        before, after, difference = np.split(np.asarray(Image.open(path)).astype(int), 3, axis=1)
        assert np.abs(after - before).max() == 2
        assert np.abs(difference - 127.5 - 10 * (after - before)).max() <= 0.5


def test_a_group_size_of_ones_own_is_refused(capsys):
    with pytest.raises(SystemExit):
        Args(n1=3, n2=3, group_size=8)
    assert "--group_size 8 is not --n1 3 + --n2 3" in capsys.readouterr().err
