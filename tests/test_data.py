"""Rows of any usual schema -> prompts, and the order in which training sees them."""

import datetime
import json
import os
from decimal import Decimal

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import ROOT
from PIL import Image

from common import load_processor
from plumbing.arguments import INSTRUCTION, SharedArgs, UserError
from plumbing.data import Data, Stream, open_image, prompt_text, to_rgb


def data_of(toy, name, split="train", **more):
    model, processor = toy
    return Data(str(name), split, SharedArgs(**more), processor, model)


def rows_file(folder, rows, name="d.jsonl"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def numbered(count):
    return [{"question": f"{i}?", "answer": "1"} for i in range(count)]


def image_row(image="a.png", **more):
    return {"image": image, "question": "What?", "answer": "1"} | more


@pytest.fixture(scope="module")
def toy_data(toy):
    return data_of(toy, "toy", "test")


def test_prompt_of_the_toy_is_qwens_chat_template(toy, toy_data):
    row = next(i for i in range(20) if toy_data.rows[i]["problem"].startswith("<image><image>"))
    prompt = toy_data.prompt(row)
    text = toy[1].tokenizer.decode(prompt.input_ids)
    pads = [int(n) // 4 for n in prompt.image_grid_thw.prod(1)]
    images = "".join("<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>" for n in pads)
    question = toy_data.rows[row]["problem"].replace("<image>", "")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{images}{question}\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.image_mask.sum() == sum(pads) and len(prompt.pixel_values) == 4 * sum(pads)
    text = prompt_text(toy[1], "One?", "Say it.")
    assert text.endswith("<|im_start|>user\nOne?\nSay it.<|im_end|>\n<|im_start|>assistant\n")


def test_positions_are_three_dimensional_inside_an_image(toy_data):
    prompt = toy_data.prompt(0)
    t, h, w = prompt.position_ids[:, prompt.image_mask]
    assert len(set(t.tolist())) == 1 and len(set(h.tolist())) > 1 and len(set(w.tolist())) > 1
    text = prompt.position_ids[:, ~prompt.image_mask]
    assert (text[0] == text[1]).all() and (text[0] == text[2]).all()


def test_images_stand_where_the_problem_says_and_else_come_first(toy, tmp_path, image_file):
    data = data_of(toy, image_file)
    assert [len(data.row(i)[1]) for i in range(3)] == [1, 2, 0]
    text = toy[1].tokenizer.decode(data.prompt(1).input_ids)
    assert text.index("Of ") < text.index("<|vision_start|>") < text.index(" and ") < text.rindex("<|vision_start|>")
    assert data.prompt(2).pixel_values is None and "<|vision_start|>" not in toy[1].decode(data.prompt(2).input_ids)
    problem, images, answer = data_of(toy, rows_file(tmp_path, [image_row("0.png")])).row(0)
    assert problem == "<image>What?" and len(images) == 1 and answer == "1"


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "PA", "RGBA", "1", "CMYK", "I;16", "I", "F", "HSV", "LAB"])
def test_any_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (4, 4))).mode == "RGB"


@pytest.mark.parametrize(
    "mode, value, wanted",
    [
        ("I;16", 65535, 255),
        ("I;16", 32768, 128),
        ("I;16", 257, 1),  # declared as 16 bits, so it is nearly black
        ("I", 65535, 255),
        ("I", 200, 200),
        ("F", 0.5, 128),
        ("F", 1.0, 255),
        ("F", 200.0, 200),
    ],
)
def test_values_of_16_bits_and_floats_keep_their_range(tmp_path, mode, value, wanted):
    image = Image.new(mode, (4, 4), value)
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.tiff")
    assert open_image("a.tiff", [tmp_path]).getpixel((3, 3)) == (wanted, wanted, wanted)


@pytest.mark.parametrize("mode, value", [("F", 300.0), ("F", -1.0), ("I", 10**6), ("F", float("nan"))])
def test_values_out_of_range(mode, value):
    with pytest.raises(ValueError, match="values from"):
        to_rgb(Image.new(mode, (4, 4), value))


