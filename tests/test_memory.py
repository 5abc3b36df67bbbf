"""The dry run against known models and measured memory; as a script it prints the README's tables."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from gpu import config_of
from helpers import ROOT, save_internvl

from common import load_processor
from plumbing.arguments import SharedArgs, UserError
from plumbing.data import load_rows
from plumbing.memory import choose_checkpointing, dry_run, plan, trial_update
from trainer import Trainer


def write_config(size, folder):
    config_of(size.lower()).save_pretrained(folder / size)
    return str(folder / size / "config.json")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a model's configuration, by its size."""
    folder = tmp_path_factory.mktemp("configs")
    return {size: write_config(size, folder) for size in ("3B", "7B", "32B")}


@pytest.mark.parametrize("size, billions", [("3B", 3.75), ("7B", 8.29), ("32B", 33.45)])
def test_parameters_of_the_known_models(config, size, billions):
    peaks = plan(SharedArgs(model=config[size]), 1)
    assert peaks["kept"]["weights"] == pytest.approx(4e9 * billions, rel=0.003)
    assert peaks["update"]["gradients"] == peaks["kept"]["weights"] == peaks["kept"]["optimiser"] / 2


def test_the_parts_of_a_plan_by_hand(config):
    """7B: 28 layers of D 3,584, MLP 18,944, 4 of 28 heads of 128 with keys; 32 vision blocks of D 1,280, MLP 3,420."""
    path = config["7B"]
    peaks = plan(SharedArgs(model=path), 8)
    token = 2 * 4 * 128 * 2  # bytes of keys and values in a layer
    assert peaks["sampling"] == {
        "computing copy": 2 * 8_292_166_656,
        "key-value cache": 32 * 2048 * 28 * token + 32 * 8 * 2048 * 29 * token,
        "attention": 32 * 8 * 28 * (2048 + 2048) * 12,
        "logits": 32 * 8 * 152_064 * 16,
        "prompts": 0,
    }
    layer, block = 233_057_792, 19_702_200
    root = 8_292_166_656 - 28 * layer - 32 * block
    patches, D, mlp = 1_000_000 // 14**2, 3584, 18_944
    text = 16_384 * 2 * (28 * D + 6 * D + 5 * D + 4 * mlp)
    vision = patches * 2 * (32 * 1280 + 6 * 1280 + 5 * 1280 + 4 * 3420)
    head = 512 * 152_064 * 16 + 152_064 * D * 4
    assert peaks["update"] == {
        "computing copy": 2 * (root + 2 * layer) + 6 * layer,
        "gradients": 4 * 8_292_166_656 / 8,
        "activations": text + vision,
        "head": head,
    }
    alone = plan(SharedArgs(model=path, kl_coef=0.1, max_response_tokens=200), 1)  # fp32 between layers, under autocast
    text = (2048 + 8 * 200) * (4 * (28 * D + 6 * D) + 2 * (5 * D + 4 * mlp))
    vision = patches * (4 * (32 * 1280 + 6 * 1280) + 2 * (5 * 1280 + 4 * 3420))
    assert alone["update"]["activations"] == text + vision
    assert alone["kept"]["reference"] == 2 * 8_292_166_656 + 4 * 152_064 * D
    assert alone["sampling"]["key-value cache"] == 32 * 2048 * 28 * token + 32 * 8 * 256 * 29 * token  # of 256 tokens


def test_the_parts_of_a_plan_with_adapters_by_hand(config):
    """The whole model on each of any number of GPUs, rank times both sides of each linear layer in fp32."""
    one, eight = (plan(SharedArgs(model=config["7B"], lora_rank=32, kl_coef=0.1), gpus) for gpus in (1, 8))
    adapters = 32 * 28 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18_944))
    assert one["kept"] == {"weights": 2 * 8_292_166_656 + 4 * adapters, "optimiser": 8 * adapters, "reference": 0}
    assert eight["kept"] == one["kept"] and eight["update"] == one["update"]
    assert one["update"]["gradients"] == 4 * adapters and one["update"]["computing copy"] == 2 * adapters
    assert one["update"]["head"] == 512 * 152_064 * 16


def test_what_each_flag_changes(config):
    def total(gpus=8, **more):
        peaks = plan(SharedArgs(model=config["3B"], **more), gpus)
        return {peak: sum(peaks["kept"].values()) + sum(peaks[peak].values()) for peak in ("sampling", "update")}

    base = total()
    assert total(gpus=16)["sampling"] < base["sampling"] and total(gpus=16)["update"] < base["update"]
    assert total(rollout_prompts=8)["sampling"] < base["sampling"]
    assert total(tokens_per_row=8192)["update"] < base["update"]
    assert total(gradient_checkpointing=False)["update"] > 2 * base["update"]
    assert total(freeze_vision=True)["sampling"] < base["sampling"] < total(kl_coef=0.1)["sampling"]


