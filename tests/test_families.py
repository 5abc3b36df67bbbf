"""What differs between model families: InternVL's tiles as patches, and all that a run does with such a model."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
import transformers
from helpers import (
    ROOT,
    chooser,
    plain_images,
    same,
    save_internvl,
    timeless,
    tiny_group,
    tiny_model,
    tiny_prompt,
    train,
    weights,
)
from PIL import Image

import eval as evaluation
import prpo
import show
from common import Reward, load_config, load_model, load_processor, seeded
from plumbing.arguments import SharedArgs, UserError
from plumbing.data import Data
from plumbing.families import image_inputs, largest_image, limit_pixels, patch_places, patches_of
from plumbing.memory import plan
from prpo import blacken
from saei import Args, attack, unpatchify
from show import run_of
from trainer import Trainer

PIXELS = ["--min_pixels", 784, "--max_pixels", 784 * 6]
COMMON = [*PIXELS, "--kl_coef", 0.1, "--entropy_coef", 0.01, "--max_response_tokens", 12, "--steps", 1]
COMMON += ["--eval_rows", 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_internvl(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def internvl(folder):
    return load_model(str(folder)), load_processor(str(folder), min_pixels=784, max_pixels=784 * 6)


@pytest.fixture(scope="module")
def rows(folder):
    return folder / "rows.jsonl"


def images_of(prompt, processor):
    parts = prompt.pixel_values.split(prompt.image_grid_thw.prod(1).tolist())
    return [unpatchify(part, grid, processor.image_processor) for part, grid in zip(parts, prompt.image_grid_thw)]


def data_of(rows, internvl, **args):
    model, processor = internvl
    return Data(str(rows), "train", SharedArgs(**args), processor, model)


@pytest.mark.parametrize("row, names", [(0, [0]), (1, [1]), (2, [2, 3]), (4, [4])])
def test_patches_and_tiles_are_those_of_the_processor(rows, internvl, row, names):
    """There and back: the very tiles; and each patch has the same place in its image as in the canvas."""
    (model, processor), prompt = internvl, data_of(rows, internvl).prompt(row)
    images = [Image.open(rows.parent / f"{i}.png") for i in names]
    made = processor(text=["<IMG_CONTEXT>" * len(images)], images=images, return_tensors="pt")
    assert torch.equal(image_inputs(model, [prompt])["pixel_values"], made["pixel_values"])
    assert torch.equal(plain_tiles(prompt), made["pixel_values"])
    assert torch.equal(patches_of(model.config, made["pixel_values"], prompt.image_grid_thw), prompt.pixel_values)
    assert int(prompt.image_mask.sum()) == len(made["pixel_values"])
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt.input_ids))[None])
    once, again = prompt.pixel_values.view(-1, 3, 2, 196).unbind(2)
    assert torch.equal(once, again)
    changed = dataclasses.replace(prompt, pixel_values=torch.stack([once, again + 1], 2).flatten(1))
    taken = image_inputs(model, [changed])["pixel_values"]
    assert torch.equal(taken, made["pixel_values"])  # the tower takes the first
    if row == 1:  # 2 x 3 tiles and the thumbnail; nothing was resized: the very pixels
        assert prompt.image_grid_thw.tolist() == [[1, 4, 6], [1, 2, 2]]
        canvas, thumbnail = images_of(prompt, processor)
        pixels = torch.tensor(list(images[0].tobytes())).view(56, 84, 3).permute(2, 0, 1) / 255
        assert torch.equal(canvas, pixels) and thumbnail.shape == (3, 28, 28)


def plain_tiles(prompt):
    """Tiles of 28 x 28 pixels, by loops."""
    tiles, start = [], 0
    for _, h, w in prompt.image_grid_thw.tolist():
        for i in range(0, h, 2):
            for j in range(0, w, 2):
                tile = torch.empty(3, 28, 28)
                for y in range(2):
                    for x in range(2):
                        patch = prompt.pixel_values[start + (i + y) * w + j + x].view(3, 2, 14, 14)[:, 0]
                        tile[:, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14] = patch
                tiles.append(tile)
        start += h * w
    return torch.stack(tiles)


@pytest.mark.parametrize("min_pixels", [784, 784 * 4 + 5])
def test_limits_of_pixels_and_the_length_of_a_prompt(folder, rows, min_pixels):
    """The limit holds for the length of a prompt, which is known before its images are decoded, and for its tiles."""
    model, processor = load_model(str(folder)), load_processor(str(folder), min_pixels=min_pixels, max_pixels=784 * 6)
    assert limit_pixels(model.config, processor) == (min_pixels // 784 * 784, 784 * 6)
    data = data_of(rows, (model, processor))
    assert len(data) == len(data.tokens) == 8
    for row, length in data.tokens.items():
        prompt = data.prompt(row)
        assert len(prompt.input_ids) == length
        if prompt.pixel_values is not None:
            assert image_inputs(model, [prompt])["pixel_values"].shape[0] == int(prompt.image_mask.sum())
    if min_pixels > 784:
        assert data.prompt(0).image_grid_thw.tolist() == [[1, 4, 4], [1, 2, 2]]  # of 28 x 28 pixels: 2 x 2 tiles
    assert limit_pixels(model.config, processor, 784 * 2 + 5, 784 * 5 + 7) == (784 * 2, 784 * 5)


def test_images_of_several_prompts_follow_one_another(internvl):
    model = tiny_model("internvl")
    prompts = [tiny_prompt(model, grids, seed=i) for i, grids in enumerate([[(4, 8)], [], [(4, 4), (8, 4)]])]
    got = image_inputs(model, prompts)
    want = torch.cat([plain_images(model, prompt, 1)["pixel_values"] for prompt in (prompts[0], prompts[2])])
    assert got.keys() == {"pixel_values"} and torch.equal(got["pixel_values"], want)
    assert image_inputs(model, [prompts[1]]) == {}


def test_places_by_hand():
    """Tiles of 4 x 4 patches. Two patches of a canvas of 2 x 1 tiles, one above the other, are one of its thumbnail."""
    config, one = tiny_model("internvl").config, list(range(16))
    assert patch_places(config, torch.tensor([[1, 4, 4]])).tolist() == one
    got = patch_places(config, torch.tensor([[1, 8, 4], [1, 4, 4], [1, 4, 4]])).tolist()
    above = [4 * (row // 2) + column for row in range(8) for column in range(4)]
    assert got == [*above, *one, *(16 + place for place in one)]
    wide = patch_places(config, torch.tensor([[1, 4, 8], [1, 4, 4]])).tolist()
    assert wide[:8] == [0, 0, 1, 1, 2, 2, 3, 3] and wide[32:] == one
    assert patch_places(tiny_model("qwen2_5_vl").config, torch.tensor([[1, 4, 4]])) == slice(None)


def test_what_is_blackened_in_the_canvas_is_in_the_thumbnail(internvl):
    """By images: a canvas of 2 x 3 tiles after blackening, shrunk by plain means, is black where the thumbnail is."""
    model, processor = internvl
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    white = ((1 - torch.tensor(mean)) / torch.tensor(std)).repeat_interleave(392)
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    scale = {"image_mean": mean, "image_std": std}
    prompt = dataclasses.replace(tiny_prompt(model, []), pixel_values=white.expand(28, -1).clone(), image_grid_thw=grid)
    seen = set()
    for seed in range(20):
        views = blacken(prompt.pixel_values, seeded(seed), **scale, places=patch_places(model.config, grid))
        dark = dataclasses.replace(prompt, pixel_values=views)
        canvas, thumbnail = (image[0].round() for image in images_of(dark, processor))
        blocks = canvas.view(2, 28, 2, 42).mean((1, 3))
        assert torch.equal(blocks, thumbnail.view(2, 14, 2, 14).mean((1, 3)))
        assert set(blocks.unique().tolist()) <= {0, 1}
        seen.add(blocks.sum().item())
    assert len(seen) > 2


def test_prpos_strong_view_hides_a_place_in_both(rows, internvl, monkeypatch):
    (model, processor), seen = internvl, []
    row = tiny_group(data_of(rows, internvl).prompt(1), [3, 2])  # 2 x 3 tiles and the thumbnail
    monkeypatch.setattr(prpo, "forward", lambda model, row, *_: (seen.append(row.prompt.pixel_values), None, None))
    prpo.perturbed_hidden(row, run_of(model, processor), prpo.Args(), 0)
    black = (seen[0] != row.prompt.pixel_values).any(1)
    canvas, thumbnail = black[:24].view(2, 2, 2, 3), black[24:].view(2, 2)
    assert 0 < black.sum() < len(black)
    assert torch.equal(canvas, thumbnail[:, None, :, None].expand(2, 2, 2, 3))


def test_the_attack_moves_canvas_and_thumbnail(rows, internvl):
    (model, processor), data = internvl, data_of(rows, internvl)
    prompt = data.prompt(2)  # two images
    group, run = tiny_group(prompt, [5, 3]), run_of(model, processor)
    args = Args(n1=1, n2=1)
    moved = dataclasses.replace(prompt, pixel_values=attack(group, run, args).pixel_values)
    before, after = images_of(prompt, processor), images_of(moved, processor)
    assert len(before) == len(prompt.image_grid_thw) == 3
    for one, two in zip(before, after):
        change = (one - two).abs()
        assert 0 < change.max() <= 2.001 / 255 and two.min() >= 0 and two.max() <= 1
        assert (change > 0).float().mean() > 0.8


def test_a_patched_model_computes_what_that_of_transformers_does():
    """With frequencies that may grow (InternVL3's rotary embedding), below the model's number of positions."""
    ours, config = tiny_model("internvl"), tiny_model("internvl").config
    config.vision_config._attn_implementation = "eager"
    theirs = type(ours)._from_config(config, attn_implementation="eager").float().eval()
    theirs.load_state_dict(ours.state_dict())
    assert theirs.model.language_model.rotary_emb.rope_type == "dynamic"
    prompt = tiny_prompt(ours, [(4, 8)])
    with torch.no_grad():
        inputs = {"input_ids": prompt.input_ids[None], **plain_images(ours, prompt, 1)}
        want = theirs(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits
        got = ours.eval()(**inputs).logits
    assert torch.allclose(got, want, atol=1e-4)


METHODS = ["grpo", "vepo", "vgpo", "prpo", "pepo", "saei"]


def trained(folder, method, output, *flags):
    """A step of a method; returns the lines of metrics.jsonl, and the tensors by whether the run changed them."""
    lines = train(method, output, *COMMON, "--model", folder, "--data", folder / "rows.jsonl", *flags)
    before, after = load_model(str(folder)).state_dict(), load_model(output / "last").state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return lines, moved, before.keys() - moved


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_it_and_transformers_opens_the_checkpoint(folder, tmp_path, method):
    flags = ["--updates_per_step", 2, "--tokens_per_row", 150, "--eval_rows", 2]
    lines, moved, unmoved = trained(folder, method, tmp_path / "run", *flags)
    assert all(value == value for line in lines for value in line.values() if isinstance(value, float))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "last")
    assert not unmoved & {name for name, _ in model.named_parameters()} and moved
    assert load_processor(tmp_path / "run" / "last").image_processor.max_patches == 6


def test_frozen_vision_is_tower_and_projector(folder, tmp_path):
    _, moved, unmoved = trained(folder, "grpo", tmp_path / "run", "--freeze_vision")
    assert moved and unmoved == {name for name in moved | unmoved if "vision" in name or "projector" in name}


def test_a_resumed_run_is_bit_identical(folder, rows, tmp_path, monkeypatch):
    flags = [*COMMON, "--model", folder, "--data", rows, "--save_every", 1, "--steps", 2, "--max_response_tokens", 6]
    whole, log, calls = train("pepo", tmp_path / "whole", *flags), Trainer.log, iter(range(9))

    def dies(run):  # in the second step, after its update
        log(run)
        if next(calls) == 1:
            raise RuntimeError("power cut")

    monkeypatch.setattr(Trainer, "log", dies)
    with pytest.raises(RuntimeError):
        train("pepo", tmp_path / "cut", *flags)
    monkeypatch.setattr(Trainer, "log", log)
    assert timeless(train("pepo", tmp_path / "cut", *flags, "--resume")) == timeless(whole)
    assert same(*(weights(tmp_path / name / "last") for name in ("whole", "cut")))


def test_adapters(folder, tmp_path):
    _, moved, _ = trained(folder, "vepo", tmp_path / "run", "--lora_rank", 2)
    assert moved and all("language_model.layers" in name and "_proj" in name for name in moved)


def test_evaluation_and_both_pages(folder, rows, tmp_path, monkeypatch, capsys):
    def command(main, *flags):
        flags = [*flags, "--model", folder, "--data", rows, *PIXELS, "--max_response_tokens", 8]
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, flags)])
        main()

    class Alternating(Reward):  # a random model's are all 0, and the page shows a right and a wrong one
        def __call__(self, groups):
            super().__call__(groups)
            for group in groups:
                group.accuracy = group.rewards = torch.arange(len(group.texts)) % 2.0
            return groups

    command(evaluation.main, "--benchmarks", "own", "--output", tmp_path / "eval")
    assert "images of 784 to 4,704 pixels" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval/results.json").read_text())["scores"]["own"]["rows"] == 8
    monkeypatch.setattr(show, "Reward", Alternating)
    for what, place, file in (("tokens", "page.html", "page.html"), ("signals", ".", "signals.json")):
        command(show.main, what, "--group_size", 2, "--page" if what == "tokens" else "--output", tmp_path / place)
        assert (tmp_path / file).exists()


def test_numbers_of_internvl3_2b(tmp_path):
    """Published: vision 24 layers of 1,024, decoder Qwen2.5-1.5B with a separate head, 2.09 billion parameters."""
    text = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
    text |= dict(num_key_value_heads=2, vocab_size=151_674)
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**text), vision_config={"attention_bias": True}
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["tie_word_embeddings"]  # as on the hub
    (tmp_path / "config.json").write_text(json.dumps(saved))
    args = SharedArgs(model=str(tmp_path), dry_run=1)
    peaks = plan(args, 1)
    assert peaks["kept"]["weights"] == 4 * 2_088_957_440
    assert largest_image(config, 1_000_000, 2048) == 5 * 1025  # 4 tiles and the thumbnail
    assert largest_image(config, 448**2, 2048) == 1025 and largest_image(config, None, 2048) == 8 * 1025
    assert largest_image(config, None, 3 * 256 - 1) == 1025  # no thumbnail of one tile
    tower, row = 5 * 1025 * 4 * (24 * 1024 + 6 * 1024 + 5 * 1024 + 4 * 4096), 16_384  # fp32 on a CPU
    decoder = row * 4 * (28 * 1536 + 6 * 1536 + 5 * 1536 + 4 * 8960)
    assert plan(SharedArgs(model=str(tmp_path), dtype="float32"), 1)["update"]["activations"] == tower + decoder


def test_a_separate_head_that_the_configuration_does_not_name(folder, tmp_path):
    """InternVL3's files on the hub: a head, and no tie_word_embeddings, which transformers takes for tied."""
    assert "tie_word_embeddings" not in json.loads((folder / "config.json").read_text())
    model, empty = load_model(str(folder)), load_model(str(folder), meta=True)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert dict(empty.named_parameters()).keys() == dict(model.named_parameters()).keys()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_model(str(tmp_path)).lm_head.weight, model.lm_head.weight)
    model.lm_head.weight = model.get_input_embeddings().weight  # and one that is the embeddings
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "tied")
    tied = load_model(str(tmp_path / "tied"))
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert load_model(str(tmp_path / "tied"), meta=True).config.tie_word_embeddings


