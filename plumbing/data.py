"""Data: files and hub data sets -> rows -> images in RGB and texts -> prompts, and their order in training.

Not here: the model's pass over a prompt (common.py), and how a benchmark's rows become questions (eval.py).
"""

import copy
import dataclasses
import datetime
import glob
import io
import os
import random
import re
import zlib
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
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
    path, splits = Path(name), defaultdict(list)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in KINDS)
    for file in files:
        inside = file.relative_to(path)
        if not hidden(inside):
            words = re.split(r"[\W\d_]+", str(inside).lower())
            splits[next((SPLITS[word] for word in words if word in SPLITS), "train")].append(file)
    return dict(splits)


def local_files(name, split, option="--data"):
    """The files of a local file or folder: of its only split, or of `split`; [] where there are none.

    Raises UserError, which names the flag `option`, for a split that is not there.
    """
    if name in EMBEDDED:
        return [EMBEDDED[name] / f"{split}.parquet"]
    splits, wanted = local_splits(name), SPLITS.get(split, split)
    if len(splits) > 1 and wanted not in splits:
        raise UserError(
            f"{option} {name} has no split {split}; it has {', '.join(splits)}: name one with --data_split or "
            f"--eval_split of training, or give the file itself."
        )
    return splits.get(wanted) or next(iter(splits.values()), [])


def image_folders(name, split):
    """Where relative paths of images begin: the files' folder, if they share one, and then the given one."""
    folders = {file.parent for file in local_files(name, split)}
    given = Path(name) if Path(name).is_dir() else Path(name).parent
    return [*folders, given] if len(folders) == 1 else [given]


def refuse_output_among(output, *names):
    """Raises UserError where --output lies in the local folder of a data set, whose files are all read as rows."""
    for name in names:
        if name and name not in EMBEDDED and Path(name).is_dir():
            inside, folder = Path(output).resolve(), Path(name).resolve()
            if inside.is_relative_to(folder) and not hidden(inside.relative_to(folder)):
                raise UserError(f"--output {output} lies in {name}, all of which is data: name another one.")


def hidden(path):
    return any(part.startswith(".") for part in path.parts)


def version(files):
    """Eight digits that change when one of the files is written again, even with its old time.

    They name the folder of the cache: by itself `datasets` goes by path and time alone, and would return old rows.
    """
    facts = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in (file.stat() for file in files)]
    return f"{zlib.crc32(repr(facts).encode()):08x}"