@pytest.mark.parametrize("memory, chosen", [(80, True), (141, True), (170, False)])
def test_checkpointing_where_a_card_has_too_little_memory(config, memory, chosen):
    args = SharedArgs(model=config["7B"], dry_run=8, gpu_memory=memory)
    text = dry_run(args)
    assert args.gradient_checkpointing is chosen
    need = float(re.search(r"without it an update takes up to ([\d.]+) GB of ", text)[1])
    assert (need >= 0.85 * memory) == chosen
    peaks = plan(SharedArgs(model=args.model, gradient_checkpointing=False), 8)
    assert need == pytest.approx(sum(sum(peaks[part].values()) for part in ("kept", "update")) / 1e9, abs=0.1)


def test_checkpointing_as_it_is_set_and_without_a_card(config):
    for model, given, on, why in (
        (config["3B"], None, True, "on, there is no GPU"),
        (config["3B"], False, False, "off, as set"),
        ("toy", None, False, "off, as set, or for the toy"),
    ):
        args = SharedArgs(model=model, gradient_checkpointing=given)
        assert why in choose_checkpointing(args, 1) and args.gradient_checkpointing is on


def test_the_text_and_the_first_flag_to_change(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        Trainer(SharedArgs(model=config["7B"], dry_run=8, output=str(tmp_path / "run")))
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "8 GPUs of 80 GB" in text and "DOES NOT FIT" not in text
    assert not (tmp_path / "run").exists()

    def said(size, gpus, **flags):
        return dry_run(SharedArgs(model=config[size], dry_run=gpus, **flags))

    small = said("7B", 8, gpu_memory=48)
    assert "DOES NOT FIT" in small and "first flag to change: --rollout_prompts" in small
    assert "none helps: weights, gradients and optimizer alone are too much; take more GPUs" in said("7B", 1)
    assert "first flag to change: --gradient_checkpointing" in said("7B", 8, gradient_checkpointing=False)
    assert "first flag to change: --tokens_per_row" in said("7B", 8, gpu_memory=30)
    text = said("32B", 16)
    assert "first flag to change: --reshard_while_sampling" in text and "\n  0 of 32 prompts fit together" in text
    for prompts, fits in ((7, True), (10, True), (11, False)):  # that is what the sentence says
        text = said("32B", 16, reshard_while_sampling=True, rollout_prompts=prompts)
        assert ("DOES NOT FIT" not in text) == fits and "\n  10 of 32 prompts fit together" in text


@pytest.mark.parametrize("flags, need", [({"gpu_memory": 80}, 132.7), ({"gpu_memory": 16, "lora_rank": 32}, 17.9)])
def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(config, tmp_path, flags, need):
    sentence = f"needs {need} GB on each of 1 GPUs of {flags['gpu_memory']} GB: weights, .* alone are too much"
    with pytest.raises(UserError, match=sentence):
        Trainer(SharedArgs(model=config["7B"], output=str(tmp_path / "run"), **flags))


def test_a_trial_update_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], 0.1, weight_decay=0.1)
    trial_update(optimizer, lambda: (0 * weight.sum()).backward(), None)
    assert torch.equal(weight, torch.ones(2)) and weight.grad is None and optimizer.param_groups[0]["lr"] == 0.1
    assert not any(value.any() for value in optimizer.state[weight].values())


def test_a_model_that_is_not_there():
    with pytest.raises(UserError, match="--model /nowhere cannot be opened"):
        dry_run(SharedArgs(model="/nowhere", dry_run=8))


MEASURE = """
import json, os, re, sys
sys.path.insert(0, ROOT)
from common import SharedPrefixCache
from plumbing.arguments import SharedArgs
from plumbing.memory import plan
from trainer import Trainer

def memory():
    return 1024 * int(re.search("VmHWM:(.*) kB", open("/proc/self/status").read())[1])

def check_memory(run):
    before.append(memory())
    rehearse(run)

def grow_and_touch(cache, *size):  # pages of zeros take no memory until they are written
    grow(cache, *size)
    for pair in cache.suffix:
        for x in pair:
            x.zero_()

before, rehearse, grow = [], Trainer.check_memory, SharedPrefixCache.grow
Trainer.check_memory, SharedPrefixCache.grow = check_memory, grow_and_touch
for name, (peak, flags) in CASES.items():
    if os.fork():
        os.wait()
        continue
    args = SharedArgs(dtype="float32", group_size=4, eval_rows=0, updates_per_step=1, **flags)
    run = Trainer(args)
    args.max_prompt_tokens, args.max_pixels = len(run.data.prompt(run.data.longest_row).input_ids), None
    peaks = plan(args, 1)
    parts = {peak: sum(peaks[peak].values()) for peak in peaks}
    assert parts[peak] == max(parts["sampling"], parts["update"])
    print(json.dumps([name, (before[0] + parts["kept"] + parts[peak]) / memory()]), flush=True)
    os._exit(0)
"""


