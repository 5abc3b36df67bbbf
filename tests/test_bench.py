"""tests/bench.py and tests/gpu.py: what they count, and that they run where there is no card."""

import re
import sys

import bench
import gpu
import pytest
import torch
from helpers import tiny_group
from torch.utils.flop_counter import FlopCounterMode

from common import forward, load_processor
from plumbing.adapters import add_adapters
from plumbing.arguments import TOY, SharedArgs


def prompt_of(model, image_tokens):
    processor = load_processor(TOY / "model", max_pixels=10**8)
    return bench.make_data(SharedArgs(max_prompt_tokens=10**4), processor, model, image_tokens)[0]


@pytest.mark.parametrize("size, billions", [("3b", 3.75), ("7b", 8.29)])
def test_the_shapes_have_their_names_sizes(size, billions):
    with torch.device("meta"):
        model = gpu.transformers.Qwen2_5_VLForConditionalGeneration(gpu.config_of(size))
    assert gpu.size_of(model) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("image_tokens, rank", [(16, 0), (256, 0), (256, 16)])
def test_the_operations_of_an_update_are_those_that_torch_counts(image_tokens, rank):
    """But for attention, which torch does not count on a CPU: that is held to the pairs of tokens below.

    Nor does it count a product in place, which is B's; and what the first layer reads gets no gradient where all below
    is frozen, which is much of two layers.
    """
    model = gpu.random_model("tiny", "cpu").float()
    if rank:
        add_adapters(model, SharedArgs(lora_rank=rank))
    row = tiny_group(prompt_of(model, image_tokens), [50, 60, 70, 80])
    with FlopCounterMode(display=False) as counted:
        logps, entropy, _ = forward(model, row)
        (logps + entropy).sum().backward()
    recomputed = 2 * sum(row.lengths) * 512 * 64  # the head, in chunks
    lengths = [len(row.prompt.input_ids), *row.lengths]
    seen = sum(n * n / 2 for n in lengths) + lengths[0] * sum(row.lengths)  # half of the diagonal
    not_counted = r"lora_B|layers\.0\.self_attn\.[qkv]_proj.*(base_layer\.weight|lora_A)"
    weights = sum(p.numel() for name, p in model.named_parameters() if rank and re.search(not_counted, name))
    want = counted.get_total_flops() + 2 * sum(lengths) * weights - recomputed
    assert gpu.flops(model, row) - 12 * seen * 64 * 2 == pytest.approx(want, rel=0.03)


def test_kernels_by_kind():
    names = ["sm90_xmma_gemm_bf16", "nvjet_tst_128x256", "void pytorch_flash::flash_bwd_kernel", "triton_poi_fused_mul"]
    found = gpu.by_kind([(name, 2.0**i) for i, name in enumerate(names)], 20.0)
    assert found == {"attention": 4.0, "products": 3.0, "elementwise": 8.0, "idle": 5.0}


def test_bytes_and_operations_of_a_token_by_hand():
    model = gpu.random_model("tiny", "cpu")
    prompt, args = prompt_of(model, 16), SharedArgs(group_size=4, max_response_tokens=100)
    layer = 64 * 64 + 64 + 2 * (64 * 32 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64  # q, k and v, o, mlp, norms
    weights, Lp = 2 * layer + 512 * 64, len(prompt.input_ids)
    cached = 2 * 2 * 32 * 3 * (Lp + 4 * 50)  # keys and values, layers, one head of 32
    attention = 4 * 64 * 2 * (Lp + 50)
    assert gpu.token_cost(model, [prompt] * 3, args) == (2 * (weights + cached), 12 * (2 * weights + attention))


def test_on_a_cpu_in_a_tiny_shape(monkeypatch, capsys):
    flags = ["--gpu", "tiny", "--image_tokens", "16", "--repeats", "1", "--lora_rank", "2"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    bench.main()
    said = capsys.readouterr().out
    assert "million of adapters" in said and "AdamW of the adapters" in said and "x its bytes or FLOP" in said
    assert "2 prompts x 8, Lp = 79 of which 16 image tokens, Lr = 5" in said
    assert re.search(r"a step of 512 prompts x 8 on 8 such cards[^:]*:\nsampling \d", said)
