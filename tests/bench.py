"""Speed as ratios of one run: python tests/bench.py [--repeats 5] [--image_tokens 1024]

Shape: a random Qwen2.5-VL of 28M parameters with 8,192 tokens, 2 prompts of one 448-pixel image (256 image
tokens), G = 8, 64 response tokens. Every figure is a ratio of medians of interleaved runs, so that a machine that is
slow today is slow for both sides. The last one runs the same step in TRL's GRPOTrainer (tests/requirements.txt).

On a card: python tests/bench.py --gpu 3b, or 7b, or with --lora_rank 32. Milliseconds, in the shape of the real model
(tests/gpu.py).
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpu  # noqa: E402

from common import (  # noqa: E402
    Reward,
    checkpoint_layers,
    forward,
    group_advantages,
    load_processor,
    policy_loss,
    rollout,
    stack_rewards,
)
from plumbing.adapters import add_adapters  # noqa: E402
from plumbing.arguments import INSTRUCTION, TOY, SharedArgs  # noqa: E402
from plumbing.data import Data  # noqa: E402
from plumbing.families import image_inputs, patch_attention  # noqa: E402

P, G = 2, 8
# what a step may cost, in GRPO's
METHODS = {"vepo": 1.5, "vgpo": 1.1, "prpo": 1.8, "pepo": 1.1, "saei": 2.0, "vppo": 2.6}


def make_model():
    """As transformers has it; what is ours is measured after `patch_attention`, as in training."""
    model = gpu.random_model("28m", "cpu").float()
    model.generation_config.eos_token_id = [8191]  # a random model hardly ever ends: equal lengths for all
    return model


def make_rows(count, image_tokens):
    """Square images of noise and a question each, in the schema of geometry3k."""
    size = (28 * math.isqrt(image_tokens),) * 2
    images = [Image.effect_noise(size, 40 + i).convert("RGB") for i in range(count)]
    problem = "<image>How many things are there in picture {}?"
    return [{"images": [x], "problem": problem.format(i), "answer": "3"} for i, x in enumerate(images)]


def make_data(args, processor, model, image_tokens):
    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_list(make_rows(P, image_tokens)).to_parquet(f"{folder}/rows.parquet")
        data = Data(f"{folder}/rows.parquet", "train", args, processor, model)
        return [data.prompt(i) for i in range(P)]


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(name, slow, fast, repeats, note=""):
    """Prints median(slow) / median(fast) of interleaved runs, after one of each that does not count."""
    slow(), fast()
    times = [(seconds(slow), seconds(fast)) for _ in range(repeats)]
    a, b = (statistics.median(column) for column in zip(*times))
    ratios = sorted(x / y for x, y in times)
    print(f"{name:46s} {a / b:6.2f} x   ({ratios[0]:.2f} to {ratios[-1]:.2f}; {a:.2f} s against {b:.2f} s) {note}")
    return a / b


def padded_update(model, groups):
    """The usual way: G copies of prompt and images in one padded batch, all logits of the responses in memory."""
    for group in groups:
        prompt, mask = group.prompt, group.mask
        out = model(
            input_ids=torch.cat([prompt.input_ids.expand(G, -1), group.responses], 1),
            attention_mask=torch.cat([torch.ones(G, len(prompt.input_ids), dtype=torch.bool), mask], 1),
            mm_token_type_ids=torch.cat([prompt.image_mask.expand(G, -1), torch.zeros_like(mask)], 1).int(),
            **image_inputs(model, [prompt] * G),
            logits_to_keep=mask.shape[1] + 1,
        )
        logps = out.logits[:, :-1].log_softmax(-1).gather(-1, group.responses[..., None])[..., 0]
        loss, _ = policy_loss(logps, logps.detach(), torch.linspace(-1, 1, G), mask)
        loss.backward()
    model.zero_grad()


def packed_update(model, groups):
    for group in groups:
        logps, _, _ = forward(model, group)
        loss, _ = policy_loss(logps, logps.detach(), torch.linspace(-1, 1, G), group.mask)
        loss.backward()
    model.zero_grad()


def plain_sampling(model, prompts, tokens):
    """`generate` on G copies of each prompt, as a trainer without a shared cache calls it."""
    copies = [prompt for prompt in prompts for _ in range(G)]
    with torch.no_grad():
        model.eval().generate(
            input_ids=torch.stack([p.input_ids for p in copies]),
            attention_mask=torch.stack([torch.ones_like(p.input_ids) for p in copies]),
            mm_token_type_ids=torch.stack([p.image_mask.int() for p in copies]),
            **image_inputs(model, copies),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=True,
        )
    model.train()


def our_step(model, tokenizer, prompts, args, reward, optimizer, step):
    groups = rollout(model, tokenizer, prompts, args, step)
    advantages = group_advantages(stack_rewards(reward(groups), args.group_size))
    denominator = sum(int(group.mask.sum()) for group in groups)
    for group, group_advantage in zip(groups, advantages):
        logps, _, _ = forward(model, group)
        loss, _ = policy_loss(logps, logps.detach(), group_advantage, group.mask, denominator=denominator)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def method_steps(model, processor, image_tokens, tokens, repeats):
    """Prints the whole step of each method's own script against that of grpo.py: two counted steps in each run."""
    times = {name: [] for name in ["grpo", *METHODS, "grpo with 12", "attack"]}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        processor.save_pretrained(f"{folder}/model")
        datasets.Dataset.from_list(make_rows(P, image_tokens)).to_parquet(f"{folder}/rows.parquet")
        Path(folder, "reward.py").write_text("def mixed(p, r, a): return [hash(text) % 7 for text in r]")
        flags = f"--model {folder}/model --data {folder}/rows.parquet --reward {folder}/reward.py:mixed --eval_rows 0"
        flags += f" --prompts_per_step {P} --max_response_tokens {tokens} --updates_per_step 1"
        flags += " --steps 3 --show_every 0 --save_every 0 --gradient_checkpointing false"
        for repeat in range(repeats):
            for name in list(times)[:-1]:
                output = f"{folder}/{name}-{repeat}"
                size = 12 if name in ("saei", "grpo with 12") else G  # SaEI's 6 + 6 against GRPO's 12
                sys.argv = [name, "--output", output, "--group_size", str(size), *flags.split()]
                with contextlib.redirect_stderr(io.StringIO()):
                    importlib.import_module(name.split()[0]).main()
                lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()[1:]]
                times[name].append(statistics.mean(line["seconds"] for line in lines))
                if name == "saei":
                    times["attack"].append(statistics.mean(line["seconds_attack"] for line in lines))
    for name, bar in {**METHODS, "attack": 0.4}.items():
        base = times["grpo with 12" if name in ("saei", "attack") else "grpo"]
        ratios = sorted(a / b for a, b in zip(times[name], base))
        a, b = statistics.median(times[name]), statistics.median(base)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}; {a:.2f} s against {b:.2f} s"
        what = "the attack of saei.py" if name == "attack" else f"whole step: {name}.py"
        print(f"{f'{what} / grpo.py':46s} {a / b:6.2f} x   ({spread}) bar {bar}")


