"""Save, find, restore: Hugging Face folders with the training state beside the weights, whole at any moment.

Every file is written under another name and renamed. Nothing is pickled, and no state of a random generator is kept:
every random number comes from the seed, the step, the row of the data and its number in the stream. Not here: when a
run saves (run.py).
"""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing.arguments import UserError
from plumbing.sharding import full_tensor, like


def write_text(path, text):
    """Writes a file beside and renames it: whoever reads it finds the old one or the new one, whole."""
    beside = path.with_name(path.name + ".unfinished")
    beside.write_text(text)
    beside.replace(path)


def find_checkpoint(args):
    """The training state to go on from, or None; refuses to mix two runs in one folder."""
    output, last = Path(args.output), Path(args.output) / "last"
    if not args.resume:
        if last.exists():
            raise UserError(f"{output} holds a run: --resume goes on with it, --output starts another.")
        return None
    if not last.exists():
        raise UserError(f"--resume: there is no checkpoint in {output}; start without it, or set --output.")
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
                f"--resume: {output} holds a run with --{name} {state[name]}, not {getattr(args, name)}: "
                f"give the same, or another --output."
            )
    return state


def restore_optimizer(output, optimizer, parameters):
    """AdamW's moments of the {name: parameter} as they were; raises UserError where they are of other weights."""
    moments = safe_open(output / "last" / "optimizer.safetensors", "pt")  # read tensor by tensor
    keys = moments.keys()
    if {key.rpartition(".")[0] for key in keys} != set(parameters):
        raise UserError(
            f"--resume: the optimiser state in {output}/last is of other weights than this run trains: "
            f"give the same --model and --freeze_vision, or start anew with another --output."
        )
    for key in keys:
        name, _, what = key.rpartition(".")
        p, value = parameters[name], moments.get_tensor(key)
        optimizer.state[p][what] = value if what == "step" else like(value.to(p.device), p)


def restore_metrics(output, step):
    """metrics.jsonl as it was after `step`: later lines, and half a line, are of a run that was killed."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_text(output / "metrics.jsonl", "".join(f"{line}\n" for line in lines))


def save_checkpoint(folder, model, processor, optimizer, parameters, state, is_main):
    """`folder`, called step-N, and the link `last` beside it; `state` is what `find_checkpoint` gives back.

    All processes take part, the main one writes. Raises UserError where the disk is full; the checkpoint before stays.
    """
    once = dict(model.named_parameters())  # a head that is the embeddings stands here once
    weights = collect({name: value for name, value in model.state_dict().items() if name in once}, is_main)
    moments = {f"{name}.{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}
    moments = collect(moments, is_main)
    if not is_main:
        return
    beside, last = folder.with_name(f"{folder.name}.unfinished"), folder.with_name("last.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.save_pretrained(beside, state_dict=weights)
        processor.save_pretrained(beside)
        save_file(moments, beside / "optimizer.safetensors")
        write_text(beside / "trainer_state.json", json.dumps(state, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        last.unlink(missing_ok=True)
        last.symlink_to(folder.name)
        last.replace(folder.with_name("last"))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(
            f"{folder} could not be written ({error}); the checkpoint before it is whole: make room, then --resume."
        ) from None


def collect(tensors, is_main):
    """Whole tensors in main memory, on the main process; the others take part and keep nothing."""
    collected = {}
    for name, value in tensors.items():
        value = full_tensor(value)
        if is_main:
            collected[name] = value.cpu().contiguous()
    return collected
