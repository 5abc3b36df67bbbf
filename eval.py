"""Benchmarks without a judge model: accuracy by rule, with error bars, by the prompt, sampler and checker of training.

    python eval.py                                                                      # the toy, on a CPU
    torchrun --nproc_per_node=8 eval.py --model runs/vepo/last --benchmarks geometry3k,mathvista,hallusionbench
    ... eval.py --model runs/vepo/last --benchmarks mmk12 --samples 8 --temperature 1   # avg@8 and pass@8
    python eval.py --compare runs/eval/toy runs/eval/vepo                               # paired, on the same rows

Writes <output>/results.json, with the whole protocol, and <output>/<benchmark>.jsonl, every row with its responses.
Rows that cannot be asked (too long, or damaged) and responses without an answer count as wrong, and are counted; rows
without a gold answer are left out, and counted. Numbers from papers that ask a judge model do not compare with these.
"""

import ast
import contextlib
import dataclasses
import itertools
import json
import math
import re
import statistics
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from scipy.stats import binomtest, bootstrap
from tqdm.auto import tqdm

from common import load_model, load_processor, rollout
from plumbing.adapters import resolve_model
from plumbing.answers import Checker, extract_answer, letters, parts, plain
from plumbing.arguments import (
    EMBEDDED,
    INSTRUCTION,
    UserError,
    check_numbers,
    flag,
    model_source,
    parse_args,
    without_links,
)
from plumbing.checkpoints import locked, trained_with, write_text
from plumbing.data import Data, Unusable, listed, plain_text, refuse_output_among, some_of
from plumbing.families import limit_pixels
from plumbing.kernels import use_cores
from plumbing.sharding import PATIENCE, on_main

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FROM_TRAINING = ("instruction", "max_response_tokens", "image_column", "problem_column", "answer_column")


@dataclass
class Args:
    """evaluation"""

    model: str = flag("toy", "hub id, folder or checkpoint of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or InternVL3")
    model_revision: str = flag("main", "branch, tag or commit of a hub model")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of weights; auto: bfloat16 on a GPU, else float32")
    benchmarks: str | None = flag(None, "names, with commas between them (default: the data that the model trained on)")
    data: str | None = flag(None, "file or folder of your own, or of the one benchmark that is named, in its schema")
    image_column: str | None = flag(None, "of your own data (default: as in training, else images or image)")
    problem_column: str | None = flag(None, "the same (default: problem, question or query)")
    answer_column: str | None = flag(None, "the same (default: answer, solution or ground_truth)")
    rows: int = flag(-1, "of each benchmark, a random choice by --seed; -1 or 0: all", min=-1)
    samples: int = flag(1, "responses to each prompt; more than 1: their mean, and whether any is right", gt=0)
    temperature: float = flag(0.0, "0: greedy", min=0, max=100)
    top_p: float = flag(1.0, "sample from the smallest set of tokens of this probability", gt=0, max=1)
    top_k: int = flag(0, "sample from the k likeliest tokens; 0: from all", min=0)
    instruction: str | None = flag(None, "sentence that follows every question (default: that of training)")
    max_prompt_tokens: int | None = flag(None, "longer prompts are not asked, and count as wrong (default: 8192)", gt=0)
    max_response_tokens: int | None = flag(None, "of a response (default: as in training; toy: 64, else: 2048)", gt=0)
    min_pixels: int | None = flag(None, "smaller images are enlarged to this (default: as in training)", gt=0)
    max_pixels: int | None = flag(None, "larger images are shrunk to this (default: as in training)", gt=0)
    rollout_prompts: int = flag(128, "responses sampled together on each process; halved if memory runs out", gt=0)
    check_seconds: float = flag(3.0, "an answer that takes the maths checker longer than this is wrong", gt=0, max=3600)
    seed: int = flag(0, "of sampled tokens and of the choice of --rows")
    output: str | None = flag(None, "folder of everything that is written (default: runs/eval/<model>)")
    resume: bool = flag(False, "go on with what a stopped evaluation wrote to --output")
    compare: str | None = flag(None, "the difference of a second result folder to a first, and stop", nargs=2)
    reshard_while_sampling = False  # this and the next three: flags of training that the sampler and the data need
    cuda_graphs = torch.cuda.is_available()
    tokens_per_row = 16384
    data_revision = "main"

    def __post_init__(self):
        name = Path(self.model).name
        self.model = without_links(self.model)
        self.trained = trained = trained_with(self.model)  # the flags of a checkpoint's run; {} for any other model
        folder, base, _, _ = resolve_model(model_source(self))
        if trained:
            name = Path(folder).resolve().parent.name  # of the run
        toys = {str(path / "model"): toy for toy, path in EMBEDDED.items()}  # adapters may be of a toy, too
        toy = trained["model"] if trained.get("model") in EMBEDDED else toys.get(str(base))
        if self.benchmarks is None:
            source = trained.get("eval_data") or trained.get("data") or toy or "hiyouga/geometry3k"
            names = {benchmark.id: name for name, benchmark in BENCHMARKS.items()}
            self.benchmarks = "own" if self.data else names.get(source, "own")
        of_training = trained.get("max_prompt_tokens", 0) if self.benchmarks == "own" and not self.data else 0
        has_limits = toy or trained  # the processor of a checkpoint has those of its training
        defaults = {
            "output": f"runs/eval/{name}",
            "instruction": INSTRUCTION,
            "max_prompt_tokens": max(8192, of_training),
            "max_response_tokens": 64 if toy else 2048,
            "min_pixels": None if has_limits else 262_144,
            "max_pixels": None if has_limits else 1_000_000,
        }
        defaults |= {name: trained[name] for name in FROM_TRAINING if name in trained}
        for name, default in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        self.group_size = self.samples
        check_numbers(self)
        known = [*BENCHMARKS, "own"] if self.data or trained else [*BENCHMARKS]
        for name in self.benchmarks.split(","):
            if name not in known:
                raise UserError(f"--benchmarks {name} is not one of {', '.join(known)}; your own data needs --data.")
        if self.data and "," in self.benchmarks:
            raise UserError("--data is for one benchmark: name it alone with --benchmarks.")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--samples {self.samples} at --temperature 0 are all the same: set --temperature 1.")


