"""Rows of any usual schema -> prompts: columns, the chat template, what is too long or cannot be used.

Not here: files and hub sets (rows.py), how a picture is opened (pictures.py), the order in which training sees prompts
(stream.py), what a model makes of one (common.py), and how a benchmark's rows become questions (eval.py).
"""

import copy
import datetime
import os
import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from plumbing.arguments import EMBEDDED
from plumbing.commandline import UserError
from plumbing.families import prompt_tensors
from plumbing.pictures import Unusable, listed, open_picture
from plumbing.rows import load_rows, local_splits, picture_folders

COLUMNS = {
    "image": ("images", "image"),
    "problem": ("problem", "question", "query"),
    "answer": ("answer", "solution", "ground_truth"),
}


@dataclass
class Prompt:
    """One question, ready for the model.

    input_ids (Lp,); position_ids (3, Lp), Qwen-VL's temporal, height and width positions, or (1, Lp); pixel_values
    (patches, C) and image_grid_thw (pictures, 3), both None where there is none: see families.py.
    """

    index: int  # row of the data set: with seed, step and serial it determines every sampled token
    problem: str
    answer: str
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    image_mask: torch.Tensor  # (Lp,) True on image tokens
    opened: str = ""  # "<think>" where the chat template has written that already: a response begins inside
    serial: int = 0  # its number in the stream of prompts


def prompt_text(processor, problem, instruction):
    """The chat template around a question with `<image>` at the place of each picture, and the instruction after it."""
    content = []
    for i, text in enumerate(f"{problem}\n{instruction}".split("<image>")):
        content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}] * bool(text)
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def plain_text(value, what):
    """A question or an answer as a string. Raises Unusable for None, NaN, blanks, and what has no usual text.

    >>> plain_text(30.0, "answer"), plain_text(0.1, "answer"), plain_text(np.float32(0.1), "answer")
    ('30', '0.1', '0.1')
    """
    if value is None or value != value or not str(value).strip():
        raise Unusable(f"has no {what}")
    if not isinstance(value, str | int | float | np.floating | Decimal | datetime.date | datetime.time):
        raise Unusable(f"has a {type(value).__name__} for its {what}, not a text")
    if isinstance(value, datetime.date):
        return str(value).removesuffix(" 00:00:00")  # datasets takes a date in a json file for a time
    whole = isinstance(value, float | np.floating) and value.is_integer() and abs(float(value)) < 2**53
    return str(int(value) if whole else value)


