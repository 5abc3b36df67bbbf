"""eval.py: rows of each benchmark with the hub's columns, verdicts, scores, processes, resume and comparison."""

import dataclasses
import json
import math
import shutil
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
from helpers import train
from PIL import Image
from safetensors.torch import load_file, save_file

import eval as evaluation
from common import load_model
from eval import BENCHMARKS, Args, Question, Questions, choose, compare, judge, place_images, scores
from plumbing.answers import Checker
from plumbing.arguments import EMBEDDED, INSTRUCTION, TOY, SharedArgs, UserError
from plumbing.checkpoints import State
from plumbing.data import Data, load_rows

IMAGE = Image.new("RGB", (56, 56), "red")
TABLES = {  # benchmark: the hub's columns; rows, and after the last column a right answer in \boxed{}
    "geometry3k": ("images, problem, answer", ([IMAGE], "<image>Find x.", "2\\sqrt{3}", "\\sqrt{12}")),
    "mathvista": (
        "decoded_image, question, choices, unit, precision, answer, question_type, answer_type",
        (IMAGE, "Which colour?", ["blue", "red"], None, None, "red", "multi_choice", "text", "B"),
        (IMAGE, "How long?", None, "cm", 1.0, "2.4", "free_form", "float", "2.41"),
    ),
    "mathverse": (  # the question of every row of "Vision Only" is empty
        "image, question, answer, question_type, problem_version",
        (IMAGE, "Find it.\nChoices:\nA:1\nB:2", "B", "multi-choice", "Text Lite", "(B)"),
        (IMAGE, "Find it.", "5", "free-form", "Vision Only", "x=5"),
        (IMAGE, "", "C", "multi-choice", "Vision Only", "C"),
        (IMAGE, "", "7", "free-form", "Vision Only", "7"),
    ),
    "mathvision": (
        "decoded_image, question, options, answer",
        (IMAGE, "See <image1>. Which?", ["A", "B", "C", "D", "E"], "E", "E"),
        (IMAGE, "How many?\n<image1>", [], "7", "7"),
    ),
    "logicvista": ("image, question, answer", (IMAGE, "Which? A. a B. b C. c", "A, C", "C, A")),
    "mmmu_pro": (
        "question, options, answer, image_1, image_2, image_3, image_4, image_5, image_6, image_7",
        (
            *("Compare <image 2> with <image 1>.", "['like <image 1>', 'it\\'s \"far\"']", "B"),
            *(IMAGE, IMAGE, None, None, None, None, None, "B"),
        ),
    ),
    "mmmu_pro_vision": ("options, image, answer", ("['a', 'b', 'c']", IMAGE, "C", "C")),
    "hallusionbench": (
        "question, gt_answer, category, subcategory, set_id, figure_id, question_id, image",
        ("Is it red?", "1", "VD", "figure", "0", "0", "1", IMAGE, "yes, it is"),
        ("Is it red?", "0", "VD", "figure", "0", "1", "1", None, "No"),
    ),
    "wemath": (
        "question, option, answer, image_path",
        ("How much?", "A. 3 dm; B. 30; C. No correct answer", "B", IMAGE, "B. 30"),
    ),
    "dynamath": (
        "id, decoded_image, question, ground_truth, answer_type",
        ("7", IMAGE, "x?", "1.234", "float", "1.2349"),
        ("8", IMAGE, "Which? A: 1 B: 2", "A", "multiple choice", "A"),
    ),
    "puzzlevqa": (
        "image, question, options, answer",
        (IMAGE, "Which number?", [6, 3, 4], "4", "C"),
        (IMAGE, "Which number?", [6, 3, 4], "3", "3"),
    ),
    "algopuzzlevqa": ("image, question, options, answer", (IMAGE, "Is it? Yes or No.", ["Yes", "No"], "No", "no")),
    "clevr_count": ("images, problem, answer", ([IMAGE], "<image>How many?", "3", "3")),
    "mmk12": ("image, question, answer", (IMAGE, "<image>Which? A. 1 B. 2", "B", "\\text{(B)}")),
}
ROWS = {name: [dict(zip(columns.split(", "), values)) for values in rows] for name, (columns, *rows) in TABLES.items()}
assert {*TABLES, *EMBEDDED} == set(BENCHMARKS)


