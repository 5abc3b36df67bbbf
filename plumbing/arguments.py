"""The command line: how a flag is declared, checked and listed by --help, and the flags that all scripts share.

Not here: a method's own flags (its file), and what a flag does (where it is used).
"""

import argparse
import dataclasses
import math
import operator
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm
from transformers import HfArgumentParser


class UserError(SystemExit):
    """A mistake of the user's: one sentence that says what to do, exit code 2, no traceback."""

    def __init__(self, sentence):
        super().__init__(2)
        self.args = (sentence,)
        tqdm.write(f"error: {sentence}", file=sys.stderr)  # not behind a bar
        sys.stderr.flush()


def cannot_open(option, name, error):
    """The sentence for a model or data that is not there, from the first line of the library's error."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return f"{option} {name} cannot be opened ({first}): give a hub id that is reachable from here, or a local folder."


def cannot_write(path, error):
    """The sentence for a file or folder that cannot be written, and what to do about it."""
    full = re.search(r"No space left|quota exceeded|File too large|os error (28|122|27)\b", str(error))
    advice = "free space on the disk" if full else "check its permissions"
    return f"{path} could not be written ({error}): {advice}"


def flag(default, help, gt=None, min=None, max=None, lt=None, **options):
    """A flag of the command line, a field of a dataclass.

    A number must be greater than `gt` or at least `min`, less than `lt` or at most `max`. options: argparse's.
    """
    limits = {"above": gt, "at least": min, "at most": max, "below": lt}
    limits = {words: limit for words, limit in limits.items() if limit is not None}
    return field(default=default, metadata={"limits": limits, "argparse": {"help": help, **options}})


SWITCH = {"nargs": "?", "const": True}  # a flag that may be true, false, or not given
WITHIN = {"above": operator.gt, "at least": operator.ge, "at most": operator.le, "below": operator.lt}


def check_numbers(args):
    """Raises UserError for a number that is not finite, or outside of what its flag allows."""
    for f in dataclasses.fields(args):
        value, limits = getattr(args, f.name), f.metadata.get("limits", {})
        if isinstance(value, int | float):
            within = [WITHIN[words](value, limit) for words, limit in limits.items()]
            if not (math.isfinite(value) and all(within)):
                said = " and ".join(f"{words} {limit:,}" for words, limit in limits.items())
                raise UserError(f"--{f.name} {value} must be {said or 'a finite number'}.")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A flag by one name, with its choices; its default, unless that depends on the model: then the help says it."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        names = [name for name in action.option_strings if "-" not in name[2:]] or [action.metavar or action.dest]
        return " ".join([*names, "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""]).strip()


class Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists what there is.")


def parse_args(cls, argv=None):
    """`cls` filled from the command line; `--help` shows one group for each dataclass that `cls` inherits from."""
    groups, left = [], {f.name: f for f in dataclasses.fields(cls)}
    for base in cls.__mro__[:-1]:  # a method may give a shared flag another default: its own class comes first
        own = [left.pop(name) for name in base.__dict__.get("__annotations__", {}) if name in left]
        spec = [(f.name, f.type, field(default=f.default, metadata=f.metadata["argparse"])) for f in own]
        if spec:
            title = Path(sys.argv[0]).stem if base is cls else base.__doc__
            groups.append(dataclasses.make_dataclass(base.__name__, spec, namespace={"_argument_group_name": title}))
    parser = Parser(groups, allow_abbrev=False, formatter_class=Help, usage="%(prog)s [flags]")
    return cls(**vars(parser.parse_args(argv)))


TOY = Path(__file__).resolve().parent.parent / "toy"
EMBEDDED = {"toy": TOY, "toy-faint": TOY / "faint"}  # the embedded models and their data
INSTRUCTION = "Think step by step inside <think> </think>, then give the final answer inside \\boxed{}."


def model_source(args):
    """Where --model is: a hub id, a folder, or an embedded model's folder."""
    return str(EMBEDDED[args.model] / "model") if args.model in EMBEDDED else args.model


def without_links(model):
    """--model with its links followed, where it is a path with some: `last` is another one when its run goes on."""
    real = os.path.realpath(model)
    linked = model not in EMBEDDED and os.path.exists(model) and real != os.path.abspath(model)
    return real if linked else model


