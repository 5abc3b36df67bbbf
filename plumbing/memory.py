"""--dry_run: the memory of a run, from the shapes of the model, and the first flag to change where it does not fit.

It is arithmetic; tests/test_memory.py compares it with measured memory. Not here: what saves the memory (common.py).
"""

import contextlib
import dataclasses
import math

import torch
import transformers

from plumbing.adapters import refuse_adapters
from plumbing.arguments import UserError, cannot_open, model_source
from plumbing.families import known_family, largest_image, vision
from plumbing.kernels import HEAD_CHUNK

TOO_MUCH = (
    "weights, gradients and optimizer alone are too much; take more GPUs (without --lora_rank), or --lora_rank 32"
)


def plan(args, gpus):
    """Bytes on each of `gpus` GPUs that stay for the whole run, and at the two peaks of a step.

    Returns {"kept" | "sampling" | "update": {part: bytes}}, for prompts and responses of the full length. Activations
    are what autograd keeps of a layer, per token: 6 D around norms and residuals, 5 of all heads around attention, 4 of
    the MLP's width; with gradient checkpointing that of one layer, and D for every layer. Sampling computes some of the
    prompts at a time, 2 D and 6 of all heads or 3 of the MLP, before the responses' cache exists. Gradients are those
    of the rows before. On several GPUs the update gathers two layers at a time, and the root (embeddings and head).
    The gradients of one layer are unsharded, and those of the root when activations are freed. With LoRA nothing is
    sharded, the model is in the compute type, and only adapters have gradients and an optimizer state.
    """
    try:
        source = {"revision": args.model_revision, "trust_remote_code": False}
        config = known_family(args.model, transformers.AutoConfig.from_pretrained(model_source(args), **source))
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # transformers' errors of damaged files are of many types
        raise UserError(cannot_open("--model", args.model, error)) from None
    (frozen, blocks), decoder = vision(model), model.model.language_model
    text, tower, attention = config.text_config, config.vision_config, decoder.layers[0].self_attn
    layers = [size(layer) for layer in [*decoder.layers, *blocks]]
    parameters, layer, depth = size(model), max(layers), len(decoder.layers)
    root, embeddings = parameters - sum(layers), text.vocab_size * text.hidden_size
    number = 4 if args.dtype == "float32" else 2  # bytes, in the compute type
    if lora := bool(args.lora_rank):
        linear = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
        trained = args.lora_rank * sum(m.in_features + m.out_features for m in linear)
        shards, weights, reference, head = 1, number * parameters + 4 * trained, 0, 0
    else:
        trained = parameters - args.freeze_vision * sum(map(size, frozen))
        shards, weights, head = gpus, 4 * parameters / gpus, 4 * embeddings  # of the head: its gradient
        reference = weights if gpus > 1 or number == 4 else 2 * parameters + 4 * embeddings
    by_layer = number * (root + 2 * layer)
    whole = number * (trained if lora else parameters) if shards > 1 or number == 2 else 0

    D, heads, keys = text.hidden_size, attention.q_proj.out_features, attention.k_proj.out_features  # of all heads
    of_text = D, heads, text.intermediate_size
    D = getattr(tower, "embed_dim", None) or tower.hidden_size
    of_image = D, D, getattr(tower, "intermediate_size", 4 * D)
    stream = number if shards > 1 or lora else 4  # from layer to layer: autocast leaves sums and norms in fp32

    def activations(tokens, depth, D, heads, mlp):
        once = 6 * D * stream + (5 * heads + 4 * mlp) * number
        return tokens * (depth * D * stream + once if args.gradient_checkpointing is not False else depth * once)

    def temporaries(tokens, D, heads, mlp):
        return tokens * (2 * D * stream + max(6 * heads, 3 * mlp) * number)

    G, T, prompt = args.group_size, args.max_response_tokens, args.max_prompt_tokens
    batch = min(args.rollout_prompts, args.prompts_per_step // gpus)
    patches = largest_image(config, args.max_pixels, prompt)
    kept = activations(max(min(prompt + G * T, args.tokens_per_row), prompt + T), depth, *of_text)
    if not (args.freeze_vision or lora):  # a frozen tower keeps none
        kept += activations(patches, len(blocks), *of_image)
    head += HEAD_CHUNK * text.vocab_size * 4 * 4  # four fp32 copies of a chunk's logits
    at_once = min(batch, max(1, args.tokens_per_row // prompt))  # prompts that are computed at a time
    prefill = max(temporaries(at_once * patches, *of_image), temporaries(at_once * prompt, *of_text))
    capacity = math.ceil(T / min(T, 128)) * min(T, 128)  # in steps of kernels.py's CACHE_STEP
    grown = batch * G * capacity * (depth + 1) * 2 * keys * number  # one layer is held twice while it grows
    scores = batch * G * text.num_attention_heads * (prompt + capacity) * 12  # 2 x bf16, 2 x fp32
    sampling = {
        "computing copy": by_layer if args.reshard_while_sampling and shards > 1 else whole,
        "key-value cache": batch * prompt * depth * 2 * keys * number + grown,
        "attention": scores,
        "logits": batch * G * text.vocab_size * 16,  # the model's, in fp32, without banned tokens, probabilities
        "prompts": max(0, prefill - grown - scores),
    }
    update = {
        "computing copy": by_layer + (number + 4) * layer if shards > 1 else whole,
        "gradients": 4 * trained / shards,
        "activations": max(kept, (number + 4) * root - head) if shards > 1 else kept,
        "head": head,
    }
    always = {"weights": weights, "optimiser": 8 * trained / shards, "reference": reference if args.kl_coef else 0}
    return {"kept": always, "sampling": sampling, "update": update}


def size(module):
    return sum(p.numel() for p in module.parameters())


def choose_checkpointing(args, gpus):
    """Sets --gradient_checkpointing, unless it is set, and returns a sentence which and why.

    On if an update without it would take 0.85 of a GPU's memory or more by `plan`, or if there is no GPU. A first
    guess: see `Trainer.check_memory`. Raises UserError where weights and optimizer alone are too much for a GPU.
    """
    why = "as set, or for the toy"
    if torch.cuda.is_available() or args.gpu_memory or args.dry_run:
        peaks, memory = plan(dataclasses.replace(args, gradient_checkpointing=False), gpus), gpu_memory(args)
        least = (sum(peaks["kept"].values()) + peaks["update"]["gradients"]) / 1e9
        if least >= memory and not args.dry_run:
            raise UserError(f"{args.model} needs {least:.1f} GB on each of {gpus} GPUs of {memory:g} GB: {TOO_MUCH}.")
        if args.gradient_checkpointing is None:
            need = (sum(peaks["kept"].values()) + sum(peaks["update"].values())) / 1e9
            args.gradient_checkpointing = need >= 0.85 * memory
            why = f"without it an update takes up to {need:.1f} GB of {memory:g}"
    elif args.gradient_checkpointing is None:
        args.gradient_checkpointing, why = True, "there is no GPU"
    return f"gradient checkpointing: {'on' if args.gradient_checkpointing else 'off'}, {why}"


def trial_update(optimizer, backward, less_memory):
    """An update for nothing: `backward` with gradients and the optimizer's state in memory, at a learning rate of 0.

    Out of memory, `less_memory` is called and `backward` once more; None: raises OutOfMemoryError.
    """
    (group,) = optimizer.param_groups
    learning_rate, group["lr"] = group["lr"], 0.0
    for p in group["params"]:
        p.grad = torch.zeros_like(p)  # those of the rows before
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    try:
        backward()
        less_memory = None
    except torch.OutOfMemoryError:
        if less_memory is None:
            raise
    if less_memory:  # not in the handler, which would keep the tensors of the failed pass
        torch.cuda.empty_cache()
        less_memory()
        backward()
    optimizer.zero_grad()
    group["lr"] = learning_rate


def dry_run(args):
    """What a run needs, as text, with the first flag to change where it does not fit."""
    gpus, memory = args.dry_run, gpu_memory(args)
    refuse_uneven(args, gpus)
    refuse_adapters(args)
    why = choose_checkpointing(args, gpus)
    peaks = plan(args, gpus)
    kept, sampling, update = peaks.values()
    free = 1e9 * memory - sum(kept.values())
    fixed = sum(update[part] for part in ("computing copy", "gradients", "head"))
    lines = [f"{args.model} on {gpus} GPUs of {memory:g} GB; GB on each, without what CUDA and fragments take:"]
    for peak in ("sampling", "update"):
        fits = sum(peaks[peak].values()) < free
        shown = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in (kept | peaks[peak]).items() if value)
        total = sum((kept | peaks[peak]).values()) / 1e9
        lines.append(f"  {peak:9s}{total:7.1f}   {'fits' if fits else 'DOES NOT FIT'}   ({shown})")
        if peak == "update":
            flag = "--tokens_per_row" if args.gradient_checkpointing else "--gradient_checkpointing"
        else:
            flag = "--rollout_prompts" if sampling["computing copy"] < free else "--reshard_while_sampling"
        if not fits:
            lines.append(f"  first flag to change: {flag if fixed < free else f'none helps: {TOO_MUCH}'}")
    prompts = args.prompts_per_step // gpus
    batch = min(args.rollout_prompts, prompts)
    each = sum(sampling[part] for part in ("key-value cache", "attention", "logits")) / batch
    fit = max(0, min(batch + math.floor((free - sum(sampling.values())) / each), prompts))
    return "\n".join([*lines, f"  {why}", f"  {fit} of {prompts} prompts fit together while sampling, at full length"])


def gpu_memory(args):
    """GB of a GPU: --gpu_memory, or that of the first one here, or 80."""
    found = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 80.0
    return args.gpu_memory or round(found, 1)


def refuse_uneven(args, processes):
    """Raises UserError where the prompts of a step cannot be split evenly."""
    count = args.prompts_per_step
    if count % processes:
        raise UserError(f"--prompts_per_step {count} cannot be split over {processes} processes: make it a multiple.")


@contextlib.contextmanager
def errors_of_a_gpu(phase):
    """Turns an error of a phase into a UserError: memory that ran out, and a compiler that failed."""
    flags = "--rollout_prompts, then --tokens_per_row" if phase == "rollout" else "--tokens_per_row, then --max_pixels"
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error)[:120]
        raise UserError(f"out of memory in the {phase} phase: lower {flags}, or see --dry_run ({said}).") from None
    except torch._dynamo.exc.TorchDynamoException as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"compiling failed ({said}): turn it off with --compile false.") from None
