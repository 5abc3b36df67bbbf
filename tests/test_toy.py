"""The embedded worlds are what toy/worlds.py and toy/make.py say they are."""

import random
import re
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from datasets import load_dataset
from helpers import ROOT
from safetensors import safe_open

sys.path.insert(0, str(ROOT / "toy"))
import arm  # noqa: E402
import make  # noqa: E402
import worlds  # noqa: E402
from worlds import WORLDS, conclude  # noqa: E402

from common import format_reward, load_model, load_processor
from plumbing.answers import Checker, extract_answer
from plumbing.arguments import EMBEDDED
from toy.kinds import kinds_of, reads

EACH = pytest.mark.parametrize("name", [*WORLDS])


def puzzles(name, count=210):
    return list(WORLDS[name].puzzles("test of the test", count))


def said(made, name, numbers=None, seed=0):
    """A response to a puzzle that reads these numbers, the right ones if none are given."""
    return made.response(made.counts if numbers is None else numbers, random.Random(seed), WORLDS[name].words)


@EACH
def test_size_and_classes(name):
    model, processor = load_model(EMBEDDED[name] / "model"), load_processor(EMBEDDED[name] / "model")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert 200 < len(processor.tokenizer) < 600


def test_all_committed_files_are_small():
    files = [f for f in (ROOT / "toy").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 12e6


@EACH
def test_tables_are_in_the_schema_of_geometry3k_and_come_from_the_seed(name):
    world = WORLDS[name]
    for split, count in (("train", world.train), ("test", world.test)):
        table = load_dataset("parquet", data_files=str(EMBEDDED[name] / f"{split}.parquet"), split="train")
        assert table.column_names == ["images", "problem", "answer", "family", "reads"] and len(table) == count
        for row, made in zip(table, world.puzzles(f"0 {split}", 60)):
            assert (row["problem"], row["answer"]) == (made.problem, conclude(made.family, made.counts))
            assert (row["family"], row["reads"]) == (made.family, made.counts)
            assert [p.tobytes() for p in row["images"]] == [p.tobytes() for p in made.images]


@EACH
def test_no_image_is_in_both_tables(name):
    world = WORLDS[name]
    images = [
        {made.images[0].tobytes() for made in world.puzzles(f"0 {split}", count) if made.images}
        for split, count in (("train", world.train), ("test", world.test))
    ]
    assert not images[0] & images[1]


@EACH
def test_right_counts_give_the_right_answer_in_the_right_format(name):
    checker = Checker()
    for made in puzzles(name):
        text = said(made, name)
        assert checker(text, conclude(made.family, made.counts)) and format_reward(text) == 1.0
        assert made.problem.count("<image>") == len(made.scenes)
    checker.close()


def test_hand_examples_of_conclusions():
    cases = {
        ("count", (3,)): "3",
        ("sum", (2, 1)): "3",
        ("sum", (2, 1, 4)): "7",
        ("pictures", (1, 2)): "3",
        ("text", (4, 4, 1)): "9",
        ("difference", (2, 3)): "-1",
        ("difference", (2, 3, 4)): "1",
        ("compare", (2, 2)): "no",
        ("compare", (1, 2, 2)): "yes",
        ("choice", (1, 3, 2)): "B",
        ("list", (1, 0, 2)): "102",
        ("list of two", (0, 1, 2, 3)): "0123",
    }
    assert all(conclude(family, list(numbers)) == answer for (family, numbers), answer in cases.items())


@EACH
def test_what_a_response_reads_is_read_back(name):
    """Also of wrong reads; perception and reasoning are judged apart."""
    rng = random.Random(1)
    for i, made in enumerate(puzzles(name)):
        wrong = [max(0, n + rng.choice([-1, 1])) for n in made.counts]
        for numbers in (made.counts, wrong):
            text = said(made, name, numbers, i)
            assert reads(text) == numbers
            assert arm.judged(text, made.family, made.counts) == (numbers == made.counts, True)
        off = re.sub(r"boxed\{.*\}", "boxed{17}", said(made, name))
        assert arm.judged(off, made.family, made.counts) == (True, False)
        assert arm.judged("I count nothing.", made.family, made.counts) == (False, False)


@EACH
def test_labels_of_tokens_on_real_responses(name):
    """As many reads as numbers were read, one token each; what is derived is said after the reads."""
    tokenizer = load_processor(EMBEDDED[name] / "model").tokenizer
    for i, made in enumerate(puzzles(name)):
        ids = tokenizer(said(made, name, seed=i)).input_ids
        tokens = [tokenizer.decode([token]) for token in ids]
        kinds = kinds_of(tokens)
        found = [token.strip() for token, kind in zip(tokens, kinds) if kind == "read"]
        assert [worlds.NUMBERS.index(t) if t in worlds.NUMBERS else int(t) for t in found] == made.counts
        derived = [i for i, kind in enumerate(kinds) if kind == "derived"]
        assert derived[0] > max(i for i, kind in enumerate(kinds) if kind == "read")
        assert kinds.count("words") > len(tokens) / 2


def test_labels_by_hand():
    tokens = [
        "<think",
        ">",
        "Well",
        ",",
        " I",
        " see",
        " two",
        " red",
        " and",
        " one",
        " circles",
        ".",
        " Then",
        " six",
    ]
    tokens += [
        " green",
        ".",
        " Thus",
        " the",
        " most",
        " are",
        " green",
        ".</",
        "think",
        ">",
        " \\",
        "boxed",
        "{",
        "C",
        "}",
    ]
    named = {i: kind for i, kind in enumerate(kinds_of(tokens)) if kind != "words"}
    assert named == {6: "read", 9: "read", 13: "read", 20: "derived", 27: "derived"}
    tokens = ["I count", " ", "1", "2", " red", ".</", "think", "> \\boxed{", "12", "}"]  # no So: the box concludes
    named = {i: kind for i, kind in enumerate(kinds_of(tokens)) if kind != "words"}
    assert named == {2: "read", 3: "read", 8: "derived"}
    assert kinds_of(["one", "tw", "o"]) == ["words"] * 3  # "onetwo" is no number
    assert kinds_of([" I", " tw", "o"]) == ["words", "read", "read"]  # all tokens of a word
    assert kinds_of([]) == [] and reads("") == []


def test_plain_images_by_counting_pixels():
    """The image shows what the counts say: cells are counted again from the pixels, by their colour."""
    rng = random.Random(3)
    for _ in range(30):
        scene = worlds.draw_scene(rng)
        image = worlds.paint_plain(scene)
        for i, cell in enumerate(scene.cells):
            x, y = (i % scene.columns) * worlds.CELL, (i // scene.columns) * worlds.CELL
            colours = image.crop((x, y, x + worlds.CELL, y + worlds.CELL)).getcolors()
            assert len(colours) == (1 if cell is None else 2)
            if cell:
                drawn = next(colour for _, colour in colours if len(set(colour)) > 1)  # the background is grey
                near = min(worlds.COLOURS, key=lambda c: sum(abs(a - b) for a, b in zip(worlds.COLOURS[c], drawn)))
                assert near == cell[0]
        assert scene.things == [cell[:2] for cell in scene.cells if cell]


def test_faint_images_show_the_same_scene():
    """Where contrast is high, the mean colour of what a cell holds leans to its hue; blocks are flat."""
    rng, right, total = random.Random(3), 0, 0
    for _ in range(60):
        scene = worlds.draw_scene(rng, 0.65, 1.0)
        image = worlds.paint_faint(scene, rng, easy=60)
        pixels = torch.from_numpy(numpy.array(image)).float()  # (H, W, 3)
        blocks = pixels.unfold(0, 4, 4).unfold(1, 4, 4)  # (rows, columns, 3, 4, 4)
        assert (blocks == blocks[..., :1, :1]).all() and ((pixels % 4 == 0) | (pixels == 255)).all()
        for i, cell in enumerate(scene.cells):
            if cell:
                colour, _, x, y, size, _ = cell
                top, left = i // scene.columns * worlds.CELL, i % scene.columns * worlds.CELL
                inner = pixels[
                    top + y + size // 2 : top + y + size - 2, left + x + size // 3 : left + x + size - size // 3
                ]
                lean = inner.mean((0, 1)) - inner.mean()
                hues = {name: torch.tensor(hue) - sum(hue) / 3 for name, hue in worlds.HUES.items()}
                near = max(hues, key=lambda name: torch.cosine_similarity(lean, hues[name], dim=0))
                right, total = right + (near == colour), total + 1
    assert right / total > 0.9


@EACH
def test_families_differ_in_what_they_ask(name):
    world = WORLDS[name]
    answers = {family: set() for family in world.families}
    for made in puzzles(name):
        answers[made.family].add(conclude(made.family, made.counts))
    numbers = answers.get("sum", answers["difference"])
    assert answers["compare"] == {"yes", "no"} and len(numbers) > 4
    assert answers.get("choice", set("ABC")) == set("ABC")
    assert all(len(answer) == 3 for answer in answers.get("list", ()))
    assert all(extract_answer(f"\\boxed{{{a}}}") == a for a in numbers)
    sizes = {image.size for made in puzzles(name) for image in made.images}
    assert len(sizes) == len(worlds.GRIDS)


def test_the_faint_world_reads_three_times_and_more_and_late():
    """Three or four reads; the last one in the middle of the response or later."""
    tokenizer, places = load_processor(EMBEDDED["toy-faint"] / "model").tokenizer, []
    for i, made in enumerate(puzzles("toy-faint")):
        assert len(made.counts) == (4 if made.family == "list of two" else 3) and sum(made.counts) <= 9
        kinds = kinds_of([tokenizer.decode([t]) for t in tokenizer(said(made, "toy-faint", seed=i)).input_ids])
        places.append((len(kinds) - 1 - kinds[::-1].index("read")) / len(kinds))
    assert sum(places) / len(places) > 0.4


def test_the_teacher_who_miscounts():
    teacher, off = make.miscount(random.Random(0), 0.5), []
    for _ in range(4000):
        off += [b - a for a, b in zip([3, 4], teacher([3, 4]))]
    assert set(off) == {-1, 0, 1} and abs(off.count(0) / 8000 - 0.5) < 0.02
    assert make.miscount(random.Random(0), 0.0)([1, 2]) == [1, 2] and min(teacher([0] * 100)) == 0


@EACH
def test_make_builds_a_model_that_loads(name, tmp_path, monkeypatch):
    """And the tables, to the same bytes."""
    flags = ["--see_steps", "1", "--answer_steps", "1", "--doubt_steps", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["make.py", "--world", name, *flags])
    make.main()

    model, processor = load_model(tmp_path / "model"), load_processor(tmp_path / "model")
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size
    for file in ("train.parquet", "test.parquet", "model/tokenizer.json"):
        assert (tmp_path / file).read_bytes() == (EMBEDDED[name] / file).read_bytes(), file
    assert torch.isfinite(next(model.parameters())).all()
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.float32 if name == "toy" else torch.bfloat16}


def test_the_faint_model_begins_with_the_toys_weights():
    """Number words with the digits' embeddings, shared tokens with their own, and all other tensors."""
    bold, old = load_model(EMBEDDED["toy"] / "model"), load_processor(EMBEDDED["toy"] / "model")
    processor = load_processor(EMBEDDED["toy-faint"] / "model")
    torch.manual_seed(0)
    model = make.make_model(processor.tokenizer)
    make.begin_with(model, processor, bold, old)
    new, known = processor.tokenizer.get_vocab(), old.tokenizer.get_vocab()
    embeddings = {"new": model.get_input_embeddings().weight, "old": bold.get_input_embeddings().weight}
    for token, same in ((".", "."), ("\u0120red", "\u0120red"), ("\u0120two", "2"), ("\u0120nine", "9")):
        assert torch.equal(embeddings["new"][new[token]], embeddings["old"][known[same]])
    assert torch.equal(model.model.visual.merger.mlp[0].weight, bold.model.visual.merger.mlp[0].weight)
    assert model.lm_head.weight.data_ptr() == embeddings["new"].data_ptr()


def test_the_oracle_has_a_loss_on_reads_alone(tmp_path, monkeypatch):
    """Through a real run: its masks, its denominator, and what it logs."""
    from helpers import main_of, read_metrics

    seen, alike = [], []

    class Seen(arm.WorldRun):
        oracle = True

        def denominator(self, minibatch):
            found = super().denominator(minibatch)
            assert found == sum(int(row.loss_mask.sum()) for row in minibatch) > 0
            alike.extend(row for row in minibatch if row.zero_advantage)
            for row in minibatch:
                for response, valid, counted in zip(row.responses, row.mask, row.loss_mask):
                    tokens = [self.tokenizer.decode([t]) for t in response[valid].tolist()]
                    assert [k == "read" for k in kinds_of(tokens)] == counted[valid].tolist()
                    assert not counted[~valid].any()
                    seen.append(int(counted.sum()))
            return found

    import grpo

    monkeypatch.setattr(grpo, "Trainer", Seen)
    flags = ["--model", "toy-faint", "--steps", 1, "--prompts_per_step", 8, "--group_size", 4, "--eval_rows", 0]
    main_of("grpo", tmp_path / "run", [*flags, "--show_every", 0])
    (line,) = read_metrics(tmp_path / "run")
    assert max(seen) <= 5 and sum(seen) > 0 and line["grad_norm"] > 0
    assert alike  # groups of equal rewards, whose reads count in the denominator
    assert 0 < line["perception"] < 1 and 0.5 < line["reasoning"] <= 1


def test_of_saei_the_clean_half_is_judged():
    """Two right responses to the clean image, two wrong ones to the attacked one; a prompt without one counts not."""
    added = []
    texts = ["<think>I see two red. So two.</think> \\boxed{2}"] * 2 + [
        "<think>I see one red. So one.</think> \\boxed{1}"
    ] * 2
    group = SimpleNamespace(prompt=SimpleNamespace(pixel_values=0, index=1), texts=texts)
    text_only = SimpleNamespace(prompt=SimpleNamespace(pixel_values=None), texts=texts)
    truth = [None, {"family": "list", "reads": [2]}]
    for n1, right in ((2, [True] * 2), (None, [True, True, False, False])):
        args = SimpleNamespace(n1=n1) if n1 else SimpleNamespace()
        metrics = SimpleNamespace(add=lambda name, value, weight: added.append((name, value)))
        known = SimpleNamespace(args=args, truth=truth, metrics=metrics)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arm, "super", lambda: SimpleNamespace(keep_groups=lambda *_: None), raising=False)
            arm.WorldRun.keep_groups(known, [], [group, text_only])
        assert [value for name, value in added if name == "perception"] == right
        assert all(value for name, value in added if name == "reasoning")
        added.clear()


def test_arms_that_do_not_exist_get_a_sentence(monkeypatch, capsys):
    for argv, sentence in (
        ([], "'' is no arm"),
        (["mine.py"], "'mine.py' is no arm: name one of the six scripts"),
        (["/mine/vepo.py"], "'/mine/vepo.py' is no arm"),  # another one than the repository's
    ):
        monkeypatch.setattr(sys, "argv", ["arm.py", *argv])
        with pytest.raises(SystemExit) as error:
            arm.main()
        assert error.value.code == 2 and sentence in capsys.readouterr().err
