"""Data: files and hub data sets -> rows -> images in RGB and texts -> prompts, and their order in training.

Not here: the model's pass over a prompt (common.py), and how a benchmark's rows become questions (eval.py).
"""

import copy
import dataclasses
import datetime
import glob
import io
import itertools
import os
import random
import re
import zlib
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from plumbing.arguments import EMBEDDED, UserError, cannot_open
from plumbing.families import prompt_tensors

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
SPLITS = {"test": "test", "eval": "test", "holdout": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def local_splits(name):
    """{split: files} of a local file or folder, {} where there is none: "test-00001.parquet" is of the split test.

    A file is one split, train; so are files of a folder whose names do not tell. Hidden files are no data.
    """
    if name in EMBEDDED:
        return {split: [EMBEDDED[name] / f"{split}.parquet"] for split in ("train", "test")}
    path, splits = Path(name), defaultdict(list)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in KINDS)
    for file in files:
        inside = file.relative_to(path)
        if not hidden(inside):
            words = re.split(r"[\W\d_]+", str(inside).lower())
            splits[next((SPLITS[word] for word in words if word in SPLITS), "train")].append(file)
    return splits


def hidden(path):
    return any(part.startswith(".") for part in path.parts)


def refuse_output_among(output, *names):
    """Raises UserError where --output lies in the local folder of a data set, whose files are all read as rows."""
    for name in names:
        if name and name not in EMBEDDED and Path(name).is_dir():
            inside, folder = Path(output).resolve(), Path(name).resolve()
            if inside.is_relative_to(folder) and not hidden(inside.relative_to(folder)):
                raise UserError(f"--output {output} lies in {name}, all of which is data: name another one.")


def local_files(name, split):
    """The files of a local file or folder: of its only split, or of `split`; [] where there are none.

    Raises UserError for a split that is not there, and for files of other kinds.
    """
    splits, wanted = local_splits(name), SPLITS.get(split, split)
    if len(splits) > 1 and wanted not in splits:
        raise UserError(
            f"data {name} has no split {split}; it has {', '.join(splits)}: name one with --data_split or --eval_split "
            f"of training, or give the file itself."
        )
    files = splits[wanted] if wanted in splits else list(itertools.chain(*splits.values()))
    kinds = {KINDS.get(file.suffix) for file in files}
    if Path(name).exists() and (len(kinds) != 1 or None in kinds):
        raise UserError(f"data {name} must be a parquet, json or jsonl file, or a folder of files of one kind.")
    return files


def load_rows(name, split, revision="main"):
    """Rows of a hub data set (`id` or `id:config`), or of a local file or folder: its only split, or `split`."""
    files = local_files(name, split)
    for file in (file for file in files if KINDS[file.suffix] == "json"):
        with file.open("rb") as opened:
            begin = opened.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n")
        if begin[:1] not in (b"{", b"["):  # of an empty file datasets says nothing; on null pyarrow crashes
            raise UserError(f"data {file} must hold rows: one object a line, or a list of objects.")
    try:
        if not files:
            identifier, _, config = name.partition(":")
            return datasets.load_dataset(identifier, config or None, split=split, revision=revision)
        datasets.disable_progress_bars()  # of every converted file; downloads show theirs
        # the cache gets a name from sizes and times: by itself `datasets` goes by one time, and would return old rows
        facts = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in map(Path.stat, files)]
        cache = f"{zlib.crc32(repr(facts).encode()):08x}"
        paths = [glob.escape(str(file)) for file in files]  # names, not patterns
        return datasets.load_dataset(KINDS[files[0].suffix], name=cache, data_files=paths, split="train")
    except Exception as error:  # the libraries raise many types
        raise UserError(cannot_open("data", name, error.__cause__ or error)) from None


class Unusable(Exception):
    """What is wrong with a row of the data, to follow "row 7"; such rows are left out, and counted."""


def listed(images):
    """The images of a cell, which holds a list or one; null and "" are none."""
    images = images if isinstance(images, list) else [images]
    nothing = (None, "", {"bytes": None, "path": ""}, {"bytes": None, "path": None})
    return [image for image in images if image not in nothing]


