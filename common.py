"""The shared floor of every method file, in the order of the data flow:

    arguments -> model -> data -> rollout -> reward -> forward -> advantages, loss -> the run: update, log, checkpoints

No method lives here. Shapes, the same everywhere: P prompts in a step, G responses to each (a group), B responses in a
row or batch, T tokens of the longest response (up to and including its end-of-turn token), L tokens of a packed row,
D hidden size, V vocabulary. The one idea that makes it fast: the G responses to a prompt share its long, picture-heavy
prefix, so everything after sampling runs on ONE row [prompt | response 1 | ... | response G] per group, and sampling
computes the prompt once.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import torch
import torch.distributed
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, gather_object
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, HfArgumentParser
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TOY = Path(__file__).resolve().parent / "toy"
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # of processes with one that still downloads or samples
INSTRUCTION = "Think step by step inside <think> </think>, then give the final answer inside \\boxed{}."


class UserError(SystemExit):
    """A mistake of the user's: one sentence that says what to do, exit code 2, no traceback."""

    def __init__(self, sentence):
        super().__init__(2)
        self.args = (sentence,)
        print(f"error: {sentence}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def flag(default, help, **options):
    return field(default=default, metadata={"help": help, **options})


@dataclass
class ModelArgs:
    """model"""

    model: str = flag("toy", "hub id or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL; toy is the embedded tiny one")
    model_revision: str = flag("main", "branch, tag or commit of a hub model")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "compute type; auto: bfloat16 on a GPU, else float32")
    freeze_vision: bool = flag(False, "do not train the vision tower")
    gradient_checkpointing: bool | None = flag(
        None, "recompute activations in the backward pass (toy: off, else: on)", nargs="?", const=True
    )


@dataclass
class DataArgs:
    """data"""

    data: str | None = flag(None, "hub id, id:config, or parquet, json or jsonl file or folder (toy, else geometry3k)")
    eval_data: str | None = flag(None, "the same for evaluation (default: --data)")
    data_split: str = flag("train", "split of a hub data set to train on")
    eval_split: str = flag("test", "split of a hub data set to evaluate on")
    data_revision: str = flag("main", "branch, tag or commit of a hub data set")
    image_column: str | None = flag(None, "column of the image or images (default: images or image)")
    problem_column: str | None = flag(None, "column of the question (default: problem, question or query)")
    answer_column: str | None = flag(None, "column of the answer (default: answer, solution or ground_truth)")
    instruction: str = flag(INSTRUCTION, "sentence that follows every question")
    max_prompt_tokens: int = flag(2048, "longer prompts are dropped, and counted")
    min_pixels: int | None = flag(None, "smaller pictures are enlarged to this (default: 262144; toy: never)")
    max_pixels: int | None = flag(None, "larger pictures are shrunk to this (default: 1000000; toy: never)")


@dataclass
class RolloutArgs:
    """rollout"""

    prompts_per_step: int | None = flag(None, "prompts sampled in a step, all processes together (toy: 16, else: 512)")
    group_size: int = flag(8, "responses sampled for each prompt")
    max_response_tokens: int | None = flag(None, "a response is cut after so many tokens (toy: 64, else: 2048)")
    temperature: float = flag(1.0, "sampling temperature, also of the log-probs in the loss")
    top_p: float = flag(1.0, "sample from the smallest set of tokens of this probability")
    top_k: int = flag(0, "sample from the k likeliest tokens; 0: from all")
    rollout_prompts: int = flag(32, "prompts that are sampled together, on each process")
    reshard_while_sampling: bool = flag(
        False, "gather weights layer by layer for every token: slow, for what fits no card"
    )
    cuda_graphs: bool = flag(False, "replay the kernels of a token as one launch (one process on a GPU)")


@dataclass
class RewardArgs:
    """reward"""

    reward: str | None = flag(None, "your own reward, my_file.py:function, instead of the weighted sum below")
    accuracy_weight: float = flag(0.9, "weight of a right answer")
    format_weight: float = flag(0.1, "weight of <think> </think> followed by \\boxed{}")
    check_seconds: float = flag(3.0, "an answer that takes the maths checker longer than this is wrong")


@dataclass
class LossArgs:
    """loss"""

    clip_low: float = flag(0.2, "the ratio is clipped from below at 1 - clip_low")
    clip_high: float = flag(0.2, "and from above at 1 + clip_high (DAPO: 0.28)")
    aggregation: Literal["token", "sequence"] = flag("token", "mean over all tokens, or over responses")
    kl_coef: float = flag(0.0, "weight of the KL term; the reference model is loaded only when it is not 0")
    entropy_coef: float = flag(0.0, "weight of the entropy bonus")
    filter_groups: bool = flag(False, "replace groups that are all right or all wrong by new prompts (DAPO)")
    filter_tries: int = flag(10, "draws of --prompts_per_step prompts in a step before going on with what there is")
    drop_truncated: bool = flag(False, "leave responses that hit --max_response_tokens out of the loss")


@dataclass
class UpdateArgs:
    """update"""

    steps: int | None = flag(None, "steps of the whole run (toy: 150, else: 60)")
    updates_per_step: int | None = flag(None, "updates in a step, each on a share of the prompts (toy: 1, else: 4)")
    learning_rate: float | None = flag(None, "AdamW's (toy: 1e-4, else: 1e-6)")
    schedule: Literal["constant", "linear", "cosine"] = flag("constant", "of the learning rate, over the whole run")
    warmup_steps: int = flag(0, "steps over which the learning rate rises from 0")
    weight_decay: float = flag(0.01, "AdamW's")
    beta2: float = flag(0.999, "AdamW's")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    tokens_per_row: int = flag(16384, "of a forward pass: longer groups are cut into rows, and prompts come in parts")


@dataclass
class RunArgs:
    """run"""

    output: str | None = flag(None, "folder of everything the run writes (default: runs/<script>)")
    seed: int = flag(0, "of the order of the data and of every sampled token")
    eval_every: int = flag(20, "steps between evaluations; there is also one before the first and after the last step")
    eval_rows: int = flag(-1, "rows of --eval_data to evaluate on; -1: all, 0: never evaluate")
    eval_temperature: float | None = flag(None, "temperature of evaluation; 0: greedy (toy: 1, else: 0)")
    save_every: int = flag(20, "steps between checkpoints; there is also one after the last step")
    resume: bool = flag(False, "go on from <output>/last")
    dry_run: int = flag(
        0, "print the memory that this run needs on so many GPUs, and stop; --model may be a config.json"
    )
    gpu_memory: float | None = flag(None, "GB of a GPU, for --dry_run (default: of the card found, else 80)")
    show_every: int = flag(10, "steps between sampled responses on the console; 0: never")
    report_to: str | None = flag(None, "trackers of accelerate besides metrics.jsonl, e.g. tensorboard,wandb")


@dataclass
class Args(ModelArgs, DataArgs, RolloutArgs, RewardArgs, LossArgs, UpdateArgs, RunArgs):
    """What every script takes. A method's `Args` inherits these and adds its own."""

    def __post_init__(self):
        toy = self.model == "toy"
        defaults = {  # flag: (for the toy, for any other model)
            "data": ("toy", "hiyouga/geometry3k"),
            "gradient_checkpointing": (False, True),
            "min_pixels": (None, 262_144),
            "max_pixels": (None, 1_000_000),
            "prompts_per_step": (16, 512),
            "max_response_tokens": (64, 2048),
            "steps": (150, 60),
            "updates_per_step": (1, 4),
            "learning_rate": (1e-4, 1e-6),
            "eval_temperature": (1.0, 0.0),
            "output": (f"runs/{Path(sys.argv[0]).stem}",) * 2,
        }
        for name, (for_toy, for_others) in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, for_toy if toy else for_others)
        self.eval_data = self.eval_data or self.data
        if self.group_size < 2:
            raise UserError(
                f"--group_size {self.group_size} leaves no group to compare a response with: set it to 2 or more."
            )
        positive = ["temperature", "top_p", "max_response_tokens", "rollout_prompts", "tokens_per_row", "steps"]
        positive += ["prompts_per_step", "updates_per_step", "learning_rate", "max_prompt_tokens", "filter_tries"]
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)} must be above 0.")
        within(self, top_p=(0, 1), top_k=(0, 10**9), eval_temperature=(0, 100))
        if self.prompts_per_step % self.updates_per_step:
            raise UserError(
                f"--prompts_per_step {self.prompts_per_step} cannot be split into --updates_per_step "
                f"{self.updates_per_step} equal parts: make it a multiple."
            )


