"""Rows of any usual schema -> prompts, and the order in which training sees them."""

import json

import pytest
import torch
from datasets import Dataset
from helpers import ROOT
from PIL import Image

from common import load_processor
from plumbing.arguments import INSTRUCTION, SharedArgs, UserError
from plumbing.data import Data, Stream, prompt_text, to_rgb


def data_of(toy, name, split="train", **more):
    model, processor = toy
    return Data(str(name), split, SharedArgs(**more), processor, model.model.get_rope_index)


def test_prompt_of_the_toy_is_qwens_chat_template(toy):
    data = data_of(toy, "toy")
    row = next(i for i in range(20) if data.rows[i]["problem"].startswith("<image><image>"))
    prompt = data.prompt(row)
    text = toy[1].tokenizer.decode(prompt.input_ids)
    pads = [int(n) // 4 for n in prompt.image_grid_thw.prod(1)]
    images = "".join("<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in pads)
    question = data.rows[row]["problem"].replace("<image>", "")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{images}{question}\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.image_mask.sum() == sum(pads) and len(prompt.pixel_values) == 4 * sum(pads)


def test_training_prompt_equals_evaluation_prompt(toy):
    training, evaluation = data_of(toy, "toy", "test"), data_of(toy, "toy", "test", eval_rows=5, seed=3)
    for i in range(7):
        a, b = training.prompt(i), evaluation.prompt(i)
        for name in ("input_ids", "position_ids", "pixel_values", "image_grid_thw", "image_mask"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None and y is None) or torch.equal(x, y)


def test_positions_are_three_dimensional_inside_a_picture(toy):
    prompt = data_of(toy, "toy").prompt(0)
    t, h, w = prompt.position_ids[:, prompt.image_mask]
    assert len(set(t.tolist())) == 1 and len(set(h.tolist())) > 1 and len(set(w.tolist())) > 1
    text = prompt.position_ids[:, ~prompt.image_mask]
    assert (text[0] == text[1]).all() and (text[0] == text[2]).all()


def test_images_stand_where_the_problem_says(toy, picture_file):
    data = data_of(toy, picture_file)
    assert [len(data.row(i)[1]) for i in range(3)] == [1, 2, 0]
    tokenizer = toy[1].tokenizer
    text = tokenizer.decode(data.prompt(1).input_ids)
    assert text.index("Of ") < text.index("<|vision_start|>") < text.index(" and ") < text.rindex("<|vision_start|>")
    assert data.prompt(2).pixel_values is None and "<|vision_start|>" not in tokenizer.decode(data.prompt(2).input_ids)


def test_images_without_a_placeholder_come_first(toy, tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    (tmp_path / "d.json").write_text(json.dumps([{"image": "a.png", "question": "What?", "solution": "1"}]))
    problem, images, answer = data_of(toy, tmp_path / "d.json").row(0)
    assert problem == "<image>What?" and len(images) == 1 and answer == "1"


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (4, 4))).mode == "RGB"


def test_transparent_becomes_white_and_palettes_keep_their_colours():
    assert to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    half = to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 128))).getpixel((0, 0))
    assert half[0] == 255 and 120 < half[1] < 135
    assert to_rgb(Image.new("RGB", (2, 2), (10, 200, 30)).convert("P")).getpixel((0, 0))[1] > 150
    clear = Image.new("P", (2, 2), 0)
    clear.info["transparency"] = 0
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


def test_a_photo_is_turned_as_its_exif_says(toy, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (84, 56)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "d.json").write_text(json.dumps([{"image": "a.jpg", "question": "What?", "answer": "1"}]))
    data = data_of(toy, tmp_path / "d.json")
    assert data.row(0)[1][0].size == (56, 84)
    assert data.prompt(0).image_grid_thw.tolist() == [[1, 6, 4]]


def test_parquet_json_jsonl_and_folders(toy, tmp_path, picture_file):
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "folder").mkdir()
    Dataset.from_list(rows[:2]).to_parquet(tmp_path / "folder" / "1.parquet")
    Dataset.from_list(rows[2:]).to_parquet(tmp_path / "folder" / "2.parquet")
    assert len(data_of(toy, tmp_path / "a.json")) == len(data_of(toy, tmp_path / "folder")) == 3
    assert len(data_of(toy, picture_file)) == 3


def test_columns_by_flag(toy, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"frage": "Eins?", "antwort": 1, "answer": "no"}]))
    data = data_of(toy, tmp_path / "d.json", problem_column="frage", answer_column="antwort")
    assert data.row(0) == ("Eins?", [], "1")