def open_image(source, folders):
    """An RGB image, decoded completely and turned as its EXIF data says. Raises Unusable.

    `source`: the bytes of a file, a path relative to the first of the `folders` that has it, or a dict of both, as the
    datasets library has them.
    """
    try:
        if isinstance(source, dict):
            source = source["path"] if source.get("bytes") is None else source["bytes"]
        if isinstance(source, str):
            paths = [folder / source for folder in folders]
            source = next((path for path in paths if path.exists()), paths[0])
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's errors of damaged files are of many types
        raise Unusable(f"has an image that cannot be read ({str(error)[:120]})") from None


def to_rgb(image):
    """Any mode to RGB: transparency becomes white; 16 bits and floats are scaled by their range, [0, 65535] or [0, 1].

    Integers and floats up to 255 that are not declared as 16 bits stay as they are. Raises ValueError beyond the range.
    """
    if image.mode == "F" or image.mode.startswith("I"):  # `convert` would cut them off at 255
        low, high = image.getextrema()
        white = 255
        if image.mode.startswith("I;16") or (image.mode == "I" and high > 255):
            white = 65535
        elif image.mode == "F" and high <= 1:
            white = 1
        if not (low >= 0 and high <= white):
            raise ValueError(f"values from {low:g} to {high:g}: save it with 8 bits")
        image = image.convert("F").point(lambda value: value * (255 / white) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


COLUMNS = {
    "image": ("images", "image"),
    "problem": ("problem", "question", "query"),
    "answer": ("answer", "solution", "ground_truth"),
}


@dataclass
class Prompt:
    """One question, ready for the model.

    input_ids (Lp,); position_ids (3, Lp), Qwen-VL's temporal, height and width positions, or (1, Lp); pixel_values
    (patches, C) and image_grid_thw (images, 3), both None without images: see families.py.
    """

    index: int  # row of the data set: with seed, step and prompt_id it determines every sampled token
    problem: str
    answer: str
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    image_mask: torch.Tensor  # (Lp,) True on image tokens
    opened: str = ""  # "<think>" where the chat template ends with it: a response begins inside
    prompt_id: int = 0  # its number in the stream of prompts


def prompt_text(processor, problem, instruction):
    """The chat template around a question with `<image>` at the place of each image, and the instruction after it."""
    content = []
    for text in re.split("(<image>)", f"{problem}\n{instruction}"):
        if text:
            content.append({"type": "image"} if text == "<image>" else {"type": "text", "text": text})
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def plain_text(value, what):
    """A question or an answer as a string. Raises Unusable for None, NaN, blanks, and lists.

    >>> plain_text(30.0, "answer"), plain_text(0.1, "answer"), plain_text(np.float32(0.1), "answer")
    ('30', '0.1', '0.1')
    """
    if value is None or value != value or not str(value).strip():
        raise Unusable(f"has no {what}")
    if isinstance(value, list | dict | bytes):
        raise Unusable(f"has a {type(value).__name__} for its {what}, not a text")
    if isinstance(value, datetime.date):
        return str(value).removesuffix(" 00:00:00")  # datasets reads a date in a json file as a time
    if isinstance(value, float | np.floating) and value.is_integer():
        return str(int(value))
    return str(value)


class Data:
    """A data set as prompts, of training and of evaluation: finds the columns, reads every row once, builds prompts.

    `tokens` {usable row: length of its prompt}, `indices` the usable rows that are not too long, `dropped` the number
    of those that are, `unusable` {row: why}.
    """

    def __init__(self, name, split, args, processor, model):
        self.name, self.args, self.processor, self.model, path = name, args, processor, model, Path(name)
        self.title = path.name if path.is_file() and name not in EMBEDDED else f"{path.name} ({split})"
        self.rows = load_rows(name, split, args.data_revision if name == args.data else "main")
        self.raw = self.rows.with_format("arrow")  # an image keeps its bytes, and is opened by `row`
        # where paths of images begin: in the files' folder, if they share one, and then in the given one
        folders = {file.parent for file in local_files(name, split)}
        self.folders = [*(folders if len(folders) == 1 else []), path if path.is_dir() else path.parent]
        self.columns = self.find_columns()
        added = processor.tokenizer.added_tokens_decoder.values()
        self.control_tokens = {str(token) for token in added if token.special}
        self.control_tokens |= {processor.image_token, processor.video_token}
        self.measure()

    def find_columns(self):
        """{"problem": column, "answer": column, "image": columns}: merged data sets have two of images."""
        columns, there = {}, self.rows.column_names
        for what, usual in COLUMNS.items():
            wanted = getattr(self.args, f"{what}_column")
            found = [column for column in ([wanted] if wanted else usual) if column in there]
            if not found and (what != "image" or wanted):
                raise UserError(
                    f"data {self.name} has no {what} column ({wanted or ' or '.join(usual)}); it has "
                    f"{', '.join(there)}: name the right one with --{what}_column."
                )
            columns[what] = found if what == "image" else found[0]
        return columns

    def measure(self):
        """Reads every row. Up to 1 % may be unusable, and are left out. Prompts that are too long are dropped."""

        def look(index):
            problem, images, answer = self.row(index)
            return problem, [(image.height, image.width) for image in images], answer

        rows, self.tokens, self.unusable, self.checksum = len(self.rows), {}, {}, 0
        pool, silent = ThreadPoolExecutor(), os.environ.get("RANK", "0") != "0"
        looked = [pool.submit(look, i) for i in range(rows)]
        try:
            for i, row in enumerate(tqdm(looked, self.name, leave=False, delay=2, unit="row", disable=silent)):
                try:
                    problem, sizes, answer = row.result()
                    text = prompt_text(self.processor, problem, self.args.instruction)
                    images = self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
                    self.tokens[i] = len(self.processor.tokenizer(text).input_ids) - len(sizes) + sum(images)
                    self.checksum = zlib.crc32(f"{i} {problem} {answer}".encode(errors="replace"), self.checksum)
                except (Unusable, ValueError) as error:  # ValueError: no UTF-8, or an image too wide
                    self.unusable[i] = str(error)
        finally:
            pool.shutdown(cancel_futures=True)
        if len(self.unusable) > 0.01 * rows:
            raise UserError(f"data {self.name}: {self.left_out()}: fix or remove them.")
        limit = self.args.max_prompt_tokens
        self.indices = [i for i, length in self.tokens.items() if length <= limit]
        self.dropped = len(self.tokens) - len(self.indices)
        if not self.indices:
            raise UserError(f"data {self.name} has no row of at most --max_prompt_tokens {limit}, of {self.dropped}.")
        decoder, longest = self.model.config.text_config, self.longest_tokens + self.args.max_response_tokens
        limit = decoder.max_position_embeddings
        if decoder.rope_parameters.get("rope_type") == "dynamic" and longest > limit:  # rotary frequencies would change
            raise UserError(
                f"prompt and response of up to {longest} tokens in {self.name} do not fit --model's {limit} positions: "
                f"lower --max_prompt_tokens or --max_response_tokens."
            )

    def left_out(self):
        """How many rows cannot be used, and the first three by number with the reason."""
        reasons = [f"row {index} {why}" for index, why in self.unusable.items()][:3]
        more = "; ..." if len(self.unusable) > 3 else ""
        return f"{len(self.unusable)} of {len(self.rows)} rows left out ({'; '.join(reasons)}{more})"

    def __str__(self):
        text = f"{self.title}: {len(self)} prompts, {self.dropped} dropped as too long"
        if not self.columns["image"]:
            text += ", no column of images"
        return f"{text}; {self.left_out()}" if self.unusable else text

    @property
    def contents(self):
        """Number of prompts, and a checksum of all texts, not of images: a resumed run compares it."""
        return f"{len(self)} ({self.checksum:08x})"

    def __len__(self):
        return len(self.indices)

    @property
    def longest_row(self):
        """The row of the longest prompt."""
        return max(self.indices, key=self.tokens.__getitem__)

    @property
    def longest_tokens(self):
        return self.tokens[self.longest_row]

    def for_evaluation(self):
        """The data that a run on this data set is evaluated on: --eval_data, another split, or rows that are held out.

        None where a local file has fewer than 10 rows.
        """
        args, name = self.args, self.args.eval_data or self.name
        if args.eval_data or len(local_splits(name)) != 1:  # of a single split all rows are for training
            return Data(name, args.eval_split, args, self.processor, self.model)
        if len(self) < 10:
            return None
        held = copy.copy(self)
        held.indices = some_of(self.indices, min(len(self) // 10, 500), f"held out {args.seed}")
        held.title, held.dropped, held.unusable = f"rows held out of {self.title}", 0, {}
        self.indices = sorted(set(self.indices) - set(held.indices))
        return held

    def fields(self, index):
        """(problem, images, answer) as a row has them. Raises Unusable."""
        (row,), feature = self.raw[index].to_pylist(), self.rows.features[self.columns["answer"]]
        problem, answer = row[self.columns["problem"]], row[self.columns["answer"]]
        filled = [images for column in self.columns["image"] if (images := listed(row[column]))]
        if isinstance(feature, datasets.ClassLabel) and isinstance(answer, int):
            answer = feature.int2str(answer) if answer >= 0 else None
        if isinstance(answer, float) and feature.dtype in ("float16", "float32"):
            answer = getattr(np, feature.dtype)(answer)  # prints 0.1 where the float is 0.10000000149011612
        if listed(row.get("video")) or listed(row.get("videos")) or "<video>" in str(problem):
            raise Unusable("asks about a video, and only images can be used")
        return problem, filled[0] if filled else [], answer

    def row(self, index):
        """(problem, with `<image>` for each image; images in RGB; answer). Raises Unusable."""
        problem, images, answer = self.fields(index)
        problem, answer = plain_text(problem, "question"), plain_text(answer, "answer")
        for token in self.control_tokens:
            if token in problem:
                raise Unusable(f"has {token} in its question, which is a control token of the model")
        marked = problem.count("<image>")
        if marked not in (0, len(images)):
            hint = "" if self.columns["image"] else ": no column is called images or image, set --image_column"
            raise Unusable(f"says <image> {marked} times and has {len(images)} images{hint}")
        opened = [open_image(image, self.folders) for image in images]
        return problem if marked else "<image>" * len(opened) + problem, opened, answer

    def prompt(self, index):
        problem, images, answer = self.row(index)
        text = prompt_text(self.processor, problem, self.args.instruction)
        options = {"truncation": False, "padding": False, "return_tensors": "pt"}  # a tokenizer.json may have others
        made = self.processor(text=[text], images=images or None, **options)
        ids, tensors = made["input_ids"][0], prompt_tensors(self.model, self.processor.image_processor, made, images)
        opened = "<think>" if text.rstrip().endswith("<think>") else ""
        return Prompt(index, problem, answer, ids, *tensors, ids == self.model.config.image_token_id, opened)


def some_of(order, rows, seed):
    """So many `rows` of a list, chosen by the seed, in order; all for 0 and -1, and where the list has no more."""
    return sorted(random.Random(seed).sample(order, rows)) if 0 < rows < len(order) else order


class Stream:
    """The endless, seeded order of a data set. Each process takes its turn, so the order is that of one process.

    Threads open images and cut them into patches, one draw ahead.
    """

    def __init__(self, data, seed, rank=0, world_size=1, position=0):
        self.data, self.seed, self.rank, self.world_size = data, seed, rank, world_size
        self.position = position  # prompts drawn so far, all processes together
        self.pool, self.ahead, self.order = ThreadPoolExecutor(4), deque(), {}

    def index(self, prompt_id):
        """The row of the data set for the prompt of this number."""
        epoch, offset = divmod(prompt_id, len(self.data))
        if epoch not in self.order:
            shuffled = list(self.data.indices)
            random.Random(f"{self.seed} {epoch}").shuffle(shuffled)
            self.order[epoch] = shuffled
        return self.order[epoch][offset]

    def draw(self, count):
        """This process's share of the next `count` prompts, each with its number in the stream."""
        while len(self.ahead) < 2 * count // self.world_size:
            prompt_id = self.position + len(self.ahead) * self.world_size + self.rank
            self.ahead.append((prompt_id, self.pool.submit(self.data.prompt, self.index(prompt_id))))
        self.position += count
        drawn = [self.ahead.popleft() for _ in range(count // self.world_size)]
        return [dataclasses.replace(future.result(), prompt_id=prompt_id) for prompt_id, future in drawn]
