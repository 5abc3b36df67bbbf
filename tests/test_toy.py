"""The embedded toy is what toy/make.py says it is."""

import random
import sys

import pytest
import torch
from datasets import load_dataset
from helpers import ROOT

sys.path.insert(0, str(ROOT / "toy"))
import make  # noqa: E402

from common import format_reward, load_model, load_processor
from plumbing.answers import Checker, extract_answer


@pytest.fixture(scope="module")
def puzzles():
    return list(make.rows("test of the test", 210))


def test_size_and_classes(toy):
    model, processor = toy
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert 200 < len(processor.tokenizer) < 600
    files = [f for f in (ROOT / "toy").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 10e6


def test_tables_are_in_the_schema_of_geometry3k_and_come_from_the_seed():
    for split, count in (("train", 2002), ("test", 504)):
        table = load_dataset("parquet", data_files=str(ROOT / "toy" / f"{split}.parquet"), split="train")
        assert table.column_names == ["images", "problem", "answer"] and len(table) == count
        for i, made in zip(range(60), make.rows(f"0 {split}", 60)):
            row = table[i]
            assert (row["problem"], row["answer"]) == (made["problem"], made["answer"])
            assert [p.tobytes() for p in row["images"]] == [p.tobytes() for p in made["images"]]


def test_no_picture_is_in_both_tables():
    pictures = [
        {row["images"][0].tobytes() for row in make.rows(f"0 {split}", count) if row["images"]}
        for split, count in (("train", 2002), ("test", 504))
    ]
    assert not pictures[0] & pictures[1]


def test_right_counts_give_the_right_answer_in_the_right_format(puzzles):
    checker = Checker()
    for made in puzzles:
        text = make.response(*made["solve"](*made["counts"]))
        assert checker(text, made["answer"]) and format_reward(text) == 1.0
        assert made["problem"].count("<image>") == len(made["images"])
    wrong = [make.response(*made["solve"](*[n + 1 for n in made["counts"]])) for made in puzzles[::7]]  # "count"
    assert not any(checker(text, made["answer"]) for text, made in zip(wrong, puzzles[::7]))
    checker.close()


def test_answers_by_counting_pixels():
    """The picture shows what the counts say: cells are counted again from the pixels, by their colour."""
    rng = random.Random(3)
    for _ in range(30):
        picture, things, cells = make.draw_scene(rng)
        columns = picture.width // make.CELL
        for i, cell in enumerate(cells):
            x, y = (i % columns) * make.CELL, (i // columns) * make.CELL
            colours = picture.crop((x, y, x + make.CELL, y + make.CELL)).getcolors()
            assert len(colours) == (1 if cell is None else 2)
            if cell:
                drawn = next(colour for _, colour in colours if len(set(colour)) > 1)  # the background is grey
                near = min(make.COLOURS, key=lambda c: sum(abs(a - b) for a, b in zip(make.COLOURS[c], drawn)))
                assert near == cell[0]
        assert things == [cell for cell in cells if cell]


def test_families_differ_in_what_they_ask(puzzles):
    answers = {family: {m["answer"] for m in puzzles[i::7]} for i, family in enumerate(make.FAMILIES)}
    assert answers["compare"] == {"yes", "no"} and answers["choice"] == {"A", "B", "C"}
    assert len(answers["sum"]) > 4 and all(extract_answer(f"\\boxed{{{a}}}") == a for a in answers["sum"])
    sizes = {picture.size for made in puzzles for picture in made["images"]}
    assert len(sizes) == len(make.GRIDS)


def test_the_teacher_who_miscounts():
    teacher, off = make.miscount(random.Random(0), 0.5), []
    for _ in range(4000):
        off += [b - a for a, b in zip([3, 4], teacher([3, 4]))]
    assert set(off) == {-1, 0, 1} and abs(off.count(0) / 8000 - 0.5) < 0.02
    assert make.miscount(random.Random(0), 0.0)([1, 2]) == [1, 2] and min(teacher([0] * 100)) == 0


def test_make_builds_a_model_that_loads(tmp_path, monkeypatch):
    flags = ["--see_steps", "1", "--answer_steps", "1", "--doubt_steps", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["make.py", *flags])
    make.main()

    model, processor = load_model(tmp_path / "model"), load_processor(tmp_path / "model")
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size
    assert (tmp_path / "train.parquet").read_bytes() == (ROOT / "toy" / "train.parquet").read_bytes()
    assert torch.isfinite(next(model.parameters())).all()