def test_pixel_limits(toy, tmp_path):
    Image.new("RGB", (280, 280)).save(tmp_path / "a.png")
    (tmp_path / "d.json").write_text(json.dumps([{"image": "a.png", "question": "What?", "answer": "1"}]))
    folder = str(ROOT / "toy" / "model")
    for least, most, tokens in [(None, 28 * 28 * 40, 36), (28 * 28 * 144, 28 * 28 * 400, 144), (None, 28 * 28 * 4, 4)]:
        processor = load_processor(folder, min_pixels=least, max_pixels=most)
        data = data_of((toy[0], processor), tmp_path / "d.json")
        assert data.prompt(0).image_mask.sum() == tokens
        assert data.prompt_tokens(0) == len(data.prompt(0).input_ids)


def test_long_prompts_are_dropped_and_counted_never_cut(toy, picture_file):
    lengths = [len(data_of(toy, picture_file).prompt(i).input_ids) for i in range(3)]
    data = data_of(toy, picture_file, max_prompt_tokens=sorted(lengths)[1])
    assert data.dropped == 1 and len(data) == 2 and 1 not in data.indices  # the row with two pictures
    for name in ("toy", picture_file):
        data = data_of(toy, name)
        for i in data.indices[:14]:
            assert data.prompt_tokens(i) == len(data.prompt(i).input_ids)


@pytest.mark.parametrize("world", [2, 4])
def test_the_order_is_that_of_one_process(toy, world):
    data = data_of(toy, "toy")
    data.indices = data.indices[:10]  # so that a draw crosses an epoch
    one = Stream(data, seed=5)
    many = [Stream(data, 5, rank, world) for rank in range(world)]
    seen = []
    for _ in range(4):
        want = one.draw(8)
        got = [p for stream in many for p in stream.draw(8)]
        assert [p.serial for p in want] == sorted(p.serial for p in got)
        assert {p.serial: p.index for p in want} == {p.serial: p.index for p in got}
        seen += [p.index for p in want]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == sorted(data.indices) and seen[:10] != seen[10:20]
    later = Stream(data, 5, position=16)
    assert [p.index for p in later.draw(8)] == seen[16:24]
    assert [p.index for p in Stream(data, 6).draw(8)] != seen[:8]


@pytest.mark.parametrize(
    "rows, more, sentence",
    [
        ([{"foo": "a", "answer": "1"}], {}, "no problem column .problem or question or query.; it has foo, answer"),
        ([{"question": "a", "bar": "1"}], {}, "no answer column .* has question, bar"),
        ([{"question": "a", "answer": "1"}], {"image_column": "pic"}, "no image column .pic.* --image_column"),
        ([{"question": "<image>a", "answer": "1"}], {}, "row 0 .* says <image> 1 times and has 0 images"),
        ([{"question": "a", "answer": "1", "image": "gone.png"}], {}, "row 0 .* has an image that cannot be read"),
        ([{"question": "a", "answer": "1"}], {"max_prompt_tokens": 3}, "no row left to use .1 were longer than"),
    ],
)
def test_mistakes_in_the_data(toy, tmp_path, rows, more, sentence):
    (tmp_path / "d.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=sentence) as error:
        data_of(toy, tmp_path / "d.json", **more)
    assert error.value.code == 2


def test_a_picture_that_is_cut_off(toy, tmp_path):
    Image.effect_noise((280, 280), 50).convert("RGB").save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d.json").write_text(json.dumps([{"question": "a", "answer": "1", "image": "a.png"}]))
    data = data_of(toy, tmp_path / "d.json")  # the size stands at the front of the file
    with pytest.raises(UserError, match="row 0 of .* has an image that cannot be read"):
        data.prompt(0)


def test_a_picture_of_an_impossible_shape(toy, tmp_path):
    Image.new("RGB", (3000, 10)).save(tmp_path / "a.png")
    (tmp_path / "d.json").write_text(json.dumps([{"question": "a", "answer": "1", "image": "a.png"}]))
    with pytest.raises(UserError, match="row 0 of .* cannot be used .*aspect ratio"):
        data_of(toy, tmp_path / "d.json")


def test_empty_data(toy, tmp_path):
    Dataset.from_dict({"problem": [], "answer": []}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text("")
    for name in ("d.parquet", "d.jsonl"):
        with pytest.raises(UserError, match="has no rows"):
            data_of(toy, tmp_path / name)


def test_unknown_data_and_no_network(toy, tmp_path, no_waiting):
    with pytest.raises(UserError, match="--data nobody/nothing cannot be opened .*local folder"):
        data_of(toy, "nobody/nothing")
    (tmp_path / "notes.txt").write_text("hello")
    for name in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(UserError, match="must be a parquet, json or jsonl file"):
            data_of(toy, name)


def test_prompt_text_of_plain_text(toy):
    text = prompt_text(toy[1], "One?", "Say it.")
    assert text.endswith("<|im_start|>user\nOne?\nSay it.<|im_end|>\n<|im_start|>assistant\n")
