"""Random models in Qwen2.5-VL's shapes, and what a card makes of them: `python tests/bench.py --gpu 3b`.

Nothing is downloaded and nothing is trained: the weights are random and bf16, as a process holds them while it computes
in a run on several cards, and every response is as long as it may be. With `--lora_rank 32` a frozen model in bf16 with
adapters in fp32, as each card of such a run has it. Runs on a CPU too, in the shape "tiny".
"""

import contextlib
import dataclasses
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Group, checkpoint_layers, forward, generate, make_sampler, policy_loss, split_group  # noqa: E402
from plumbing.arguments import TOY  # noqa: E402
from plumbing.families import compile_layers, patch_attention  # noqa: E402

SHAPES = {  # the published config.json of Qwen2.5-VL-Instruct, and smaller ones:
    # hidden, mlp, layers, heads, kv heads, vocabulary, tied; vision: hidden, mlp, depth, heads
    "tiny": (64, 128, 2, 2, 1, 512, True, 32, 64, 2, 2),
    "28m": (512, 1536, 6, 8, 4, 8192, True, 256, 512, 4, 4),
    "1b": (1536, 6144, 16, 12, 2, 151_936, True, 1280, 3420, 12, 16),
    "3b": (2048, 11008, 36, 16, 2, 151_936, True, 1280, 3420, 32, 16),
    "7b": (3584, 18944, 28, 28, 4, 152_064, False, 1280, 3420, 32, 16),
    "32b": (5120, 27648, 64, 40, 8, 152_064, False, 1280, 3456, 32, 16),
}
TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # of dense bf16 products, by NVIDIA's data sheets


def config_of(size):
    """A Qwen2.5-VL configuration of that shape, with the token ids of the toy's tokenizer."""
    hidden, mlp, layers, heads, kv, vocabulary, tied, vision_hidden, vision_mlp, depth, vision_heads = SHAPES[size]
    config = transformers.Qwen2_5_VLConfig.from_pretrained(TOY / "model")
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, mlp, layers
    text.num_attention_heads, text.num_key_value_heads, text.vocab_size = heads, kv, vocabulary
    text.layer_types, text.initializer_range = ["full_attention"] * layers, 0.02
    half = hidden // heads // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # 16, 24, 24 of 64
    text.rope_parameters = {**text.rope_parameters, "mrope_section": section}
    config.tie_word_embeddings = text.tie_word_embeddings = tied
    vision.hidden_size, vision.intermediate_size, vision.depth = vision_hidden, vision_mlp, depth
    vision.num_heads, vision.out_hidden_size, vision.window_size = vision_heads, hidden, 112
    vision.fullatt_block_indexes = list(range(7, depth, 8)) or [depth - 1]
    return config


def random_model(size, device):
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16, "attn_implementation": {"text_config": "shared_prefix"}}
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config_of(size), **options)
    model.generation_config.eos_token_id = []  # no response ends before it must
    return model.train()


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function, repeats):
    """The median of some runs, after one that does not count; a GPU is waited for."""
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def card(device, repeats):
    """(name, bytes a second that it copies, FLOP a second of a large bf16 product, those of its data sheet or None)."""
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    n = 8192 if cuda else 512
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    large = torch.empty(2**30 if cuda else 2**24, dtype=torch.uint8, device=device)
    product, copy = seconds(lambda: a @ b, repeats), seconds(lambda: large.clone(), repeats)
    said = next((1e12 * value for known, value in TFLOPS.items() if known in name), None)
    return name, 2 * len(large) / copy, 2 * n**3 / product, said


def size_of(module):
    return sum(p.numel() for p in module.parameters())


def flops(model, row):
    """Of an update on a packed row, without what is recomputed: 6 a weight and token, 4 a frozen one, 2 in the frozen
    tower; 12 a pair of tokens that see each other, head and layer. The attention of the vision tower is left out."""
    text, layers = model.config.text_config, model.model.language_model.layers
    shared, lengths = len(row.prompt.input_ids), row.mask.sum(1).tolist()
    pairs = shared**2 / 2 + sum(length * (shared + length / 2) for length in lengths)
    frozen = not model.lm_head.weight.requires_grad
    products = (shared + sum(lengths)) * sum(p.numel() * (6 if p.requires_grad else 4) for p in layers.parameters())
    products += (4 if frozen else 6) * text.vocab_size * text.hidden_size * sum(lengths)
    patches, visual = 0 if row.prompt.pixel_values is None else len(row.prompt.pixel_values), model.model.visual
    once = size_of(visual) - size_of(visual.merger) * 3 / 4  # the merger sees four as one
    products += patches * (2 * once if frozen else 6 * once - 2 * size_of(visual.patch_embed))  # pixels get no gradient
    return products + 12 * pairs * text.hidden_size * len(layers)


def token_cost(model, prompts, args):
    """(bytes read, operations) at least for one more token of all responses, half of their length there.

    Bytes of weights and caches; operations 2 a weight, and 4 D for each layer and each token that a response sees.
    """
    text, layers = model.config.text_config, model.model.language_model.layers
    weights = size_of(layers) + text.vocab_size * text.hidden_size
    cached = 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * len(layers)
    G, half = args.group_size, args.max_response_tokens / 2
    stored = sum(len(p.input_ids) + G * half for p in prompts)
    seen = sum(G * (len(p.input_ids) + half) for p in prompts)
    operations = 2 * weights * G * len(prompts) + 4 * text.hidden_size * len(layers) * seen
    return 2 * (weights + cached * stored), operations


