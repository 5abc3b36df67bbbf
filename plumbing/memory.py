"""--dry_run: the memory of a run, from the shapes of the model, and the first flag to change where it does not fit.

It is arithmetic; tests/test_memory.py compares it with measured memory. Not here: what saves the memory (common.py).
"""

import contextlib
import copy
import math

import torch
import transformers

from plumbing.adapters import refuse_adapters
from plumbing.arguments import UserError, cannot_open, model_source
from plumbing.families import known_family, largest_image, vision
from plumbing.kernels import HEAD_CHUNK


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
    text, shape = config.text_config, config.vision_config
    parameters, lora = size(model), bool(args.lora_rank)
    tower = 0 if args.freeze_vision or lora else 1  # a frozen one keeps no activations
    trained = parameters - args.freeze_vision * sum(map(size, vision(model)[0]))
    if lora:
        linear = [m for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
        trained = args.lora_rank * sum(m.in_features + m.out_features for m in linear)
    shards = 1 if lora else gpus  # the weights are cut into so many parts
    layers = [size(layer) for layer in [*model.model.language_model.layers, *vision(model)[1]]]
    root = parameters - sum(layers)
    bytes_each = 4 if args.dtype == "float32" else 2  # of a number in the compute type
    stream = bytes_each if shards > 1 or lora else 4  # from layer to layer: autocast leaves sums and norms in fp32
    G, T, prompt = args.group_size, args.max_response_tokens, args.max_prompt_tokens
    row = max(min(prompt + G * T, args.tokens_per_row), prompt + T)
    patches = largest_image(config, args.max_pixels, prompt)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    batch = min(args.rollout_prompts, args.prompts_per_step // gpus)
    embeddings = text.vocab_size * text.hidden_size

    def activations(tokens, depth, D, heads, mlp):
        layer = 6 * D * stream + (5 * heads + 4 * mlp) * bytes_each
        return tokens * (depth * D * stream + layer if args.gradient_checkpointing is not False else depth * layer)

    def temporaries(tokens, D, heads, mlp):
        return tokens * (2 * D * stream + max(6 * heads, 3 * mlp) * bytes_each)

    D = getattr(shape, "embed_dim", None) or shape.hidden_size
    vision_shape = D, D, getattr(shape, "intermediate_size", 4 * D)
    text_shape = text.hidden_size, text.num_attention_heads * head, text.intermediate_size
    at_once = min(batch, max(1, args.tokens_per_row // prompt))  # prompts that are computed at a time
    prefill = max(temporaries(at_once * patches, *vision_shape), temporaries(at_once * prompt, *text_shape))
    vision_bytes = tower * activations(patches, len(vision(model)[1]), *vision_shape)
    text_bytes = activations(row, text.num_hidden_layers, *text_shape)
    logits = HEAD_CHUNK * text.vocab_size * 4 * 4  # four fp32 copies of a chunk
    logits += 0 if lora else embeddings * 4  # the head's gradient
    by_layer = bytes_each * (root + 2 * max(layers))
    whole_weights = bytes_each * (trained if lora else parameters) if shards > 1 or bytes_each == 2 else 0
    reference = 4 * parameters / gpus if gpus > 1 or bytes_each == 4 else 2 * parameters + 4 * embeddings
    cached = 2 * text.num_key_value_heads * head * bytes_each  # keys and values of a token in a layer
    capacity = math.ceil(T / min(T, 128)) * min(T, 128)  # in steps of kernels.py's CACHE_STEP
    grown = batch * G * capacity * (text.num_hidden_layers + 1) * cached  # one layer is held twice while it grows
    attention = batch * G * text.num_attention_heads * (prompt + capacity) * 12  # scores: 2 x bf16, 2 x fp32
    return {
        "kept": {
            "weights": bytes_each * parameters + 4 * trained if lora else 4 * parameters / gpus,
            "optimiser": 8 * trained / shards,
            "reference": reference if args.kl_coef and not lora else 0,
        },
        "sampling": {
            "computing copy": by_layer if args.reshard_while_sampling and shards > 1 else whole_weights,
            "key-value cache": batch * prompt * text.num_hidden_layers * cached + grown,
            "attention": attention,
            "logits": batch * G * text.vocab_size * 16,  # the model's, in fp32, without banned tokens, probabilities
            "prompts": max(0, prefill - grown - attention),
        },
        "update": {
            "computing copy": by_layer + (bytes_each + 4) * max(layers) if shards > 1 else whole_weights,
            "gradients": 4 * trained / shards,
            "activations": max(vision_bytes + text_bytes, (shards > 1) * (bytes_each + 4) * root - logits),
            "head": logits,
        },
    }


def size(module):
    return sum(p.numel() for p in module.parameters())


def choose_checkpointing(args, gpus):
    """(--gradient_checkpointing, a sentence which and why): as it was set, else on if an update without it would take
    0.85 of a GPU's memory or more by `plan`, or if there is no GPU. A first guess: see `Trainer.check_memory`."""
    chosen, why = args.gradient_checkpointing, "as set, or for the toy"
    if chosen is None and not (torch.cuda.is_available() or args.dry_run):
        chosen, why = True, "there is no GPU"
    if chosen is None:
        without = copy.copy(args)
        without.gradient_checkpointing = False
        peaks, memory = plan(without, gpus), gpu_memory(args)
        need = (sum(peaks["kept"].values()) + sum(peaks["update"].values())) / 1e9
        chosen, why = need >= 0.85 * memory, f"without it an update takes up to {need:.1f} GB of {memory:g}"
    return chosen, f"gradient checkpointing: {'on' if chosen else 'off'}, {why}"


def trial_update(optimizer, backward, less_memory):
    """An update for nothing: `backward` with gradients and the optimizer's state in memory, at a learning rate of 0.

    Out of memory, `less_memory` is called and `backward` once more; None: raises OutOfMemoryError. The state is 0
    afterwards.
    """
    (group,) = optimizer.param_groups
    learning_rate, group["lr"] = group["lr"], 0.0
    for p in group["params"]:
        p.grad = torch.zeros_like(p)  # those of the rows before
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    short_of_memory = False
    try:
        backward()
    except torch.OutOfMemoryError:
        if less_memory is None:
            raise
        short_of_memory = True
    if short_of_memory:  # not in the handler, which would keep the tensors of the failed pass
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
    args.gradient_checkpointing, why = choose_checkpointing(args, gpus)
    peaks = plan(args, gpus)
    digits = 1 if memory >= 1 else 6
    kept = sum(peaks["kept"].values()) / 1e9
    fixed = kept + sum(peaks["update"][part] for part in ("computing copy", "gradients", "head")) / 1e9
    lines = [f"{args.model} on {gpus} GPUs of {memory:g} GB; GB on each, without what CUDA and fragments take:"]
    for peak in ("sampling", "update"):
        parts = {**peaks["kept"], **peaks[peak]}
        total = sum(parts.values()) / 1e9
        shown = ", ".join(f"{name} {value / 1e9:.{digits}f}" for name, value in parts.items() if value)
        lines.append(f"  {peak:9s}{total:7.{digits}f}   {'fits' if total < memory else 'DOES NOT FIT'}   ({shown})")
        if total < memory:
            continue
        copy_fits = kept + peaks["sampling"]["computing copy"] / 1e9 < memory
        if fixed >= memory:
            flag = f"none helps: {too_much(args)}"
        elif peak == "update":
            flag = "--tokens_per_row" if args.gradient_checkpointing else "--gradient_checkpointing"
        elif copy_fits or gpus == 1 or args.lora_rank:
            flag = "--rollout_prompts"
        else:
            flag = "--reshard_while_sampling"
        lines.append(f"  first flag to change: {flag}")
    prompts = args.prompts_per_step // gpus
    batch = min(args.rollout_prompts, prompts)
    each = sum(peaks["sampling"][part] for part in ("key-value cache", "attention", "logits")) / batch
    free = 1e9 * (memory - kept) - sum(peaks["sampling"].values()) + batch * each
    fit = max(0, min(int(free / each), prompts))
    sampled = args.prompts_per_step * args.group_size * args.max_response_tokens
    rows = args.prompts_per_step * args.max_prompt_tokens + sampled
    passes = 1 + (args.updates_per_step > 1) + bool(args.kl_coef)
    lines += [
        f"  {why}",
        f"  {fit} of {prompts} prompts fit together while sampling, at full length",
        f"  a step: at most {sampled:,} tokens sampled, {passes} forward and 1 backward pass over {rows:,} tokens, "
        f"and what the method adds",
    ]
    return "\n".join(lines)


def too_much(args):
    """The sentence for weights and optimizer that do not fit, whatever the other flags are."""
    if args.lora_rank:
        return "model and adapters alone are too much; leave --lora_rank out: it shards nothing"
    return "weights, gradients and optimizer alone are too much; take more GPUs, or --lora_rank 32"


def gpu_memory(args):
    """GB of a GPU: --gpu_memory, or that of the first one here, or 80."""
    found = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 80.0
    return args.gpu_memory or round(found, 1)


def refuse_uneven(args, processes):
    """Raises UserError where the prompts of a step cannot be split evenly."""
    if args.prompts_per_step % processes:
        raise UserError(
            f"--prompts_per_step {args.prompts_per_step} cannot be split over {processes} processes: "
            f"make it a multiple of {processes}."
        )


@contextlib.contextmanager
def errors_of_a_gpu(phase, args):
    """Turns an error of a phase into a UserError: memory that ran out, and a compiler that failed."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if phase == "rollout":
            flags = "--rollout_prompts, then --tokens_per_row and --max_response_tokens"
        else:
            flags = "--tokens_per_row, then --max_pixels"
            flags += "" if args.gradient_checkpointing else ", or give --gradient_checkpointing"
        raise UserError(f"out of memory in the {phase} phase: lower {flags} ({str(error)[:120]}).") from None
    except torch._dynamo.exc.TorchDynamoException as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"compiling failed ({said}): turn it off with --compile false.") from None


def refuse_what_cannot_fit(args, gpus):
    """Raises UserError, before anything is loaded, where weights and optimizer alone are too much for a GPU."""
    if torch.cuda.is_available() or args.gpu_memory:
        peaks, memory = plan(args, gpus), gpu_memory(args)
        need = (sum(peaks["kept"].values()) + peaks["update"]["gradients"]) / 1e9
        if need >= memory:
            raise UserError(
                f"{args.model} needs {need:.1f} GB on each of {gpus} GPUs that have {memory:.1f} GB: {too_much(args)}."
            )
