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
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor, distribute_tensor

from plumbing.adapters import refuse_adapters
from plumbing.arguments import UserError
from plumbing.families import vision
from plumbing.memory import refuse_uneven, refuse_what_cannot_fit

PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # of processes with one that still downloads or samples


def start_processes(args):
    """The Accelerator: devices, precision, trackers. Raises UserError for what this machine cannot run."""
    gpu = torch.cuda.is_available()
    trackers = args.report_to.split(",") if args.report_to else []
    for tracker in trackers:
        if tracker not in (installed := [*map(str, get_available_trackers()), "all"]):
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
    refuse_what_cannot_fit(args, world_size)
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
    load_shards(model, source, device)
    type(model).with_full_params = lambda model, function, *args: function(model, *args)
    register_fsdp_forward_method(model, "with_full_params")  # gathers the root's weights for a function
    model.with_full_params(lambda model: None)  # FSDP2 takes the first module to run for the root
    model.reshard()


@torch.no_grad()
def load_shards(model, source, device):
    """Weights, buffers and settings of the main process's whole model, tensor by tensor, into a sharded one."""
    model.to_empty(device=device)
    tensors = {} if source is None else dict(source.named_parameters(remove_duplicate=False))
    for name, p in model.named_parameters():
        full = torch.empty(p.shape, device=device) if source is None else tensors[name].to(device)
        p.to_local().copy_(like(full, p).to_local())
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


def is_gathered(model):
    """Whether all weights are here: those of one process, or inside of `unsharded`."""
    return not is_sharded(model) or not any(isinstance(p, DTensor) for p in model.parameters())


def with_full_params(model, function):
    """`function(model)`; if weights are sharded, embeddings and head (the root's own) are gathered for it."""
    return function(model) if is_gathered(model) else model.with_full_params(function)


def full_tensor(tensor):
    """The whole of a sharded tensor, on every process; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor, other):
    """A whole tensor, sharded as `other` is, or as it is."""
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def all_reduce(value, accelerator):
    """The sum of a number over all processes."""
    if accelerator.num_processes == 1:
        return value
    value = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(value, "sum").item()


def on_any_process(count, sharded, device):
    """Whether a number is not 0 on this process or, where weights are `sharded` while sampling, on any."""
    if sharded:
        count = torch.tensor(count, device=device)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)  # in place
    return bool(count)


@torch.no_grad()
def clip_gradients(parameters, max_norm):
    """Clips the gradients of some parameters to a norm, over all processes; returns the norm before, a float.

    Gradients of sharded weights are summed over processes already; those of adapters, whole on each, are summed here.
    """
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    whole = [p.grad for p in parameters if not isinstance(p.grad, DTensor)]
    if whole and torch.distributed.is_initialized():
        flat = torch.cat([grad.flatten() for grad in whole])
        torch.distributed.all_reduce(flat)
        for grad, part in zip(whole, flat.split([grad.numel() for grad in whole])):
            grad.copy_(part.view_as(grad))
    foreach = parameters[0].is_cuda  # one kernel for all, sharded or not
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=foreach)
    return full_tensor(norm).item()  # the one number that an update waits for


def on_main(function):
    """function() on the main process, None on the others; where it ends in a UserError, all processes end."""
    result = refused = None
    try:
        alone = not torch.distributed.is_initialized()
        result = function() if alone or torch.distributed.get_rank() == 0 else None
    except UserError as error:
        refused = error
    if from_main(refused is not None):
        raise refused or SystemExit(2)  # the main process has said why
    return result


def from_main(value):
    """What the main process says, on all of them."""
    said = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(said, 0)
    return said[0]
