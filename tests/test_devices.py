"""Tensors on two devices never meet: a GPU is played by tagged storages, and what fails there fails here.

The device "cpu:0" stands for the GPU, "cpu" for main memory. What is made on it, or moved to it, has a tagged storage;
an operation on tagged and untagged tensors together raises, as it would on a GPU, but for scalars and for indices.
Backward passes are not layer_hooks: what autograd makes there is where its inputs are.
"""

import sys
import traceback
from pathlib import Path

import accelerate
import pytest
import torch
from helpers import main_of, save_internvl
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import common
import eval as evaluation
import grpo
import pepo
import prpo
import saei
import show
import trainer
import vepo
import vgpo
from common import load_model
from plumbing import kernels

GPU, CPU = torch.device("cpu", 0), torch.device("cpu")


def there(tensor):
    return getattr(tensor.untyped_storage(), "on_gpu", False)


def tensors_in(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


WAITS = []  # where the host waited for the GPU: the innermost function that is not torch's or of this file


def note_wait():
    frames = [frame for frame in traceback.extract_stack() if "test_devices" not in frame.filename]
    own = [frame for frame in frames if "/torch/" not in frame.filename][-1]
    if Path(frames[-2].filename).name != "clip_grad.py":  # which asks C++ where a gradient is: on the CPU
        WAITS.append(f"{Path(own.filename).stem}.{own.name}")


def waits(name, args, kwargs):
    """Whether the host needs a value from the GPU to go on, or copies in step with it."""
    if name == "_to_copy":  # to the GPU; back: `fetched`
        return kwargs.get("device") == GPU and not there(args[0]) and not kwargs.get("non_blocking")
    if name == "copy_":
        return there(args[0]) != there(args[1])
    if name in ("index", "index_put", "index_put_"):
        return any(there(x) and x.dtype == torch.bool for x in tensors_in(args[1]))
    return name in ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2") and there(args[0])


class Devices(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        inputs = tensors_in((args, kwargs))
        if waits(name, args, kwargs):
            note_wait()
        if name not in ("copy_", "_to_copy"):
            indexed = name in ("index", "index_put", "index_put_") and there(args[0])  # by indices from anywhere
            judged = args[:1] + args[2:] if indexed else inputs
            places = {there(x) for x in tensors_in(judged) if there(x) or x.dim()}
            assert len(places) < 2, f"{name}: tensors on two devices, of shapes {[tuple(x.shape) for x in inputs]}"
        before = {x.untyped_storage()._cdata for x in inputs}
        out = function(*args, **kwargs)
        device = kwargs.get("device") if name != "_to_copy" or kwargs.get("device") == GPU else None  # of `fetched`
        for made in tensors_in(out):
            if made.untyped_storage()._cdata not in before:
                made.untyped_storage().on_gpu = device == GPU if device is not None else any(map(there, inputs))
        return out


@pytest.fixture
def two_devices(monkeypatch):
    """Python's view of a machine with a GPU; operations are checked inside of `with Devices()`."""
    to, cpu, numpy, place = torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.device
    tensor, tolist = torch.tensor, torch.Tensor.tolist
    with torch.device("meta"):  # what makes tensors is listed by torch when this is used first, and must not be ours
        torch.empty(0)
    backward, grad, parameters = torch.autograd.backward, torch.autograd.grad, []

    def moved(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype)
        if any(isinstance(x, torch.device | str) and torch.device(x) == CPU for x in [*args, *kwargs.values()]):
            self = self.cpu()
        return to(self, *args, **kwargs)

    def listed(self):
        if there(self):
            note_wait()
        return tolist(self)

    def fetched(self):
        if there(self):
            note_wait()
        copy = self.clone() if there(self) else cpu(self)
        copy.untyped_storage().on_gpu = False
        return copy

    def exported(self, *args, **kwargs):
        assert not there(self), "numpy() of a tensor on the GPU"
        return numpy(self, *args, **kwargs)

    def made(*args, device=None, **kwargs):
        return tensor(*args, **kwargs) if device is None else tensor(*args, **kwargs).to(device)

    def attended(*inputs, attend=kernels.attend):  # it asks where segments begin, but on a GPU has a kernel for that
        before = len(WAITS)
        out = attend(*inputs)
        del WAITS[before:]
        return out

    def layer_hooks(make):
        def made(*args, **kwargs):
            model = make(*args, **kwargs)
            parameters.extend(model.parameters())
            return model

        return made

    def backwards(*args, **kwargs):
        with _disable_current_modes():
            backward(*args, **kwargs)
        for p in parameters:
            if p.grad is not None:
                p.grad.untyped_storage().on_gpu = there(p)

    def gradients(outputs, inputs, **kwargs):
        with _disable_current_modes():
            found = grad(outputs, inputs, **kwargs)
        for x, gradient in zip(inputs, found):
            gradient.untyped_storage().on_gpu = there(x)
        return found

    monkeypatch.setattr(torch.autograd, "backward", backwards)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    for module in (common, evaluation, show):
        monkeypatch.setattr(module, "load_model", layer_hooks(load_model))
    monkeypatch.setattr(common, "add_adapters", layer_hooks(common.add_adapters))
    monkeypatch.setattr(common, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    monkeypatch.setattr(kernels, "attend", attended)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "cpu", fetched)
    monkeypatch.setattr(torch.Tensor, "tolist", listed)
    monkeypatch.setattr(torch.Tensor, "numpy", exported)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: GPU if there(self) else place.__get__(self)))
    monkeypatch.setattr(torch, "tensor", made)
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: GPU))