def write(path, rows):
    """The rows as parquet, images as the hub keeps them."""

    def feature(values):
        value = next((value for value in values if value is not None), None)
        if isinstance(value, Image.Image):
            return datasets.Image()
        if isinstance(value, list):
            return datasets.List(feature(value) if value else datasets.Value("string"))
        kinds = {int: "int64", float: "float64"}
        return datasets.Value(kinds.get(type(value), "string"))

    features = {name: feature([row[name] for row in rows]) for name in rows[0]}
    datasets.Dataset.from_list(rows, datasets.Features(features)).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def check():
    checker = Checker()
    yield checker
    checker.close()


def questions(name, path, toy):
    model, processor = toy
    return Questions(name, "train", Args(data=str(path), benchmarks=name), processor, model)


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_the_hubs_schema(name, toy, tmp_path, check):
    rows, answers = ROWS[name], [values[-1] for values in TABLES[name][1:]]
    data = questions(name, write(tmp_path / "rows.parquet", rows), toy)
    assert data.indices == list(range(len(rows)))
    for i, right in enumerate(answers):
        question, prompt = data.question(i), data.prompt(i)
        images = sum(value is IMAGE or value == [IMAGE] for value in rows[i].values())
        assert (0 if prompt.image_grid_thw is None else len(prompt.image_grid_thw)) == images
        assert judge(check, f"<think>so</think> \\boxed{{{right}}}", question), (question, right)
        for wrong in ("", "\\boxed{}", "\\boxed{Z}", "\\boxed{None}", right):
            assert not judge(check, wrong, question), wrong


@pytest.mark.parametrize("name", TABLES)
def test_a_row_without_question_or_gold_is_refused(name, toy, tmp_path):
    """None never becomes the word "None", nor a "no"."""
    row = ROWS[name][0]
    for what, columns in (("answer", ["answer", "gt_answer", "ground_truth"]), ("question", ["question", "problem"])):
        empty = {key: None for key in columns if key in row}  # none is left where the image holds the question
        path = write(tmp_path / f"{what}.parquet", [row, row | empty])
        if empty:
            with pytest.raises(UserError, match=f"1 of 2 rows left out .row 1 (has no {what}|is not in the schema)"):
                questions(name, path, toy)


@pytest.mark.parametrize(
    "name, row, why",
    [
        ("mathvista", ROWS["mmk12"][0], "KeyError.'question_type'"),
        ("wemath", ROWS["wemath"][0] | {"option": "3 dm"}, ".*its options have no labels"),
    ],
)
def test_a_row_of_another_schema_is_refused(name, row, why, toy, tmp_path):
    with pytest.raises(UserError, match=f"row 0 is not in the schema of --benchmarks {name} .{why}"):
        questions(name, write(tmp_path / "rows.parquet", [row]), toy)


WEMATH = {  # as some of the hub's rows have their options: strays, full-width points, separators that are missing
    "A. 3 dm; B. 30; C. No": ["3 dm", "30", "No"],
    "A. to point ;O.;B. to ;C.  ;C. No.; D. None": ["to point ;O.", "to ;C.", "No.", "None"],
    "A. 1;B．2;C. 3": ["1", "2", "3"],
    "A. 45° B. 60° ;C. 120°": ["45°", "60°", "120°"],
    "A:x;C. y; B. z; C. w": ["x;C. y", "z", "w"],
}


def test_options_are_read_and_printed_and_the_letter_is_asked_for():
    for options in ("[['a', 'b']]", "['a', 'b']", ["a", "b"], [["a", "b"]]):
        assert evaluation.list_of(options) == ["a", "b"]
    assert evaluation.list_of(["[1]"]) == ["[1]"]
    for text, options in WEMATH.items():
        assert BENCHMARKS["wemath"].read(ROWS["wemath"][0] | {"option": text}).options == options
    text = choose("Which?", ["30", "40"])
    assert text == "Which?\n(A) 30\n(B) 40\nAnswer with the letter of the right option."
    assert "(A)" not in choose("Which?", ["A", "B"])