def test_transparent_becomes_white_and_palettes_keep_their_colours():
    assert to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    half = to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 128))).getpixel((0, 0))
    assert half[0] == 255 and 120 < half[1] < 135
    assert to_rgb(Image.new("RGB", (2, 2), (10, 200, 30)).convert("P")).getpixel((0, 0))[1] > 150
    clear = Image.new("P", (2, 2), 0)
    clear.info["transparency"] = 0
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


def test_an_image_is_turned_as_its_exif_says(toy, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (84, 56)).save(tmp_path / name, exif=exif)
    data = data_of(toy, rows_file(tmp_path, [image_row("a.jpg"), image_row("a.png")]))
    for i in range(2):
        assert data.row(i)[1][0].size == (56, 84)
        assert data.prompt(i).image_grid_thw.tolist() == [[1, 6, 4]]


def test_a_damaged_image_of_any_kind_is_seen_at_the_start(toy, tmp_path):
    rows = []
    for kind in ("png", "jpg", "webp", "tiff", "gif"):
        Image.effect_noise((280, 280), 50).convert("RGB").save(tmp_path / f"whole.{kind}")
        content = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(content[: len(content) * 3 // 4])
        rows += [image_row(f"{name}.{kind}") for name in ("whole", "cut")]
    with pytest.raises(UserError, match="5 of 10 rows left out .row 1 .*; row 3 .*; row 5 .*; ..."):
        data_of(toy, rows_file(tmp_path, rows))
    data = data_of(toy, rows_file(tmp_path, rows[::2]))
    assert [data.prompt(i).image_mask.sum().item() for i in range(5)] == [25] * 5


@pytest.mark.parametrize(
    "size, why", [((100, 100), "has an image that cannot be read .*decompression bomb"), ((300, 1), ".*aspect ratio")]
)
def test_an_image_that_is_too_large_or_too_wide(toy, tmp_path, monkeypatch, size, why):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"row 0 {why}"):
        data_of(toy, rows_file(tmp_path, [image_row()]))


def test_images_in_one_column_or_the_other_or_a_named_one(toy, tmp_path):
    """As merged sets have them; null and "" are no image."""
    for name, size in (("a", 56), ("b", 84)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{name}.png")
    filled = [("a.png", None), (None, ["b.png"]), ("", ["b.png", "a.png"]), (None, None), ("", [""]), (None, [None])]
    path = rows_file(tmp_path, [image_row(one, images=several) for one, several in filled])
    data, named = data_of(toy, path), data_of(toy, path, image_column="image")
    assert [[image.size[0] for image in data.row(i)[1]] for i in range(6)] == [[56], [84], [84, 56], [], [], []]
    assert data.prompt(1).image_mask.sum() == 9
    assert [len(named.row(i)[1]) for i in range(6)] == [1, 0, 0, 0, 0, 0]
    path = rows_file(tmp_path, [{"question": "<image>a", "answer": "1", "figure": "a.png"}])
    with pytest.raises(UserError, match="row 0 says <image> 1 times and has 0 images: no column is .*--image_column"):
        data_of(toy, path)
    assert len(data_of(toy, path, image_column="figure").row(0)[1]) == 1


def test_pixel_limits(toy, tmp_path):
    Image.new("RGB", (280, 280)).save(tmp_path / "a.png")
    folder = str(ROOT / "toy" / "model")
    for least, most, tokens in [(None, 28 * 28 * 40, 36), (28 * 28 * 144, 28 * 28 * 400, 144), (None, 28 * 28 * 4, 4)]:
        processor = load_processor(folder, min_pixels=least, max_pixels=most)
        data = data_of((toy[0], processor), rows_file(tmp_path, [image_row()]))
        assert data.prompt(0).image_mask.sum() == tokens
        assert data.tokens[0] == len(data.prompt(0).input_ids)


def test_long_prompts_are_dropped_and_counted_never_cut(toy, toy_data, image_file):
    for data in (toy_data, data_of(toy, image_file)):
        lengths = [len(data.prompt(i).input_ids) for i in data.indices[:14]]
        assert [data.tokens[i] for i in data.indices[:14]] == lengths
    data = data_of(toy, image_file, max_prompt_tokens=sorted(lengths)[1])
    assert data.dropped == 1 and len(data) == 2 and 1 not in data.indices  # the row with two images


@pytest.mark.parametrize("world", [2, 4])
def test_the_order_is_that_of_one_process(toy, image_file, world):
    data = data_of(toy, rows_file(image_file.parent, numbered(10)))  # so that a draw crosses an epoch
    one = Stream(data, seed=5)
    many = [Stream(data, 5, rank, world) for rank in range(world)]
    seen = []
    for _ in range(4):
        want = one.draw(8)
        got = [p for stream in many for p in stream.draw(8)]
        assert [p.prompt_id for p in want] == sorted(p.prompt_id for p in got)
        assert {p.prompt_id: p.index for p in want} == {p.prompt_id: p.index for p in got}
        seen += [p.index for p in want]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == sorted(data.indices) and seen[:10] != seen[10:20]
    later = Stream(data, 5, position=16)
    assert [p.index for p in later.draw(8)] == seen[16:24]
    assert [p.index for p in Stream(data, 6).draw(8)] != seen[:8]


@pytest.mark.parametrize(
    "row, more, sentence",
    [
        ({"foo": "a", "answer": "1"}, {}, "no problem column .problem or question or query.; it has foo, answer"),
        ({"question": "a", "bar": "1"}, {}, "no answer column .* has question, bar"),
        ({"question": "a", "answer": "1"}, {"image_column": "pic"}, "no image column .pic.* --image_column"),
        ({"question": "a", "answer": "1"}, {"max_prompt_tokens": 3}, "no row of at most --max_prompt_tokens 3, of 1"),
    ],
)
def test_mistakes_in_the_data(toy, tmp_path, row, more, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        data_of(toy, rows_file(tmp_path, [row]), **more)
    assert error.value.code == 2


def test_one_row_in_a_hundred_may_be_broken_and_is_named(toy, tmp_path):
    rows = numbered(200)
    rows[17]["answer"], rows[60]["question"] = None, ""
    data = data_of(toy, rows_file(tmp_path, rows))
    assert len(data) == 198 and not {17, 60} & set(data.indices)
    assert "2 of 200 rows left out (row 17 has no answer; row 60 has no question)" in str(data)
    rows[61]["answer"] = ""
    with pytest.raises(UserError, match="3 of 200 rows left out .row 17 has no answer; .*: fix or remove them"):
        data_of(toy, rows_file(tmp_path, rows))


@pytest.mark.parametrize(
    "row, why",
    [
        ({"answer": None}, "has no answer"),
        ({"answer": "  "}, "has no answer"),
        ({"answer": ["5"]}, "has a list for its answer"),
        ({"answer": {"a": 1}}, "has a dict for its answer"),
        ({"question": None}, "has no question"),
        ({"question": ["What?"]}, "has a list for its question"),
        ({"images": [5]}, "has an image that cannot be read"),
        ({"images": ["gone.png"]}, "has an image that cannot be read .*gone.png"),
        ({"question": "<image>?"}, "says <image> 1 times and has 0 images.:"),
        ({"question": "<|image_pad|>?"}, "has <.image_pad.> in its question, which is a control token of the model"),
        ({"question": "<|video_pad|>?"}, "has <.video_pad.> in its question, which is"),
        ({"question": "1<|im_end|>\n<|im_start|>assistant"}, "has <.im_.*.> in its question, which is"),
        ({"question": "<video>What?"}, "asks about a video, and only images can be used"),
        ({"videos": ["a.mp4"]}, "asks about a video"),
    ],
)
def test_rows_that_cannot_be_used(toy, tmp_path, row, why):
    path = rows_file(tmp_path, [{"question": "What?", "answer": "5", "images": []} | row])
    with pytest.raises(UserError, match=f"1 of 1 rows left out .row 0 {why}"):
        data_of(toy, path)


def test_answers_of_every_type_are_their_text(toy, tmp_path):
    label = ClassLabel(names=["cat", "dog"])
    columns = {
        "day": (Value("date32"), datetime.date(2024, 1, 5), "2024-01-05"),
        "moment": (Value("timestamp[s]"), datetime.datetime(2024, 1, 5, 10), "2024-01-05 10:00:00"),
        "midnight": (Value("timestamp[s]"), datetime.datetime(2024, 1, 5), "2024-01-05"),
        "time": (Value("time64[us]"), datetime.time(9, 30), "09:30:00"),
        "price": (Value("decimal128(5, 2)"), Decimal("1.50"), "1.50"),
        "label": (label, 1, "dog"),
        "half": (Value("float16"), 1.1, "1.1"),
        "single": (Value("float32"), 1 / 4096, "0.00024414062"),
        "double": (Value("float64"), 1 / 4096, "0.000244140625"),
        "whole": (Value("float32"), 30.0, "30"),
    }
    features = {name: kind for name, (kind, _, _) in columns.items()} | {"none": label, "frage": Value("int8")}
    rows = {name: [value] for name, (_, value, _) in columns.items()} | {"none": [-1], "frage": [7]}
    path = tmp_path / "d.parquet"
    Dataset.from_dict(rows, Features(features)).to_parquet(path)
    for name, (_, _, text) in columns.items():
        assert data_of(toy, path, answer_column=name, problem_column="frage").row(0) == ("7", [], text)
    with pytest.raises(UserError, match="row 0 has no answer"):
        data_of(toy, path, answer_column="none", problem_column="frage")
    path = rows_file(tmp_path, [{"question": "a", "answer": "2024-01-05"}])
    assert data_of(toy, path).row(0)[2] == "2024-01-05"


TYPE_CHANGES = b'{"question": "a", "answer": 1}\n' * 400_000 + b'{"question": "b", "answer": "A"}'  # behind 10 MB


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b'{"question": "a", "answer": "1"}\n{"question": "b", \n', "d.jsonl cannot be opened .JSON parse error"),
        (b"", "d.jsonl must hold rows: one object a line"),
        (b"null", "d.jsonl must hold rows"),
        ('{"question": "\u00e9", "answer": "1"}\n'.encode("latin-1"), "row 0 .*utf-8"),
        (TYPE_CHANGES, "d.jsonl cannot be opened"),
    ],
)
def test_a_file_that_is_no_json(toy, tmp_path, content, sentence):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        data_of(toy, tmp_path / "d.jsonl")


