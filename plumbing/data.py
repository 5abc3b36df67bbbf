"""Rows of any usual schema -> prompts, and the endless order in which training sees them.

Columns, pictures of any mode, the chat template, what is too long. Not here: what a model makes of a prompt
(common.py), and how the rows of a benchmark become questions (eval.py).
"""

import dataclasses
import io
import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from plumbing.arguments import TOY, UserError, cannot_open

COLUMNS = {
    "image": ("images", "image"),
    "problem": ("problem", "question", "query"),
    "answer": ("answer", "solution", "ground_truth"),
}


@dataclass
class Prompt:
    """One question, ready for the model.

    input_ids (Lp,); position_ids (3, Lp), Qwen-VL's temporal, height and width positions; pixel_values (patches, C) and
    image_grid_thw (images, 3), both None where there is no image.
    """

    index: int  # row of the data set: with seed, step and serial it determines every sampled token
    problem: str
    answer: str
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    image_mask: torch.Tensor  # (Lp,) True on image tokens
    serial: int = 0  # its number in the stream of prompts


def load_rows(name, split, revision, option="--data"):
    """Rows of a hub data set (`id` or `id:config`), or of a local parquet, json or jsonl file or folder.

    `option` is the flag that a UserError names.
    """
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
    path = TOY / f"{split}.parquet" if name == "toy" else Path(name)
    try:
        if not path.exists():
            identifier, _, config = name.partition(":")
            return datasets.load_dataset(identifier, config or None, split=split, revision=revision)
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in kinds)
        found = {kinds.get(f.suffix) for f in files}
        if len(found) != 1 or None in found:
            raise UserError(f"{option} {name} must be a parquet, json or jsonl file, or a folder of files of one kind.")
        return datasets.load_dataset(found.pop(), data_files=[str(f) for f in files], split="train")
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, StopIteration) or "no data" in str(error):
            raise UserError(f"{option} {name} has no rows: give a file with some.") from None
        raise UserError(cannot_open(option, name, error)) from None


def prompt_text(processor, problem, instruction):
    """The chat template around a question with `<image>` at the place of each picture, and the instruction after it."""
    content = []
    for i, text in enumerate(f"{problem}\n{instruction}".split("<image>")):
        content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}] * bool(text)
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