def test_images_stand_where_the_text_names_them():
    text, images = place_images("<image 2> or <image 1>? <image2>, <image 3>!", {1: "a", 2: "b", 4: "d"})
    assert text == "<image><image> or <image>? image 2, image 3!" and images == ["d", "b", "a"]


def test_prompt_of_training_and_evaluation_is_the_same(toy, tmp_path):
    model, processor = toy
    path = write(tmp_path / "rows.parquet", ROWS["geometry3k"])
    training = Data(str(path), "train", SharedArgs(), processor, model)
    asked = questions("geometry3k", path, toy)
    a, b = training.prompt(0), asked.prompt(0)
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.pixel_values, b.pixel_values)
    asked.args.instruction = "Hm."
    assert not torch.equal(a.input_ids, asked.prompt(0).input_ids)


CHOICES = [  # answer, gold, options, verdict
    ("(A)", "A", ["x", "y"], True),
    ("A. 30", "A", ["30", "40"], True),
    ("30", "A", ["30", "40"], True),
    ("30", "A", ["30", "30"], True),  # as the row has it
    ("B", "A", ["30", "30"], True),
    ("A. Point B", "A", ["Point B", "Point A"], True),
    ("A. B: 5; C: 7", "A", ["B: 5; C: 7", "B: 7; C: 5"], True),  # a text with labels of its own
    ("A. Point A", "A", ["Point B", "Point A"], False),  # the text of another
    ("B. Point A", "A", ["Point B", "Point A"], False),
    ("C. Point B", "A", ["Point B", "Point A"], False),
    ("A. for it is red", "A", ["Point B", "Point A"], True),
    ("1, 2", "B", ["2, 1", "1, 2"], True),  # the very text before what is equal to it
    ("III", "D", ["I", "II", "I and II", "III"], True),
    ("III", "A", ["I", "II", "I and II", "III"], False),
    ("L", "L", [f"{i} m" for i in range(12)], True),
    ("L. 11 m", "L", [f"{i} m" for i in range(12)], True),
    ("K", "L", [f"{i} m" for i in range(12)], False),
    ("50", "A", ["30", "40"], False),
    ("B", "A", ["30", "40"], False),
    ("ATP", "ATP", [], True),  # no option, as far as is known
    ("no idea", "Yes", [], False),
    ("12.0", "12", [], True),
]
OTHER_KINDS = [  # answer, gold, kind, digits, verdict
    ("2\\sqrt{3}", "\\sqrt{12}", "free", None, True),  # more of these in answers.tsv
    ("9**9**9", "5", "free", None, False),
    ("C, A", "A, C", "letters", None, True),
    ("AC", "A, C", "letters", None, True),
    ("A", "A, C", "letters", None, False),
    ("banana", "12", "letters", None, False),  # neither names an option
    ("K", "K", "letters", None, True),
    ("12", "12", "letters", None, True),
    ("2.449", "2.4", "float", 1, True),
    ("2.46", "2.4", "float", 1, False),
    ("1.235", "1.234", "float", None, True),
    ("1.236", "1.234", "float", None, False),
    ("\\frac{1}{2}", "0.5", "float", None, True),
    ("3.9", "3", "integer", None, True),
    ("3 apples", "3", "integer", None, True),
    ("4", "3", "integer", None, False),
    ("1e400", "3", "integer", None, False),
    ("Yes.", "yes", "yes/no", None, True),
    ("No, it is not", "no", "yes/no", None, True),
    ("Nothing", "no", "yes/no", None, False),
    ("It cannot be told", "no", "yes/no", None, False),
    ("No, yes", "no", "yes/no", None, False),
    ("no or yes", "yes", "yes/no", None, False),
    ("No idea", "no", "yes/no", None, False),
    ("It cannot be told", "no", "yes/no or unsure", None, True),
    ("Uncertain.", "yes", "yes/no or unsure", None, True),
    ("Insufficient information", "no", "yes/no or unsure", None, True),
    ("Nothing", "no", "yes/no or unsure", None, False),
    ("Yes, I am not sure why", "no", "yes/no or unsure", None, False),
]


