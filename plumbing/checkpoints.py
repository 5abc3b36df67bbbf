"""Checkpoints: save, find, restore; Hugging Face folders with the training state next to the weights.

A file or folder is written under another name and renamed: it is complete at any moment. What another run wrote is set
aside, not overwritten. Each process writes its part of the optimizer's state, and any number of processes can read it.
Nothing is pickled, and no state of a random generator is kept: each random number comes from the seed, the step, the
row of the data and its number in the stream. Not here: when a run saves (trainer.py).
"""

import dataclasses
import itertools
import json
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm.auto import tqdm

from plumbing.adapters import adapters_of, resolve_model, save_adapters
from plumbing.arguments import EMBEDDED, MAY_CHANGE, UserError, cannot_write
from plumbing.data import refuse_output_among
from plumbing.sharding import on_main

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is right on one process


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


def trained_with(model):
    """{flag: value} of a checkpoint's run, and its data's `contents`; {} for other models."""
    path = Path(resolve_model(model)[0]) / "trainer_state.json"
    if model in EMBEDDED or not path.exists():
        return {}
    state = json.loads(path.read_text())  # or that of transformers' own Trainer
    return state["arguments"] | {"contents": state["contents"]} if "arguments" in state else {}


def saved_in(output):
    """[(N, folder)] of the checkpoints step-N in a run's folder, the oldest first."""
    return sorted((int(path.name[5:]), path) for path in output.glob("step-*") if path.name[5:].isdigit())


def newest(output):
    """The checkpoint to resume from: what `last` is or points to; the latest step-N where there is none; or None."""
    if (output / "last").exists():
        return (output / "last").resolve()
    saved = saved_in(output)
    return saved[-1][1] if saved else None


def find_checkpoint(args):
    """(folder, State) to resume from, or (None, None). Raises UserError for a folder of another run, or of data."""
    output = Path(args.output)
    refuse_output_among(output, args.data, args.eval_data)
    folder = newest(output)
    if folder and not args.resume:
        raise UserError(f"{output} holds a run: --resume continues it, --output starts another.")
    if args.resume and not folder:
        raise UserError(f"--resume: there is no checkpoint in {output}; start without it, or set --output.")
    if not folder:
        return None, None
    state = State(**json.loads((folder / "trainer_state.json").read_text()))
    changes(args, state, state.contents)
    return folder, state


def changes(args, state, contents):
    """{what: (then, now)} of all that makes a resumed run train something else; `contents`: of its data now.

    The number of steps is part of that where a flag called schedule, or ..._schedule, depends on it. Raises UserError
    for changes that --allow_changed does not allow; --lora_rank never changes.
    """
    scheduled = any(name.endswith("schedule") and value != "constant" for name, value in vars(args).items())
    compared = [name for name in state.arguments if name not in MAY_CHANGE or (scheduled and name == "steps")]
    found = {"script": (state.script, Path(sys.argv[0]).stem), "prompts": (state.contents, contents)}
    found |= {name: (state.arguments[name], getattr(args, name)) for name in compared if hasattr(args, name)}
    found = {what: (then, now) for what, (then, now) in found.items() if then != now}
    if found and (not args.allow_changed or "lora_rank" in found):
        differences = "; ".join(f"{what} was {then}, is {now}" for what, (then, now) in found.items())
        raise UserError(
            f"--resume: {args.output} was begun otherwise ({differences}): give the same, or another --output; "
            f"--allow_changed resumes nevertheless (not with another --lora_rank), and writes it into metrics.jsonl."
        )
    return found


def open_output(args, folder, state):
    """Makes --output ready, for a new run or a resumed one; returns a lock, which keeps other runs out."""
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {cannot_write(output, error)}.") from None
    lock = locked(output)
    if state:
        for step, later in saved_in(output):
            if step > state.step:
                tqdm.write(f"{later} is later than the resumed step: set aside", file=sys.stderr)
                set_aside(later)
        restore_log(output / "metrics.jsonl", state.step)
    else:
        set_aside(output / "metrics.jsonl")  # of a run that died before its first checkpoint
    for half in output.glob("step-*.unfinished"):  # a checkpoint of a run that was killed
        shutil.rmtree(half)
    write_text(output / "args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    return lock


def restore_log(path, step):
    """metrics.jsonl as it was after `step`: later lines, and half a line at the end, are of a run that was killed."""
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if line["step"] < step or (line["step"] == step and "changed" not in line)]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))  # what changed is written again


def moments(optimizer, parameters, updates):
    """{name: tensor} of AdamW's state of the {name: parameter}, and the number of updates."""
    found = {f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}
    return found | {"updates": torch.tensor(float(updates))}


def restore_optimizer(folder, optimizer, parameters, state):
    """AdamW's state as it was. Raises UserError where a file is missing, or is of other weights or another step."""
    reader = dcp.HuggingFaceStorageReader(folder / "optimizer")
    found = moments(optimizer, parameters, -1)
    if len(list(reader.path.glob("*.safetensors"))) == state.processes:
        saved = {name: value.size for name, value in reader.read_metadata().state_dict_metadata.items()}
        if saved == {name: value.shape for name, value in found.items()}:
            dcp.load(found, storage_reader=reader)
    if found["updates"] != state.updates:
        raise UserError(
            f"--resume: the files in {folder}/optimizer are not all of this checkpoint: point {folder.parent}/last to "
            f"another. Or this run trains other weights: give the same --freeze_vision, or start again."
        )


def save_checkpoint(folder, model, processor_files, optimizer, parameters, state, keep, ending=True):
    """`folder`, called step-N, and the link `last` next to it; `state` is the State that `find_checkpoint` returns.

    All processes take part: each writes its part of the optimizer, the main one the weights, `processor_files` {name:
    text} and all else; with adapters the optimizer too, and at the `ending` of a run the merged model. `parameters`:
    {name: what is trained}; `keep`: so many checkpoints stay, 0 for all. Raises UserError; the checkpoint before stays.
    """
    unfinished, last = folder.with_name(f"{folder.name}.unfinished"), folder.with_name("last")
    lora, weights = bool(adapters_of(model)), {}
    if not lora:  # whole on the main process, {} on the others
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write_the_rest():
        if lora:
            save_adapters(model, unfinished, ending)
        else:
            once = {name: weights[name] for name, _ in model.named_parameters()}  # also a head that is the embeddings
            model.save_pretrained(unfinished, state_dict=once)
        for name, text in processor_files.items():
            write_text(unfinished / name, text)
        write_text(unfinished / "trainer_state.json", json.dumps(dataclasses.asdict(state), indent=2) + "\n")
        set_aside(folder)
        unfinished.rename(folder)
        if not last.is_symlink():
            set_aside(last)  # a folder, of a run that was copied without links
        (folder / "last").symlink_to(folder.name)
        (folder / "last").replace(last)
        for _, old in saved_in(folder.parent)[:-keep]:
            shutil.rmtree(old.rename(f"{old}.unfinished"))  # half a checkpoint never has a checkpoint's name

    try:
        writer = dcp.HuggingFaceStorageWriter(unfinished / "optimizer", save_distributed=True)
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # what all processes hold: the main one
        dcp.save(moments(optimizer, parameters, state.updates), storage_writer=writer, planner=planner)
        on_main(write_the_rest)
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, dcp.CheckpointException):  # raised on all processes
            error = next(iter(error.failures.values()))[0]
        raise UserError(f"{cannot_write(folder, error)}; the checkpoint before it is whole, for --resume.") from None