# Benchmarks: how a row becomes a question


@dataclass
class Question:
    problem: str
    images: list
    answer: str
    kind: str = "free"  # or choice (one letter), letters, yes/no, yes/no or unsure, integer, float: how to compare
    options: list = field(default_factory=list)  # texts of a choice, where they are known
    digits: int | None = None  # float: both are rounded to so many digits, or differ by 0.001 at most
    group: dict = field(default_factory=dict)  # what the benchmark's own scores group by


def choose(problem, options):
    """The problem, its options as "(A) ..." lines, and the request for a letter."""
    lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, options)]
    if [str(option) for option in options] == list(LETTERS[: len(options)]):
        lines = []  # the image shows them
    return "\n".join([problem, *lines, "Answer with the letter of the right option."])


def place_images(text, images):
    """The text with `<image>` where the number of an image first occurs, and the images in the order of the text.

    Images that the text does not mention come first.
    """
    mentioned = dict.fromkeys(int(number) for number in re.findall(r"<image ?(\d+)>", text))
    order = [number for number in mentioned if number in images]
    for number in order:
        text = re.sub(rf"<image ?{number}>", "<image>", text, count=1)
    text = re.sub(r"<image ?(\d+)>", r"image \1", text)
    rest = [number for number in images if number not in order]
    return "<image>" * len(rest) + text, [images[number] for number in rest + order]


def list_of(options):
    """The options of a row: a list, the text of one, or a list in a list."""
    options = ast.literal_eval(options) if isinstance(options, str) else options
    return options[0] if len(options) == 1 and isinstance(options[0], list) else options


def letter_of(options, answer):
    """The letter of the option whose text is the answer. Raises ValueError where there is none."""
    return LETTERS[[str(option).strip() for option in options].index(str(answer).strip())]


def as_it_is(row):  # the toys, geometry3k, clevr_count_70k
    return Question(row["problem"], listed(row["images"]), row["answer"])


