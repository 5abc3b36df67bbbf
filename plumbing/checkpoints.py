"""Checkpoints: save, find, restore; Hugging Face folders with the training state next to the weights.

A file or folder is written under another name and renamed, so it is complete at any moment. What another run wrote is
set aside, not overwritten. One run writes to a folder at a time. Each process writes its part of the optimizer's
state, in safetensors, and any number of processes can read it. A resumed run rewrites args.json, and cuts metrics.jsonl
back to its step. Nothing is pickled, and no state of a random generator is kept: each random number comes from the
seed, the step, the row of the data and its number in the stream. Not here: when a run saves (trainer.py).
"""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from tqdm.auto import tqdm

from plumbing.adapters import adapters_of, resolve_model, save_adapters
from plumbing.arguments import EMBEDDED, MAY_CHANGE, UserError, cannot_write
from plumbing.data import refuse_output_among
from plumbing.sharding import full_tensor, on_main


def locked(folder):
    """A lock that keeps others out of a folder until it is released. Raises UserError where another run holds it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
        return lock
    except Timeout:
        raise UserError(f"another run writes to {folder}: wait for its end, or name another --output.") from None


def write_text(path, text):
    """Writes a file under another name and renames it: a reader finds the old one or the new one, complete."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def set_aside(path):
    """Renames what is there, so that nothing is overwritten: metrics.jsonl to metrics.1.jsonl, step-20 to step-20.1."""
    if path.exists():
        names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is right on one process


@dataclass
class State:
    """Where a run stands: trainer_state.json of a checkpoint."""

    step: int  # the last one that is done
    updates: int  # so far, with skipped ones: the position in the schedule
    position: int  # prompts drawn from the data so far
    contents: str  # the data's number of prompts and their checksum
    processes: int  # number of files in optimizer/
    history: dict  # first and last evaluation, seconds of training
    script: str
    arguments: dict


