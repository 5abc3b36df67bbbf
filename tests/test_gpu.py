"""What only a GPU can show: python -m pytest tests/test_gpu.py, alone, since all other tests hide the GPU.

Kernels, graphs and memory on one GPU, FSDP2 over NCCL where there are two. Speed: python tests/bench.py --gpu.
"""

import json
import os
import subprocess
import sys
from random import Random

import bench
import datasets
import gpu
import pytest
import torch
from helpers import ROOT, chooser, read_metrics, save_internvl, tiny_group
from test_forward import states_and_gradients, with_boolean_mask
from torch._dynamo.utils import counters

from common import forward, generate, load_model, load_processor, seeded
from plumbing import kernels
from plumbing.arguments import TOY, SharedArgs
from plumbing.data import Data
from plumbing.families import compile_layers

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and python -m pytest tests/test_gpu.py"
)


@pytest.fixture(scope="module")
def model():
    """The toy model in fp32, on the GPU; products without TF32."""
    torch.set_float32_matmul_precision("highest")
    return load_model(TOY / "model").to(DEVICE).train()


@pytest.fixture(scope="module")
def prompts(model):
    processor = load_processor(TOY / "model")
    data = Data("toy", "test", SharedArgs(), processor, model)
    return [data.prompt(i) for i in range(8)]