def mathvista(row):
    if row["question_type"] == "multi_choice":
        options = row["choices"]
        gold = letter_of(options, row["answer"])
        return Question(choose(row["question"], options), [row["decoded_image"]], gold, "choice", options)
    problem = row["question"] + (f" (unit: {row['unit']})" if row["unit"] else "")
    kind = row["answer_type"] if row["answer_type"] in ("float", "integer") else "free"
    digits = int(row["precision"]) if kind == "float" else None
    return Question(problem, [row["decoded_image"]], row["answer"], kind, digits=digits)


def mathverse(row):
    kind = "choice" if row["question_type"] == "multi-choice" else "free"
    question = "<image>" if row["question"] == "" else row["question"]  # the version "Vision Only" has no text
    problem = choose(question, []) if kind == "choice" else question
    return Question(problem, [row["image"]], row["answer"], kind, group={"version": row["problem_version"]})


def mathvision(row):
    problem, images = place_images(row["question"], {1: row["decoded_image"]})
    if row["options"]:
        return Question(choose(problem, row["options"]), images, row["answer"], "choice", row["options"])
    return Question(problem, images, row["answer"])


def logicvista(row):
    problem = row["question"] + "\nAnswer with the letter of every right option."
    return Question(problem, [row["image"]], row["answer"], "letters")


def mmmu_pro(row):
    options = list_of(row["options"])
    found = {n: row[f"image_{n}"] for n in range(1, 8) if row[f"image_{n}"] is not None}
    problem, images = place_images(choose(row["question"], options), found)
    return Question(problem, images, row["answer"], "choice", options)


def mmmu_pro_vision(row):
    options = list_of(row["options"])
    return Question(choose("<image>", LETTERS[: len(options)]), [row["image"]], row["answer"], "choice", options)


def hallusionbench(row):
    answer = {"1": "yes", "0": "no"}.get(str(row["gt_answer"]))
    part = f"{row['category']}/{row['subcategory']}/{row['set_id']}"
    group = {"figure": f"{part}/{row['figure_id']}", "question": f"{part}/{row['question_id']}"}
    kind = "yes/no"
    if row["category"] == "VS" and str(row["figure_id"]) == "0":  # asked without its visual supplement: no figure
        kind = "yes/no or unsure"
        group["figure"] = None
    return Question(row["question"] + " Answer yes or no.", listed(row.get("image")), answer, kind, group=group)


def wemath(row):
    options = []
    rest = " " + row["option"].rstrip("; ")
    for letter in LETTERS:  # a label has a text behind it: "to point ;B.;" ends an option and begins none
        *before, rest = re.split(rf"[;\s]{letter}\s?[.:．：](?!\s*(?:;|$))", rest, maxsplit=1)
        options += [text.strip("; ") for text in before]
        if not before:
            break
    options = [*options[1:], rest.strip()]
    if len(options) < 2:
        raise ValueError("its options have no labels")
    return Question(choose(row["question"], options), [row["image_path"]], row["answer"], "choice", options)


def dynamath(row):
    kind = {"float": "float", "multiple choice": "choice"}.get(row["answer_type"], "free")
    problem = choose(row["question"], []) if kind == "choice" else row["question"]
    group = {"seed": str(row["id"])} if "id" in row else {}
    return Question(problem, [row["decoded_image"]], row["ground_truth"], kind, group=group)


def puzzlevqa(row):
    options = list_of(row["options"])
    gold = letter_of(options, row["answer"])
    return Question(choose(row["question"], options), [row["image"]], gold, "choice", options)


def mmk12(row):
    return Question(choose(row["question"], []), listed(row["image"]), row["answer"], "letters")


class Benchmark(NamedTuple):
    id: str  # of the hub, with the config after a colon
    splits: tuple
    read: callable  # row -> Question


