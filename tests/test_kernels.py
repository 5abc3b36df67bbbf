"""plumbing/kernels.py: windows of the vision tower in one call, and how many threads."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import QUICK, ROOT, chooser, main_of, tiny_group, tiny_model, tiny_prompt
from torch.utils._python_dispatch import TorchDispatchMode

import trainer
from common import checkpoint_layers, forward, generate, seeded
from plumbing import kernels

GRIDS = torch.tensor([[1, 4, 6], [1, 10, 12], [1, 2, 2], [1, 10, 12]])  # windows of 4, 8, 12 and 16 patches


def tower(family, seen=None):
    """Outputs and gradients of a vision tower, for images of several sizes, by `_attn_implementation` seen."""
    visual = tiny_model(family).double().model.visual
    visual.config._attn_implementation = seen or visual.config._attn_implementation
    pixels = torch.randn(int(GRIDS.prod(1).sum()), 1176, generator=seeded(0)).double()
    out = visual(pixels.requires_grad_(), grid_thw=GRIDS).pooler_output
    out.square().sum().backward()
    return [out, pixels.grad, *(p.grad for p in visual.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_windows_together_equal_windows_one_by_one(family):
    assert tiny_model(family).model.visual.config._attn_implementation == "flash_windows"
    for ours, theirs in zip(tower(family), tower(family, "sdpa"), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9, rtol=1e-9)


FLASH_ATTN_3 = """
import importlib.machinery, sys, types, torch
library = torch.library.Library("flash_attn_3", "DEF")
for name in ("fwd", "bwd"):
    library.define(f"{name}(Tensor x) -> Tensor")
package = sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")
package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None)
import plumbing.kernels
print(torch.nn.attention.current_flash_attention_impl())
"""


def test_flash_attn_3_is_used_where_it_is_installed():
    assert torch.nn.attention.current_flash_attention_impl() is None
    used = subprocess.check_output([sys.executable, "-c", FLASH_ATTN_3], text=True, cwd=ROOT)
    assert used.strip() == "FA3"


def test_calls_for_many_windows(monkeypatch):
    """One call for each block, over the whole image or not, and one more where it is recomputed."""
    calls, attend = [], kernels.scaled_dot_product_attention
    monkeypatch.setattr(kernels, "scaled_dot_product_attention", lambda *x, **y: (calls.append(1), attend(*x, **y))[1])
    model, grid = tiny_model("qwen2_5_vl"), torch.tensor([[1, 24, 24]])
    checkpoint_layers(model)
    out = model.model.visual(torch.randn(576, 1176), grid_thw=grid).pooler_output
    assert len(calls) == len(model.model.visual.blocks) == 2
    out.sum().backward()
    assert len(calls) == 4


def test_memory_that_runs_out_in_a_recording_is_said_to_have(monkeypatch):
    """torch's own words would be that the recording failed, and eval.py would not halve its batch."""

    @contextlib.contextmanager
    def graph(*_, **__):
        try:
            yield
        finally:
            if sys.exception():
                raise RuntimeError("operation failed due to a previous error during capture")

    recording = iter([False, True])

    def full():
        if next(recording):
            raise torch.OutOfMemoryError("CUDA out of memory")

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "capture_stream", lambda: stream)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.recorded(full)


class Casts(TorchDispatchMode):
    """Counts the casts of a model's weights to bf16."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.count = {p.data_ptr() for p in model.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ == "_to_copy" and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.count += args[0].data_ptr() in self.weights
        return function(*args, **(kwargs or {}))


def test_no_weight_is_cast_anew_for_a_sampled_token():
    model = tiny_model("qwen2_5_vl").eval()
    prompts, choose = [tiny_prompt(model, [(4, 6)])] * 2, chooser(model)

    def casts(tokens):
        with torch.autocast("cpu", torch.bfloat16), Casts(model) as counted:
            generate(model, prompts, 2, choose, torch.rand(4, tokens), [], 0)
        return counted.count

    assert casts(20) == casts(1) > 20


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_weights_are_cast_once_for_all_rows_of_an_update(family):
    """And gradients are those of autocast's own casts."""

    def gradients(model, weights):
        with torch.autocast("cpu", torch.bfloat16), weights(model), Casts(model) as counted:
            for lengths in ([7, 1, 4], [3, 9]):
                logps, entropy, _ = forward(model, tiny_group(tiny_prompt(model, [(4, 6)]), lengths))
                (logps + entropy).sum().backward()
        return [p.grad for p in model.parameters()], counted.count

    want, casts = gradients(tiny_model(family), lambda _: contextlib.nullcontext())
    model = tiny_model(family)
    got, none = gradients(model, lambda model: kernels.bf16_products(model, gradients=True))
    assert casts > 20 and none == 0 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(p.is_leaf and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_the_weights_of_a_frozen_models_products_are_bf16_already_and_nothing_else_changes(family):
    def measured(model):
        group = tiny_group(tiny_prompt(model, [(4, 6)]), [7, 1, 4])
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), Casts(model) as counted:
            logps, entropy, hidden = forward(model, group)
        return logps, entropy, hidden, counted.count

    *want, casts = measured(tiny_model(family))
    frozen = kernels.products_in_bf16(tiny_model(family).requires_grad_(False))
    *got, none = measured(frozen)
    assert casts > 20 and none == 0 and not any(p.requires_grad for p in frozen.parameters())
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    embeddings = frozen.get_input_embeddings().weight
    assert embeddings.dtype == torch.float32 and frozen.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_of_a_run_on_one_process(tmp_path, monkeypatch, dtype):
    made = []
    monkeypatch.setattr(trainer.Trainer, "check_memory", lambda self: made.append(self))
    monkeypatch.setattr(trainer.Trainer, "restore", lambda *_: sys.exit(0))
    with pytest.raises(SystemExit):
        main_of("grpo", tmp_path / "run", [*QUICK, "--kl_coef", 0.1, "--dtype", dtype])
    dtypes = {str(p.dtype)[6:] for p in made[0].reference.parameters()}
    assert dtypes == {"float32", dtype} and {p.dtype for p in made[0].model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "limit, processes, threads",
    [("max 100000", 1, 4), ("250000 100000", 1, 2), ("50000 100000", 1, 1), ("max 100000", 2, 2)],
)
def test_threads_are_those_that_find_a_core(monkeypatch, tmp_path, limit, processes, threads):
    """On cores 0 to 3 of 8, torch having taken 8 threads; and where a container may use 2.5 of them, or half of one."""
    said = []
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(kernels, "Path", lambda name: tmp_path / Path(name).name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(torch, "get_num_threads", lambda: said[-1] if said else 8)
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert kernels.use_cores().startswith(f"threads: {threads} of ") and said == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert kernels.use_cores() == f"threads: {threads}, as set" and len(said) == 1