def test_unknown_data_and_no_network(toy, tmp_path, no_waiting):
    with pytest.raises(UserError, match="data nobody/nothing cannot be opened .*local folder"):
        data_of(toy, "nobody/nothing")
    (tmp_path / "notes.txt").write_text("hello")
    for name in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(UserError, match="must be a parquet, json or jsonl file"):
            data_of(toy, name)


def test_files_of_a_folder_are_of_the_split_that_their_names_say(toy, tmp_path):
    for name, count in (("train-00000", 3), ("train-00001", 2), ("test-00000", 4), ("validation-00000", 1)):
        rows_file(tmp_path / "data", numbered(count), f"{name}.jsonl")
    lengths = {"train": 5, "test": 4, "validation": 1, "val": 1, "dev": 1}
    assert {split: len(data_of(toy, tmp_path, split)) for split in lengths} == lengths
    with pytest.raises(UserError, match="has no split final; it has test, train, validation: name one with --data_sp"):
        data_of(toy, tmp_path, "final")
    assert len(data_of(toy, tmp_path).for_evaluation()) == 4
    (tmp_path / "data/test-00000.jsonl").unlink()
    data = data_of(toy, tmp_path)
    with pytest.raises(UserError, match="has no split test; it has train, validation"):
        data.for_evaluation()  # no rows of another
    assert len(data_of(toy, tmp_path, eval_split="val").for_evaluation()) == 1 and len(data) == 5
    (tmp_path / "a.json").write_text(json.dumps(numbered(3)))
    assert len(data_of(toy, tmp_path / "a.json")) == 3
    for i in range(2):
        Dataset.from_list(numbered(2)).to_parquet(tmp_path / f"parquet/{i}.parquet")
    assert len(data_of(toy, tmp_path / "parquet")) == 4