def read_state(folder):
    """The State of a checkpoint. Raises UserError where it is not whole."""
    try:
        return State(**json.loads((folder / "trainer_state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not a whole checkpoint of this project ({error}): take another step-N.") from None


def trained_with(model):
    """{flag: value} of a checkpoint's run, and its data's `contents`; {} for other models. Raises UserError."""
    path = Path(resolve_model(model)[0]) / "trainer_state.json"
    if model in EMBEDDED or not path.exists() or '"global_step"' in path.read_text():  # of transformers' own Trainer
        return {}
    state = read_state(path.parent)
    return state.arguments | {"contents": state.contents}


def newest(output):
    """The checkpoint to resume from: what `last` is or points to; the latest step-N where there is none; or None."""
    if (output / "last").exists():
        return (output / "last").resolve()
    steps = steps_in(output)
    return steps[max(steps)] if steps else None


def steps_in(output):
    """{number: folder} of the checkpoints in a run's folder."""
    return {int(path.name[5:]): path for path in output.glob("step-*") if re.fullmatch(r"step-\d+", path.name)}


def find_checkpoint(args):
    """(folder, State) to resume from, or (None, None). Raises UserError for a folder of another run, or of data."""
    output = Path(args.output)
    refuse_output_among(output, args.data, args.eval_data)
    folder = newest(output)
    if not args.resume:
        if folder:
            raise UserError(f"{output} holds a run: --resume continues it, --output starts another.")
        return None, None
    if not folder:
        raise UserError(f"--resume: there is no checkpoint in {output}; start without it, or set --output.")
    state, parts = read_state(folder), len(list(folder.glob("optimizer/*.safetensors")))
    if parts != state.processes:
        raise UserError(
            f"{folder} is not a whole checkpoint: its optimizer/ holds {parts} files of {state.processes}; point "
            f"{output}/last to another, or start again."
        )
    refuse_changes(changes(args, state), args)
    return folder, state


def changes(args, state, contents=None):
    """{what: (then, now)} of all that would make a resumed run train something else than before.

    The number of steps is part of that where a flag called schedule, or ..._schedule, depends on it.
    """
    compared = [f.name for f in dataclasses.fields(args) if f.name not in MAY_CHANGE]
    scheduled = [name for name, value in vars(args).items() if name.endswith("schedule") and value != "constant"]
    if scheduled:
        compared.append("steps")
    found = {"script": (state.script, Path(sys.argv[0]).stem), "prompts": (state.contents, contents or state.contents)}
    found |= {name: (state.arguments[name], getattr(args, name)) for name in compared if name in state.arguments}
    return {what: values for what, values in found.items() if values[0] != values[1]}


def refuse_changes(found, args):
    """Raises UserError for `changes`, unless they are wanted; --lora_rank never changes."""
    if found and (not args.allow_changed or "lora_rank" in found):
        differences = "; ".join(f"{what} was {then}, is {now}" for what, (then, now) in found.items())
        raise UserError(
            f"--resume: {args.output} was begun otherwise ({differences}): give the same, or another --output; "
            f"--allow_changed resumes nevertheless (not with another --lora_rank), and writes it into metrics.jsonl."
        )


def open_output(args, folder, state):
    """Makes --output ready, for a new run or a resumed one; returns a lock, which keeps other runs out."""
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = locked(output)
        if newest(output) != folder:
            raise UserError(f"another run has written to {output} since the start: --resume continues it.")
        if state:
            for step in [step for step in steps_in(output) if step > state.step]:
                tqdm.write(f"{output}/step-{step} is later than the resumed step: set aside", file=sys.stderr)
                set_aside(output / f"step-{step}")
            restore_log(output / "metrics.jsonl", state.step)
        else:
            set_aside(output / "metrics.jsonl")  # of a run that died before its first checkpoint
            write_text(output / "metrics.jsonl", "")
        write_text(output / "args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
        return lock
    except OSError as error:
        raise UserError(f"--output {cannot_write(output, error)}.") from None


def restore_log(path, step):
    """metrics.jsonl as it was after `step`: later lines, and half a line at the end, are of a run that was killed."""
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if found["step"] < step or (found["step"] == step and "changed" not in found):  # that is written again
                kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))


def moments(optimizer, parameters):
    """{name: tensor} of AdamW's state of the {name: parameter}."""
    return {f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}


def restore_optimizer(folder, optimizer, parameters, updates):
    """AdamW's state as it was after so many updates. Raises UserError where the files have another."""
    reader = HuggingFaceStorageReader(folder / "optimizer")
    found = moments(optimizer, parameters) | {"updates": torch.tensor(0.0)}
    saved = {name: value.size for name, value in reader.read_metadata().state_dict_metadata.items()}
    whole = saved == {name: value.shape for name, value in found.items()}
    if whole:
        dcp.load(found, storage_reader=reader)
    if not whole or found["updates"] != updates:
        raise UserError(
            f"--resume: the files in {folder}/optimizer are not all of this checkpoint: point {folder.parent}/last to "
            f"another. Or this run trains other weights: give the same --freeze_vision, or start again."
        )


def save_checkpoint(folder, model, processor_files, optimizer, parameters, state, is_main, keep, ending=True):
    """`folder`, called step-N, and the link `last` next to it; `state` is the State that `find_checkpoint` returns.

    All processes take part: each writes its part of the optimizer, the main one the weights, `processor_files` {name:
    text} and all else; with adapters the optimizer too, and at the `ending` of a run the merged model. `parameters`:
    {name: what is trained}; `keep`: so many checkpoints stay, 0 for all. Raises UserError; the checkpoint before stays.
    """
    lora, weights = bool(adapters_of(model)), {}
    unfinished, last = folder.with_name(f"{folder.name}.unfinished"), folder.with_name("last")

    @contextlib.contextmanager
    def or_refuse():
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, CheckpointException):
                error = next(iter(error.failures.values()))[0]
            sentence = f"{cannot_write(folder, error)}; the checkpoint before it is whole, for --resume."
            raise UserError(sentence) from None

    @or_refuse()
    def write_weights():
        shutil.rmtree(unfinished, ignore_errors=True)
        if lora:
            save_adapters(model, unfinished, ending)
        else:
            model.save_pretrained(unfinished, state_dict=weights)
        for name, text in processor_files.items():
            write_text(unfinished / name, text)
        write_text(unfinished / "trainer_state.json", json.dumps(dataclasses.asdict(state), indent=2) + "\n")

    @or_refuse()
    def write_optimizer():
        writer = HuggingFaceStorageWriter(unfinished / "optimizer", save_distributed=True)
        parts = moments(optimizer, parameters) | {"updates": torch.tensor(float(state.updates))}
        dcp.save(parts, storage_writer=writer, no_dist=lora)  # what fails on one process is raised on all

    @or_refuse()
    def put_in_place():
        set_aside(folder)
        unfinished.rename(folder)
        link = folder.with_name("last.unfinished")
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        if not last.is_symlink():
            set_aside(last)  # a folder, of a run that was copied without links
        link.replace(last)
        remove_older(folder, keep)

    once = {} if lora else dict(model.named_parameters())  # a head that is the embeddings is in there once
    for name, value in model.state_dict().items():
        if name in once:
            value = full_tensor(value)  # all processes take part
            if is_main:
                weights[name] = value.cpu().contiguous()
    on_main(write_weights)
    if lora:
        on_main(write_optimizer)
    else:
        write_optimizer()
    on_main(put_in_place)


def remove_older(folder, keep):
    """Removes checkpoints before `folder`, a step-N, the oldest ones, until `keep` are left; 0 keeps all."""
    saved = steps_in(folder.parent)
    older = sorted(number for number in saved if number < int(folder.name[5:]))
    for number in older[: max(0, len(older) + 1 - keep)] if keep else []:
        saved[number].rename(f"{saved[number]}.unfinished")  # half a checkpoint never has a checkpoint's name
    for path in folder.parent.glob("step-*.unfinished"):
        shutil.rmtree(path, ignore_errors=True)