def within(args, **limits):
    """Raises UserError for an argument outside of its (lowest, highest)."""
    for name, (lowest, highest) in limits.items():
        if not lowest <= getattr(args, name) <= highest:
            raise UserError(f"--{name} {getattr(args, name)} must be between {lowest} and {highest}.")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that depend on the model, which stand in the help's own words."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse_args(cls, argv=None):
    """`cls` filled from the command line; `--help` shows one group for each dataclass that `cls` inherits from."""
    groups, seen = [], set()
    for base in cls.__mro__[:-1]:  # a method may give a shared flag another default: its own class comes first
        own = [f for f in dataclasses.fields(cls) if f.name in base.__dict__.get("__annotations__", {})]
        own = [f for f in own if not (f.name in seen or seen.add(f.name))]
        title = base.__doc__ if base in Args.__bases__ else Path(sys.argv[0]).stem
        spec = [(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in own]
        if spec:
            groups.append(dataclasses.make_dataclass(base.__name__, spec, namespace={"_argument_group_name": title}))
    parser = HfArgumentParser(groups, allow_abbrev=False, formatter_class=Help)
    return cls(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------------------------------------------------------------
# Model and processor
# ---------------------------------------------------------------------------------------------------------------------


def image_only(cls):
    """The processor class `cls` without its video processor, which transformers loads only where torchvision is."""
    return type(cls.__name__, (cls,), {"get_attributes": classmethod(lambda _: ["image_processor", "tokenizer"])})


def load_processor(name, revision="main", min_pixels=None, max_pixels=None):
    """Tokenizer and image processor of a Qwen-VL model behind the interface of its own processor class.

    `min_pixels` and `max_pixels`: area of a picture after resizing; None keeps the model's own. Raises UserError.
    """
    try:
        if importlib.util.find_spec("torchvision"):
            processor = transformers.AutoProcessor.from_pretrained(name, revision=revision)
        else:
            config = transformers.AutoConfig.from_pretrained(name, revision=revision)
            cls = transformers.models.auto.processing_auto.PROCESSOR_MAPPING[type(config)]
            processor = image_only(cls).from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(unreachable("--model", name, error)) from None
    size = dict(processor.image_processor.size)
    size["shortest_edge"] = min_pixels or size["shortest_edge"]
    size["longest_edge"] = max_pixels or size["longest_edge"]
    processor.image_processor.size = size
    return processor


def load_model(name, revision="main", meta=False, dtype=torch.float32, bf16=False):
    """A Qwen-VL model. Raises UserError for other models.

    `dtype`: of the weights, fp32 for training; the model's `.to` would round the frequencies of the positions as well.
    `bf16`: what it will compute in, so that flash-attn, which takes no fp32, may be used in the vision tower.
    `meta`: shapes, no weights.
    """
    flash = bf16 and torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
    kernels = {"text_config": "shared_prefix", "vision_config": "flash_attention_2" if flash else "sdpa"}
    options = {"dtype": dtype, "attn_implementation": kernels}
    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        if config.model_type not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            raise UserError(f"--model {name} is a {config.model_type}; use a qwen2_vl, qwen2_5_vl or qwen3_vl model.")
        if meta:
            with torch.device("meta"):
                return transformers.AutoModelForImageTextToText.from_config(config, **options)
        return transformers.AutoModelForImageTextToText.from_pretrained(name, revision=revision, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(unreachable("--model", name, error)) from None


def shard(model, source, device, bf16):
    """FSDP2: each process keeps a part of every weight; decoder layers and vision blocks are gathered one at a time.

    `model` has no weights yet; they come from `source`, which is None on all processes but the main one.
    Gradients are summed over the processes, not averaged: the loss is divided by the tokens of all of them already.
    Embeddings and head, which may be one tensor, go with the root.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    dtypes = (torch.bfloat16, torch.float32) if bf16 else (None, None)  # of compute, of the gradients' sum
    policy = MixedPrecisionPolicy(*dtypes, cast_forward_inputs=False)  # the vision tower's angles stay fp32
    for unit in [*model.model.visual.blocks, *model.model.language_model.layers, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    fill(model, source, device)
    type(model).inside = lambda model, function, *args: function(model, *args)
    register_fsdp_forward_method(model, "inside")  # what runs there finds the root's weights gathered
    model.inside(lambda model: None)  # FSDP2 takes the first module to run for the root
    model.reshard()


@torch.no_grad()
def fill(model, source, device):
    """Weights, buffers and settings of the main process's whole model, tensor by tensor, into a sharded one."""
    model.to_empty(device=device)
    tensors = {} if source is None else dict(source.named_parameters(remove_duplicate=False))
    for name, p in model.named_parameters():
        full = torch.empty(p.shape, device=device) if source is None else tensors[name].to(device)
        p.to_local().copy_(distribute_tensor(full, p.device_mesh, p.placements).to_local())
    buffers = {} if source is None else dict(source.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers.get(name, buffer))
        torch.distributed.broadcast(buffer, 0)
    settings = [getattr(source, "generation_config", None)]
    torch.distributed.broadcast_object_list(settings, 0)
    model.generation_config = settings[0]
    if source is not None:  # transformers keeps here what the hub's checkpoints call each weight
        model._weight_conversions = source._weight_conversions


@contextlib.contextmanager
def gathered(model):
    """Every process holds all weights: sampling needs no word from the others, whose responses end elsewhere."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)  # a method may differentiate here, by no parameter
        unit.set_requires_gradient_sync(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.reshard()
        unit.set_reshard_after_forward(unit is not model, recurse=False)
        unit.set_reshard_after_backward(True, recurse=False)
        unit.set_requires_gradient_sync(True, recurse=False)


def whole(tensor):
    """The full tensor of a sharded one, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def unreachable(option, name, error):
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"{option} {name} cannot be opened ({first}): give a hub id that exists and can be reached from here, "
        f"or the path of a local folder."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data: rows of any usual schema -> prompts
# ---------------------------------------------------------------------------------------------------------------------

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

    index: int  # row of the data set: with seed and step it determines every sampled token
    problem: str
    answer: str
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    image_mask: torch.Tensor  # (Lp,) True on image tokens
    place: int = 0  # in the stream of prompts


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
        raise UserError(unreachable(option, name, error)) from None


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
        self.longest = max(self.indices, key=tokens.__getitem__, default=None)
        self.width = max((tokens[i] for i in self.indices), default=0)
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
        places = problem.count("<image>")
        if places == 0:
            problem = "<image>" * len(opened) + problem
        elif places != len(opened):
            raise UserError(
                f"row {index} of {self.name} says <image> {places} times and has {len(opened)} images: make them agree."
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

    def __init__(self, data, seed, rank=0, world=1, position=0):
        self.data, self.seed, self.rank, self.world = data, seed, rank, world
        self.position = position  # prompts drawn so far, all processes together
        self.pool, self.ahead, self.order = ThreadPoolExecutor(4), deque(), {}

    def index(self, place):
        epoch, offset = divmod(place, len(self.data))
        if epoch not in self.order:
            shuffled = list(self.data.indices)
            random.Random(f"{self.seed} {epoch}").shuffle(shuffled)
            self.order[epoch] = shuffled
        return self.order[epoch][offset]

    def draw(self, count):
        """This process's share of the next `count` prompts, each with its place in the stream."""
        while len(self.ahead) < 2 * count // self.world:
            place = self.position + len(self.ahead) * self.world + self.rank
            self.ahead.append((place, self.pool.submit(self.data.prompt, self.index(place))))
        self.position += count
        drawn = [self.ahead.popleft() for _ in range(count // self.world)]
        return [dataclasses.replace(future.result(), place=place) for place, future in drawn]


# ---------------------------------------------------------------------------------------------------------------------
# Rollout: the prompt is computed once, its cache is shared by the G responses
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """A prompt and its responses; everything per response has G rows, everything per token is (G, T).

    A slice of a group is a group with fewer responses: a packed row that fits the token budget.
    """

    prompt: Prompt
    responses: torch.Tensor  # (G, T) token ids
    mask: torch.Tensor  # (G, T) True up to and including the first end-of-turn token
    truncated: torch.Tensor  # (G,) True where there is no end-of-turn token
    texts: list
    rewards: torch.Tensor | None = None  # (G,)
    accuracy: torch.Tensor | None = None  # (G,)
    format: torch.Tensor | None = None  # (G,)
    advantages: torch.Tensor | None = None  # (G,)
    loss_mask: torch.Tensor | None = None  # (G, T) tokens that the loss counts
    old_logps: torch.Tensor | None = None  # (G, T)
    ref_logps: torch.Tensor | None = None  # (G, T)
    scores: torch.Tensor | None = None  # (G, T) what a method thinks of each token,
    weights: torch.Tensor | None = None  # (G, T) and makes of it: factors of the advantage

    def __getitem__(self, part):
        rows = {name: value[part] for name, value in vars(self).items() if isinstance(value, torch.Tensor | list)}
        return dataclasses.replace(self, **rows)


WINDOW = 128  # the responses' cache is read in steps of so many tokens: shapes stay the same while they grow


class SharedPrefixCache(transformers.DynamicCache):
    """Keys and values of P prompts (a usual padded cache), and of the G responses of each in a buffer of T tokens.

    The prompts' part is computed once, some prompts at a time, and never copied while responses grow. The buffer is
    written at `place`, a tensor, and read up to `window`, a number that seldom changes; 0 as long as prompts come.
    """

    def __init__(self, layers, max_tokens, device):
        super().__init__()
        self.prefix, self.suffix = [[] for _ in range(layers)], [None] * layers
        self.max_tokens, self.window = max_tokens, 0
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # in the responses, of the next token

    def update(self, keys, values, layer, *args, **kwargs):
        keys = keys.to(values.dtype)  # autocast computes rotary embeddings in fp32
        if not self.window:  # some of the prompts: (p, heads, Lp, d)
            self.prefix[layer].append((keys, values))
            return keys, values
        if self.suffix[layer] is None:  # one more token of each response: (P, heads, G, d)
            self.prefix[layer] = tuple(map(torch.cat, zip(*self.prefix[layer])))
            size = (*keys.shape[:3], self.max_tokens, keys.shape[3])
            self.suffix[layer] = (keys.new_zeros(size), values.new_zeros(size))
        for buffer, new in zip(self.suffix[layer], (keys, values)):
            buffer.index_copy_(3, self.place, new[:, :, :, None])
        return [
            (prefix, buffer[:, :, :, : self.window]) for prefix, buffer in zip(self.prefix[layer], self.suffix[layer])
        ]

    def keep(self, prompts):
        """Forgets all prompts but these, when the others' responses have all ended."""
        for layers in (self.prefix, self.suffix):
            for i, pair in enumerate(layers):  # one layer at a time is there twice
                layers[i] = tuple(x[prompts] for x in pair)


def shared_prefix_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of G response tokens per prompt to the prompt's keys, shared, and to their own response's keys.

    query (P, H, G, d); key and value: (prefix (P, H', Lp, d), suffix (P, H', G, t, d)) from `SharedPrefixCache`, H' the
    key-value heads; attention_mask (P, 1, 1, Lp + t) bool. One softmax over both parts. Plain tensors (prefill,
    training) take the usual path: flex attention where the mask is a block mask, else scaled dot product.
    """
    if isinstance(attention_mask, BlockMask):
        query, key = query.to(value.dtype), key.to(value.dtype)
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    if isinstance(key, torch.Tensor):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (prefix_k, suffix_k), (prefix_v, suffix_v) = key, value
    P, H, G, d = query.shape
    heads, shared = prefix_k.shape[1], prefix_k.shape[2]
    query = query.view(P, heads, H // heads, G, d).transpose(2, 3)  # (P, H', G, H / H', d)
    to_prefix = (query.flatten(2, 3) @ prefix_k.mT).view(P, heads, G, H // heads, shared)
    scores = torch.cat([to_prefix, query @ suffix_k.mT], -1).float() * scaling
    scores = scores.masked_fill(~attention_mask.view(P, 1, 1, 1, -1), float("-inf"))
    weights = scores.softmax(-1).to(value[0].dtype)
    out = (weights[..., :shared].flatten(2, 3) @ prefix_v).view(P, heads, G, H // heads, d)
    out = out + weights[..., shared:] @ suffix_v
    return out.transpose(1, 2).flatten(2, 3), None  # (P, G, H, d)


AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)


def seeded(*key):
    """A torch generator that depends on `key` alone: on no process, batch or earlier draw."""
    return torch.Generator().manual_seed(random.Random(" ".join(map(str, key))).getrandbits(63))


def token_chooser(model, temperature, top_p, top_k):
    """`choose(logits (B, V), uniforms (B,)) -> (B,)`: inverse-transform sampling after generate's own warpers.

    Image and video placeholder tokens are banned: one of them in a response breaks the next forward pass.
    """
    banned = [model.config.image_token_id, model.config.video_token_id]
    warpers = [transformers.SuppressTokensLogitsProcessor(banned, device=model.device)]
    if temperature != 1.0 and temperature > 0:
        warpers.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k > 0:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    warp = transformers.LogitsProcessorList(warpers)

    def choose(logits, uniforms):
        logits = warp(None, logits.float())
        if temperature == 0:
            return logits.argmax(-1)
        cumulative = logits.softmax(-1).double().cumsum(-1)
        picked = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
        return picked.clamp(max=logits.shape[-1] - 1)

    return choose


@torch.no_grad()
def generate(
    model, prompts, group_size, max_tokens, choose, uniforms, eos, pad_id, budget=1, together=False, graphs=False
):
    """G responses to each of P prompts, in one batch.

    Args: `uniforms` (P * G, max_tokens) in [0, 1), one for each token to come; `choose` from `token_chooser`;
    `budget`: prompts are computed so many tokens at a time, or one by one; `together`: the weights are sharded, so that
    all processes go on as long as one of them does; `graphs`: a token's kernels are recorded once for each batch and
    window, and replayed.
    Returns responses (P * G, T) and their mask, True up to and including the first of the `eos` tokens.
    """
    P, G, device = len(prompts), group_size, model.device
    width = max(len(p.input_ids) for p in prompts)
    ids = torch.stack([pad(p.input_ids, (width - len(p.input_ids), 0), value=pad_id) for p in prompts]).to(device)
    positions = torch.stack([pad(p.position_ids, (width - len(p.input_ids), 0)) for p in prompts], 1).to(device)
    real = torch.stack([torch.arange(width) >= width - len(p.input_ids) for p in prompts]).to(device)  # (P, Lp)
    cache = SharedPrefixCache(model.config.text_config.num_hidden_layers, max_tokens, device)

    def next_logits(prompts, **inputs):
        seen = pictures(prompts, device)

        def run(model):
            if together and prompts and not seen:
                blank_picture(model)
            hidden = model.model(**inputs, **seen, past_key_values=cache, use_cache=True).last_hidden_state
            return model.lm_head(hidden[:, -1:] if prompts else hidden)

        return model.inside(run) if together else run(model)

    size = P if together else max(1, budget // width)  # sharded weights are gathered as often by all processes
    parts = [slice(start, start + size) for start in range(0, P, size)]
    inputs = [{"input_ids": ids[p], "attention_mask": real[p], "position_ids": positions[:, p]} for p in parts]
    logits = torch.cat([next_logits(prompts[p], **x) for p, x in zip(parts, inputs)])  # (P, 1, V)
    logits = logits[:, 0].repeat_interleave(G, 0)  # (P * G, V)
    after = positions.amax((0, 2)) + 1  # (P,) the position of a response's first token
    slots = torch.arange(max_tokens, device=device)

    def decode(tokens, real, after):  # waits for no value of a tensor, so that it can be recorded
        written = (slots[: cache.window] <= cache.place).expand(len(tokens), -1)
        sees = torch.cat([real, written], 1)[:, None, None]  # (P, 1, 1, Lp + window)
        place = (after + cache.place)[:, None].expand(3, -1, G)
        return next_logits([], input_ids=tokens, attention_mask=sees, position_ids=place).flatten(0, 1)

    responses = torch.full((P, G, max_tokens), pad_id, device=device)
    uniforms, eos = uniforms.view(P, G, -1).to(device), torch.tensor(eos, device=device)
    ended = torch.zeros(P, G, dtype=torch.bool, device=device)
    alive = torch.arange(P, device=device)  # prompts in the batch: those whose responses have all ended leave it
    for t in range(max_tokens):
        tokens = choose(logits, uniforms[alive, :, t].flatten()).view(-1, G)
        responses[alive, :, t] = torch.where(ended[alive], pad_id, tokens)
        ended[alive] |= torch.isin(tokens, eos)
        going = ~ended[alive].all(1)
        if t + 1 == max_tokens or not anywhere(going.any(), together):
            break
        if shrinks := t > 0 and bool(0 < going.sum() <= len(alive) // 2):
            alive, tokens, real, after = alive[going], tokens[going], real[going], after[going]
            cache.keep(going)
        if t % WINDOW == 0 or shrinks:
            cache.window = min((t // WINDOW + 1) * WINDOW, max_tokens)
            feed = tokens.clone()
            step = recorded(decode, feed, real, after) if graphs else partial(decode, feed, real, after)
        feed.copy_(tokens)
        logits = step()
        cache.place += 1
    responses = responses[:, :, : t + 1].flatten(0, 1)
    is_end = torch.isin(responses, eos)
    return responses, (is_end.cumsum(1) - is_end.long()) == 0


def recorded(function, *inputs):
    """`function(*inputs)` as a CUDA graph, to be called without arguments: `inputs` and the result stay in place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*inputs)  # libraries set themselves up, and autocast fills its cache, before the recording
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*inputs)

    def replay():
        graph.replay()
        return out

    return replay


def anywhere(flag, together):
    """Whether a boolean tensor is true on this process or, `together`, on any."""
    if together:
        torch.distributed.all_reduce(flag := flag.int(), torch.distributed.ReduceOp.MAX)
    return bool(flag)


def pictures(prompts, device):
    """pixel_values and image_grid_thw of all prompts' images one after the other, or nothing where there are none."""
    prompts = [p for p in prompts if p.image_grid_thw is not None]
    if not prompts:
        return {}
    return {
        "pixel_values": torch.cat([p.pixel_values.to(device) for p in prompts]),  # a method may have made some there
        "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts]).to(device),
    }


def rollout(model, tokenizer, prompts, args, step, part=slice(None), temperature=None):
    """G responses to each prompt, as a list of `Group`s, or a part of these G; equal for any batch and any processes.

    Every token's random number comes from --seed, the step and the prompt (its row, and its place in the stream).
    """
    G = len(range(args.group_size)[part])
    temperature = args.temperature if temperature is None else temperature
    choose = token_chooser(model, temperature, args.top_p, args.top_k)
    eos = model.generation_config.eos_token_id
    eos, groups = [eos] if isinstance(eos, int) else eos, []
    training, _ = model.training, model.eval()
    together = args.reshard_while_sampling and isinstance(model, FSDPModule)
    for start in range(0, len(prompts), args.rollout_prompts):
        batch = prompts[start : start + args.rollout_prompts]
        size = (args.group_size, args.max_response_tokens)
        tables = [torch.rand(size, generator=seeded(args.seed, step, p.index, p.place)) for p in batch]
        uniforms = torch.cat([table[part] for table in tables])
        limits = (args.max_response_tokens, choose, uniforms, eos, tokenizer.pad_token_id, args.tokens_per_row)
        responses, mask = generate(model, batch, G, *limits, together, args.cuda_graphs)
        truncated = ~torch.isin(responses, torch.tensor(eos, device=responses.device)).any(1)
        for i, prompt in enumerate(batch):
            own = slice(i * G, (i + 1) * G)
            longest = mask[own].sum(1).max()
            valid = mask[own, :longest]
            ids = responses[own, :longest].masked_fill(~valid, tokenizer.pad_token_id)
            texts = [tokenizer.decode(r[m], skip_special_tokens=True) for r, m in zip(ids, valid)]
            groups.append(Group(prompt, ids, valid, truncated[own], texts))
    model.train(training)
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Reward: is the answer right, and is it written as asked for
# ---------------------------------------------------------------------------------------------------------------------


def extract_answer(response):
    """The content of the last balanced \\boxed{}, else of the last <answer></answer>, else None.

    >>> extract_answer(r"so \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", response)]):
        depth = 1
        for i in range(start, len(response)):
            depth += {"{": 1, "}": -1}.get(response[i], 0)
            if depth == 0:
                return response[start:i].strip() or None
    tagged = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    return (tagged[-1].strip() or None) if tagged else None


def format_reward(response):
    """1.0 for one <think> </think> that comes first and a \\boxed{} that comes after it, else 0.0."""
    match = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", response, re.DOTALL)
    return float(bool(match) and "<think>" not in match[1] + match[2] and extract_answer(match[2]) is not None)


UNITS = (
    r"(?:degrees?|deg|radians?|percent|mm|cm|dm|km|m|inches|inch|in|feet|foot|ft|yards?|yd|miles?|mi|meters?|metres?|"
    r"centimeters?|kilometers?|grams?|kg|g|pounds?|lbs?|liters?|litres?|ml|l|seconds?|sec|s|minutes?|min|hours?|hr|h|"
    r"units?|square units?|dollars?)"
)


def normalise(answer):
    """Text, spacing, units, degree and percent signs, and a leading `x =` taken off an answer."""
    answer = answer.strip().strip("$").strip().rstrip(".")
    answer = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", answer)
    answer = re.sub(r"\\(?:left|right|,|;|!| )|~", " ", answer)
    answer = re.sub(r"\^?\s*\{?\\circ\}?|°|\\?%|\\\$", " ", answer)
    answer = re.sub(r"^\s*\\?[A-Za-z]+\s*(?:=|\\approx)\s*", "", answer)
    answer = re.sub(rf"(?<=[\d}})\s])\s*{UNITS}\s*(?:\^\s*\{{?[23]\}}?|²|³)?\s*$", "", answer)
    answer = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer)
    return re.sub(r"\s+", " ", answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")).strip()


def letters(answer):
    """The options that an answer names, sorted, or None: A for "(A)" and "A. 30", AC for "C, A" and "AC"."""
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer).strip().strip("$").strip()
    if label := re.match(r"\(?([A-J])(?:[.:)]|\)\s*[.:]?)\s*\S*(?<![,;])(?!.*\b[A-J]\b)", answer):
        return label[1]
    named = re.sub(r"[\s,;()&.]|\band\b", "", answer)
    return "".join(sorted(set(named))) if re.fullmatch(r"[A-J]{1,10}", named) else None


def maths_worker():
    """Reads [gold, answer] lines, prints 1 or 0: sympy at work, in a process of its own that may be killed."""
    import json
    import signal
    import sys

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(int(float(sys.argv[1])) + 2)  # and that dies by itself where the run that asked was killed
        try:
            options = dict(
                extraction_config=(LatexExtractionConfig(), ExprExtractionConfig()),
                fallback_mode="no_fallback",
                extraction_mode="first_match",
                parsing_timeout=None,
            )
            gold, answer = (parse(f"${text}$", **options) for text in json.loads(line))
            print(int(bool(gold and answer) and verify(gold, answer, timeout_seconds=None)), flush=True)
        except Exception:  # whatever sympy makes of a model's answer: not a right one
            print(0, flush=True)
        signal.alarm(0)


class Checker:
    """Decides whether an answer is right. What takes sympy longer than `seconds` is wrong and costs just that."""

    def __init__(self, seconds=3.0):
        self.seconds, self.worker, self.timeouts = seconds, None, 0

    def __call__(self, response, gold):
        """True if the answer in `response` equals `gold`: letters, numbers, LaTeX, units, degrees, percent, words."""
        answer = extract_answer(response)
        return answer is not None and self.equal(answer, gold)

    def equal(self, answer, gold):
        boxed = extract_answer(gold)  # some data sets keep the whole solution as the answer
        gold = boxed if boxed is not None else gold
        if (options := letters(gold)) is not None:
            return letters(answer) == options
        answer, gold = normalise(answer), normalise(gold)
        if not answer or not gold:
            return False
        if answer.casefold() == gold.casefold():
            return True
        if re.fullmatch(r"[A-Za-z ]+", gold):
            return False  # words are equal or they are not
        number = r"[+-]?\d{1,15}(\.\d{1,15})?"
        if re.fullmatch(number, answer) and re.fullmatch(number, gold):
            return float(answer) == float(gold)
        return self.maths(answer, gold)

    def maths(self, answer, gold):
        if self.worker is None or self.worker.poll() is not None:
            code = inspect.getsource(maths_worker) + "\nmaths_worker()"
            self.worker = subprocess.Popen(
                [sys.executable, "-c", code, str(self.seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run
            )
            if self.worker.stdout.readline() != "ready\n":
                raise UserError("the maths checker does not start: pip install -r requirements.txt brings math-verify.")
        self.worker.stdin.write(json.dumps([gold, answer]) + "\n")
        self.worker.stdin.flush()
        if select.select([self.worker.stdout], [], [], self.seconds)[0]:
            return self.worker.stdout.readline() == "1\n"
        self.timeouts += 1
        self.close()
        return False

    def close(self):
        if self.worker is not None:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None


def load_reward(spec):
    """The function named by `my_file.py:function`; it takes problems, responses, answers, and returns rewards."""
    file, _, name = spec.rpartition(":")
    try:
        module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:  # whatever the user's file raises while it is imported
        raise UserError(
            f"--reward {spec} cannot be imported ({type(error).__name__}: {error}): write it as my_file.py:function."
        ) from None


class Reward:
    """The rewards of groups: a weighted sum of accuracy and format, or the user's own function."""

    def __init__(self, args):
        self.args, self.check = args, Checker(args.check_seconds)
        self.custom = load_reward(args.reward) if args.reward else None

    def __call__(self, groups):
        """Sets accuracy, format and rewards (G,) of each group; returns the rewards (P, G)."""
        args = self.args
        for group in groups:
            group.accuracy = torch.tensor([float(self.check(text, group.prompt.answer)) for text in group.texts])
            group.format = torch.tensor([format_reward(text) for text in group.texts])
            group.rewards = args.accuracy_weight * group.accuracy + args.format_weight * group.format
        if self.custom:
            rows = [(g.prompt.problem, text, g.prompt.answer) for g in groups for text in g.texts]
            problems, responses, answers = map(list, zip(*rows))
            try:
                values = torch.tensor([float(value) for value in self.custom(problems, responses, answers)])
            except Exception as error:  # whatever the user's function raises
                raise UserError(f"--reward {args.reward} failed ({type(error).__name__}: {error}).") from None
            if len(values) != len(responses):
                raise UserError(
                    f"--reward {args.reward} returned {len(values)} values for {len(responses)} responses: "
                    f"return one for each."
                )
            for group, value in zip(groups, values.view(len(groups), -1)):
                group.rewards = value
        return torch.stack([group.rewards for group in groups])


# ---------------------------------------------------------------------------------------------------------------------
# Forward: one packed row per group
# ---------------------------------------------------------------------------------------------------------------------

FLEX_ATTENTION = torch.cuda.is_available()  # a packed row skips what its responses do not see, block by block
HEAD_CHUNK = 512  # tokens whose logits exist at the same time: 512 x 152k x 4 bytes = 0.3 GB


def rows_of(group, budget):
    """The group as packed rows of at most `budget` tokens: itself, or slices of it, each of one response or more."""
    cost, rows, start = len(group.prompt.input_ids), [], 0
    total = cost
    for i, length in enumerate(group.mask.sum(1).tolist()):
        if i > start and total + length > budget:
            rows.append(group[start:i])
            start, total = i, cost
        total += length
    return [*rows, group[start:]]


def pack(row, device):
    """The row [prompt | response 1 | ... | response G] as model inputs.

    A response sees the prompt and itself, and its positions go on after the prompt's. Returns input_ids (1, L),
    position_ids (3, 1, L), attention_mask (1, 1, L, L), bool or a block mask.
    """
    prompt, mask = row.prompt, row.mask.to(device)
    shared, (G, T) = len(prompt.input_ids), mask.shape
    step = torch.arange(T, device=device).expand(G, T)[mask]  # (N,) a token's place in its response
    owner = torch.arange(1, G + 1, device=device)[:, None].expand(G, T)[mask]  # (N,) 1 to G
    owner = torch.cat([owner.new_zeros(shared), owner])  # (L,) 0: the prompt
    positions = prompt.position_ids.to(device)
    positions = torch.cat([positions, (positions.max() + 1 + step).expand(3, -1)], 1)

    def sees(batch, head, q, k):
        return ((owner[q] == owner[k]) | (owner[k] == 0)) & (q >= k)

    if FLEX_ATTENTION:
        visible = create_block_mask(sees, None, None, len(owner), len(owner), device=device)
    else:
        place = torch.arange(len(owner), device=device)
        visible = sees(None, None, place[:, None], place)[None, None]
    ids = torch.cat([prompt.input_ids.to(device), row.responses.to(device)[mask]])
    return {"input_ids": ids[None], "position_ids": positions[:, None], "attention_mask": visible}


def predicting(row, device):
    """(N,) for each response token, row by row, the place in the packed row whose hidden state predicts it."""
    mask, shared = row.mask.to(device), len(row.prompt.input_ids)
    first = torch.zeros_like(mask)
    first[:, 0] = True
    place = shared + torch.arange(int(mask.sum()), device=device)
    return torch.where(first[mask], shared - 1, place - 1)


def unpack(values, mask):
    """Values (N, ...) of the valid tokens, row by row, as (G, T, ...) with 0 on padding."""
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    return out.masked_scatter(mask.view(*mask.shape, *[1] * (values.dim() - 1)), values)


def forward(model, row, temperature=1.0, watch=None):
    """Log-probs and entropies of a row's response tokens, from one packed forward pass.

    `watch`: called with the row's detached hidden states (L, D) before each layer, from the embeddings on, and after
    the final norm. Returns logps (G, T), over the full vocabulary at the sampling temperature; entropy (G, T) in nats,
    of the distribution that each token was drawn from; hidden (L, D), the whole row's states after the final norm.
    """
    inputs, mask = pack(row, model.device), row.mask.to(model.device)
    targets = row.responses.to(model.device)[mask]

    def run(model):
        seen = pictures([row.prompt], model.device)
        nothing = 0 * blank_picture(model) if isinstance(model, FSDPModule) and not seen else 0
        with watched(model.model.language_model.layers, watch):
            hidden = model.model(**inputs, **seen, use_cache=False).last_hidden_state[0] + nothing
        if watch:
            watch(hidden.detach())
        return *token_logps(hidden[predicting(row, model.device)], model.lm_head.weight, targets, temperature), hidden

    logps, entropy, hidden = model.inside(run) if isinstance(model, FSDPModule) else run(model)
    return unpack(logps, mask), unpack(entropy, mask), hidden


@contextlib.contextmanager
def watched(layers, watch):
    """Calls `watch` with what each layer reads; not again when the backward pass recomputes a layer."""
    hooks = [layer.register_forward_pre_hook(lambda _, args: watch(args[0][0].detach())) for layer in layers if watch]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def blank_picture(model):
    """A sum over the vision tower's outputs for a grey picture, for rows without one, before the text model runs.

    Sharded weights are gathered by all processes together and in one order: where one has a picture, all run the tower.
    """
    vision = model.config.vision_config
    size = vision.spatial_merge_size
    pixels = torch.zeros(size**2, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    out = model.model.visual(pixels.to(model.device), grid_thw=torch.tensor([[1, size, size]], device=model.device))
    return sum(part.sum() for part in [out.pooler_output, *getattr(out, "deepstack_features", [])])


def own_states(hidden, row):
    """Of a packed row's hidden states (L, D): each response token's own (G, T, D), and those of the image (N, D)."""
    shared = len(row.prompt.input_ids)
    return unpack(hidden[shared:], row.mask.to(hidden.device)), hidden[:shared][row.prompt.image_mask.to(hidden.device)]


def token_logps(hidden, weight, targets, temperature=1.0, chunk=HEAD_CHUNK):
    """log p(target) and entropy in nats, each (N,) fp32, from hidden states (N, D), the head's weight (V, D) and
    targets (N,).

    The (N, V) logits never exist as a whole: chunks of tokens, recomputed in the backward pass.
    """

    def head(hidden, targets):
        logps = ((hidden @ weight.to(hidden.dtype).T).float() / temperature).log_softmax(-1)
        return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)

    parts = [checkpoint(head, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    logps, entropy = zip(*parts)
    return torch.cat(logps), torch.cat(entropy)


@torch.no_grad()
def compare_heads(function, model, row, *hidden, temperature=1.0, chunk=HEAD_CHUNK):
    """What `function(*logits)` says of the distributions that a row's tokens have under several hidden states (L, D).

    It is given fp32 logits (n, V) over the temperature, one for each hidden state, for a chunk of tokens at a time, and
    returns tensors (n,). Returns these as (G, T), 0 on padding. The (N, V) logits never exist as a whole.
    """
    source = predicting(row, model.device)

    def run(model):
        weight = model.lm_head.weight
        parts = [
            function(*((states[places] @ weight.to(states.dtype).T).float() / temperature for states in hidden))
            for places in source.split(max(1, chunk // len(hidden)))
        ]
        return [torch.cat(part) for part in zip(*parts)]

    values = model.inside(run) if isinstance(model, FSDPModule) else run(model)
    return [unpack(value, row.mask.to(value.device)) for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Perturbed pictures: pixel_values in, pixel_values out, for methods that ask what a response owes to the picture
# ---------------------------------------------------------------------------------------------------------------------

# pixel_values (patches, 3 x 2 x p x p): channel, time, height and width of a patch; a still picture stands there twice.


def add_noise(pixel_values, generator, std=2.0):
    """Gaussian noise on the processor's normalised pixels, each entry for itself, nothing clipped (VEPO's code)."""
    return pixel_values + std * torch.randn(pixel_values.shape, generator=generator)


def diffuse(pixel_values, generator, step=500):
    """Forward diffusion: sqrt(abar) x + sqrt(1 - abar) noise after `step` of 1,000 steps (arXiv 2311.16922).

    step 500: 0.863 x + 0.505 noise, on normalised pixels; both copies of a picture get the same noise.
    """
    betas = torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    kept = (1 - betas).cumprod(0)[step].item()
    return kept**0.5 * pixel_values + (1 - kept) ** 0.5 * still_noise(pixel_values, generator)


def add_pixel_noise(pixel_values, generator, image_mean, image_std, std=0.1):
    """Gaussian noise on pixels in [0, 1], clipped to [0, 1]; both copies of a picture get the same noise."""
    mean, scale = (torch.tensor(x).repeat_interleave(pixel_values.shape[1] // 3) for x in (image_mean, image_std))
    pixels = pixel_values * scale + mean + std * still_noise(pixel_values, generator)
    return (pixels.clamp(0, 1) - mean) / scale


def blacken(pixel_values, generator, image_mean, image_std, probability=0.6):
    """Each patch of the vision tower (14 pixels, or 16) black with this probability (PAPO, arXiv 2507.06448)."""
    black = -torch.tensor(image_mean) / torch.tensor(image_std)
    chosen = torch.rand(len(pixel_values), 1, generator=generator) < probability
    return torch.where(chosen, black.repeat_interleave(pixel_values.shape[1] // 3), pixel_values)


def still_noise(pixel_values, generator):
    """Standard normal noise (patches, C), the same at both times of a patch."""
    noise = torch.randn(len(pixel_values), 3, 1, pixel_values.shape[1] // 6, generator=generator)
    return noise.expand(-1, -1, 2, -1).flatten(1)


def patchify(picture, image_processor):
    """A picture (3, H, W) in [0, 1] as pixel_values (patches, 3 x 2 x p x p), differentiably.

    What the processor does with a picture of the right size: it normalises, cuts patches, puts the four of an image
    token side by side, and repeats a still picture in time.
    """
    p, m, time = image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size
    mean, std = (
        torch.tensor(x)[:, None, None].to(picture) for x in (image_processor.image_mean, image_processor.image_std)
    )
    _, H, W = picture.shape
    cut = ((picture - mean) / std).view(3, H // p // m, m, p, W // p // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
    return cut.unsqueeze(5).expand(*[-1] * 5, time, -1, -1).reshape(-1, 3 * time * p * p)


def unpatchify(pixel_values, grid, image_processor):
    """The picture (3, H, W) in [0, 1] behind pixel_values and its image_grid_thw (3,), in whole 255ths."""
    p, m, time = image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size
    mean, std = (
        torch.tensor(x)[:, None, None].to(pixel_values) for x in (image_processor.image_mean, image_processor.image_std)
    )
    _, h, w = grid.tolist()
    cut = pixel_values.view(h // m, w // m, m, m, 3, time, p, p)[:, :, :, :, :, 0]
    picture = cut.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * p, w * p) * std + mean
    return (picture * 255).round() / 255


def with_picture(row, change):
    """The row with `change(pixel_values)` in the place of its pictures; itself where it has none."""
    if row.prompt.pixel_values is None:
        return row
    return dataclasses.replace(
        row, prompt=dataclasses.replace(row.prompt, pixel_values=change(row.prompt.pixel_values))
    )


def token_noise(row, seed, step):
    """Uniform numbers (G, T) in [0, 1) that depend on seed, step, prompt and response alone."""
    keys = [(seed, step, row.prompt.index, row.prompt.place, r[m].tolist()) for r, m in zip(row.responses, row.mask)]
    return torch.stack([torch.rand(row.mask.shape[1], generator=seeded(*key)) for key in keys]).to(row.mask.device)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and loss: plain tensors in, plain tensors out
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards, eps=1e-6):
    """(P, G) rewards -> (P, G) advantages: (r - mean) / (std + eps) in each group, unbiased std; 0 where all are equal.

    GRPO (arXiv 2402.03300, section 4.1.2); the unbiased std and eps are EasyR1's and verl's. Raises ValueError for
    G = 1, which would be a NaN.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"a group of {rewards.shape[1]} response has nothing to compare with: G must be 2 or more")
    centred = rewards - rewards.mean(1, keepdim=True)
    std = (centred.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)).sqrt()
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(equal, 0.0, centred / (std + eps))


def aggregate(values, mask, aggregation="token", denominator=None):
    """(B, T) -> scalar. "token" (DAPO): sum over valid tokens / their number. "sequence" (GRPO): mean over each
    response's tokens, summed / number of responses. `denominator`: that number for the whole mini-batch over all
    processes, so that any split into micro-batches sums to the same loss; None: of this batch.

    >>> aggregate(torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(3.)
    >>> aggregate(torch.tensor([[1.0, 2.0], [6.0, 0.0]]), torch.tensor([[True, True], [True, False]]), "sequence")
    tensor(3.7500)
    """
    values = torch.where(mask, values, 0.0)
    if aggregation == "sequence":
        values = values.sum(1) / mask.sum(1).clamp(min=1)
    if denominator is None:
        denominator = loss_denominator(mask, aggregation)
    return values.sum() / max(denominator, 1)


def loss_denominator(mask, aggregation="token"):
    """Valid tokens, or responses with a valid token: what `aggregate` divides by."""
    return (mask.sum() if aggregation == "token" else mask.any(1).sum()).item()


def policy_loss(logps, old_logps, advantages, mask, clip_low=0.2, clip_high=0.2, aggregation="token", denominator=None):
    """The clipped loss of PPO and GRPO (arXiv 2402.03300, eq. 3), with DAPO's two clip ranges (2503.14476, eq. 8).

        -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A),  ratio = exp(logp - old_logp)

    Args: logps, old_logps, mask (B, T); advantages (B,) or (B, T); aggregation and denominator as in `aggregate`.
    Returns (loss, info): `clip_fraction`, the share of tokens where the clipped product is the smaller one, and
    `approx_kl`, the mean of ratio - 1 - log(ratio).

    >>> logps = torch.tensor([[0.5, -0.5]]).log1p()  # ratio 1.5 and 0.5
    >>> loss, info = policy_loss(logps, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
    >>> round(loss.item(), 4), info["clip_fraction"].item()  # -(1.2 + 0.5) / 2
    (-0.85, 0.5)
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    log_ratio = torch.where(mask, logps - old_logps, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = aggregate(-torch.min(free, clipped), mask, aggregation, denominator)
    info = {
        "clip_fraction": aggregate((clipped < free).float(), mask).detach(),
        "approx_kl": aggregate(ratio - 1 - log_ratio, mask).detach(),
    }
    return loss, info


def kl_penalty(logps, ref_logps):
    """(B, T) k3 estimate of KL(policy || reference): exp(ref - logp) - (ref - logp) - 1 (arXiv 2402.03300, eq. 4).

    >>> kl_penalty(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]))
    tensor([[0.3679]])
    """
    log_ratio = (ref_logps - logps).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def quantiles(name, values, mask):
    """5, 50 and 95 % of the values (B, T) at valid tokens, named for the log."""
    levels = values[mask].float().quantile(torch.tensor([0.05, 0.5, 0.95], device=values.device))
    return {f"{name}_p05": levels[0], f"{name}_p50": levels[1], f"{name}_p95": levels[2]}


# ---------------------------------------------------------------------------------------------------------------------
# Dry run: memory of a run, from the shapes of the model alone
# ---------------------------------------------------------------------------------------------------------------------


def plan(args, gpus):
    """Bytes on each of `gpus` GPUs that stay for the whole run, and at the two peaks of a step.

    Returns {"kept" | "sampling" | "update": {part: bytes}}, for prompts and responses of the full length. Activations
    are what autograd keeps of a layer, per token: 6 D around norms and residuals, 5 of all heads around attention, 4 of
    the MLP's width; with gradient checkpointing that of one layer, and D for every layer; in sampling, of one layer for
    the prompts that are computed at a time. While the backward pass frees activations it makes gradients: the update
    holds the larger of the two.
    """
    source = str(TOY / "model") if args.model == "toy" else args.model
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=args.model_revision)
    except (OSError, ValueError) as error:
        raise UserError(unreachable("--model", args.model, error)) from None
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    text, vision = config.text_config, config.vision_config
    parameters = sum(p.numel() for p in model.parameters())
    trained = parameters - args.freeze_vision * sum(p.numel() for p in model.model.visual.parameters())
    number = 4 if args.dtype == "float32" else 2  # bytes of one, in compute
    G, T, prompt = args.group_size, args.max_response_tokens, args.max_prompt_tokens
    row = max(min(prompt + G * T, args.tokens_per_row), prompt + T)
    patches = args.max_pixels // vision.patch_size**2 if args.max_pixels else prompt * vision.spatial_merge_size**2
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    batch = min(args.rollout_prompts, args.prompts_per_step // gpus)
    embeddings = text.vocab_size * text.hidden_size

    def activations(tokens, depth, D, heads, mlp):
        layer = 6 * D + 5 * heads + 4 * mlp
        return tokens * number * (depth * D + layer if args.gradient_checkpointing else depth * layer)

    D = model.model.visual.blocks[0].norm1.weight.numel()
    seeing = D, D, getattr(vision, "intermediate_size", 4 * D)
    reading = text.hidden_size, text.num_attention_heads * head, text.intermediate_size
    together = min(batch, max(1, args.tokens_per_row // prompt))  # prompts that are computed at a time
    first = max(activations(together * patches, 1, *seeing), activations(together * prompt, 1, *reading))
    seen = activations(patches, vision.depth, *seeing)
    read = activations(row, text.num_hidden_layers, *reading) + row**2 * (
        1 + number
    )  # with the attention mask, as booleans and as numbers
    logits = HEAD_CHUNK * text.vocab_size * 4 * 4 + embeddings * 4  # four copies of a chunk, and the head's gradient
    one_layer = number * (embeddings + parameters // text.num_hidden_layers)
    whole_weights = number * parameters if gpus > 1 or number == 2 else 0
    return {
        "kept": {
            "weights": 4 * parameters / gpus,
            "optimiser": 8 * trained / gpus,
            "reference": 4 * parameters / gpus if args.kl_coef else 0,
        },
        "sampling": {
            "gathered weights": one_layer if args.reshard_while_sampling and gpus > 1 else whole_weights,
            "key-value cache": batch
            * (prompt + G * T)
            * text.num_hidden_layers
            * 2
            * text.num_key_value_heads
            * head
            * number,
            "logits": batch * G * text.vocab_size * 24,
            "prompts": first,
        },
        "update": {
            "gathered weights": one_layer if gpus > 1 else whole_weights,
            "activations": max(seen + read, 4 * trained / gpus - logits),
            "head": logits,
        },
    }


def dry_run(args):
    """What a run needs, as text, with the first flag to turn where it does not fit."""
    gpus, peaks = args.dry_run, plan(args, args.dry_run)
    memory = gpu_memory(args)
    lines = [f"{args.model} on {gpus} GPUs of {memory:.0f} GB, GB on each:"]
    for peak in ("sampling", "update"):
        parts = {**peaks["kept"], **peaks[peak]}
        total = sum(parts.values()) / 1e9
        shown = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts.items() if value)
        lines.append(f"  {peak:9s}{total:7.1f}   {'fits' if total < memory else 'DOES NOT FIT'}   ({shown})")
        kept = sum(peaks["kept"].values()) / 1e9
        if total < memory:
            continue
        if kept >= memory:
            turn = "none helps: weights and optimiser alone are too much; take more GPUs"
        elif peak == "sampling" and gpus > 1 and kept + peaks[peak]["gathered weights"] / 1e9 >= memory:
            turn = "--reshard_while_sampling"
        elif peak == "sampling":
            turn = "--rollout_prompts"
        else:
            turn = "--tokens_per_row" if args.gradient_checkpointing else "--gradient_checkpointing"
        lines.append(f"  first flag to turn: {turn}")
    sampled = args.prompts_per_step * args.group_size * args.max_response_tokens
    rows = args.prompts_per_step * (args.max_prompt_tokens + args.group_size * args.max_response_tokens)
    passes = 1 + (args.updates_per_step > 1) + bool(args.kl_coef)
    lines.append(
        f"  a step: at most {sampled:,} tokens sampled, {passes} forward and 1 backward pass over {rows:,} tokens, "
        f"and what the method adds"
    )
    return "\n".join(lines)


def gpu_memory(args):
    """GB of a GPU: as given, or of the card found, or 80."""
    found = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 80.0
    return args.gpu_memory or found


# ---------------------------------------------------------------------------------------------------------------------
# The run: what a script's `main` calls by name, and what happens between two steps
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """Model, data, optimiser, checkpoints and log of one training run, on one process or several."""

    def __init__(self, args):
        self.args, self.output = args, Path(args.output)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(130))  # nothing is lost while the model is loading
        if args.dry_run:
            print(dry_run(args))
            raise SystemExit(0)
        available = [str(tracker) for tracker in get_available_trackers()]
        trackers = args.report_to.split(",") if args.report_to else []
        for tracker in trackers:
            if tracker not in available:
                raise UserError(f"--report_to {tracker} is not installed: pip install {tracker}, or leave it out.")
        bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and torch.cuda.is_available())
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="bf16" if bf16 else "no",
            kwargs_handlers=[PATIENCE],
            log_with=trackers or None,
            project_dir=str(self.output),
        )
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")  # TF32, where a product is not in bf16
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        if args.cuda_graphs and not (torch.cuda.is_available() and self.world == 1):
            raise UserError("--cuda_graphs is for one process on a GPU: leave it out.")
        if args.prompts_per_step % self.world:
            raise UserError(
                f"--prompts_per_step {args.prompts_per_step} cannot be split over {self.world} processes: "
                f"make it a multiple of {self.world}."
            )
        if torch.cuda.is_available() or args.gpu_memory:
            need, memory = sum(plan(args, self.world)["kept"].values()) / 1e9, gpu_memory(args)
            if need >= memory:
                raise UserError(
                    f"weights and optimiser of {args.model} need {need:.1f} GB on each of {self.world} GPUs that have "
                    f"{memory:.1f} GB: take more GPUs; --dry_run 8 says what 8 need."
                )
        state = self.find_checkpoint()
        transformers.utils.logging.disable_progress_bar()
        source = str(TOY / "model") if args.model == "toy" else args.model
        weights, revision = (self.output / "last", "main") if state else (source, args.model_revision)
        self.processor = load_processor(source, args.model_revision, args.min_pixels, args.max_pixels)
        self.tokenizer = self.processor.tokenizer
        self.model = self.load(weights, revision, bf16)
        self.reference = self.load(source, args.model_revision, bf16, frozen=True) if args.kl_coef else None
        rope_index = self.model.model.get_rope_index
        self.data = Data(args.data, args.data_split, args, self.processor, rope_index)
        self.say(f"{args.data}: {len(self.data)} prompts, {self.data.dropped} dropped as too long")
        if args.eval_rows:
            split = args.eval_split if args.eval_data != "toy" else "test"
            self.eval_data = Data(args.eval_data, split, args, self.processor, rope_index, "--eval_data")
            self.say(f"{args.eval_data}: {len(self.eval_data)} rows to evaluate on, {self.eval_data.dropped} dropped")
        self.reward = Reward(args)

        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), args.learning_rate, betas=(0.9, args.beta2), weight_decay=args.weight_decay
        )
        shape = "constant_with_warmup" if args.schedule == "constant" else args.schedule
        spans = args.warmup_steps * args.updates_per_step, args.steps * args.updates_per_step
        self.schedule = transformers.get_scheduler(shape, self.optimizer, *spans).lr_lambdas[0]  # of the updates so far
        self.updates, self.step, self.saved, self.stopping = 0, 0, None, False
        self.history, self.seconds = {"first_eval": None, "last_eval": None, "seconds": 0.0}, {}
        self.rehearse()
        position = self.restore(state) if state else 0
        self.stream = Stream(self.data, args.seed, self.rank, self.world, position)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        if self.main:
            try:
                self.output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--output {self.output} cannot be made ({error}): name another folder.") from None
            write_text(self.output / "args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
            if not state:
                write_text(self.output / "metrics.jsonl", "")  # of a run that died before its first checkpoint
        if trackers:
            self.accelerator.init_trackers(self.output.name, config=dataclasses.asdict(args))

    def load(self, name, revision, bf16, frozen=False):
        """The model that is trained, or a frozen one; on several processes sharded, and whole on the main one alone."""
        model = load_model(name, revision, meta=self.world > 1, bf16=bf16).train(not frozen)
        if frozen:
            model.requires_grad_(False)
        if self.args.freeze_vision:
            model.model.visual.requires_grad_(False)
        if self.args.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.world > 1:
            whole = load_model(name, revision, bf16=bf16) if self.main else None
            shard(model, whole, self.accelerator.device, bf16)
        return model.to(self.accelerator.device)

    def rehearse(self):
        """A first update, for nothing, on the largest row that the settings allow: memory runs out now or never.

        Its learning rate is 0 and its optimiser state is forgotten, so that the run does not remember it.
        """
        G, T = self.args.group_size, self.args.max_response_tokens
        size = {"responses": torch.zeros(G, T, dtype=torch.long), "mask": torch.ones(G, T, dtype=torch.bool)}
        group = Group(self.data.prompt(self.data.longest), **size, truncated=torch.ones(G), texts=[""] * G)
        row = max(rows_of(group, self.args.tokens_per_row), key=lambda row: row.mask.sum())
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        with self.phase("update"):
            self.optimizer.step()  # the optimiser state is there when the forward pass begins, as in every later update
            self.optimizer.zero_grad()
            logps, entropy, _ = forward(self.model, row, self.args.temperature)
            (0 * (logps + entropy).sum()).backward()
        self.optimizer.zero_grad()
        self.optimizer.state.clear()

    # ---- what `main` calls, in this order ---------------------------------------------------------------------------

    def steps(self):
        """Yields the number of each step; logs, evaluates and saves after it; ends with the last step or on Ctrl-C."""
        if self.step == 0 and self.args.eval_rows:
            self.evaluate()
        first = self.step + 1
        with tqdm(total=self.args.steps, initial=self.step, disable=not self.main, unit="step") as self.bar:
            for step in range(first, self.args.steps + 1):
                self.begin = time.perf_counter()
                self.seconds = {"rollout": 0.0, "score": 0.0, "update": 0.0}
                self.groups, self.places, self.tries = [], [], 0
                self.sums, self.norms, self.skipped = {}, [], 0
                yield step
                self.step = step
                self.log()
                due = self.args.eval_every and step % self.args.eval_every == 0
                if self.args.eval_rows and (due or step == self.args.steps) and not self.stopping:
                    self.evaluate()
                self.stopping = self.total(self.stopping) > 0
                due = self.args.save_every and step % self.args.save_every == 0
                if due or step == self.args.steps or self.stopping:
                    self.save()
                if self.stopping:
                    break
        self.close()

    @contextlib.contextmanager
    def phase(self, name):
        """Times a phase of the step, and computes in bf16 where the run does."""
        start = time.perf_counter()
        try:
            with self.sampling() if name == "rollout" else self.accelerator.autocast():
                yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except torch.OutOfMemoryError as error:
            flags = (
                "--rollout_prompts, then --tokens_per_row and --max_response_tokens"
                if name == "rollout"
                else "--tokens_per_row, then --max_pixels"
            )
            raise UserError(f"out of memory in the {name} phase: lower {flags} ({str(error)[:120]}).") from None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def sampling(self):
        """Sampling finds all weights gathered, unless --reshard_while_sampling."""
        with self.accelerator.autocast(), contextlib.ExitStack() as stack:
            if not self.args.reshard_while_sampling:
                stack.enter_context(gathered(self.model))
            yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the update finds memory in one piece

    def draw(self):
        """This process's share of the next --prompts_per_step prompts; nothing once the step is full."""
        tries = self.args.filter_tries if self.args.filter_groups else 1
        if len(self.places) >= self.args.prompts_per_step or self.tries >= tries:
            return []
        self.tries += 1
        return self.stream.draw(self.args.prompts_per_step)

    def keep(self, groups):
        """Adds groups to the step; with --filter_groups (DAPO, 2503.14476, eq. 11) only those of mixed success."""

        def mixed(group):
            if self.args.reward:  # accuracy may mean nothing under a reward of one's own
                return bool((group.rewards != group.rewards[0]).any())
            return 0.01 < group.accuracy.mean() < 0.99

        self.sampled = groups  # the last draw, kept or not: what the log shows as a sample
        kept = [group for group in groups if not self.args.filter_groups or mixed(group)]
        if self.args.filter_groups:
            self.add("filtered_groups", len(groups) - len(kept), len(groups))
        for group in groups:
            self.add("accuracy", group.accuracy.sum(), len(group.texts))
            self.add("format", group.format.sum(), len(group.texts))
            self.add("reward", group.rewards.sum(), len(group.texts))
            self.add("response_tokens", group.mask.sum(), len(group.texts))
            self.add("truncated", group.truncated.sum(), len(group.texts))
            self.add("zero_advantage_groups", float((group.rewards == group.rewards[0]).all()), 1)
        places = sorted(gather_object([group.prompt.place for group in kept]))
        self.places = [*self.places, *places][: self.args.prompts_per_step]
        self.groups = [group for group in [*self.groups, *kept] if group.prompt.place in self.places]

    def rewards(self):
        """(P, G) rewards of the groups that were kept."""
        return torch.stack([g.rewards for g in self.groups]) if self.groups else torch.zeros(0, self.args.group_size)

    def rows(self, advantages):
        """The step's groups as packed rows: one per group, more where a group is longer than --tokens_per_row."""
        rows = []
        for group, group_advantage in zip(self.groups, advantages):
            group.advantages = group_advantage.to(group.mask.device)
            group.loss_mask = group.mask & ~group.truncated[:, None] if self.args.drop_truncated else group.mask
            rows += rows_of(group, self.args.tokens_per_row)
        self.cut = self.total(len(rows) - len(self.groups)) > 0  # some group, on some process, is in several rows
        if len(self.places) < self.args.prompts_per_step:
            self.say(f"step {self.step + 1}: {len(self.places)} prompts of mixed success in {self.tries} draws")
        return self.even(rows)

    def minibatches(self, rows):
        """--updates_per_step lists of rows, each of an equal share of the step's prompts in the order of the data."""
        size = math.ceil(len(self.places) / self.args.updates_per_step)
        for start in range(0, len(self.places), max(size, 1)):
            places = self.places[start : start + size]
            yield self.even([row for row in rows if row.prompt.place in places])

    def even(self, rows):
        """As many rows on each process, since sharded weights are gathered by all together; a filler counts nothing."""
        most = max(gather_object([len(rows)]))
        filler = self.sampled[0][:1]
        filler.prompt = dataclasses.replace(filler.prompt, place=-1)
        filler.advantages = torch.zeros(1, device=filler.mask.device)
        filler.loss_mask = torch.zeros_like(filler.mask)
        zeros = torch.zeros(filler.mask.shape, device=filler.mask.device)
        filler.old_logps = filler.ref_logps = filler.scores = filler.weights = zeros
        return rows + [filler] * (most - len(rows))

    def denominator(self, rows):
        """Tokens (or responses) that the loss of a mini-batch is divided by: over all its rows and all processes."""
        return self.total(sum(loss_denominator(row.loss_mask, self.args.aggregation) for row in rows))

    def backward(self, loss, info, row, mask):
        """Gradients of one row; `info` goes to the log as the mean over the tokens in `mask`, weighted by their number.

        A group of equal rewards has no gradient: on one process its backward pass is left out.
        """
        flat = not (row.advantages.any() or self.args.kl_coef or self.args.entropy_coef)
        if self.world > 1 or not flat:
            self.accelerator.backward(loss)
        self.add("loss", loss.detach(), 0)
        self.note(info, mask)

    def update(self):
        """One optimiser step on the gradients so far; one that is not finite is skipped, and counted."""
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        rate = self.args.learning_rate * self.schedule(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.args.max_grad_norm))
        if norm.isfinite():
            self.optimizer.step()
            torch.clear_autocast_cache()  # bf16 copies of the weights as they were
            self.norms.append(norm.item())
        else:
            self.skipped += 1
            self.say(f"step {self.step + 1}: the gradient is not finite; this update is skipped")
        self.optimizer.zero_grad()
        self.updates += 1

    # ---- log --------------------------------------------------------------------------------------------------------

    def add(self, name, value, weight):
        """Adds to a sum and its weight; the log holds their quotient over all processes (weight 0: the sum itself)."""
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + float(value), weights + float(weight))

    def note(self, info, mask):
        """Adds a row's `info`, means over its tokens, to the log, with as much weight as it has tokens in `mask`."""
        for name, value in info.items():
            self.add(name, value * mask.sum(), mask.sum())

    def total(self, value):
        """The sum of a number over all processes."""
        if self.world == 1:
            return value
        value = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(value, "sum").item()

    def log(self):
        """Writes the step's line of metrics.jsonl, moves the bar, and now and then shows a response."""
        seconds = time.perf_counter() - self.begin
        self.history["seconds"] += seconds
        names = "reward accuracy format response_tokens truncated zero_advantage_groups"
        sums = dict.fromkeys([*names.split(), "entropy", "loss", "clip_fraction", "approx_kl"], (0.0, 0.0))
        for part in gather_object([self.sums]):  # one for each process
            for name, (value, weight) in part.items():
                value_so_far, weight_so_far = sums.get(name, (0.0, 0.0))
                sums[name] = (value_so_far + value, weight_so_far + weight)
        mean = {name: value / weight if weight else value for name, (value, weight) in sums.items()}
        mean["loss"] /= max(len(self.norms) + self.skipped, 1)
        line = {
            "step": self.step,
            **mean,
            "grad_norm": sum(self.norms) / max(len(self.norms), 1),
            "skipped_updates": self.skipped,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            **{f"seconds_{name}": value for name, value in self.seconds.items()},
            "tokens_per_second": sums["response_tokens"][0] / seconds,
        }
        self.write(line)
        self.bar.set_postfix(reward=f"{line['reward']:.2f}", refresh=False)
        self.bar.update()
        if self.args.show_every and self.step % self.args.show_every == 0:
            group = self.sampled[self.step % len(self.sampled)]
            self.say(
                f"\nstep {self.step}  {group.prompt.problem}\n  {group.texts[0].strip()}\n"
                f"  right answer {group.prompt.answer}, reward {group.rewards[0]:.2f}"
            )

    def write(self, line):
        """A line of metrics.jsonl, floats with six digits, null where one is not finite; the same to the trackers."""
        floats = {name: value for name, value in line.items() if isinstance(value, float)}
        line |= {name: float(f"{value:.6g}") if math.isfinite(value) else None for name, value in floats.items()}
        if self.main:
            with open(self.output / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def say(self, text):
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def evaluate(self):
        """Accuracy on --eval_data, one response per row, by the prompt, sampler and checker of training."""
        begin, args = time.perf_counter(), self.args
        order = self.eval_data.indices
        if 0 < args.eval_rows < len(order):
            order = sorted(random.Random(args.seed).sample(order, args.eval_rows))
        mine, T = order[self.rank :: self.world], args.max_response_tokens
        batch = args.rollout_prompts * (self.data.width + args.group_size * T) // (self.eval_data.width + T)
        batch = max(1, batch)  # as many prompts, of one response each, as take the memory of training's
        wide = dataclasses.replace(args, rollout_prompts=batch)
        right = tokens = truncated = 0
        most = math.ceil(len(order) / self.world)  # the same number of rows everywhere; what fills up is not counted
        filled = mine + order[:1] * (most - len(mine))
        bar = tqdm(total=most, desc="evaluation", leave=False, disable=not self.main, unit="row")
        with bar, self.phase("rollout"):
            for start in range(0, most, batch):
                prompts = list(self.stream.pool.map(self.eval_data.prompt, filled[start : start + batch]))
                groups = rollout(
                    self.model, self.tokenizer, prompts, wide, "evaluation", slice(1), args.eval_temperature
                )
                for group in groups[: len(mine) - start]:
                    right += self.reward.check(group.texts[0], group.prompt.answer)
                    tokens += group.mask.sum().item()
                    truncated += group.truncated.sum().item()
                bar.update(len(prompts))
        rows = len(order)
        accuracy = self.total(right) / rows
        line = {
            "step": self.step,
            "eval_accuracy": accuracy,
            "eval_stderr": math.sqrt(accuracy * (1 - accuracy) / rows),
            "eval_rows": rows,
            "eval_response_tokens": self.total(tokens) / rows,
            "eval_truncated": self.total(truncated) / rows,
            "eval_seconds": time.perf_counter() - begin,
        }
        self.history["first_eval"] = self.history["first_eval"] or line
        self.history["last_eval"] = line
        self.write(line)
        self.say(f"step {self.step}: accuracy {accuracy:.1%} ± {line['eval_stderr']:.1%} on {rows} rows")

    def close(self):
        """The last lines on the console: what was gained, and where the files are."""
        first, last = self.history["first_eval"], self.history["last_eval"]
        self.accelerator.end_training()
        self.reward.check.close()
        self.stream.pool.shutdown()
        if first and last and last["step"] > first["step"]:
            self.say(
                f"accuracy {first['eval_accuracy']:.1%} -> {last['eval_accuracy']:.1%} ± {last['eval_stderr']:.1%} on "
                f"{last['eval_rows']} rows of {self.args.eval_data}, in {self.step} steps and "
                f"{self.history['seconds']:.0f} s of training"
            )
        if self.reward.check.timeouts:
            self.say(f"{self.reward.check.timeouts} answers took the maths checker too long and count as wrong")
        if self.main:
            with contextlib.suppress(ImportError):  # a method that was copied without show.py
                import show

                show.curves(show.read_runs([self.output]), self.output / "curves")
        self.say(f"{self.output}/: metrics.jsonl, args.json, curves.png, and the model in last/")
        if self.stopping:
            self.say(f"stopped after step {self.step} of {self.args.steps}: the same command with --resume goes on")
            raise SystemExit(130)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def stop(self, *_):
        """Ctrl-C, or a scheduler's SIGTERM: finish the step, save, stop. A second one stops at once."""
        if self.stopping:
            raise SystemExit(130)
        self.stopping = True
        self.say("stopping after this step; once more stops at once, without saving")

    def save(self):
        """<output>/step-N, a Hugging Face folder with the training state beside the weights; `last` points to it.

        Written under another name and renamed, so that a folder called step-N is whole. There is no state of a random
        generator to save: every random number comes from the seed, the step and the row of the data.
        """
        if self.saved == self.step:
            return
        self.saved = self.step
        once = dict(self.model.named_parameters())  # a head that is the embeddings stands here once
        weights = self.collect({name: value for name, value in self.model.state_dict().items() if name in once})
        state = {name: self.optimizer.state[p] for name, p in self.parameters.items()}
        moments = self.collect({f"{name}.{key}": value for name, s in state.items() for key, value in s.items()})
        if not self.main:
            return
        folder, beside = self.output / f"step-{self.step}", self.output / f"step-{self.step}.unfinished"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            self.model.save_pretrained(beside, state_dict=weights)
            self.processor.save_pretrained(beside)
            save_file(moments, beside / "optimizer.safetensors")
            state = {
                "step": self.step,
                "position": self.stream.position,
                "updates": self.updates,
                "history": self.history,
                **{name: getattr(self.args, name) for name in ("model", "data", "seed", "instruction")},
            }
            write_text(beside / "trainer_state.json", json.dumps(state, indent=2) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
            (self.output / "last.unfinished").unlink(missing_ok=True)
            (self.output / "last.unfinished").symlink_to(folder.name)
            (self.output / "last.unfinished").replace(self.output / "last")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise UserError(
                f"{folder} could not be written ({error}); the checkpoint before it is whole: make room, then --resume."
            ) from None

    def collect(self, tensors):
        """Whole tensors in main memory, on the main process; the others take part and keep nothing."""
        collected = {}
        for name, value in tensors.items():
            value = whole(value)
            if self.main:
                collected[name] = value.cpu().contiguous()
        return collected

    def find_checkpoint(self):
        """The training state to go on from, or None; refuses to mix two runs in one folder."""
        last, args = self.output / "last", self.args
        if not args.resume:
            if last.exists():
                raise UserError(f"{self.output} holds a run: --resume goes on with it, --output starts another.")
            return None
        if not last.exists():
            raise UserError(f"--resume: there is no checkpoint in {self.output}; start without it, or set --output.")
        try:
            state = json.loads((last / "trainer_state.json").read_text())
            safe_open(last / "optimizer.safetensors", "pt")  # is it there, and whole
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"--resume: {last} is not a whole checkpoint of this script ({error}): point {last} to another step-N."
            ) from None
        for name in ("model", "data", "seed"):
            if state[name] != getattr(args, name):
                raise UserError(
                    f"--resume: {self.output} holds a run with --{name} {state[name]}, not {getattr(args, name)}: "
                    f"give the same, or another --output."
                )
        return state

    def restore(self, state):
        """Optimiser, counters and log as they were; returns the position in the data."""
        moments = safe_open(self.output / "last" / "optimizer.safetensors", "pt")  # read tensor by tensor
        keys = moments.keys()
        if {key.rpartition(".")[0] for key in keys} != set(self.parameters):
            raise UserError(
                f"--resume: the optimiser state in {self.output}/last is of other weights than this run trains: "
                f"give the same --model and --freeze_vision, or start anew with another --output."
            )
        for key in keys:
            name, _, what = key.rpartition(".")
            p, value = self.parameters[name], moments.get_tensor(key)
            if what != "step":
                value = value.to(self.accelerator.device)
                value = distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value
            self.optimizer.state[p][what] = value
        self.updates, self.step, self.saved = state["updates"], state["step"], state["step"]
        self.history = state["history"]
        if self.main:
            lines = (self.output / "metrics.jsonl").read_text().splitlines()
            lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
            write_text(self.output / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
        self.say(f"going on after step {self.step}")
        return state["position"]


def write_text(path, text):
    """Writes a file beside and renames it: whoever reads it finds the old one or the new one, whole."""
    beside = path.with_name(path.name + ".unfinished")
    beside.write_text(text)
    beside.replace(path)