def test_what_fails_on_a_gpu_fails_here(two_devices):
    with Devices():
        here, gone = torch.ones(3), torch.ones(3).to(GPU)
        assert here.device == here.to(CPU).device == gone.cpu().device == gone.to(here).device == CPU
        for there in (gone, (gone * 2)[1:], torch.zeros(2, device=GPU), torch.zeros_like(gone), here.to(gone)):
            assert there.device == GPU
        assert (gone * here.sum() + gone[torch.tensor([0, 1, 1])]).device == GPU  # a scalar, indices
        for mixed in (lambda: here + gone, lambda: torch.cat([here, gone]), lambda: here[gone > 0], gone.numpy):
            with pytest.raises(AssertionError):
                mixed()
        for waiting in (
            gone.sum().item,
            gone.tolist,
            (gone > 0).nonzero,
            lambda: gone[gone > 0],
            lambda: here.to(GPU),
            lambda: gone.equal(gone),
            lambda: float(gone[0]),
            lambda: gone.copy_(here),
        ):
            WAITS.clear()
            waiting()
            assert WAITS
        WAITS.clear()
        here.sum().item(), here.to(GPU, non_blocking=True), gone.sum() + 1, gone[torch.tensor([0])]
        assert not WAITS


def flags_of(module, internvl, folder):
    """Flags of a short run; `internvl`: of a random one, with data of its own."""
    flags = "--steps 1 --prompts_per_step 4 --max_response_tokens 8 --kl_coef 0.01 "
    flags += "--n1 2 --n2 2 --measure_every 1" if module is saei else "--group_size 4"
    if internvl:
        (folder / "model").mkdir()
        model = save_internvl(folder / "model")
        flags += f" --model {model} --data {model / 'rows.jsonl'} --min_pixels 784 --max_pixels 4704"
        flags += " --gradient_checkpointing False"  # which sees that this GPU is none
    return flags.split()


@pytest.mark.parametrize("module", [grpo, vepo, vgpo, prpo, pepo, saei])
@pytest.mark.parametrize("updates, lora, internvl", [(1, 0, False), (2, 0, False), (2, 4, False), (1, 0, True)])
def test_a_run_on_a_gpu(two_devices, monkeypatch, tmp_path, module, updates, lora, internvl):
    more = f"--updates_per_step {updates} --lora_rank {lora} --eval_rows 2 --show_every 1 "
    more += f"--tokens_per_row {260 // updates**2}"  # some images share a batch, or none
    more += " --save_images 4" if module is saei else ""
    runs = []

    failed = []

    def failing_once(*given, gradient=saei.entropy_gradient):  # one prompt keeps its clean image
        H, found, kept = gradient(*given)
        failed.append(len(failed) == 1)
        return H, found * float("nan") if failed[-1] else found, kept

    monkeypatch.setattr(saei, "entropy_gradient", failing_once)
    monkeypatch.setattr(
        trainer.Trainer, "check_memory", lambda r, do=trainer.Trainer.check_memory: (runs.append(r), do(r))
    )
    with Devices():
        main_of(module.__name__, tmp_path / "run", flags_of(module, internvl, tmp_path) + more.split())
    assert all(there(p) for p in runs[0].model.parameters()) and not there(runs[0].sampled[0].rewards)
    assert there(runs[0].sampled[0].responses)


SCORES = {grpo: 0, vepo: 1, vgpo: 0, prpo: 2, pepo: 0, saei: 0}  # passes of a row besides those of GRPO


@pytest.mark.parametrize("module", SCORES)
@pytest.mark.parametrize("internvl", [False, True])
def test_the_host_waits_for_no_value_of_a_row(two_devices, monkeypatch, tmp_path, module, internvl):
    """But in transformers' check of an image's placeholders, two a pass. And for two or three numbers an update: the
    denominators of the loss, and the norm of the gradient."""
    more = ["--eval_rows", 0, "--entropy_coef", 0.01, "--updates_per_step", 1]
    rows, attacks, found = [], [], []

    def attacking(*inputs, attack=saei.attack):
        before = len(WAITS)
        out = attack(*inputs)
        attacks.extend(WAITS[before:])
        return out

    monkeypatch.setattr(saei, "attack", attacking)
    pack_rows, log = module.pack_rows, trainer.Trainer.log
    with_gradient = trainer.Trainer.with_gradient
    monkeypatch.setattr(module, "pack_rows", lambda *x: (pack_rows(*x), WAITS.clear())[0])
    monkeypatch.setattr(trainer.Trainer, "with_gradient", lambda *x: rows.append(with_gradient(*x)) or rows[-1])
    monkeypatch.setattr(trainer.Trainer, "log", lambda r: (found.extend(WAITS), log(r)))
    with Devices():
        main_of(module.__name__, tmp_path / "run", flags_of(module, internvl, tmp_path) + more)
    of_transformers = {"get_placeholder_mask", "torch_compilable_check"}
    ours = [place for place in found + attacks if place.split(".")[1] not in of_transformers]
    assert ours == ["trainer.all_reduce"] * (2 if module is vepo else 1) + ["sharding.clip_gradients"]
    seen = sum(row.prompt.pixel_values is not None for row in rows[-1])
    assert seen > 1 and len(found) - len(ours) == 2 * seen * (2 + SCORES[module])  # pi_theta, pi_ref, and scores


def test_evaluation_and_the_page_of_tokens_on_a_gpu(two_devices, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", f"x --rows 3 --samples 2 --temperature 1 --output {tmp_path / 'eval'}".split())
    with Devices():
        evaluation.main()
    move = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **k: move(self, GPU))
    with Devices():
        page = show.token_page(show.TokenArgs(prompts=1, max_response_tokens=30))
    assert "A wrong response" in page