@dataclass
class ModelArgs:
    """model"""

    model: str = flag("toy", "hub id or folder of a Qwen2(.5)-VL, Qwen3-VL or InternVL3; built in: toy, toy-faint")
    model_revision: str = flag("main", "branch, tag or commit of a hub model")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "compute type; auto: bfloat16 on a GPU, else float32")
    freeze_vision: bool = flag(False, "do not train the vision tower and what joins it to the decoder")
    lora_rank: int = flag(0, "LoRA adapters of this rank in the language model; 0: all weights", min=0, max=1024)
    lora_alpha: int | None = flag(None, "adapters' factor times --lora_rank (default: --lora_rank)", gt=0, max=10**6)
    compile: bool = flag(True, "on a GPU: compile layers and head, once in a run's first minutes")
    gradient_checkpointing: bool | None = flag(None, "recompute activations (default: if memory is short)", **SWITCH)


@dataclass
class DataArgs:
    """data"""

    data: str | None = flag(None, "hub id, id:config, or local parquet, json or jsonl (toy: its own, else: geometry3k)")
    eval_data: str | None = flag(None, "the same for evaluation (default: --data)")
    data_split: str = flag("train", "split of a hub data set to train on")
    eval_split: str = flag("test", "split of a hub data set to evaluate on")
    data_revision: str = flag("main", "branch, tag or commit of a hub data set")
    image_column: str | None = flag(None, "column of the image or images (default: images or image)")
    problem_column: str | None = flag(None, "column of the question (default: problem, question or query)")
    answer_column: str | None = flag(None, "column of the answer (default: answer, solution or ground_truth)")
    instruction: str = flag(INSTRUCTION, "sentence that follows every question")
    max_prompt_tokens: int = flag(2048, "longer prompts are dropped, and counted", gt=0)
    min_pixels: int | None = flag(None, "smaller images are enlarged to this (default: 262144; toy: never)", gt=0)
    max_pixels: int | None = flag(None, "larger images are shrunk to this (default: 1000000; toy: never)", gt=0)


@dataclass
class RolloutArgs:
    """rollout"""

    prompts_per_step: int | None = flag(None, "prompts in a step, over all processes (toy: 16, else: 512)", gt=0)
    group_size: int = flag(8, "responses sampled for each prompt", min=2)
    max_response_tokens: int | None = flag(None, "longer responses are cut (toy: 64, else: 2048)", gt=0)
    temperature: float = flag(1.0, "sampling temperature, also of the log-probs in the loss", min=1e-6, max=100)
    top_p: float = flag(1.0, "sample from the smallest set of tokens of this probability", gt=0, max=1)
    top_k: int = flag(0, "sample from the k likeliest tokens; 0: from all", min=0)
    rollout_prompts: int = flag(32, "prompts that are sampled together, on each process", gt=0)
    reshard_while_sampling: bool = flag(False, "gather weights layer by layer for every token: slow, needs less memory")
    cuda_graphs: bool | None = flag(None, "replay a sampled token's kernels as one (default: on one GPU)", **SWITCH)


@dataclass
class RewardArgs:
    """reward"""

    reward: str | None = flag(None, "your own reward, my_file.py:function, instead of the weighted sum below")
    accuracy_weight: float = flag(0.9, "weight of a right answer", min=0, max=1e6)
    format_weight: float = flag(0.1, "weight of <think> </think> followed by \\boxed{}", min=0, max=1e6)
    check_seconds: float = flag(3.0, "an answer that the maths checker needs longer for is wrong", gt=0, max=3600)


@dataclass
class LossArgs:
    """loss"""

    clip_low: float = flag(0.2, "the ratio is clipped from below at 1 - clip_low", min=0, max=1)
    clip_high: float = flag(0.2, "and from above at 1 + clip_high (DAPO: 0.28)", min=0, max=1e6)
    aggregation: Literal["token", "sequence"] = flag("token", "mean over all tokens, or over responses")
    kl_coef: float = flag(0.0, "weight of the KL term; not 0: loads the reference model", min=0, max=1e6)
    entropy_coef: float = flag(0.0, "weight of the entropy bonus", min=-1e6, max=1e6)
    filter_groups: bool = flag(False, "replace groups that are all right or all wrong by new prompts (DAPO)")
    filter_tries: int = flag(10, "draws of --prompts_per_step prompts before a step goes on with what there is", gt=0)
    drop_truncated: bool = flag(False, "leave responses that hit --max_response_tokens out of the loss")