def widened(config):
    """The configuration with a decoder of 79M parameters, and heads of 64, half as many of them with keys."""
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers = 32_000, 640, 1728, 8
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 10, 5, ["full_attention"] * 8
    vision.hidden_size, vision.intermediate_size = 512, 1024
    return config


def write_model(folder):
    """The folder of a random Qwen2.5-VL."""
    config = widened(transformers.Qwen2_5_VLConfig.from_pretrained(ROOT / "toy" / "model"))
    config.text_config.rope_parameters |= {"mrope_section": [8, 12, 12]}
    config.vision_config.out_hidden_size, config.vision_config.depth = 640, 6
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    load_processor(ROOT / "toy" / "model").save_pretrained(folder)
    return str(folder)


def write_internvl(folder):
    """The folder of a random InternVL, with tiles of 112 x 112 pixels, 16 tokens each."""
    folder.mkdir()
    config = widened(transformers.AutoConfig.from_pretrained(save_internvl(folder)))
    vision, config.image_seq_length, config.tie_word_embeddings = config.vision_config, 16, False
    vision.num_attention_heads, vision.image_size, vision.num_hidden_layers = 8, (112, 112), 6
    transformers.InternVLForConditionalGeneration(config).save_pretrained(folder)
    for name, change in (("", {"image_seq_length": 16}), ("pre", {"size": {"height": 112, "width": 112}})):
        path = folder / f"{name}processor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return str(folder)


CASES = {  # name: (model, peak, prompts, tokens, more flags)
    "update": ("qwen", "update", 1, 64, {"gradient_checkpointing": False}),
    "sampling": ("qwen", "sampling", 20, 512, {}),
    "several tiles": ("internvl", "update", 1, 64, {"gradient_checkpointing": True, "min_pixels": 112**2}),
    "lora": ("qwen", "update", 1, 200, {"gradient_checkpointing": False, "lora_rank": 32}),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """{case: planned memory over measured memory}, by one process, which forks another for each case.

    An allocator that gives back what is freed makes peak resident memory the sum of the tensors. Weights are mapped
    from their file: they are not yet in what the process holds before its first forward pass.
    """
    folder, cases = tmp_path_factory.mktemp("models"), {}
    load_rows("toy", "test", "main").select(range(50)).to_parquet(folder / "rows.parquet")
    models = {"qwen": write_model(folder / "qwen"), "internvl": write_internvl(folder / "internvl")}
    for name, (model, peak, prompts, tokens, more) in CASES.items():
        flags = {"model": models[model], "data": str(folder / "rows.parquet"), "output": str(folder / name)}
        flags |= {"prompts_per_step": prompts, "rollout_prompts": prompts, "max_response_tokens": tokens}
        if peak == "sampling":  # small images, so that the responses' cache counts; and a small update
            flags |= {"min_pixels": 4 * 28**2, "tokens_per_row": 600, "gradient_checkpointing": True}
        cases[name] = peak, flags | more
    code = f"ROOT, CASES = {str(ROOT)!r}, {cases!r}\n{MEASURE}"
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    environment = os.environ | alone | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("\n") == len(cases), done.stdout + done.stderr[-2000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_15_percent_of_what_is_measured(measured, case):
    assert measured[case] == pytest.approx(1, abs=0.15)


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        lora, small = {"dry_run": 1, "lora_rank": 32}, {"rollout_prompts": 2, "tokens_per_row": 4096}
        tables = [("3B", {"dry_run": 8}), ("7B", {"dry_run": 8}), ("32B", {"dry_run": 16}), ("7B", {"dry_run": 1})]
        tables += [("3B", lora | {"gpu_memory": 24, "rollout_prompts": 16}), ("3B", lora | {"gpu_memory": 48})]
        tables += [("7B", lora | {"gpu_memory": 24} | small), ("7B", lora | {"gpu_memory": 48, "rollout_prompts": 16})]
        for size, flags in [*tables, ("7B", lora)]:
            args = SharedArgs(model=write_config(size, Path(folder)), **flags)
            print(flags, dry_run(args).replace(args.model, f"Qwen2.5-VL-{size}"), end="\n\n")