KINDS = {"products": "gemm|cutlass|nvjet|cublas|xmma", "attention": "flash|fmha|attention"}  # the rest: elementwise


def by_kind(kernels, wall):
    """{kind: seconds} of kernels [(name, seconds)] that ran within `wall` seconds; the rest of these is idle."""
    found = dict.fromkeys(["attention", "products", "elementwise"], 0.0)
    for name, taken in kernels:
        kind = next((kind for kind in list(found)[:2] if re.search(KINDS[kind], name, re.IGNORECASE)), "elementwise")
        found[kind] += taken
    return found | {"idle": max(0.0, wall - sum(found.values()))}


def line(what, taken, more=""):
    print(f"{what:46s}{1e3 * taken:9.1f} ms   {more}")


def report(model, size, prompt, args, repeats, groups=64, cards=8):
    """Prints what a step of `groups` prompts on each of `cards` cards takes, phase by phase."""
    device, G, T = model.device.type, args.group_size, args.max_response_tokens
    compile_layers(patch_attention(model))
    autocast = torch.autocast(device, torch.bfloat16, enabled=bool(args.lora_rank))
    name, bandwidth, product, said = card(device, repeats)
    prompts = [dataclasses.replace(prompt, prompt_id=i) for i in range(args.rollout_prompts)]
    trained, parts = sum(p.numel() for p in model.parameters() if p.requires_grad), 1 if args.lora_rank else cards
    adapters = f", {trained / 1e6:.0f} million of adapters" if args.lora_rank else ""
    Lp, image = len(prompt.input_ids), int(prompt.image_mask.sum())
    print(
        f"Qwen2.5-VL in the shape {size}: {size_of(model) / 1e9:.2f} billion random weights{adapters}, on one {name}\n"
        f"{len(prompts)} prompts x {G}, Lp = {Lp} of which {image} image tokens, Lr = {T}; torch {torch.__version__}\n"
        f"{bandwidth / 1e12:.2f} TB/s are copied, {product / 1e12:.0f} TFLOP/s reached in a large bf16 product\n"
    )

    banned = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool, device=device)
    choose = make_sampler(banned, args.temperature, args.top_p, args.top_k)

    def sample(tokens, graphs):
        uniforms = torch.rand(len(prompts) * G, tokens)
        fixed = {"capacity": min(128, T), "prefill_tokens": args.tokens_per_row, "graphs": graphs}
        with autocast:
            return seconds(lambda: generate(model, prompts, G, choose, uniforms, [], 0, **fixed), repeats)

    first = sample(1, False)
    bytes_read, operations = token_cost(model, prompts, args)
    least = max(bytes_read / bandwidth, operations / product)
    sampling = {graphs: sample(T, graphs) for graphs in ([False, True] if device == "cuda" else [False])}
    for graphs, whole in sampling.items():
        token, how = (whole - first) / (T - 1), ", as a CUDA graph" if graphs else ""
        ratio = f"{token / least:.1f} x its bytes or FLOP, {1e3 * least:.1f} ms"
        line(f"a token of {len(prompts) * G} responses{how}", token, ratio)

    tokens = torch.randint(100, 400, (G, T), device=device)
    group = Group(prompt, tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(G), [""] * G)
    rows = split_group(group, args.tokens_per_row)

    def score():
        with autocast, torch.no_grad():
            for row in rows:
                forward(model, row)

    def update():
        for row in rows:
            with autocast:
                logps, _, _ = forward(model, row)
            loss, _ = policy_loss(logps, logps.detach(), torch.linspace(-1, 1, len(row.mask), device=device), row.mask)
            loss.backward()

    scoring, updates = seconds(score, repeats), []
    for checkpointing in (True, False):  # the latter as a run does where memory allows
        if checkpointing:
            checkpoint_layers(model)
        else:
            model.activation_checkpointing_disable()
        with contextlib.suppress(torch.OutOfMemoryError):
            updates.append(seconds(update, repeats))
            line(f"update of a group, {'with' if checkpointing else 'without'} checkpointing", updates[-1])
    updating = min(updates)
    speed = sum(flops(model, row) for row in rows) / updating
    share = f", {speed / said:.0%} MFU by the data sheet" if said else ""
    print(f"the faster of them: {speed / product:.0%} of the large product{share}")
    if device == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            update()
            wait()
        found = [(event.key, event.self_device_time_total / 1e6) for event in profile.key_averages()]
        for kind, taken in by_kind(found, updating).items():
            line(f"  of the last, {kind}", taken)
    model.zero_grad()
    line("forward pass of a group", scoring)
    part = torch.zeros(trained // parts, device=device, requires_grad=True)  # fp32, what a card keeps of it
    part.grad = torch.zeros_like(part)
    stepping = seconds(torch.optim.AdamW([part], fused=True).step, repeats)
    line("AdamW of the adapters" if args.lora_rank else f"AdamW of 1/{cards} of the weights", stepping)
    if device == "cuda":
        print(f"{'memory at its peak':46s}{torch.cuda.max_memory_allocated() / 1e9:9.1f} GB")

    batches = math.ceil(groups / len(prompts))
    print(f"\nseconds of a step of {groups * cards} prompts x {G} on {cards} such cards, without rewards,")
    print("gathering and summing, clipping, checkpoints and waiting:")
    print(f"sampling {batches * sampling[False]:.1f}, scoring {groups * scoring:.1f}, ", end="")
    print(f"update {groups * updating + args.updates_per_step * stepping:.1f}")
    if True in sampling:
        print(f"sampling with CUDA graphs, as on one card, {batches * sampling[True]:.1f}")