class Data:
    """A data set as prompts: finds the columns, reads every row once, builds the prompts.

    Training and evaluation build their prompts here and nowhere else. `tokens` {row: length of its prompt} of the rows
    that can be used, `indices` those of them that are not too long, `dropped` how many are, `unusable` {row: why}.
    """

    def __init__(self, name, split, args, processor, model, option="--data"):
        self.name, self.args, self.processor, self.model, self.option = name, args, processor, model, option
        self.title = f"{Path(name).name} ({split})" if name in EMBEDDED or not Path(name).is_file() else Path(name).name
        self.rows = load_rows(name, split, args.data_revision if name == args.data else "main", option)
        self.folders = picture_folders(name, split)
        self.columns = {}
        for what, usual in COLUMNS.items():
            wanted = getattr(args, f"{what}_column")
            found = [column for column in ([wanted] if wanted else usual) if column in self.rows.column_names]
            if not found and (what != "image" or wanted):
                raise UserError(
                    f"{option} {name} has no {what} column ({wanted or ' or '.join(usual)}); it has "
                    f"{', '.join(self.rows.column_names)}: name the right one with --{what}_column."
                )
            self.columns[what] = found if what == "image" else found[0]  # merged sets have images in either
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
        """Reads every row: what cannot be used is left out, up to 1 % of the rows, what is too long is dropped."""
        for column, feature in self.rows.features.items():  # keep the bytes: a picture is opened when its turn comes
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
                except Unusable as error:
                    self.unusable[i] = str(error)
        finally:
            pool.shutdown(cancel_futures=True)
        if len(self.unusable) > 0.01 * rows:
            raise UserError(f"{self.option} {self.name}: {self.say_unusable('cannot be used')}: mend or remove them.")
        most = self.args.max_prompt_tokens
        self.indices = [i for i, length in self.tokens.items() if length <= most]
        self.dropped = len(self.tokens) - len(self.indices)
        if not self.indices:
            raise UserError(
                f"{self.option} {self.name} has no row left to use ({self.dropped} were longer than "
                f"--max_prompt_tokens {most})."
            )
        longest, decoder = self.longest_tokens + self.args.max_response_tokens, self.model.config.text_config
        grows = decoder.rope_parameters.get("rope_type") == "dynamic"  # rotary frequencies change in longer rows
        if grows and longest > (most := decoder.max_position_embeddings):
            said = f"prompt and response of up to {longest} tokens in {self.name} do not fit --model's {most} positions"
            raise UserError(f"{said}: lower --max_prompt_tokens or --max_response_tokens.")

    def look(self, index):
        """(problem, (height, width) of each picture, answer). Raises Unusable."""
        problem, images, answer = self.row(index)
        return problem, [(image.height, image.width) for image in images], answer

    def say_unusable(self, verb):
        """How many rows cannot be used, and the first three by number with the reason."""
        said = [f"row {index} {why}" for index, why in self.unusable.items()]
        return f"{len(said)} of {len(self.rows)} rows {verb} ({'; '.join(said[:3])}{'; ...' if said[3:] else ''})"

    def __str__(self):
        said = f"{self.title}: {len(self)} prompts, {self.dropped} dropped as too long"
        said += "" if self.has_images else ", no column of images"
        return f"{said}; {self.say_unusable('left out')}" if self.unusable else said

    @property
    def contents(self):
        """Number of prompts, and a checksum of all texts, not of pictures: for a resumed run to find again."""
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
        """What a run on this data set is evaluated on: --eval_data, the other split, or rows that are held out.

        None where a local file has fewer than 10 rows: none can be spared.
        """
        args, name = self.args, self.args.eval_data or self.name
        several = len(local_splits(name)) > 1  # of a single split all rows are trained on, whatever it is called
        if args.eval_data or name in EMBEDDED or not Path(name).exists() or several:
            split = "test" if name in EMBEDDED else args.eval_split
            option = "--eval_data" if args.eval_data else "--data"
            return Data(name, split, args, self.processor, self.model, option)
        return self.hold_out(min(len(self) // 10, 500), args.seed) if len(self) >= 10 else None

    def hold_out(self, rows, seed):
        """Takes so many rows, chosen by the seed, out of this data set; returns them as a data set of their own."""
        held = copy.copy(self)
        held.indices = some_of(self.indices, rows, f"held out {seed}")
        held.title, held.dropped, held.unusable = f"rows held out of {self.title}", 0, {}
        self.indices = sorted(set(self.indices) - set(held.indices))
        return held

    def fields(self, index):
        """(problem, images, answer) as they stand in a row. Raises Unusable."""
        try:
            row = self.rows[index]
        except UnicodeDecodeError:
            raise Unusable("is not in UTF-8") from None
        filled = [images for column in self.columns["image"] if (images := listed(row[column]))]
        problem, answer = row[self.columns["problem"]], row[self.columns["answer"]]
        feature = self.rows.features[self.columns["answer"]]
        if isinstance(feature, datasets.ClassLabel) and isinstance(answer, int):
            answer = feature.int2str(answer) if answer >= 0 else None
        if isinstance(answer, float) and feature.dtype in ("float16", "float32"):
            answer = getattr(np, feature.dtype)(answer)  # which writes 0.1 for what comes as 0.10000000149011612
        if listed(row.get("video")) or listed(row.get("videos")) or "<video>" in str(problem):
            raise Unusable("asks about a video, and only images are shown here")
        return problem, filled[0] if filled else [], answer

    def row(self, index):
        """(problem, images in RGB, answer), with a place for each image. Raises Unusable."""
        problem, images, answer = self.fields(index)
        problem, answer = plain_text(problem, "question"), plain_text(answer, "answer")
        if found := [token for token in self.control_tokens if token in problem]:
            raise Unusable(f"has {found[0]} in its question, which is a control token of the model")
        marked = problem.count("<image>")
        if marked and not self.has_images:
            usual = " or ".join(COLUMNS["image"])
            raise Unusable(f"says <image>, and no column is called {usual}: name the right one with --image_column")
        if marked not in (0, len(images)):
            raise Unusable(f"says <image> {marked} times and has {len(images)} images")
        opened = [open_picture(image, self.folders) for image in images]
        return problem if marked else "<image>" * len(opened) + problem, opened, answer

    def prompt_tokens(self, problem, sizes):
        """Length of a prompt, from its text and the (height, width) of its pictures. Raises Unusable."""
        try:
            tokens = self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        except ValueError as error:  # 200 times as wide as high
            raise Unusable(f"has an image that cannot be used ({error})") from None
        ids = self.processor.tokenizer(prompt_text(self.processor, problem, self.args.instruction)).input_ids
        return len(ids) - len(sizes) + sum(tokens)

    def prompt(self, index):
        problem, images, answer = self.row(index)
        text = prompt_text(self.processor, problem, self.args.instruction)
        whole = {"truncation": False, "padding": False, "return_tensors": "pt"}  # whatever a tokenizer.json has stored
        made = self.processor(text=[text], images=images or None, **whole)
        ids, tensors = made["input_ids"][0], prompt_tensors(self.model, self.processor.image_processor, made, images)
        opened = "<think>" if text.rstrip().endswith("<think>") else ""
        return Prompt(index, problem, answer, ids, *tensors, ids == self.model.config.image_token_id, opened)


def some_of(order, rows, seed):
    """So many of a list, chosen by the seed, in their order; all of it where it has no more, and for 0 and -1."""
    return sorted(random.Random(seed).sample(order, rows)) if 0 < rows < len(order) else order