def load_rows(name, split, revision="main", option="--data"):
    """Rows of a hub data set (`id` or `id:config`), or of a local file or folder: its only split, or `split`.

    Raises UserError, which names the flag `option`.
    """
    files = local_files(name, split, option)
    kinds = {KINDS.get(file.suffix) for file in files}
    if Path(name).exists() and (len(kinds) != 1 or None in kinds):
        raise UserError(f"{option} {name} must be a parquet, json or jsonl file, or a folder of files of one kind.")
    for file in files if kinds == {"json"} else ():
        with file.open("rb") as opened:
            begin = opened.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if begin not in (b"{", b"["):  # pyarrow crashes on a file that holds null
            raise UserError(f"{option} {file} must hold rows: one object a line, or a list of objects.")
    try:
        if files:
            datasets.disable_progress_bars()  # of every converted file; downloads show theirs
            paths = [glob.escape(str(file)) for file in files]  # names, not patterns
            return datasets.load_dataset(kinds.pop(), name=version(files), data_files=paths, split="train")
        identifier, _, config = name.partition(":")
        return datasets.load_dataset(identifier, config or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(cannot_open(option, name, error.__cause__ or error)) from None


class Unusable(Exception):
    """What is wrong with a row of the data, to follow "row 7"; such rows are left out, and counted."""


def listed(images):
    """The images of a cell, which holds a list or one; null and "" are none."""
    images = images if isinstance(images, list) else [images]
    nothing = (None, "", {"bytes": None, "path": ""}, {"bytes": None, "path": None})
    return [image for image in images if image not in nothing]


def open_image(source, folders):
    """An RGB image, decoded completely and turned as its EXIF data says. Raises Unusable.

    `source`: an image, the bytes of a file, a path relative to the first of the `folders` that has it, or a dict of
    bytes and path, as the datasets library has them.
    """
    try:
        if isinstance(source, dict):
            source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if isinstance(source, bytes):
            source = Image.open(io.BytesIO(source))
        if isinstance(source, str):
            paths = [folder / source for folder in folders]
            source = Image.open(next((path for path in paths if path.exists()), paths[0]))
        ImageOps.exif_transpose(source, in_place=True)
        return to_rgb(source)
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
        return image.convert("F").point(lambda value: value * (255 / white) + 0.5).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
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

    def __init__(self, name, split, args, processor, model, option="--data"):
        self.name, self.args, self.processor, self.model, self.option = name, args, processor, model, option
        self.title = f"{Path(name).name} ({split})" if name in EMBEDDED or not Path(name).is_file() else Path(name).name
        self.rows = load_rows(name, split, args.data_revision if name == args.data else "main", option)
        self.folders = image_folders(name, split)
        self.columns = {}
        for what, usual in COLUMNS.items():
            wanted = getattr(args, f"{what}_column")
            found = [column for column in ([wanted] if wanted else usual) if column in self.rows.column_names]
            if not found and (what != "image" or wanted):
                raise UserError(
                    f"{option} {name} has no {what} column ({wanted or ' or '.join(usual)}); it has "
                    f"{', '.join(self.rows.column_names)}: name the right one with --{what}_column."
                )
            self.columns[what] = found if what == "image" else found[0]  # merged data sets have images in both
        self.measure()

    @property
    def has_images(self):
        return bool(self.columns["image"])

    @cached_property
    def control_tokens(self):
        added = self.processor.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        return special | {self.processor.image_token, self.processor.video_token}

    def measure(self):
        """Reads every row. Up to 1 % may be unusable, and are left out. Prompts that are too long are dropped."""
        for column, feature in self.rows.features.items():  # keeps the bytes, an image is opened by `row`
            as_list = hasattr(feature, "feature")
            kind = type(feature.feature if as_list else feature)
            if kind in (datasets.Image, datasets.Video):
                raw = kind(decode=False)
                self.rows = self.rows.cast_column(column, datasets.List(raw) if as_list else raw)
        rows, self.tokens, self.unusable, self.checksum = len(self.rows), {}, {}, 0
        pool, silent = ThreadPoolExecutor(), os.environ.get("RANK", "0") != "0"
        looked = [pool.submit(self.look, i) for i in range(rows)]
        try:
            for i, row in enumerate(tqdm(looked, self.name, leave=False, delay=2, unit="row", disable=silent)):
                try:
                    problem, sizes, answer = row.result()
                    self.tokens[i] = self.prompt_tokens(problem, sizes)
                    self.checksum = zlib.crc32(f"{i} {problem} {answer}".encode(errors="replace"), self.checksum)
                except (Unusable, ValueError) as error:  # ValueError: no UTF-8, or an image too wide
                    self.unusable[i] = str(error)
        finally:
            pool.shutdown(cancel_futures=True)
        if len(self.unusable) > 0.01 * rows:
            raise UserError(
                f"{self.option} {self.name}: {self.describe_unusable('cannot be used')}: fix or remove them."
            )
        limit = self.args.max_prompt_tokens
        self.indices = [i for i, length in self.tokens.items() if length <= limit]
        self.dropped = len(self.tokens) - len(self.indices)
        if not self.indices:
            raise UserError(
                f"{self.option} {self.name} has no row left to use ({self.dropped} were longer than "
                f"--max_prompt_tokens {limit})."
            )
        decoder, longest = self.model.config.text_config, self.longest_tokens + self.args.max_response_tokens
        limit = decoder.max_position_embeddings
        if decoder.rope_parameters.get("rope_type") == "dynamic" and longest > limit:  # rotary frequencies would change
            raise UserError(
                f"prompt and response of up to {longest} tokens in {self.name} do not fit --model's {limit} positions: "
                f"lower --max_prompt_tokens or --max_response_tokens."
            )

    def look(self, index):
        """(problem, (height, width) of each image, answer). Raises Unusable."""
        problem, images, answer = self.row(index)
        return problem, [(image.height, image.width) for image in images], answer

    def describe_unusable(self, verb):
        """How many rows cannot be used, and the first three by number with the reason."""
        reasons = [f"row {index} {why}" for index, why in self.unusable.items()]
        more = "; ..." if len(reasons) > 3 else ""
        return f"{len(reasons)} of {len(self.rows)} rows {verb} ({'; '.join(reasons[:3])}{more})"

    def __str__(self):
        text = f"{self.title}: {len(self)} prompts, {self.dropped} dropped as too long"
        if not self.has_images:
            text += ", no column of images"
        return f"{text}; {self.describe_unusable('left out')}" if self.unusable else text

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
        several = len(local_splits(name)) > 1  # of a single split all rows are for training, whatever its name
        if args.eval_data or name in EMBEDDED or not Path(name).exists() or several:
            split = "test" if name in EMBEDDED else args.eval_split
            option = "--eval_data" if args.eval_data else "--data"
            return Data(name, split, args, self.processor, self.model, option)
        if len(self) < 10:
            return None
        held = copy.copy(self)
        held.indices = some_of(self.indices, min(len(self) // 10, 500), f"held out {args.seed}")
        held.title, held.dropped, held.unusable = f"rows held out of {self.title}", 0, {}
        self.indices = sorted(set(self.indices) - set(held.indices))
        return held

    def fields(self, index):
        """(problem, images, answer) as a row has them. Raises Unusable."""
        row = self.rows[index]
        filled = [images for column in self.columns["image"] if (images := listed(row[column]))]
        problem, answer = row[self.columns["problem"]], row[self.columns["answer"]]
        feature = self.rows.features[self.columns["answer"]]
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
        if marked and not self.has_images:
            raise Unusable("says <image>, and no column is called images or image: set --image_column")
        if marked not in (0, len(images)):
            raise Unusable(f"says <image> {marked} times and has {len(images)} images")
        opened = [open_image(image, self.folders) for image in images]
        return problem if marked else "<image>" * len(opened) + problem, opened, answer

    def prompt_tokens(self, problem, sizes):
        """Length of a prompt, from its text and the (height, width) of its images."""
        tokens = self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        ids = self.processor.tokenizer(prompt_text(self.processor, problem, self.args.instruction)).input_ids
        return len(ids) - len(sizes) + sum(tokens)

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
