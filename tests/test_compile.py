"""What is compiled on a GPU: few graphs for rows of any length, and the results of what is not compiled."""

from random import Random

import pytest
import torch
import tracing
from helpers import SHAPES, assert_same_training, chooser, timeless, tiny_group, tiny_model, tiny_prompt, weights
from helpers import train as trained_by
from test_saei import gradient_of, random_images
from torch._dynamo.utils import counters
from torch.profiler import profile

import saei
from common import checkpoint_layers, forward, generate, seeded
from plumbing import kernels
from plumbing.adapters import adapters_of, add_adapters
from plumbing.arguments import SharedArgs
from plumbing.families import compile_layers


@pytest.fixture
def traced(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    tracing.use(monkeypatch.setattr)
    yield
    torch._dynamo.reset()


def model_of(family, how):
    model = tiny_model(family)
    if "adapters" in how:
        add_adapters(model, SharedArgs(lora_rank=2))
        for p in adapters_of(model).values():
            p.data = torch.randn(p.shape, generator=seeded(1)) / 10
    if "checkpointing" in how:
        checkpoint_layers(model)
    return model.train()


@pytest.mark.parametrize(
    "family, how, count, graphs",
    [
        ("qwen2_5_vl", "", 40, 3),  # decoder's layers; tower's with windows, and without
        ("qwen2_5_vl", "checkpointing, adapters, layer_hook", 15, 4),  # what the first layer reads has no gradient
        ("qwen3_vl", "checkpointing, layer_hook", 15, 3),
        ("internvl", "checkpointing", 15, 2),
    ],
)
def test_rows_of_any_length_share_few_graphs(traced, family, how, count, graphs):
    """Rows with gradients, each as without a compiler; the head, in chunks, is one more graph."""
    plain, model = model_of(family, how), model_of(family, how)
    with tracing.nothing_compiled():
        want = [differentiated(plain, row, how) for row in rows(plain, count)]
    compile_layers(model)
    for row, expected in zip(rows(model, count), want, strict=True):
        for ours, theirs in zip(differentiated(model, row, how), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5 * max(1, theirs.abs().max().item()))
    assert counters["stats"]["unique_graphs"] <= graphs + 1 and not counters["graph_break"]


def rows(model, count):
    random = Random(0)
    for i in range(count):
        shapes = SHAPES[random.choice(list(SHAPES))]
        yield tiny_group(tiny_prompt(model, shapes), [random.randint(1, 60) for _ in range(1 + i % 9)])


def differentiated(model, row, how):
    model.zero_grad()
    seen = []
    logps, entropy, _ = forward(model, row, layer_hook=seen.append if "layer_hook" in how else None)
    (logps + entropy).sum().backward()
    return [logps, entropy, *seen, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_compiled_decode_step_gives_the_same_tokens(traced, monkeypatch):
    """For all capacities and for fewer and fewer prompts by the same graphs; the prompts' own pass is not compiled."""
    model = tiny_model("qwen2_5_vl").eval()
    prompts = [tiny_prompt(model, shapes) for shapes in [*SHAPES.values()] * 2]
    uniforms = torch.rand(3 * len(prompts), 40, generator=seeded(0))
    settings = (prompts, 3, chooser(model), uniforms, list(range(20, 30)), 0)  # 10 of 96 tokens end a response
    with tracing.nothing_compiled():
        want = generate(model, *settings, capacity=16)
    compile_layers(model)
    monkeypatch.setattr(kernels, "compiled", tracing.traced)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(generate(model, *settings, capacity=16), want, strict=True))
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


def test_weights_that_are_cast_once_compile_once(traced):
    """New bf16 copies after each step of the optimizer are no new graphs, and the results are those of no compiler."""

    def updates(model):
        optimizer, found = torch.optim.AdamW(model.parameters(), 1e-3), []
        for lengths in ([7, 1, 4], [3, 9]):
            with torch.autocast("cpu", torch.bfloat16), kernels.bf16_products(model, gradients=True):
                logps, entropy, _ = forward(model, tiny_group(tiny_prompt(model, [(4, 6)]), lengths))
                (logps + entropy).sum().backward()
                optimizer.step()
            found += [logps.detach(), entropy.detach()]
        return found

    with tracing.nothing_compiled():
        want = updates(tiny_model("qwen2_5_vl"))
    compile_layers(model := tiny_model("qwen2_5_vl"))
    got = updates(model)
    assert counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


def test_scripts_train_the_same(traced, tmp_path):
    """All kinds of passes: with adapters, without gradient, with a hook, by the image. One test: they share graphs."""
    flags = ["--steps", 1, "--prompts_per_step", 1, "--updates_per_step", 1, "--max_response_tokens", 8]
    flags += ["--kl_coef", 0.01, "--entropy_coef", 1]
    for script, more in (("grpo", ["--lora_rank", 4]), ("vepo", []), ("pepo", []), ("saei", [])):
        compiled, plain = tmp_path / f"{script}-compiled", tmp_path / f"{script}-plain"
        ours = trained_by(script, compiled, *flags, *more)
        with tracing.nothing_compiled():
            theirs = trained_by(script, plain, *flags, *more)
        for a, b in zip(timeless(ours), timeless(theirs), strict=True):
            assert a == pytest.approx(b, abs=1e-4), script
        if not more:
            assert_same_training(weights(compiled / "last"), weights(plain / "last"))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] > 3


def test_the_attack_computes_no_gradient_of_a_weight(traced):
    """A compiled layer has one backward graph: without `frozen` it would multiply for weights that nobody asks for."""
    group, run = random_images(tiny_model("qwen2_5_vl"), [(4, 6)])

    def attacked():
        with profile(with_flops=True) as found:
            _, gradient, _ = gradient_of(group, run, saei.Args())
        return sum(event.flops for event in found.key_averages() if event.key in ("aten::mm", "aten::addmm")), gradient

    with tracing.nothing_compiled():
        flops, gradient = attacked()
    compile_layers(run.model)
    attacked()  # compiling counts as well
    compiled_flops, compiled_gradient = attacked()
    assert 0 < compiled_flops == flops and torch.allclose(compiled_gradient, gradient, atol=1e-6)
    assert all(p.requires_grad for p in run.model.parameters())