def trl_step_seconds(processor, image_tokens, tokens, steps):
    """Seconds of each step but the first of GRPOTrainer at the same settings."""
    import trl  # takes long, and is not on every card's machine

    class Clock(transformers.TrainerCallback):
        times = []

        def on_step_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter() - self.begin)

    rows = [
        {"prompt": [{"role": "user", "content": f"{row['problem'][7:]}\n{INSTRUCTION}"}], "image": row["images"][0]}
        for row in make_rows(P, image_tokens)
    ]
    model, clock = make_model(), Clock()
    model.set_attn_implementation("sdpa")
    settings = {"max_completion_length": tokens, "max_steps": steps, "learning_rate": 1e-6, "loss_type": "dapo"}
    settings |= {"per_device_train_batch_size": P * G, "num_generations": G, "beta": 0.0, "temperature": 1.0}
    settings |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True}
    settings |= {"report_to": [], "save_strategy": "no", "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        trl.GRPOTrainer(
            model=model,
            processing_class=processor,
            reward_funcs=lambda completions, **_: [float(len(c[0]["content"]) % 7) for c in completions],
            args=trl.GRPOConfig(output_dir=folder, **settings),
            train_dataset=datasets.Dataset.from_list(rows),
            callbacks=[clock],
        ).train()
    return clock.times[1:]


