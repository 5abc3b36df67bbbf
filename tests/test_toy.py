"""The built-in toy tasks: puzzles, images, tables and models are what toy/puzzles.py and toy/make.py promise."""

import random
import re
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from datasets import load_dataset
from helpers import ROOT, main_of, read_metrics
from safetensors import safe_open

sys.path.insert(0, str(ROOT / "toy"))
import make  # noqa: E402
import puzzles  # noqa: E402
import variant  # noqa: E402
from puzzles import TOY_TASKS, conclude  # noqa: E402

import grpo
from common import format_reward, load_model, load_processor
from plumbing.answers import Checker
from plumbing.arguments import EMBEDDED
from toy.kinds import NUMBERS, kinds_of, reads

EACH = pytest.mark.parametrize("name", [*TOY_TASKS])


def some_puzzles(name):
    return list(TOY_TASKS[name].puzzles("test of the test", 210))


def response(puzzle, name, numbers=None, seed=0):
    """A response to a puzzle that reads these numbers, the right ones if none are given."""
    return puzzle.response(numbers or puzzle.counts, random.Random(seed), TOY_TASKS[name].words)


def test_committed_files_are_small():
    files = [f for f in (ROOT / "toy").rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 12.5e6


def test_conclusions_by_hand():
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
def test_a_response_says_what_it_reads(name):
    """Right counts give the right answer in the right format; wrong ones are read back, and the rest follows."""
    rng, checker, answers = random.Random(1), Checker(), {}
    for i, puzzle in enumerate(some_puzzles(name)):
        answer = conclude(puzzle.family, puzzle.counts)
        answers.setdefault(puzzle.family, set()).add(answer)
        assert puzzle.problem.count("<image>") == len(puzzle.scenes)
        assert checker(response(puzzle, name), answer) and format_reward(response(puzzle, name)) == 1.0
        wrong = [max(0, n + rng.choice([-1, 1])) for n in puzzle.counts]
        for numbers in (puzzle.counts, wrong):
            text = response(puzzle, name, numbers, i)
            assert reads(text) == numbers
            assert variant.assess(text, puzzle.family, puzzle.counts) == (numbers == puzzle.counts, True)
        other_answer = re.sub(r"boxed\{.*\}", "boxed{17}", response(puzzle, name))
        assert variant.assess(other_answer, puzzle.family, puzzle.counts) == (True, False)
        assert variant.assess("I count nothing.", puzzle.family, puzzle.counts) == (False, False)
    checker.close()
    assert answers.keys() == set(TOY_TASKS[name].families)
    assert answers["compare"] == {"yes", "no"} and len(answers["difference"]) > 3
    assert answers.get("choice", set("ABC")) == set("ABC")


@EACH
def test_kinds_of_tokens_on_real_responses(name):
    """Each count is one perception token; derived values come after them; on toy-faint the last count comes late."""
    tokenizer, places = load_processor(EMBEDDED[name] / "model").tokenizer, []
    for i, puzzle in enumerate(some_puzzles(name)):
        tokens = [tokenizer.decode([token]) for token in tokenizer(response(puzzle, name, seed=i)).input_ids]
        kinds = kinds_of(tokens)
        found = [token.strip() for token, kind in zip(tokens, kinds) if kind == "read"]
        assert [NUMBERS.index(t) if t in NUMBERS else int(t) for t in found] == puzzle.counts
        last = max(i for i, kind in enumerate(kinds) if kind == "read")
        assert kinds.index("derived") > last
        assert kinds.count("words") > len(tokens) / 2
        places.append(last / len(kinds))
        if name == "toy-faint":
            assert len(puzzle.counts) == (4 if puzzle.family == "list of two" else 3) and sum(puzzle.counts) <= 9
    assert name == "toy" or sum(places) / len(places) > 0.4


def test_labels_by_hand():
    text = "<think|>|Well|,| I| see| two| red| and| one| circles|.| Then| six| green|.| Thus| the| most| are| green"
    tokens = (text + "|.</|think|>| \\\\|boxed|{|C|}").split("|")
    named = {i: kind for i, kind in enumerate(kinds_of(tokens)) if kind != "words"}
    assert named == {6: "read", 9: "read", 13: "read", 20: "derived", 27: "derived"}
    tokens = ["I count", " ", "1", "2", " red", ".</", "think", "> \\boxed{", "12", "}"]  # no So: the box concludes
    named = {i: kind for i, kind in enumerate(kinds_of(tokens)) if kind != "words"}
    assert named == {2: "read", 3: "read", 8: "derived"}
    assert kinds_of(["one", "tw", "o"]) == ["words"] * 3  # "onetwo" is no number
    assert kinds_of([" I", " tw", "o"]) == ["words", "read", "read"]  # all tokens of a word
    assert kinds_of([]) == [] and reads("") == []


def test_plain_images_by_counting_pixels():
    """Each cell has the colour that the scene says, and an empty cell has none."""
    rng = random.Random(3)
    for _ in range(30):
        scene = puzzles.draw_scene(rng)
        image = puzzles.paint_plain(scene)
        for i, cell in enumerate(scene.cells):
            x, y = (i % scene.columns) * puzzles.CELL, (i // scene.columns) * puzzles.CELL
            colours = image.crop((x, y, x + puzzles.CELL, y + puzzles.CELL)).getcolors()
            assert len(colours) == (1 if cell is None else 2)
            if cell:
                drawn = next(colour for _, colour in colours if len(set(colour)) > 1)  # the background is grey
                near = min(puzzles.COLOURS, key=lambda c: sum(abs(a - b) for a, b in zip(puzzles.COLOURS[c], drawn)))
                assert near == cell[0]


def test_faint_images_show_the_same_scene():
    """Where contrast is high, the mean colour of a shape is nearest to its hue; blocks have one colour."""
    rng, right, total = random.Random(3), 0, 0
    for _ in range(60):
        scene = puzzles.draw_scene(rng, 0.65, 1.0)
        image = puzzles.paint_faint(scene, rng, easy=60)
        pixels = torch.from_numpy(numpy.array(image)).float()  # (H, W, 3)
        blocks = pixels.unfold(0, 4, 4).unfold(1, 4, 4)  # (rows, columns, 3, 4, 4)
        assert (blocks == blocks[..., :1, :1]).all() and ((pixels % 4 == 0) | (pixels == 255)).all()
        for i, cell in enumerate(scene.cells):
            if cell:
                colour, _, x, y, size, _ = cell
                top, left = i // scene.columns * puzzles.CELL, i % scene.columns * puzzles.CELL
                inner = pixels[
                    top + y + size // 2 : top + y + size - 2, left + x + size // 3 : left + x + size - size // 3
                ]
                lean = inner.mean((0, 1)) - inner.mean()
                hues = {name: torch.tensor(hue) - sum(hue) / 3 for name, hue in puzzles.HUES.items()}
                near = max(hues, key=lambda name: torch.cosine_similarity(lean, hues[name], dim=0))
                right, total = right + (near == colour), total + 1
    assert right / total > 0.9


def test_the_teacher_who_miscounts():
    teacher, off = make.miscount(random.Random(0), 0.5), []
    for _ in range(4000):
        off += [b - a for a, b in zip([3, 4], teacher([3, 4]))]
    assert set(off) == {-1, 0, 1} and abs(off.count(0) / 8000 - 0.5) < 0.02
    assert make.miscount(random.Random(0), 0.0)([1, 2]) == [1, 2] and min(teacher([0] * 100)) == 0


@EACH
def test_make_builds_the_committed_tables_and_a_model_that_loads(name, tmp_path, monkeypatch):
    monkeypatch.setitem(make.STEPS, name, (1, 1, 1))
    monkeypatch.setattr(sys, "argv", ["make.py", "--toy", name, "--output", str(tmp_path)])
    make.main()

    files = ["train.parquet", "test.parquet", "model/tokenizer.json", "model/config.json"]
    files += ["model/chat_template.jinja", "model/processor_config.json", "model/generation_config.json"]
    for file in files:
        assert (tmp_path / file).read_bytes() == (EMBEDDED[name] / file).read_bytes(), file
    tables = [load_dataset("parquet", data_files=str(tmp_path / f), split="train") for f in files[:2]]
    assert tables[0].column_names == ["images", "problem", "answer", "family", "reads"]
    train, test = ({row["images"][0].tobytes() for row in table if row["images"]} for table in tables)
    assert not train & test

    model, processor = load_model(tmp_path / "model"), load_processor(tmp_path / "model")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert 200 < len(processor.tokenizer) <= model.config.text_config.vocab_size
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.float32 if name == "toy" else torch.bfloat16}


def test_the_faint_model_starts_from_the_weights_of_toy():
    """Number words with the digits' embeddings, shared tokens with their own, and all other tensors."""
    bold, old = load_model(EMBEDDED["toy"] / "model"), load_processor(EMBEDDED["toy"] / "model")
    processor = load_processor(EMBEDDED["toy-faint"] / "model")
    torch.manual_seed(0)
    model = make.make_model(processor.tokenizer)
    make.start_from(model, processor, bold, old)
    new, known = processor.tokenizer.get_vocab(), old.tokenizer.get_vocab()
    embeddings = {"new": model.get_input_embeddings().weight, "old": bold.get_input_embeddings().weight}
    for token, same in ((".", "."), ("\u0120red", "\u0120red"), ("\u0120two", "2"), ("\u0120nine", "9")):
        assert torch.equal(embeddings["new"][new[token]], embeddings["old"][known[same]])
    assert torch.equal(model.model.visual.merger.mlp[0].weight, bold.model.visual.merger.mlp[0].weight)
    assert model.lm_head.weight.data_ptr() == embeddings["new"].data_ptr()


def test_the_oracle_trains_only_on_perception_tokens(tmp_path, monkeypatch):
    """In a real run: its masks, its denominator, and its metrics."""
    rows = []

    class Checked(variant.ToyTrainer):
        oracle = True

        def denominator(self, minibatch):
            total = super().denominator(minibatch)
            assert total == sum(int(row.loss_mask.sum()) for row in minibatch) > 0
            for row in minibatch:
                for response, valid, counted in zip(row.responses, row.mask, row.loss_mask):
                    tokens = [self.tokenizer.decode([t]) for t in response[valid].tolist()]
                    assert [kind == "read" for kind in kinds_of(tokens)] == counted[valid].tolist()
                    assert not counted[~valid].any()
            rows.extend(minibatch)
            return total

    monkeypatch.setattr(grpo, "Trainer", Checked)
    flags = ["--model", "toy-faint", "--steps", 1, "--prompts_per_step", 8, "--group_size", 4, "--eval_rows", 0]
    main_of("grpo", tmp_path / "run", [*flags, "--show_every", 0])
    (line,) = read_metrics(tmp_path / "run")
    assert line["grad_norm"] > 0 and 0 < line["perception"] < 1 and 0.5 < line["reasoning"] <= 1
    assert any(row.zero_advantage for row in rows)  # groups with equal rewards count in the denominator


def test_of_saei_only_the_clean_half_is_assessed(monkeypatch):
    """Two right responses to the clean image, two wrong ones to the attacked one; a prompt without image: none."""
    right, wrong = (f"<think>I see {n} red. So {n}.</think> \\boxed{{{i}}}" for i, n in ((2, "two"), (1, "one")))
    texts = [right, right, wrong, wrong]
    group = SimpleNamespace(prompt=SimpleNamespace(pixel_values=0, index=1), texts=texts)
    text_only = SimpleNamespace(prompt=SimpleNamespace(pixel_values=None), texts=texts)
    data = SimpleNamespace(rows=[None, {"family": "list", "reads": [2]}])
    monkeypatch.setattr(variant.trainer.Trainer, "keep_groups", lambda *_: None)
    for args, expected in ((SimpleNamespace(n1=2), [True, True]), (SimpleNamespace(), [True, True, False, False])):
        added = {"perception": [], "reasoning": []}
        run = variant.ToyTrainer.__new__(variant.ToyTrainer)
        run.args, run.data = args, data
        run.metrics = SimpleNamespace(add=lambda name, value, weight, added=added: added[name].append(value))
        run.keep_groups([], [group, text_only])
        assert added == {"perception": expected, "reasoning": [True] * len(expected)}