@dataclass
class UpdateArgs:
    """update"""

    steps: int | None = flag(None, "steps of the whole run (toy: 150, else: 60)", gt=0)
    updates_per_step: int | None = flag(None, "updates, each on a share of the prompts (toy: 1, else: 4)", gt=0)
    learning_rate: float | None = flag(None, "AdamW's (toy: 1e-4, else: 1e-6; of LoRA 10 times that)", gt=0, max=1)
    schedule: Literal["constant", "linear", "cosine"] = flag("constant", "of the learning rate, over the whole run")
    warmup_steps: int = flag(0, "steps over which the learning rate rises from 0", min=0)
    weight_decay: float = flag(0.01, "AdamW's", min=0, max=1)
    beta2: float = flag(0.999, "AdamW's", min=0, lt=1)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", gt=0)
    tokens_per_row: int = flag(16384, "of a forward pass: longer groups are cut into rows", gt=0)


@dataclass
class RunArgs:
    """run"""

    output: str | None = flag(None, "folder of everything the run writes (default: runs/<script>)")
    seed: int = flag(0, "of the order of the data and of every sampled token")
    eval_every: int = flag(20, "steps between evaluations; also before the first and after the last step", min=0)
    eval_rows: int = flag(-1, "rows of --eval_data to evaluate on; -1: all, 0: never evaluate", min=-1)
    eval_temperature: float | None = flag(None, "of evaluation; 0: greedy (toy: 1, else: 0)", min=0, max=100)
    save_every: int = flag(20, "steps between checkpoints; there is also one after the last step", min=0)
    keep: int = flag(2, "checkpoints that stay, the newest ones; 0: all", min=0)
    resume: bool = flag(False, "go on from <output>/last")
    allow_changed: bool = flag(False, "--resume with other flags than the run was begun with")
    dry_run: int = flag(0, "print the memory that this run needs on so many GPUs, and stop", min=0)
    gpu_memory: float | None = flag(None, "GB of a GPU, for --dry_run (default: of the one found, else 80)", gt=0)
    show_every: int = flag(10, "steps between sampled responses on the console; 0: never", min=0)
    report_to: str | None = flag(None, "accelerate's trackers in addition to metrics.jsonl, e.g. tensorboard,wandb")


# may differ when a run is resumed: they change no result, or are meant to be changed
MAY_CHANGE = {f.name for f in dataclasses.fields(RunArgs)} - {"seed"}
MAY_CHANGE |= {"steps", "compile", "gradient_checkpointing", "tokens_per_row", "rollout_prompts"}
MAY_CHANGE |= {"reshard_while_sampling", "cuda_graphs", "eval_data", "eval_split"}


@dataclass
class SharedArgs(ModelArgs, DataArgs, RolloutArgs, RewardArgs, LossArgs, UpdateArgs, RunArgs):
    """What every training script takes. A method's `Args` inherits these and adds its own."""

    def __post_init__(self):
        toy, self.model = self.model in EMBEDDED, without_links(self.model)
        if self.lora_alpha and not self.lora_rank:
            raise UserError(f"--lora_alpha {self.lora_alpha} is for adapters: give --lora_rank too, or leave it out.")
        defaults = {  # flag: (for the toy, for any other model)
            "data": (self.model, "hiyouga/geometry3k"),
            "gradient_checkpointing": (False, None),  # memory.py decides
            "min_pixels": (None, 262_144),
            "max_pixels": (None, 1_000_000),
            "prompts_per_step": (16, 512),
            "max_response_tokens": (64, 2048),
            "steps": (150, 60),
            "updates_per_step": (1, 4),
            "lora_alpha": (self.lora_rank or None,) * 2,
            "learning_rate": (1e-3, 1e-5) if self.lora_rank else (1e-4, 1e-6),
            "eval_temperature": (1.0, 0.0),
            "output": (f"runs/{Path(sys.argv[0]).stem}",) * 2,
        }
        for name, (for_toy, for_others) in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, for_toy if toy else for_others)
        check_numbers(self)
        prompts, parts = self.prompts_per_step, self.updates_per_step
        if prompts % parts:
            raise UserError(f"--prompts_per_step {prompts} cannot be split into --updates_per_step {parts} parts.")