def head_memory(kind, tokens):
    """Peak resident GB of a process that differentiates log-probs of `tokens` tokens over Qwen's vocabulary (Linux).

    Not getrusage's, which begins with the peak of the process that started it.
    """
    code = f"""
import re, sys, torch
sys.path.insert(0, {str(TOY.parent)!r})
from common import token_logps
torch.manual_seed(0)
hidden, weight = torch.randn({tokens}, 64, requires_grad=True), torch.randn(151_936, 64, requires_grad=True)
targets = torch.randint(151_936, ({tokens},))
if {kind!r} == "chunks":
    logps, entropy = token_logps(hidden, weight, targets)
else:
    logits = (hidden @ weight.T).log_softmax(-1)
    logps, entropy = logits.gather(1, targets[:, None]), -(logits.exp() * logits).sum(-1)
(logps.sum() + 0 * entropy.sum()).backward()
print(int(re.search("VmHWM: *\\t*(.*) kB", open("/proc/self/status").read())[1]) / 2**20)
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each side")
    parser.add_argument("--image_tokens", type=int, default=256, help="of the image of a prompt: a square number")
    parser.add_argument(
        "--gpu", choices=["tiny", "1b", "3b", "7b"], nargs="?", const="3b", help="measure this shape on a card"
    )
    parser.add_argument("--lora_rank", type=int, default=0, help="with --gpu: of adapters on the frozen model")
    parser.add_argument("--methods", action="store_true", help="nothing but the methods' steps")
    parser.add_argument("--no_methods", action="store_true", help="leave the methods' steps out")
    options = parser.parse_args()
    if options.lora_rank and not options.gpu:
        parser.error("--lora_rank is for --gpu; the comparison on a CPU always measures rank 32.")
    transformers.utils.logging.set_verbosity_error()
    tokens = {None: 64, "tiny": 5}.get(options.gpu, 512)  # of every response
    args = SharedArgs(group_size=G, max_response_tokens=tokens, max_prompt_tokens=10**4, lora_rank=options.lora_rank)
    processor = load_processor(TOY / "model", max_pixels=10**8)
    if options.gpu:
        model = gpu.random_model(options.gpu, "cuda" if torch.cuda.is_available() else "cpu")
        if args.lora_rank:
            add_adapters(model, args)
        args.rollout_prompts, args.updates_per_step = P if options.gpu == "tiny" else 32, 4
        prompt = make_data(args, processor, model, options.image_tokens)[0]
        gpu.report(model, options.gpu, prompt, args, options.repeats)
        return
    model, plain = patch_attention(make_model()), make_model()
    prompts = make_data(args, processor, model, options.image_tokens)
    groups = rollout(model, processor.tokenizer, prompts, args, 0)
    Lp, Lr = len(prompts[0].input_ids), int(groups[0].mask[0].sum())
    millions, image = sum(p.numel() for p in model.parameters()) / 1e6, int(prompts[0].image_mask.sum())
    print(f"{millions:.0f}M parameters, {P} prompts x {G}, Lp = {Lp} of which {image} image tokens, Lr = {Lr}")
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()}, torch {torch.__version__}")
    if not options.methods:
        bound = G * (Lp + Lr) / (Lp + G * Lr)

        def sampling(of):
            return lambda: rollout(of, processor.tokenizer, prompts, args, 0)

        def update(of):
            return lambda: packed_update(of, groups)

        name, note = "update: padded batch / packed row", f"token ratio {bound:.2f}, bar {0.8 * bound:.2f}"
        compare(name, lambda: padded_update(plain, groups), update(model), options.repeats, note)
        name = "sampling: plain generate / prompt computed once"
        compare(name, lambda: plain_sampling(plain, prompts, tokens), sampling(model), options.repeats)
        asked, adapted = (add_adapters(copy.deepcopy(model), SharedArgs(lora_rank=32)) for _ in range(2))
        name = "sampling: with adapters of rank 32 / without"
        compare(name, sampling(adapted), sampling(model), options.repeats, "bar 1.15")
        checkpoint_layers(adapted)
        asked.activation_checkpointing_enable({"use_reentrant": False})  # as transformers does it
        compare("update with adapters: inputs' gradients / none", update(asked), update(adapted), options.repeats)
    if not options.no_methods:
        method_steps(model, processor, options.image_tokens, tokens, options.repeats)
    if options.methods:
        return
    for length in (512, 1024, 2048):
        chunks, whole = head_memory("chunks", length), head_memory("plain", length)
        name = f"peak memory of the head, {length} tokens"
        print(f"{name:46s} {whole / chunks:6.2f} x   ({whole:.1f} GB of plain logits against {chunks:.1f} GB)")
    reward, optimizer = Reward(args), torch.optim.AdamW(model.parameters(), 1e-6)
    step = functools.partial(our_step, model, processor.tokenizer, prompts, args, reward, optimizer)
    ours = [seconds(functools.partial(step, i)) for i in range(options.repeats + 1)][1:]
    theirs = trl_step_seconds(processor, options.image_tokens, tokens, options.repeats + 1)
    a, b = statistics.median(theirs), statistics.median(ours)
    spread = f"{min(theirs) / max(ours):.2f} to {max(theirs) / min(ours):.2f}; {a:.2f} s against {b:.2f} s"
    print(f"{'whole step: TRL / ours':46s} {a / b:6.2f} x   ({spread}) bar 4")


if __name__ == "__main__":
    main()