BENCHMARKS = {
    **{name: Benchmark(name, ("test",), as_it_is) for name in EMBEDDED},
    "geometry3k": Benchmark("hiyouga/geometry3k", ("test",), as_it_is),
    "mathvista": Benchmark("AI4Math/MathVista", ("testmini",), mathvista),
    "mathverse": Benchmark("AI4Math/MathVerse:testmini", ("testmini",), mathverse),
    "mathvision": Benchmark("MathLLMs/MathVision", ("test",), mathvision),
    "logicvista": Benchmark("lscpku/LogicVista", ("test",), logicvista),
    "mmmu_pro": Benchmark("MMMU/MMMU_Pro:standard (10 options)", ("test",), mmmu_pro),
    "mmmu_pro_vision": Benchmark("MMMU/MMMU_Pro:vision", ("test",), mmmu_pro_vision),
    "hallusionbench": Benchmark("lmms-lab/HallusionBench", ("image", "non_image"), hallusionbench),
    "wemath": Benchmark("We-Math/We-Math", ("testmini",), wemath),
    "dynamath": Benchmark("DynaMath/DynaMath_Sample", tuple(f"sample_variant{i}" for i in range(1, 11)), dynamath),
    "clevr_count": Benchmark("BUAADreamer/clevr_count_70k", ("test",), as_it_is),
    "mmk12": Benchmark("FanqingM/MMK12", ("test",), mmk12),
    "puzzlevqa": Benchmark("declare-lab/PuzzleVQA", ("all",), puzzlevqa),
    "algopuzzlevqa": Benchmark("declare-lab/AlgoPuzzleVQA", ("all",), puzzlevqa),
}


class Questions(Data):
    """One split of a benchmark as prompts, by the code that builds the prompts of training."""

    def __init__(self, name, split, args, processor, model):
        self.read = BENCHMARKS[name].read
        super().__init__(args.data or BENCHMARKS[name].id, split, args, processor, model)
        self.title = f"{name} ({split})"

    def find_columns(self):
        """Those that `read` knows."""
        return {"image": self.rows.column_names}

    def question(self, index):
        """A row as the benchmark means it. Raises Unusable where it is not in its schema."""
        try:
            question = self.read(*self.raw[index].to_pylist())
            return dataclasses.replace(question, answer=plain_text(question.answer, "answer"))
        except (LookupError, ValueError, SyntaxError, TypeError, AttributeError) as error:
            raise Unusable(f"is not in the schema of --benchmarks {self.args.benchmarks} ({error!r})") from None

    def fields(self, index):
        question = self.question(index)
        return question.problem, question.images, question.answer


# Verdicts: is a response right

UNSURE = r"unsure|uncertain|unknown|unclear|unable|undetermined|insufficient|no idea|cannot|can't|don't know"
UNSURE += r"|\bnot (?:sure|certain|clear|known|given|possible|enough)"


def judge(check, response, question):
    """Whether a response is right, by rule; `check` is training's `Checker`."""
    answer, kind = extract_answer(response), question.kind
    if answer is None:
        return False
    last = LETTERS[max(len(question.options), 10) - 1]  # that an option may have: J, where they are not known
    gold = letters(question.answer, last) if kind in ("letters", "choice") else None
    if kind == "free" or (kind in ("letters", "choice") and gold is None):  # the right answer names no option
        return bool(check.equal(answer, question.answer))
    if kind == "letters":
        return letters(answer, last) == gold
    if kind in ("float", "integer"):
        return same_number(check, answer, question)
    if kind == "choice":
        texts = dict(zip(LETTERS, map(str, question.options)))
        letter = chosen(check, answer, question.options, last)  # two options may have one text
        return letter is not None and texts.get(letter, letter) == texts.get(gold, gold)
    said = set(re.findall(r"\b(?:yes|no)\b(?! idea)", answer.casefold()))
    if not said:
        return kind == "yes/no or unsure" and bool(re.search(UNSURE, answer.casefold()))
    return said == {question.answer}


def chosen(check, answer, options, last):
    """The letter of the option that an answer means, or None: "C", "C. its text", or the text of a single one."""
    options = [plain(str(option)) for option in options]

    def named(text):
        return [i for i, option in enumerate(options) if option == plain(text)] or check.equal(text, *options)

    label = re.fullmatch(rf"[(\[]?([A-{last}])[)\].:]+ *(.+)", plain(answer))
    if label and (found := named(label[2])):
        return label[1] if LETTERS.index(label[1]) in found else None  # "A." and the text of another
    if letter := letters(answer, last):
        return letter
    found = named(answer)
    return LETTERS[found[0]] if len({options[i] for i in found}) == 1 else None