def error(values, exact):
    return max(((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in zip(values, exact, strict=True))


@pytest.mark.parametrize("lengths", [[130, 1, 140, 150], [1], [5, 1, 1, 7, 2, 9, 5, 1, 4]])
def test_segments_equal_the_boolean_mask(model, prompts, lengths):
    """Hidden states and gradients: the last query of a segment attends to its last key, and none to a later one."""
    row = tiny_group(prompts[0], lengths)

    def differentiated(row, bf16):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            return [x.float() for x in states_and_gradients(model, row)]

    masked = with_boolean_mask(row, model.device)
    exact = differentiated(masked, bf16=False)
    assert error(differentiated(row, bf16=False), exact) < 1e-3
    assert error(differentiated(row, bf16=True), exact) < 2 * error(differentiated(masked, bf16=True), exact) + 1e-3


def test_compiled_layers_share_few_graphs_and_equal_plain_ones(model, prompts):
    """100 rows of any length, with gradients and without, in bf16."""
    torch._dynamo.reset()
    counters.clear()
    compiled, random = load_model(TOY / "model").to(DEVICE).train(), Random(0)
    compile_layers(compiled)
    for i in range(100):
        row = tiny_group(prompts[i % 8], [random.randint(1, 300) for _ in range(random.randint(1, 8))])
        found = []
        for one, stance in ((model, "force_eager"), (compiled, "default")):  # the head is compiled for both
            one.zero_grad()
            bf16, gradients = torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(i % 3 > 0)
            with bf16, gradients, torch.compiler.set_stance(stance):
                logps, entropy, _ = forward(one, row)
            if i % 3:
                (logps + entropy).sum().backward()
            found.append([logps, entropy, *(p.grad.clone() for p in one.parameters() if p.grad is not None)])
        assert error(found[1], found[0]) < 0.05  # bf16 rounds both
    assert counters["stats"]["unique_graphs"] <= 10 and not counters["graph_break"]


def window_by_window(query, key, value, cu, *_, scale, **__):
    """What torch's varlen attention computes, with plain attention."""
    parts = []
    for start, end in zip(cu.tolist(), cu.tolist()[1:]):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def test_windows_of_any_length_in_one_call_equal_windows_one_by_one(model, monkeypatch):
    """The tower's outputs, and gradients of weights and pixels."""
    grids = torch.tensor([[1, 4, 6], [1, 10, 12], [1, 2, 2]])
    pixels = torch.randn(int(grids.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def tower(bf16):
        model.zero_grad()
        leaf = pixels.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            out = model.model.visual(leaf, grid_thw=grids.to(DEVICE)).pooler_output
        out.float().square().sum().backward()
        return [out.float(), leaf.grad, *(p.grad.clone() for p in model.model.visual.parameters())]

    exact, ours = tower(bf16=False), tower(bf16=True)
    monkeypatch.setattr(kernels, "varlen_attn", window_by_window)
    assert error(ours, exact) < 2 * error(tower(bf16=True), exact) + 1e-3  # bf16 rounds both


@pytest.mark.parametrize("bf16", [False, True])
def test_recorded_sampling_gives_the_tokens_of_plain_sampling(model, prompts, bf16, monkeypatch):
    """While the cache grows many times, and the batch gets smaller."""
    sampled, sizes, record, G = [], [], kernels.recorded, 4
    sample, eos = chooser(model), model.generation_config.eos_token_id

    def counted(function, static_input, *rest):
        sizes.append(len(static_input))
        return record(function, static_input, *rest)

    monkeypatch.setattr(kernels, "recorded", counted)
    monkeypatch.setattr(kernels, "tokens_between_checks", lambda _: 4)
    uniforms = torch.rand(len(prompts) * G, 96, generator=seeded(0))
    model.eval()
    for graphs in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            sampled.append(generate(model, prompts, G, sample, uniforms, eos, 0, capacity=8, graphs=graphs))
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(*sampled))
    assert len(sizes) > 3 and len(set(sizes)) > 1


EXACT = """
import runpy, sys, torch
torch.set_float32_matmul_precision = lambda _: None  # no TF32
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def steps(script, output, *flags, gpu, processes=1):
    """The lines of metrics.jsonl of three steps on the toy, in fp32 without TF32."""
    environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0", "PYTHONPATH": str(ROOT)}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    exact = output.with_suffix(".py")
    exact.write_text(EXACT)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    fixed = ["--dtype", "float32", "--steps", 3, "--prompts_per_step", 4, "--eval_rows", 0, "--kl_coef", 0.01]
    command = [sys.executable, *start, exact, ROOT / f"{script}.py", "--output", output, *fixed, *flags]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(output)


def assert_close(ours, theirs):
    """The first step; later ones loosely, since Adam's first updates are signs, and a flipped token stays flipped."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in ("reward", "response_tokens", "entropy", "loss", "grad_norm", "kl"):
            assert a[name] == pytest.approx(b[name], rel=0.3 if step else 1e-3, abs=0.1 if step else 1e-4), (step, name)


METHODS = ["grpo", "vepo", "vgpo", "prpo", "pepo", "saei", "vppo"]
CASES = [*((script, "toy", []) for script in METHODS), ("grpo", "toy", ["--lora_rank", 8])]
CASES += [(script, "internvl", ["--max_response_tokens", 12, "--updates_per_step", 1]) for script in ("prpo", "saei")]


@pytest.mark.parametrize("script, model, flags", CASES)
def test_three_steps_of_every_method_are_those_of_a_cpu(tmp_path, script, model, flags):
    if model == "internvl":
        (tmp_path / "model").mkdir()
        folder = save_internvl(tmp_path / "model")
        flags = [*flags, "--model", folder, "--data", folder / "rows.jsonl", "--min_pixels", 784, "--max_pixels", 4704]
        flags += ["--reward", f"{folder / 'reward.py'}:varies"]
    on_gpu = steps(script, tmp_path / "gpu", *flags, gpu=True)
    assert_close(on_gpu, steps(script, tmp_path / "cpu", *flags, gpu=False))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("script", ["grpo", "saei"])
def test_two_gpus_equal_one(tmp_path, script):
    one = steps(script, tmp_path / "one", gpu=True)
    assert_close(steps(script, tmp_path / "two", "--cuda_graphs", gpu=True, processes=2), one)
    more = ["--steps", 4, "--resume"]  # the optimiser's two parts, on one GPU
    assert len(steps(script, tmp_path / "two", *more, gpu=True)) == 4


MEASURE = """
import contextlib, json, sys
sys.path.insert(0, {root!r})
import torch
from plumbing.arguments import SharedArgs
from plumbing.memory import plan
from trainer import Trainer
peaks, phase = {{}}, Trainer.phase

@contextlib.contextmanager
def measured(run, name):
    torch.cuda.reset_peak_memory_stats()
    with phase(run, name):
        yield
    peaks[{{"rollout": "sampling"}}.get(name, name)] = torch.cuda.max_memory_allocated()

Trainer.phase = measured
args = SharedArgs(model={folder!r} + "/model", data={folder!r} + "/rows.parquet", output={folder!r} + "/run",
    eval_rows=0, prompts_per_step=32, updates_per_step=1, max_response_tokens=2048, dtype={dtype!r})
run = Trainer(args)
args.max_prompt_tokens, args.max_pixels = run.data.longest_tokens, None
planned = plan(args, 1)
kept = sum(planned["kept"].values())
print(json.dumps({{peak: (kept + sum(planned[peak].values())) / peaks[peak] for peak in ("sampling", "update")}}))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dry_run_of_a_billion_weights_is_what_is_measured(tmp_path, dtype):
    """Peaks of the sampling and the update that check the memory, within 15 %."""
    gpu.random_model("1b", DEVICE).save_pretrained(tmp_path / "model")
    load_processor(TOY / "model").save_pretrained(tmp_path / "model")
    torch.cuda.empty_cache()
    datasets.Dataset.from_list(bench.make_rows(2, 1024)).to_parquet(tmp_path / "rows.parquet")
    code = MEASURE.format(root=str(ROOT), folder=str(tmp_path), dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ratios = json.loads(done.stdout.splitlines()[-1])
    assert ratios == {"sampling": pytest.approx(1, abs=0.15), "update": pytest.approx(1, abs=0.15)}