@pytest.mark.parametrize("answer, gold, options, verdict", CHOICES)
def test_verdicts_of_a_choice(check, answer, gold, options, verdict):
    assert judge(check, f"so \\boxed{{{answer}}}", Question("", [], gold, "choice", options)) == verdict


@pytest.mark.parametrize("answer, gold, kind, digits, verdict", OTHER_KINDS)
def test_verdicts_of_the_other_kinds(check, answer, gold, kind, digits, verdict):
    assert judge(check, f"\\boxed{{{answer}}}", Question("", [], gold, kind, digits=digits)) == verdict


def result_row(correct, group=None, **more):
    row = {"correct": correct, "parsed": [True] * len(correct), "truncated": [False] * len(correct), "asked": True}
    return row | {"group": group or {}, "index": 99} | more


def test_scores_by_hand():
    rows = [
        result_row([True, False]),
        result_row([False, False], parsed=[False, True], truncated=[True, False]),
        result_row([True, True]),
        result_row([False], asked=False, parsed=[], truncated=[]),
    ]
    got = scores("mmk12", rows)
    assert got["rows"] == 4 and got["accuracy"] == pytest.approx(1.5 / 4) and got["pass"] == 0.5
    assert got["unparsed"] == got["truncated"] == pytest.approx(1 / 6) and got["not_asked"] == 1
    deviation = sum((x - 0.375) ** 2 for x in (0.5, 0, 1, 0)) / 3
    assert got["stderr"] == pytest.approx(math.sqrt(deviation / 4))


def test_scores_of_hallusionbench_dynamath_and_mathverse():
    rows = [
        result_row([right], {"figure": figure, "question": question})
        for right, figure, question in ((True, "f1", "q1"), (True, "f1", "q2"), (False, "f2", "q1"), (True, "f2", "q2"))
    ]
    got = scores("hallusionbench", rows)
    assert (got["aAcc"], got["fAcc"], got["qAcc"]) == (0.75, 0.5, 0.5)
    rows = [result_row([right], index=index) for index, right in ((0, True), (0, True), (1, True), (1, False))]
    got = scores("dynamath", rows)
    assert (got["average"], got["worst_case"]) == (0.75, 0.5)
    rows = [result_row([True, True]), result_row([False], index=1, asked=False)]  # not asked: wrong in both samples
    assert scores("dynamath", rows)["worst_case"] == 0.5
    rows = [result_row([right], {"version": version}) for right, version in ((True, "a"), (False, "a"), (True, "b"))]
    got = scores("mathverse", rows)
    assert (got["a"], got["b"]) == (0.5, 1.0)


def test_figures_of_hallusionbench():
    """A question without its visual supplement belongs to no figure, and may be answered by doubt."""
    row = ROWS["hallusionbench"][0] | {"category": "VS"}
    read = [BENCHMARKS["hallusionbench"].read(row | {"figure_id": figure}) for figure in ("0", "1", "1", "2")]
    assert [question.kind for question in read] == ["yes/no or unsure", *["yes/no"] * 3]
    rows = [result_row([right], question.group) for right, question in zip((0, 1, 1, 0), read)]
    found = scores("hallusionbench", rows)
    assert found["fAcc"] == 1 / 2 and found["qAcc"] == 0 and found["aAcc"] == 1 / 2
    assert scores("hallusionbench", [*rows, result_row([False])])["fAcc"] == 1 / 3