@pytest.mark.parametrize("top, text, tied", [(True, True, True), (True, False, False), (False, True, False)])
def test_which_configuration_ties_the_head(tmp_path, top, text, tied):
    tiny_model("internvl").config.save_pretrained(tmp_path)
    change(tmp_path, "config.json", tie_word_embeddings=top)
    change(tmp_path, "config.json", part="text_config", tie_word_embeddings=text)
    assert load_config(str(tmp_path)).tie_word_embeddings == tied


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_a_separate_head_that_the_configuration_denies_is_refused(tmp_path, family):
    """transformers would keep it on one process, and a model built from the configuration has none."""
    model = tiny_model(family)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    model.save_pretrained(tmp_path)
    change(tmp_path, "config.json", tie_word_embeddings=True)
    change(tmp_path, "config.json", part="text_config", tie_word_embeddings=True)
    with pytest.raises(UserError, match="head and embeddings differ, so tie_word_embeddings must be false"):
        load_model(str(tmp_path))


def test_longer_rows_than_its_frequencies_are_for(rows, internvl, toy):
    longest = data_of(rows, internvl).longest_tokens
    data_of(rows, internvl, max_response_tokens=4096 - longest)
    with pytest.raises(UserError, match="of up to 4097 tokens in .* do not fit --model's 4096 positions: lower"):
        data_of(rows, internvl, max_response_tokens=4097 - longest)
    data_of(rows, toy, max_response_tokens=4097)  # Qwen-VL has no such limit