class Data:
    """A data set as prompts: finds the columns, drops over-long prompts, opens pictures, builds the prompt.

    Training and evaluation build their prompts here and nowhere else.
    """

    def __init__(self, name, split, args, processor, rope_index, option="--data"):
        self.name, self.args, self.processor, self.rope_index, self.option = name, args, processor, rope_index, option
        self.rows = load_rows(name, split, args.data_revision, option)
        self.folder = Path(name) if Path(name).is_dir() else Path(name).parent
        self.columns = {}
        for what, usual in COLUMNS.items():
            wanted = getattr(args, f"{what}_column")
            found = [column for column in ([wanted] if wanted else usual) if column in self.rows.column_names]
            if not found and (what != "image" or wanted):
                raise UserError(
                    f"{option} {name} has no {what} column ({wanted or ' or '.join(usual)}); it has "
                    f"{', '.join(self.rows.column_names)}: name the right one with --{what}_column."
                )
            self.columns[what] = found[0] if found else None
        self.measure()

    def measure(self):
        """Lengths of all prompts, without decoding a picture; drops, and counts, those that are too long."""
        name, args, option = self.name, self.args, self.option
        for column, feature in self.rows.features.items():  # keep the bytes: a picture is opened when its turn comes
            as_list = hasattr(feature, "feature")
            if isinstance(feature.feature if as_list else feature, ImageFeature):
                raw = ImageFeature(decode=False)
                self.rows = self.rows.cast_column(column, datasets.List(raw) if as_list else raw)
        tokens = [self.prompt_tokens(i) for i in range(len(self.rows))]
        self.indices = [i for i, length in enumerate(tokens) if length <= args.max_prompt_tokens]
        self.dropped = len(self.rows) - len(self.indices)
        self.longest_row = max(self.indices, key=tokens.__getitem__, default=None)
        self.longest_tokens = max((tokens[i] for i in self.indices), default=0)
        if not self.indices:
            raise UserError(
                f"{option} {name} has no row left to use ({self.dropped} were longer than --max_prompt_tokens "
                f"{args.max_prompt_tokens})."
            )

    def __len__(self):
        return len(self.indices)

    def fields(self, index):
        """(problem, images, answer) as they stand in a row."""
        row = self.rows[index]
        images = row[self.columns["image"]] if self.columns["image"] else None
        images = images if isinstance(images, list) else [] if images is None else [images]
        return str(row[self.columns["problem"]]), images, str(row[self.columns["answer"]])

    def row(self, index):
        """(problem, images, answer) of a row, with a place for each picture; the pictures are not decoded yet."""
        problem, images, answer = self.fields(index)
        opened = [self.open_image(image, index) for image in images]
        marked = problem.count("<image>")
        if marked == 0:
            problem = "<image>" * len(opened) + problem
        elif marked != len(opened):
            raise UserError(
                f"row {index} of {self.name} says <image> {marked} times and has {len(opened)} images: make them agree."
            )
        return problem, opened, answer

    def open_image(self, image, index):
        try:
            if isinstance(image, dict) and image.get("bytes") is not None:
                image = io.BytesIO(image["bytes"])
            elif isinstance(image, dict):
                image = self.folder / image["path"]
            elif isinstance(image, bytes):
                image = io.BytesIO(image)
            elif isinstance(image, str):
                image = self.folder / image
            opened = image if isinstance(image, Image.Image) else Image.open(image)
            if opened.format != "PNG":  # looking for EXIF data would decode a PNG here already
                ImageOps.exif_transpose(opened, in_place=True)
            return opened
        except (OSError, TypeError, KeyError) as error:
            raise UserError(f"row {index} of {self.name} has an image that cannot be read ({error}).") from None

    def prompt_tokens(self, index):
        """Length of a row's prompt, from the sizes of its pictures alone."""
        problem, images, _ = self.row(index)
        pictures = self.processor.image_processor
        try:
            patches = sum(pictures.get_number_of_image_patches(image.height, image.width) for image in images)
        except ValueError as error:  # 200 times as wide as high
            raise UserError(f"row {index} of {self.name} has an image that cannot be used ({error}).") from None
        text = prompt_text(self.processor, problem, self.args.instruction)
        return len(self.processor.tokenizer(text).input_ids) - len(images) + patches // pictures.merge_size**2

    def prompt(self, index):
        problem, images, answer = self.row(index)
        try:
            images = [to_rgb(image) for image in images]
        except OSError as error:
            raise UserError(f"row {index} of {self.name} has an image that cannot be read ({error}).") from None
        text = prompt_text(self.processor, problem, self.args.instruction)
        made = self.processor(text=[text], images=images or None, return_tensors="pt")
        grid = made.get("image_grid_thw")
        if grid is None:
            positions = torch.arange(made["input_ids"].shape[1]).expand(3, -1)
        else:
            positions = self.rope_index(made["input_ids"], made["mm_token_type_ids"], image_grid_thw=grid)[0][:, 0]
        ids, is_image = made["input_ids"][0], made["mm_token_type_ids"][0] == 1
        return Prompt(index, problem, answer, ids, positions, made.get("pixel_values"), grid, is_image)


def some_of(order, rows, seed):
    """So many of a list, chosen by the seed, in their order; all of it where it has no more, and for -1."""
    return sorted(random.Random(seed).sample(order, rows)) if 0 < rows < len(order) else order


def to_rgb(image):
    """Any mode to RGB; what is transparent becomes white, as on the page the diagram was made for."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class Stream:
    """The endless, seeded order of a data set; each process takes its turn, so the order is that of one process.

    Pictures are opened and cut into patches in threads, one draw ahead.
    """

    def __init__(self, data, seed, rank=0, world_size=1, position=0):
        self.data, self.seed, self.rank, self.world_size = data, seed, rank, world_size
        self.position = position  # prompts drawn so far, all processes together
        self.pool, self.ahead, self.order = ThreadPoolExecutor(4), deque(), {}

    def index(self, serial):
        """The row of the data set that the prompt of this number is made of."""
        epoch, offset = divmod(serial, len(self.data))
        if epoch not in self.order:
            shuffled = list(self.data.indices)
            random.Random(f"{self.seed} {epoch}").shuffle(shuffled)
            self.order[epoch] = shuffled
        return self.order[epoch][offset]

    def draw(self, count):
        """This process's share of the next `count` prompts, each with its number in the stream."""
        while len(self.ahead) < 2 * count // self.world_size:
            serial = self.position + len(self.ahead) * self.world_size + self.rank
            self.ahead.append((serial, self.pool.submit(self.data.prompt, self.index(serial))))
        self.position += count
        drawn = [self.ahead.popleft() for _ in range(count // self.world_size)]
        return [dataclasses.replace(future.result(), serial=serial) for serial, future in drawn]