def test_compare(tmp_path):
    protocol, folders = {"model": "a", "temperature": 0.0, "seed": 0}, (tmp_path / "a", tmp_path / "b")
    for folder, right in zip(folders, ([1, 0, 0, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 0, 1, 0])):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"protocol": protocol, "scores": {"toy": {}}}))
        rows = [{"part": 0, "index": i, "answer": "1", "correct": [bool(x)]} for i, x in enumerate(right)]
        (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare(*folders)["toy"]
    assert (found["rows"], found["first"], found["second"], found["difference"]) == (8, 3 / 8, 6 / 8, 3 / 8)
    assert -0.25 <= found["95 % from"] < 0.375 < found["to"] <= 0.875
    assert found["sign test"] == f"p = {2 * (1 + 5) / 32:.3g}"  # 4 rows against 1: 0 or 1 of 5, on either side
    assert compare(folders[0], folders[0])["toy"]["sign test"] == "p = 1"
    text = (folder / "toy.jsonl").read_text()
    for other in (text.partition("\n")[2], text.replace('"index": 1', '"index": 9'), text.replace('"1"', '"2"', 1)):
        (folder / "toy.jsonl").write_text(other)
        with pytest.raises(UserError, match="hold other rows of toy"):
            compare(*folders)
    (folder / "results.json").write_text(json.dumps({"protocol": protocol | {"seed": 1}, "scores": {}}))
    with pytest.raises(UserError, match="differ in seed"):
        compare(*folders)


def test_a_batch_that_runs_out_of_memory_is_halved_and_counted(monkeypatch):
    def sample(model, tokenizer, prompts, *rest):
        if len(prompts) > 3 or "large" in prompts:
            raise torch.OutOfMemoryError
        return [f"group {p}" for p in prompts]

    monkeypatch.setattr(evaluation, "rollout", sample)
    fake = SimpleNamespace(model=None, processor=SimpleNamespace(tokenizer=None), args=Args(), retries=0)
    fake.sample = lambda prompts: evaluation.Evaluation.sample(fake, prompts)
    assert fake.sample(range(10)) == [f"group {p}" for p in range(10)] and fake.retries == 3
    with pytest.raises(UserError, match="one prompt is too much"):
        fake.sample(["large"])


def test_bf16_rounds_weights_and_no_position(tmp_path):
    made = evaluation.Evaluation(Args(dtype="bfloat16", output=str(tmp_path / "bf16"), max_prompt_tokens=512))
    made.check.close()
    exact = load_model(TOY / "model")
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    positions = torch.arange(4000)[None].expand(3, 1, -1)
    a, b = (model.model.language_model.rotary_emb(torch.ones(1), positions)[0] for model in (made.model, exact))
    assert torch.equal(a, b)


def test_a_checkpoint_is_asked_as_it_was_trained(tmp_path):
    folder = tmp_path / "vepo" / "step-3"
    folder.mkdir(parents=True)
    arguments = {"model": "toy", "data": "toy", "eval_data": None, "instruction": "Hm.", "max_response_tokens": 33}
    history = {"first_eval": None, "last_eval": None, "seconds": 0.0}
    state = State(3, 3, 12, "100 (0)", 1, history, "vepo", arguments)
    (folder / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(state)))
    args = Args(model=str(folder))
    assert (args.instruction, args.benchmarks, args.min_pixels, args.output) == ("Hm.", "toy", None, "runs/eval/vepo")
    assert args.max_response_tokens == 33
    assert Args(model=str(folder), instruction="").instruction == ""
    (folder / "trainer_state.json").write_text('{"global_step": 3, "log_history": []}')  # of another trainer
    assert Args(model=str(folder)).instruction == INSTRUCTION
    hub = Args(model="Qwen/Qwen2.5-VL-7B-Instruct")
    assert (hub.benchmarks, hub.min_pixels, hub.max_response_tokens) == ("geometry3k", 262_144, 2048)


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """eval.py with these flags, of four tokens a response, in the folder `out` unless another is named; its results."""

    def run(*flags, output="out"):
        argv = ["eval.py", "--output", str(tmp_path / output), "--max_response_tokens", "4", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        evaluation.main()
        return json.loads((tmp_path / output / "results.json").read_text())

    return run


def own_data(folder, rows, **columns):
    data = load_rows("toy", "test").select(range(rows)).rename_columns(columns)
    data.to_parquet(folder / "mine.parquet")
    return str(folder / "mine.parquet")


def text_rows(path, answers, problem="What is it?"):
    path.write_text("".join(json.dumps({"problem": problem, "answer": x}, ensure_ascii=False) + "\n" for x in answers))
    return path


def test_the_rows_that_a_run_held_out_are_the_default(tmp_path, evaluate, capsys):
    """A checkpoint on data of one's own: the same rows, columns and responses as the run's last evaluation had."""
    flags = ["--data", own_data(tmp_path, 50, problem="frage"), "--problem_column", "frage", "--steps", 1]
    lines = train("grpo", tmp_path / "run", *flags, "--eval_rows", -1, "--seed", 3)
    last = [line for line in lines if "eval_accuracy" in line][-1]
    assert last["eval_rows"] == 5 and last["eval_data"] == "rows held out of mine.parquet"
    argv = ["--model", tmp_path / "run/last", "--temperature", 1, "--seed", 3]
    result = evaluate(*argv, "--max_response_tokens", 40)  # as trained
    assert result["scores"]["own"]["rows"] == 5 and result["scores"]["own"]["accuracy"] == last["eval_accuracy"]
    assert result["protocol"]["data"]["data"] == flags[1] and result["protocol"]["problem_column"] == "frage"
    assert "rows held out of mine.parquet" in capsys.readouterr().out


def test_rows_that_were_trained_on_are_not_called_held_out(tmp_path, evaluate, monkeypatch):
    for folder, answers in (("one", range(30)), ("two", range(1, 31))):
        (tmp_path / folder).mkdir()
        text_rows(tmp_path / folder / "mine.jsonl", answers)
    monkeypatch.chdir(tmp_path / "one")
    flags = ["--data", "mine.jsonl", "--prompts_per_step", 2, "--steps", 1]
    train("grpo", tmp_path / "all", *flags)  # --eval_rows 0
    with pytest.raises(UserError, match="was trained on all of mine.jsonl: name other rows with --data"):
        evaluate("--model", tmp_path / "all/last")
    train("grpo", tmp_path / "most", *flags, "--eval_rows", 3)
    model = ["--model", tmp_path / "most/last"]
    assert evaluate(*model)["scores"]["own"]["not_asked"] == 0
    few = evaluate(*model, "--max_prompt_tokens", 5, output="few")["scores"]["own"]
    assert few["rows"] == few["not_asked"] == 3
    with pytest.raises(UserError, match="mine.jsonl, read from here, is not what .* was trained on"):
        evaluate(*model, "--problem_column", "answer", output="columns")
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(UserError, match="mine.jsonl, read from here, is not what .* was trained on"):
        evaluate(*model, output="elsewhere")


def test_rows_with_unusual_line_ends_are_read_again(tmp_path, evaluate):
    path = text_rows(tmp_path / "mine.jsonl", "1234", "one\u2028two\u2029three\u0085four")
    score, file = evaluate("--data", path)["scores"]["own"], tmp_path / "out/own.jsonl"
    assert (score["rows"], score["not_asked"]) == (4, 0)
    whole = file.read_bytes()
    assert [json.loads(line)["index"] for line in whole.decode().split("\n")[:-1]] == [0, 1, 2, 3]
    for end in (b"", b"\n", '\n{"problem": "é'.encode()[:-1]):  # killed while it wrote a row
        file.write_bytes(b"\n".join(whole.split(b"\n")[1:3]) + end)
        assert evaluate("--data", path, "--resume")["scores"]["own"] == score and file.read_bytes() == whole
    assert len(compare(tmp_path / "out", tmp_path / "out")) == 1


def test_the_output_does_not_lie_among_the_rows(tmp_path, evaluate):
    text_rows(tmp_path / "mine.jsonl", "1234")
    with pytest.raises(UserError, match="--output .*/out lies in .*, all of which is data: name another one"):
        evaluate("--data", tmp_path)
    assert evaluate("--data", tmp_path, output=".runs/out")["scores"]["own"]["rows"] == 4  # hidden, it is no data


def test_an_evaluation_that_goes_on_asks_the_same_model_the_same_rows(tmp_path, evaluate):
    path = text_rows(tmp_path / "mine.jsonl", "1234")
    one, two, last = (tmp_path / "run" / name for name in ("step-1", "step-2", "last"))
    for folder in (one, two):
        shutil.copytree(TOY / "model", folder)
    last.symlink_to("step-1")
    flags = ["--model", last, "--data", path]
    found = evaluate(*flags)
    assert found["protocol"]["model"] == str(one.resolve())
    assert found["protocol"]["min_pixels"] > 0 and found["protocol"]["max_pixels"] > 0  # what holds
    assert evaluate(*flags, "--resume") == found
    with pytest.raises(UserError, match="holds an evaluation: --resume goes on with it"):
        evaluate(*flags)
    last.unlink()
    last.symlink_to("step-2")
    with pytest.raises(UserError, match="was begun with another model: give the same"):
        evaluate(*flags, "--resume")
    flags[1] = one
    tensors = load_file(one / "model.safetensors")
    save_file({name: 1.01 * value for name, value in tensors.items()}, one / "model.safetensors")
    with pytest.raises(UserError, match="was begun with another weights_checksum: give the same"):
        evaluate(*flags, "--resume")
    save_file(tensors, one / "model.safetensors")
    text_rows(path, "4321")
    with pytest.raises(UserError, match="was begun with another rows_checksums: give the same"):
        evaluate(*flags, "--resume")
    evaluate(*flags, output="other")
    with pytest.raises(UserError, match="hold other rows of own: evaluate them alike"):
        compare(tmp_path / "out", tmp_path / "other")
    evaluate("--model", two, "--data", path, output="second")
    assert len(compare(tmp_path / "other", tmp_path / "second")) == 1  # two models, one file


def test_damaged_rows_in_a_hundred_count_as_wrong_and_those_without_an_answer_not(tmp_path, evaluate, capsys):
    row = ROWS["geometry3k"][0]
    rows = [row, row | {"problem": None}, row | {"answer": None}, *[row] * 197]
    results = evaluate("--benchmarks", "geometry3k", "--data", write(tmp_path / "rows.parquet", rows))
    assert results["scores"]["geometry3k"]["rows"] == 199 and results["scores"]["geometry3k"]["not_asked"] == 1
    assert results["rows_without_answer"] == {"geometry3k": 1}
    damaged = json.loads((tmp_path / "out/geometry3k.jsonl").read_text().splitlines()[1])
    assert damaged["why"] == "has no question" and damaged["correct"] == [False]
    assert "2 of 200 rows left out (row 1 has no question" in capsys.readouterr().err


def test_own_data_is_called_own(tmp_path, evaluate, capsys):
    """Prompts that are too long count as wrong."""
    data = own_data(tmp_path, 10)
    score = evaluate("--data", data, "--max_prompt_tokens", 77)["scores"]["own"]
    out = capsys.readouterr().out
    assert "own" in out and "mine.parquet" in out and "toy" not in out.splitlines()[1]
    assert 0 < score["not_asked"] < 10 and score["rows"] == 10 and score["accuracy"] <= 1 - score["not_asked"] / 10
    text_rows(tmp_path / "mine.jsonl", [3, None, 5])
    with pytest.raises(UserError, match="1 of 3 rows left out .row 1 has no answer"):
        evaluate("--data", tmp_path / "mine.jsonl", output="damaged")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--benchmarks", "toy,mathvist"], "--benchmarks mathvist is not one of toy, toy-faint, geometry3k"),
        (["--benchmarks", "own"], "--benchmarks own is not one of .*; your own data needs --data"),
        (["--samples", 4], "--samples 4 at --temperature 0 are all the same"),
        (["--data", "x.jsonl", "--benchmarks", "toy,geometry3k"], "--data is for one benchmark"),
        (["--check_seconds", "nan"], "--check_seconds nan must be above 0"),
        (["--min_pixels", 5000, "--max_pixels", 4000], "--max_pixels 4000 is below 5000, the least"),
        (["--model", "/nowhere"], "--model /nowhere cannot be opened"),
        (["--compare", "runs/x"], "argument --compare: expected 2 arguments"),
        (["--compare", "runs/x", "runs/y"], "--compare: runs/x has no results.json: evaluate it first"),
        (["--max_prompt_tokens", 5], "has no row of at most --max_prompt_tokens 5"),
    ],
)
def test_mistakes_get_a_sentence(evaluate, tmp_path, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(*flags)
    assert not (tmp_path / "out").exists()