@pytest.mark.parametrize("video", [{}, {"video_token_id": None}])
def test_the_image_token_is_banned_and_there_may_be_none_of_videos(video):
    model = tiny_model("internvl")
    for name, value in video.items():
        setattr(model.config, name, value)
    logits = torch.zeros(4, 96)
    logits[:, 11] = 100.0
    picked = chooser(model)(logits, torch.tensor([0.0, 0.1, 0.5, 0.99]))
    assert 11 not in picked and len(set(picked.tolist())) == 4


def test_positions_of_a_prompt_without_an_image(rows, toy):
    prompt = data_of(rows, toy).prompt(3)
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt.input_ids)).expand(3, -1))
    assert prompt.pixel_values is None and prompt.image_grid_thw is None


def test_a_plan(folder, tmp_path):
    args = SharedArgs(model=str(folder), min_pixels=784, max_pixels=784 * 6, dry_run=1)
    parameters = sum(p.numel() for p in load_model(str(folder)).parameters())
    assert plan(args, 1)["kept"]["weights"] == 4 * parameters
    frozen = plan(dataclasses.replace(args, freeze_vision=True), 1)
    named = load_model(str(folder)).named_parameters()
    rest = sum(p.numel() for name, p in named if "vision" not in name and "projector" not in name)
    assert frozen["kept"]["optimiser"] == 8 * rest


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"model_type": "internvl", "text_config": {"model_type": "gpt_oss"}}, "is internvl with gpt_oss; use one of"),
        ({"model_type": "internvl", "text_config": {"model_type": "qwen3_moe"}}, "is internvl with qwen3_moe; use"),
        ({"model_type": "internvl", "text_config": {"model_type": "clip_text_model"}}, "with clip_text_model; use"),
        ({"model_type": "llava"}, "is llava; use"),
    ],
)
def test_other_families_and_decoders_are_refused(tmp_path, change, sentence):
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=sentence):
        load_config(tmp_path)
    with pytest.raises(UserError, match=sentence):
        plan(SharedArgs(model=str(tmp_path), dry_run=1), 1)


def test_pixels_of_less_than_a_tile_are_refused(folder):
    cases = [(folder, None, 783, 784), (folder, 1, 783, 784), (folder, 7840, 1573, 7840)]
    for model, low, high, lowest in [*cases, (ROOT / "toy" / "model", None, 1000, 3136)]:
        with pytest.raises(UserError, match=f"--max_pixels {high} is below {lowest}, the least by --min_pixels or"):
            load_processor(str(model), min_pixels=low, max_pixels=high)


def change(folder, file, part=None, **values):
    """Changes keys of a json file, or of a part of it."""
    path = folder / file
    saved = json.loads(path.read_text())
    (saved[part] if part else saved).update(values)
    path.write_text(json.dumps(saved))


def test_a_processor_of_another_size_of_tiles_is_refused(folder, tmp_path):
    """transformers would interpolate the tower's positions."""
    shutil.copytree(folder, tmp_path / "model")
    change(tmp_path / "model", "preprocessor_config.json", size={"height": 56, "width": 56})
    with pytest.raises(UserError, match="not made for its vision tower"):
        load_processor(str(tmp_path / "model"))