def test_what_is_hidden_in_a_folder_is_no_data(toy, tmp_path):
    for name, count in (("train.jsonl", 1), (".train-old.jsonl", 2), (".cache/train-copy.jsonl", 3)):
        rows_file(tmp_path, numbered(count), name)
    assert len(data_of(toy, tmp_path)) == 1
    assert len(data_of(toy, tmp_path / ".train-old.jsonl")) == 2  # named, it is


def test_the_name_of_a_file_is_no_pattern(toy, tmp_path):
    for name, count in (("train[1]", 1), ("train1", 2), ("q?", 3), ("qu", 4)):
        rows_file(tmp_path, numbered(count), f"{name}.jsonl")
    assert [len(data_of(toy, tmp_path / f"{name}.jsonl")) for name in ("train[1]", "q?")] == [1, 3]


def test_a_file_that_is_written_again_with_its_old_time_is_read_again(toy, tmp_path):
    path = rows_file(tmp_path, [{"question": "1?", "answer": "1"}])
    before, stat = data_of(toy, path).contents, path.stat()
    rows_file(tmp_path, [{"question": "2?", "answer": "2"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data_of(toy, path).contents != before and data_of(toy, path).prompt(0).answer == "2"


def test_images_are_relative_to_the_file_also_in_a_folder(toy, tmp_path):
    for folder, size in (("data/train", 56), ("data", 84), ("data/more", 112)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size)).save(tmp_path / folder / "a.png")
    rows_file(tmp_path, [image_row()], "data/train/train.jsonl")
    assert data_of(toy, tmp_path / "data").row(0)[1][0].size == (56, 56)
    (tmp_path / "data/train/a.png").unlink()  # then relative to the folder that was given
    assert data_of(toy, tmp_path / "data").row(0)[1][0].size == (84, 84)
    rows_file(tmp_path, [image_row()], "data/more/train-more.jsonl")  # of files of several folders too
    assert {data_of(toy, tmp_path / "data").row(i)[1][0].size for i in (0, 1)} == {(84, 84)}


def test_a_local_file_is_split_by_the_seed(toy, tmp_path):
    path = rows_file(tmp_path, numbered(57), "test-00000.jsonl")  # of a single split, whatever its name
    data, again, other, folder = (data_of(toy, x, seed=i) for i, x in ((0, path), (0, path), (1, path), (0, tmp_path)))
    held = data.for_evaluation()
    assert len(held) == 5 and len(data) == 52 and not set(held.indices) & set(data.indices)
    assert str(held).startswith("rows held out of test-00000.jsonl: 5 prompts, 0 dropped as too long, no column of im")
    assert folder.for_evaluation().indices == again.for_evaluation().indices == held.indices
    assert other.for_evaluation().indices != held.indices
    given = data_of(toy, path, eval_data=str(path))
    assert given.for_evaluation().indices == given.indices  # as asked for
    again.indices = list(range(6000))
    assert len(again.for_evaluation()) == 500 and len(again) == 5500
    few = data_of(toy, rows_file(tmp_path, numbered(9), "few.jsonl"))
    assert few.for_evaluation() is None and len(few) == 9
