"""Several processes: weights sharded by FSDP2, unsharded for sampling, and what all processes do together.

The rule behind it: gathering weights is collective, so whatever one process computes with sharded weights, all compute,
in the same order. Not here: which process trains on which rows (trainer.py).
"""

import contextlib
from datetime import timedelta

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor

from plumbing.adapters import refuse_adapters
from plumbing.arguments import UserError
from plumbing.families import vision
from plumbing.memory import refuse_uneven

PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # of processes with one that still downloads or samples


def start_processes(args):
    """The Accelerator: devices, precision, trackers. Raises UserError for what this machine cannot run."""
    gpu = torch.cuda.is_available()
    trackers = args.report_to.split(",") if args.report_to else []
    installed = [*map(str, get_available_trackers()), "all"]
    for tracker in trackers:
        if tracker not in installed:  # accelerate would leave it out in silence
            raise UserError(f"--report_to {tracker} is none of those that are installed: {', '.join(installed)}.")
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and gpu)
    accelerator = Accelerator(
        cpu=not gpu,
        mixed_precision="bf16" if bf16 else "no",
        kwargs_handlers=[PATIENCE],
        log_with=trackers or None,
        project_dir=args.output,
    )
    if gpu:
        torch.set_float32_matmul_precision("high")  # TF32, where a product is not in bf16
    if not args.compile:
        torch.compiler.set_stance("force_eager")
    world_size = accelerator.num_processes
    refuse_adapters(args)
    if args.cuda_graphs is None:
        args.cuda_graphs = gpu and world_size == 1 and not args.reshard_while_sampling
    refuse_uneven(args, world_size)
    return accelerator


def shard(model, source, device, bf16):
    """FSDP2: each process keeps a part of every weight; decoder layers and vision blocks are gathered one at a time.

    `model` has no weights yet; they come from `source`, which is None on all processes but the main one.
    Gradients are summed over the processes, not averaged: the loss is divided by the tokens of all of them already.
    Embeddings and head, which may be one tensor, go with the root.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    dtypes = (torch.bfloat16, torch.float32) if bf16 else (None, None)  # of compute, of the gradients' sum
    policy = MixedPrecisionPolicy(*dtypes, cast_forward_inputs=False)  # the vision tower's angles stay fp32
    for unit in [*vision(model)[1], *model.model.language_model.layers, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)
    weights = {} if source is None else source.state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    rest = [None, None] if source is None else [dict(source.named_buffers()), source.generation_config]
    torch.distributed.broadcast_object_list(rest, 0)
    buffers, model.generation_config = rest
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if source is not None:  # transformers keeps here what the hub's checkpoints call each weight
        model._weight_conversions = source._weight_conversions
    type(model).with_full_params = lambda model, function, *args: function(model, *args)
    register_fsdp_forward_method(model, "with_full_params")  # gathers the root's weights for a function
    model.with_full_params(lambda model: None)  # FSDP2 takes the first module to run for the root
    model.reshard()


@contextlib.contextmanager
def unsharded(model):
    """Every process holds all weights: sampling needs no word from the others, whose responses end elsewhere.

    FSDP2's hooks, which look in every layer and for every token whether its weights are there, are off meanwhile.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    places = [place for unit in units for place in (unit._forward_pre_hooks, unit._forward_hooks)]
    hooks = [dict(place) for place in places]
    for unit in units:
        unit.unshard()
    for place in places:
        for key in [key for key, hook in place.items() if isinstance(getattr(hook, "__self__", None), FSDPState)]:
            del place[key]
    try:
        yield
    finally:
        for place, found in zip(places, hooks):
            place.clear()
            place.update(found)
        for unit in units:
            unit.reshard()


def is_sharded(model):
    return isinstance(model, FSDPModule)


def with_full_params(model, function):
    """`function(model)`; if weights are sharded, embeddings and head (the root's own) are gathered for it."""
    gathered = not any(isinstance(p, DTensor) for p in model.parameters())  # on one process, or by `unsharded`
    return function(model) if gathered else model.with_full_params(function)


def local(tensor):
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_any_process(count, sharded):
    """Whether a number is not 0 on this process or, where weights are `sharded` while sampling, on any."""
    return any(gather_object([count])) if sharded else count > 0


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Clips the gradients of some parameters to a norm, over all processes; returns the norm before, a float.

    Gradients of sharded weights are summed over processes already; those of adapters, whole on each, are summed here.
    """
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if torch.distributed.is_initialized():
        for p in parameters:
            if not isinstance(p.grad, DTensor):
                torch.distributed.all_reduce(p.grad)
    foreach = parameters[0].is_cuda  # one kernel for all, sharded or not
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=foreach)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norm.item()  # the one number that an update waits for


def on_main(function):
    """function() on the main process, None on the others; where it raises, all processes end."""
    if not torch.distributed.is_initialized():
        return function()
    result = error = None
    if torch.distributed.get_rank() == 0:
        try:
            result = function()
        except (Exception, UserError) as raised:
            error = raised
    failed = [error is not None]
    torch.distributed.broadcast_object_list(failed, 0)
    if failed[0]:
        raise error or SystemExit(2)  # the main process says why
    return result
