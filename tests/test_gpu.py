"""What only a card can show: python -m pytest tests/test_gpu.py, alone, since all other tests hide the card.

Kernels, graphs and memory on one card, FSDP2 over NCCL where there are two. Speed: python tests/bench.py --gpu.
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
from helpers import ROOT, read_metrics, tiny_group
from torch._dynamo.utils import counters

from common import forward, load_model, load_processor, rollout
from plumbing import kernels
from plumbing.arguments import TOY, SharedArgs
from plumbing.data import Data

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a card, and python -m pytest tests/test_gpu.py"
)


@pytest.fixture(scope="module")
def model():
    """The toy in fp32, on the card; products without TF32."""
    torch.set_float32_matmul_precision("highest")
    return load_model(TOY / "model").to(DEVICE).train()


@pytest.fixture(scope="module")
def prompts(model):
    processor = load_processor(TOY / "model")
    data = Data("toy", "test", SharedArgs(), processor, model.model.get_rope_index)
    return processor.tokenizer, [data.prompt(i) for i in range(8)]


def differentiated(model, row, bf16, block_mask, monkeypatch):
    """Log-probs, entropies and all gradients of a row."""
    monkeypatch.setattr(kernels, "takes_block_mask", lambda _: block_mask)
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        logps, entropy, _ = forward(model, row)
    (logps.sum() + entropy.sum()).backward()
    return [logps, entropy, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def error(values, exact):
    return max(((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in zip(values, exact, strict=True))


def test_flex_attention_equals_the_boolean_mask_forward_and_backward(model, prompts, monkeypatch):
    row = tiny_group(prompts[1][0], [130, 1, 140, 150])
    exact = differentiated(model, row, False, False, monkeypatch)
    assert error(differentiated(model, row, False, True, monkeypatch), exact) < 1e-3
    plain = error(differentiated(model, row, True, False, monkeypatch), exact)
    flexed = error(differentiated(model, row, True, True, monkeypatch), exact)
    assert flexed < 2 * plain + 1e-3  # bf16 rounds both


def test_a_thousand_lengths_share_few_compilations():
    torch._dynamo.reset()
    counters.clear()
    kernels.flex.cache_clear()
    random = Random(0)
    for _ in range(1000):
        lengths = [random.randint(1, 600), *(random.randint(1, 300) for _ in range(random.randint(1, 8)))]
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE)

        def sees(batch, head, q, k, owner=owner):
            return ((owner[q] == owner[k]) | (owner[k] == 0)) & (q >= k)

        inputs = torch.randn(3, 1, 4, len(owner), 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        query, key, value = inputs[0], inputs[1, :, :2], inputs[2, :, :2]
        kernels.flex()(query, key, value, block_mask=kernels.block_mask(owner, sees), enable_gqa=True).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 6


def test_windows_of_any_length_in_one_call_equal_the_batched_ones(model):
    grids = torch.tensor([[1, 4, 6], [1, 10, 12], [1, 2, 2]])
    pixels = torch.randn(int(grids.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def tower(bf16):
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            out = model.model.visual(pixels, grid_thw=grids.to(DEVICE)).pooler_output
        out.float().square().sum().backward()
        return [out.float(), *(p.grad.clone() for p in model.model.visual.parameters())]

    assert error(tower(bf16=True), tower(bf16=False)) < 0.05


@pytest.mark.parametrize("bf16", [False, True])
def test_recorded_sampling_gives_the_tokens_of_plain_sampling(model, prompts, bf16):
    """Through four windows of the cache, and a batch that gets smaller."""
    tokenizer, some = prompts
    sampled = []
    for graphs in (False, True):
        args = SharedArgs(max_response_tokens=64, cuda_graphs=graphs)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            groups = [group for step in (1, 2) for group in rollout(model, tokenizer, some, args, step, window=16)]
        sampled.append([(group.responses.tolist(), group.mask.tolist()) for group in groups])
    assert sampled[0] == sampled[1]


def steps(script, output, *flags, card, processes=1):
    """The lines of metrics.jsonl of three steps on the toy, in fp32 without TF32."""
    environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0", "PYTHONPATH": str(ROOT)}
    if not card:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    start = [sys.executable] + (["-m", "torch.distributed.run", "--standalone"] if processes > 1 else [])
    start += [f"--nproc_per_node={processes}"] if processes > 1 else []
    fixed = ["--dtype", "float32", "--steps", 3, "--prompts_per_step", 4, "--eval_rows", 0, "--kl_coef", 0.01]
    command = [*start, ROOT / f"{script}.py", "--output", output, *fixed, *flags]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(output)


def assert_close(ours, theirs):
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in ("reward", "accuracy", "response_tokens", "entropy", "loss", "grad_norm", "kl"):
            assert a[name] == pytest.approx(b[name], rel=[1e-3, 1e-2, 3e-2][step], abs=1e-4), (step, name)


@pytest.mark.parametrize("script", ["grpo", "vepo", "vgpo", "prpo", "pepo", "saei"])
def test_three_steps_of_every_method_are_those_of_a_cpu(tmp_path, script):
    on_card = steps(script, tmp_path / "card", "--cuda_graphs", card=True)
    assert_close(on_card, steps(script, tmp_path / "cpu", card=False))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
@pytest.mark.parametrize("script", ["grpo", "saei"])
def test_two_cards_are_one(tmp_path, script):
    one = steps(script, tmp_path / "one", card=True)
    assert_close(steps(script, tmp_path / "two", "--cuda_graphs", card=True, processes=2), one)
    more = ["--steps", 4, "--resume"]  # the optimiser's two parts, on one card
    assert len(steps(script, tmp_path / "two", *more, card=True)) == 4


MEASURE = """
import contextlib, json, sys
sys.path.insert(0, {root!r})
import torch
from plumbing.arguments import SharedArgs
from plumbing.memory import plan
from run import Run
peaks, phase = {{}}, Run.phase

@contextlib.contextmanager
def measured(run, name):
    torch.cuda.reset_peak_memory_stats()
    with phase(run, name):
        yield
    peaks[{{"rollout": "sampling"}}.get(name, name)] = torch.cuda.max_memory_allocated()

Run.phase = measured
args = SharedArgs(model={folder!r} + "/model", data={folder!r} + "/rows.parquet", output={folder!r} + "/run",
    eval_rows=0, prompts_per_step=32, updates_per_step=1, max_response_tokens=1024, dtype={dtype!r})
run = Run(args)
args.max_prompt_tokens, args.max_pixels = run.data.longest_tokens, None
planned = plan(args, 1)
kept = sum(planned["kept"].values())
print(json.dumps({{peak: (kept + sum(planned[peak].values())) / peaks[peak] for peak in ("sampling", "update")}}))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dry_run_of_a_billion_weights_is_what_is_measured(tmp_path, dtype):
    """Peaks of the rehearsed sampling and update, within 15 %."""
    gpu.random_model("1b", DEVICE).save_pretrained(tmp_path / "model")
    load_processor(TOY / "model").save_pretrained(tmp_path / "model")
    torch.cuda.empty_cache()
    datasets.Dataset.from_list(bench.make_rows(2, 1024)).to_parquet(tmp_path / "rows.parquet")
    code = MEASURE.format(root=str(ROOT), folder=str(tmp_path), dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ratios = json.loads(done.stdout.splitlines()[-1])
    assert ratios == {"sampling": pytest.approx(1, abs=0.15), "update": pytest.approx(1, abs=0.15)}