def same_number(check, answer, question):
    """Equal after rounding to the question's `digits`, within 0.001 without them; integers: after truncation."""
    try:
        said, right = float(parts(answer)[1]), float(question.answer)
        if question.kind == "integer":  # as MathVista's own code compares them
            return int(said) == int(right)
    except (ValueError, OverflowError):
        return bool(check.equal(answer, question.answer))
    if question.digits is None:
        return abs(said - right) <= 0.001 + 1e-9
    return round(said, question.digits) == round(right, question.digits)


# Evaluation


class Evaluation:
    """Model, processes and files of one evaluation."""

    def __init__(self, args):
        self.args, self.output = args, Path(args.output)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[PATIENCE])
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        refuse_output_among(args.output, args.data or args.trained.get("data"))
        self.accelerator.print(use_cores(), file=sys.stderr)
        source = model_source(args)
        self.processor = load_processor(source, args.model_revision, args.min_pixels, args.max_pixels)
        bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and torch.cuda.is_available())
        self.model = load_model(source, args.model_revision, dtype=torch.bfloat16 if bf16 else torch.float32)
        self.model.to(self.accelerator.device).eval()
        self.check, self.retries = Checker(args.check_seconds), 0
        self.parts = {name: self.find_questions(name) for name in args.benchmarks.split(",")}
        self.data = list(itertools.chain(*self.parts.values()))
        for data in self.data:
            if data.dropped or data.unusable:
                self.accelerator.print(data, file=sys.stderr)
        self.protocol = self.make_protocol()
        self.lock = on_main(self.open_output)

    def make_protocol(self):
        """What two evaluations must share to be compared, and the model."""
        protocol = dataclasses.asdict(self.args)
        for name in ("output", "resume", "compare", "rollout_prompts"):
            del protocol[name]
        if self.args.benchmarks == "own" and not self.args.data:
            protocol["data"] = {name: self.args.trained[name] for name in ("data", "eval_data", "seed")}
        protocol["min_pixels"], protocol["max_pixels"] = limit_pixels(self.model.config, self.processor)
        protocol["dtype"] = str(self.model.dtype).removeprefix("torch.")
        begins = torch.cat([weight.flatten()[:1000].float().cpu() for weight in self.model.state_dict().values()])
        protocol["weights_checksum"] = f"{zlib.crc32(begins.numpy().tobytes()):08x}"
        protocol["rows_checksums"] = [data.contents for data in self.data]
        return protocol

    def open_output(self):
        """Makes --output ready; returns a lock that keeps other evaluations out until this process ends.

        Raises UserError where it holds an evaluation, unless it is this one and --resume is given.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        lock, path = locked(self.output), self.output / "protocol.json"
        if path.exists() and not self.args.resume:
            raise UserError(f"{self.output} holds an evaluation: --resume goes on with it, --output starts another.")
        found = json.loads(path.read_text()) if path.exists() else self.protocol
        if changed := [name for name in self.protocol if found.get(name) != self.protocol[name]]:
            raise UserError(f"--resume: {self.output} was begun with another {', '.join(changed)}: give the same.")
        write_text(path, json.dumps(self.protocol, indent=2) + "\n")
        return lock

    def find_questions(self, name):
        """The splits of a benchmark; of `own`, the rows of --data, or those that training evaluated the model on."""
        args, model = self.args, (self.processor, self.model)
        if name != "own":
            splits = BENCHMARKS[name].splits[: 1 if args.data else None]
            return [Questions(name, split, args, *model) for split in splits]
        if args.data:
            return [Data(args.data, "test", args, *model)]
        trained = SimpleNamespace(**args.trained | {flag: getattr(args, flag) for flag in FROM_TRAINING})
        data = Data(trained.data, trained.data_split, trained, *model)
        found = data.for_evaluation()
        held_out = found is not None and found.rows is data.rows
        if found is None or (held_out and trained.eval_rows == 0):
            raise UserError(f"{args.model} was trained on all of {trained.data}: name other rows with --data.")
        if held_out and data.contents != trained.contents:
            raise UserError(f"{trained.data}, read from here, is not what {args.model} was trained on: give --data.")
        return [found]

    def run(self, name):
        """Asks what has not been asked yet; returns the benchmark's scores on the main process, None on the others."""
        args, parts, path = self.args, self.parts[name], self.output / f"{name}.jsonl"
        order = []
        for part, data in enumerate(parts):
            rows = [i for i in range(len(data.rows)) if data.unusable.get(i) != "has no answer"]
            if name == "own" and not args.data:  # training evaluates on the usable rows alone
                rows = data.indices
            order += [(part, index) for index in rows]
        order = some_of(order, args.rows, args.seed)
        done = read_rows(path) if self.rank == 0 else {}
        (left,) = broadcast_object_list([[place for place in order if place not in done]])  # the main process's
        size = max(1, args.rollout_prompts // args.samples) * self.world_size
        with tqdm(total=len(left), desc=name, disable=self.rank > 0, unit="row") as bar:
            for start in range(0, len(left), size):
                batch = left[start : start + size]
                rows = gather_object(self.ask(parts, batch[self.rank :: self.world_size]))
                if self.rank == 0:
                    with path.open("a") as file:  # each on a new line, also after half a line
                        file.writelines("\n" + json.dumps(row, ensure_ascii=False) for row in rows)
                bar.update(len(batch))
        if self.rank > 0:
            return None
        done = read_rows(path)
        rows = [done[place] for place in order]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return scores(name, rows)

    def ask(self, parts, batch):
        """What is written of each (part, index) of a batch: the question, the responses and the verdicts."""
        rows, limit = [], self.args.max_prompt_tokens
        asked = [(part, index) for part, index in batch if parts[part].tokens.get(index, limit + 1) <= limit]
        prompts = [dataclasses.replace(parts[part].prompt(index), prompt_id=part) for part, index in asked]
        groups = dict(zip(asked, self.sample(prompts)))
        for part, index in batch:
            data, group = parts[part], groups.get((part, index))
            row = {"part": part, "data": data.title, "index": index, "group": {}}
            if index not in data.unusable:
                question = data.question(index) if isinstance(data, Questions) else Question(*data.row(index))
                row |= {name: getattr(question, name) for name in ("problem", "answer", "kind", "group")}
            texts = group.texts if group else []
            row |= {
                "asked": group is not None,
                "correct": [judge(self.check, text, question) for text in texts] or [False],
                "parsed": [extract_answer(text) is not None for text in texts],
                "truncated": group.truncated.tolist() if group else [],
                "responses": texts,
            }
            if not group:
                row["why"] = data.unusable.get(index, "is longer than --max_prompt_tokens")
            rows.append(row)
        return rows

    def sample(self, prompts):
        """Groups of responses; a batch that runs out of memory is cut in two, and counted."""
        try:
            return rollout(self.model, self.processor.tokenizer, prompts, self.args, "evaluation")
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise UserError("one prompt is too much: lower --samples or --max_response_tokens.") from None
        self.retries += 1
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self.sample(prompts[:half]) + self.sample(prompts[half:])


def read_rows(path):
    """{(part, index): row} of a benchmark's file; {} where there is none. Half a line, of a killed process, is none."""
    rows = {}
    for line in path.read_text(errors="replace").split("\n") if path.exists() else []:  # texts have other line ends
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows[row["part"], row["index"]] = row
    return rows


# Scores


def scores(name, rows):
    """Accuracy, its standard error over rows, shares of unparsed and truncated responses, and a benchmark's own."""
    means = [statistics.fmean(row["correct"]) for row in rows]
    parsed, truncated = (list(itertools.chain(*(row[key] for row in rows))) for key in ("parsed", "truncated"))
    result = {
        "rows": len(rows),
        "accuracy": statistics.fmean(means),
        "stderr": statistics.stdev(means) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0,
        "unparsed": parsed.count(False) / max(len(parsed), 1),
        "truncated": truncated.count(True) / max(len(truncated), 1),
        "not_asked": sum(not row["asked"] for row in rows),
    }
    if any(len(row["correct"]) > 1 for row in rows):
        result["pass"] = sum(any(row["correct"]) for row in rows) / len(rows)
    if name == "hallusionbench":
        result |= {"aAcc": result["accuracy"], "fAcc": all_right(rows, "figure"), "qAcc": all_right(rows, "question")}
    if name == "mathverse":
        versions = pd.Series([row["group"].get("version") for row in rows])
        result |= pd.Series(means).groupby(versions).mean().to_dict()
    if name == "dynamath":
        result |= {"average": result["accuracy"], "worst_case": all_right(rows, "seed")}
    return result


def all_right(rows, key):
    """Share of groups whose rows are all right, in the mean over samples; a row whose group is None is in none."""
    groups = pd.Series([row["group"].get(key, row["index"]) for row in rows])  # a damaged row is a group of its own
    samples = max(len(row["correct"]) for row in rows)
    correct = pd.DataFrame([row["correct"] if row["asked"] else [False] * samples for row in rows])
    return float(correct.groupby(groups, sort=False).all().mean(axis=None))


def compare(first, second):
    """{benchmark: how the second result folder differs from the first, on the same rows}; raises UserError."""
    folders, results = (Path(first), Path(second)), {}
    for folder in folders:
        if not (folder / "results.json").exists():
            raise UserError(f"--compare: {folder} has no results.json: evaluate it first.")
    found = [json.loads((folder / "results.json").read_text()) for folder in folders]
    a, b = (result["protocol"] for result in found)
    changed = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    # which rows can be asked, and so their checksum, depends on the model: each row's texts are compared below
    changed -= {"model", "model_revision", "weights_checksum", "rows_checksums"}
    if changed:
        raise UserError(f"--compare: {first} and {second} differ in {', '.join(sorted(changed))}: evaluate them alike.")
    for name in found[0]["scores"]:
        a, b = (read_rows(folder / f"{name}.jsonl") for folder in folders)
        others = a.keys() != b.keys()
        for place in a.keys() & b.keys():
            known = {"problem", "answer"} & a[place].keys() & b[place].keys()  # a damaged row has no texts
            others = others or any(a[place][key] != b[place][key] for key in known)
        if others:
            raise UserError(f"--compare: {first} and {second} hold other rows of {name}: evaluate them alike.")
        one, two = (np.array([np.mean(rows[place]["correct"]) for place in sorted(a)]) for rows in (a, b))
        change = two - one
        low, high = bootstrap((change,), np.mean, method="percentile", batch=100, rng=0).confidence_interval
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0  # the sign test, two-sided and exact
        results[name] = {"rows": len(a), "first": one.mean(), "second": two.mean(), "difference": change.mean()}
        results[name] |= {"95 % from": low, "to": high, "sign test": f"p = {p:.3g}"}
    return results


def table(results):
    """Lines of {benchmark: {what: number}}, fractions in percent."""
    return pd.DataFrame.from_dict(results, orient="index").to_string(float_format="{:.1%}".format, na_rep="")


def main():
    args = parse_args(Args)
    if args.compare:
        print(table(compare(*args.compare)))
        return
    evaluation = Evaluation(args)
    results = {name: evaluation.run(name) for name in evaluation.parts}
    evaluation.check.close()
    retries = sum(gather_object([evaluation.retries]))
    if evaluation.rank == 0:
        protocol, without_answer = evaluation.protocol, {}
        for name, parts in evaluation.parts.items():
            without_answer[name] = sum(list(data.unusable.values()).count("has no answer") for data in parts)
        written = {"protocol": protocol, "scores": results, "memory_retries": retries}
        written |= {"rows_without_answer": without_answer}
        write_text(evaluation.output / "results.json", json.dumps(written, indent=2) + "\n")
        titles = ", ".join(data.title for data in evaluation.data)
        decoding = "greedy" if args.temperature == 0 else f"mean of {args.samples} at temperature {args.temperature}"
        pixels = f"images of {protocol['min_pixels']:,} to {protocol['max_pixels']:,} pixels"
        print(table(results))
        print(f"{args.model} on {titles}: {decoding}, {args.max_response_tokens} tokens, {pixels}")
        print(f"asked: <question> {args.instruction}\n{evaluation.output}/results.json, and every response next to it")
    evaluation.accelerator.end_training()


if __name__ == "__main__":
    main()
