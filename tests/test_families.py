"""What differs between model families: InternVL's tiles as patches, and all that a run does with such a model."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
import transformers
from helpers import (
    chooser,
    json_file,
    plain_images,
    same,
    save_internvl,
    timeless,
    times_agree,
    tiny_group,
    tiny_model,
    tiny_prompt,
    train,
    weights,
)
from PIL import Image
from test_saei import images_of

import eval as evaluation
import prpo
import show
from common import Reward, load_config, load_model, load_processor
from plumbing.arguments import SharedArgs, UserError
from plumbing.data import Data
from plumbing.families import image_inputs, largest_image, limit_pixels, patch_places, patches_of
from plumbing.memory import plan
from saei import Args, attack
from show import run_of

PIXELS = ["--min_pixels", 784, "--max_pixels", 784 * 6]
COMMON = [*PIXELS, "--kl_coef", 0.1, "--entropy_coef", 0.01, "--max_response_tokens", 12, "--steps", 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_internvl(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def internvl(folder):
    return load_model(str(folder)), load_processor(str(folder), min_pixels=784, max_pixels=784 * 6)


@pytest.fixture(scope="module")
def rows(folder):
    return folder / "rows.jsonl"


def data_of(rows, internvl, **args):
    model, processor = internvl
    return Data(str(rows), "train", SharedArgs(**args), processor, model)


@pytest.mark.parametrize("row, names", [(1, [1]), (2, [2, 3]), (4, [4])])
def test_patches_and_tiles_are_those_of_the_processor(rows, internvl, row, names):
    """There and back: the very tiles; and each patch has the same place in its image as in the canvas."""
    (model, processor), prompt = internvl, data_of(rows, internvl).prompt(row)
    images = [Image.open(rows.parent / f"{i}.png") for i in names]
    tiles = processor(text=["<IMG_CONTEXT>" * len(images)], images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(image_inputs(model, [prompt])["pixel_values"], tiles)
    assert torch.equal(plain_images(model, prompt, 1)["pixel_values"], tiles)
    assert torch.equal(patches_of(model.config, tiles, prompt.image_grid_thw), prompt.pixel_values)
    assert int(prompt.image_mask.sum()) == len(tiles) and times_agree(prompt.pixel_values)
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt.input_ids))[None])
    if row == 1:  # 2 x 3 tiles and the thumbnail; nothing was resized: the very pixels
        assert prompt.image_grid_thw.tolist() == [[1, 4, 6], [1, 2, 2]]
        canvas, thumbnail = images_of(prompt, processor)
        pixels = torch.tensor(list(images[0].tobytes())).view(56, 84, 3).permute(2, 0, 1) / 255
        assert torch.equal(canvas, pixels) and thumbnail.shape == (3, 28, 28)


def test_limits_of_pixels_and_the_length_of_a_prompt(folder, rows, min_pixels=784 * 4 + 5):
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


def trained(folder, method, output, *flags):
    """A step of a method; returns the lines of metrics.jsonl, and the tensors by whether the run changed them."""
    lines = train(method, output, *COMMON, "--model", folder, "--data", folder / "rows.jsonl", *flags)
    before, after = load_model(str(folder)).state_dict(), load_model(output / "last").state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return lines, moved, before.keys() - moved


@pytest.mark.parametrize("method", ["vgpo", "prpo", "pepo", "saei"])
def test_methods_train_it_and_transformers_opens_the_checkpoint(folder, tmp_path, method):
    flags = ["--updates_per_step", 2, "--tokens_per_row", 150, "--eval_rows", 2]
    lines, moved, unmoved = trained(folder, method, tmp_path / "run", *flags)
    assert all(value == value for line in lines for value in line.values() if isinstance(value, float))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "last")
    assert not unmoved & {name for name, _ in model.named_parameters()} and moved
    assert load_processor(tmp_path / "run" / "last").image_processor.max_patches == 6


def test_frozen_vision_is_tower_and_projector(folder, tmp_path):
    _, moved, unmoved = trained(folder, "grpo", tmp_path / "run", "--freeze_vision")
    assert moved and unmoved == {name for name in moved | unmoved if "vision" in name or "projector" in name}


def test_adapters(folder, tmp_path):
    _, moved, _ = trained(folder, "vepo", tmp_path / "run", "--lora_rank", 2)
    assert moved and all("language_model.layers" in name and "_proj" in name for name in moved)


def test_a_resumed_run_is_bit_identical(folder, tmp_path):
    flags = [*COMMON, "--model", folder, "--data", folder / "rows.jsonl", "--max_response_tokens", 6]
    whole = train("vgpo", tmp_path / "whole", *flags, "--steps", 2)
    train("vgpo", tmp_path / "cut", *flags)
    assert timeless(train("vgpo", tmp_path / "cut", *flags, "--steps", 2, "--resume"))[-1] == timeless(whole)[-1]
    assert same(*(weights(tmp_path / name / "last") for name in ("whole", "cut")))


def test_evaluation_and_both_pages(folder, rows, tmp_path, monkeypatch, capsys):
    def command(main, *flags):
        flags = [*flags, "--model", folder, "--data", rows, *PIXELS, "--max_response_tokens", 8]
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, flags)])
        main()

    def alternating(self, groups):  # a random model's are all 0, and the page shows a right and a wrong one
        for group in groups:
            group.accuracy = group.format = group.rewards = torch.arange(len(group.texts)) % 2.0
        return groups

    command(evaluation.main, "--benchmarks", "own", "--output", tmp_path / "eval")
    assert "images of 784 to 4,704 pixels" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval/results.json").read_text())["scores"]["own"]["rows"] == 8
    monkeypatch.setattr(Reward, "__call__", alternating)
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
    with json_file(tmp_path / "config.json") as saved:
        del saved["tie_word_embeddings"]  # as on the hub
    assert plan(SharedArgs(model=str(tmp_path), dry_run=1), 1)["kept"]["weights"] == 4 * 2_088_957_440
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


def ties(folder, top, text):
    with json_file(folder / "config.json") as saved:
        saved["tie_word_embeddings"], saved["text_config"]["tie_word_embeddings"] = top, text


@pytest.mark.parametrize("top, text, tied", [(True, True, True), (True, False, False), (False, True, False)])
def test_which_configuration_ties_the_head(tmp_path, top, text, tied):
    tiny_model("internvl").config.save_pretrained(tmp_path)
    ties(tmp_path, top, text)
    assert load_config(str(tmp_path)).tie_word_embeddings == tied


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_a_separate_head_that_the_configuration_denies_is_refused(tmp_path, family):
    """transformers would keep it on one process, and a model built from the configuration has none."""
    model = tiny_model(family)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    model.save_pretrained(tmp_path)
    ties(tmp_path, True, True)
    with pytest.raises(UserError, match="head and embeddings differ, so tie_word_embeddings must be false"):
        load_model(str(tmp_path))


def test_longer_rows_than_its_frequencies_are_for(rows, internvl, toy):
    longest = data_of(rows, internvl).longest_tokens
    data_of(rows, internvl, max_response_tokens=4096 - longest)
    with pytest.raises(UserError, match="of up to 4097 tokens in .* do not fit --model's 4096 positions: lower"):
        data_of(rows, internvl, max_response_tokens=4097 - longest)
    data_of(rows, toy, max_response_tokens=4097)  # Qwen-VL has no such limit


def test_the_image_token_is_banned_and_there_may_be_none_of_videos():
    model, logits = tiny_model("internvl"), torch.zeros(4, 96)
    model.config.video_token_id, logits[:, 11] = None, 100.0
    picked = chooser(model)(logits, torch.tensor([0.0, 0.1, 0.5, 0.99]))
    assert 11 not in picked and len(set(picked.tolist())) == 4


@pytest.mark.parametrize("decoder", ["gpt_oss", "qwen3_moe"])
def test_other_families_and_decoders_are_refused(tmp_path, decoder):
    saved = {"model_type": "internvl", "text_config": {"model_type": decoder}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=f"is internvl with {decoder}; use one of"):
        load_config(tmp_path)


@pytest.mark.parametrize("low, high, lowest", [(None, 783, 784), (7840, 1573, 7840)])
def test_pixels_of_less_than_a_tile_are_refused(folder, low, high, lowest):
    with pytest.raises(UserError, match=f"--max_pixels {high} is below {lowest}, the least by --min_pixels or"):
        load_processor(str(folder), min_pixels=low, max_pixels=high)


def test_a_processor_of_another_size_of_tiles_is_refused(folder, tmp_path):
    """transformers would interpolate the tower's positions."""
    shutil.copytree(folder, tmp_path / "model")
    with json_file(tmp_path / "model/preprocessor_config.json") as saved:
        saved["size"] = {"height": 56, "width": 56}
    with pytest.raises(UserError, match="not made for its vision tower"):
        load_processor(str(tmp_path / "model"))
