"""LoRA: adapters that are 0 change nothing, nothing else is trained, PEFT and transformers open what is saved."""

import json
import shutil

import peft
import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, SHAPES, same, tiny_group, tiny_model, tiny_prompt, train, weights
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from common import forward, load_model, load_processor, policy_loss, trained_model
from plumbing.adapters import adapters_of, add_adapters, merged, resolve_model, save_adapters, without_adapters
from plumbing.arguments import SharedArgs, UserError
from plumbing.checkpoints import trained_with
from plumbing.data import Data

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "internvl3_5"]
TOY = ROOT / "toy" / "model"
LORA = ["--lora_rank", 8]


def adapted(family="qwen2_5_vl", rank=4, alpha=8, zero=False):
    """(the model without, the same model with adapters, which do something unless `zero`)."""
    base, model = tiny_model(family), tiny_model(family)
    add_adapters(model, SharedArgs(lora_rank=rank, lora_alpha=alpha))
    if not zero:
        generator = torch.Generator().manual_seed(1)
        for name, p in adapters_of(model).items():
            if "lora_B" in name:
                p.data = torch.randn(p.shape, generator=generator) / 20
    return base, model


def row_of(model, shape="one image"):
    return tiny_group(tiny_prompt(model, SHAPES[shape]), [5, 1, 7])


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing_and_are_all_that_is_trained(family):
    base, model = adapted(family, zero=True)
    row = row_of(base)
    for ours, theirs in zip(forward(model, row), forward(base, row)):
        assert torch.equal(ours, theirs)
    logps, entropy, _ = forward(model, row)
    loss, _ = policy_loss(logps, logps.detach(), torch.tensor([1.0, -1.0, 0.5]), row.mask)
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert trained == {name for name in trained if "language_model.layers" in name and ".lora_" in name}
    # 3 layers; q and o 32 x 32, k and v 32 x 16, gate, up and down 32 x 48: rank times the sum of both sides
    assert sum(p.numel() for p in adapters_of(model).values()) == 3 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert any(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)  # those of A begin at 0


@pytest.mark.parametrize("how", [{"lora_rank": 4, "lora_alpha": 4}, {"freeze_vision": True}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_has_no_backward_pass(args, image_file, how, checkpointing):
    """transformers' checkpointing asks for gradients of every input, and with them for those of the whole tower."""
    for name, value in {**how, "gradient_checkpointing": checkpointing}.items():
        setattr(args, name, value)
    model, seen = trained_model(args, Accelerator(cpu=True)), []
    visual = model.model.visual
    visual.register_forward_hook(lambda _, inputs, out: seen.append(out.pooler_output.requires_grad))
    prompt = Data(str(image_file), "train", args, load_processor(TOY), model).prompt(0)
    logps, _, _ = forward(model, tiny_group(prompt, [5, 1, 7]))
    logps.sum().backward()
    assert seen == [False]
    assert all(p.grad is None for p in visual.parameters())
    assert all(p.grad is not None for p in model.model.language_model.layers.parameters() if p.requires_grad)


def test_a_configuration_next_to_adapters_that_is_not_their_bases(tmp_path, monkeypatch):
    """The base's own holds for its weights, and not the folder's; the base is named by where it is, not by a link."""
    shutil.copytree(TOY, tmp_path / "step-1" / "model")
    (tmp_path / "last").symlink_to("step-1")
    monkeypatch.chdir(tmp_path)
    model = add_adapters(load_model("last/model"), SharedArgs(model="last/model", lora_rank=2))
    monkeypatch.chdir("/")
    save_adapters(model, tmp_path / "run", merge=False)
    assert resolve_model(tmp_path / "run")[1] == str(tmp_path / "step-1" / "model")
    changed = json.loads((TOY / "config.json").read_text())
    changed["text_config"] |= {"rms_norm_eps": 0.5}
    (tmp_path / "run" / "config.json").write_text(json.dumps(changed))
    row = tiny_group(tiny_prompt(tiny_model("qwen2_5_vl"), []), [5, 3])
    assert torch.equal(forward(load_model(tmp_path / "run"), row)[0], forward(model, row)[0])


def test_a_is_drawn_by_seed_and_b_is_zero():
    one, two, other = (
        adapters_of(add_adapters(tiny_model("qwen2_5_vl"), SharedArgs(lora_rank=2, seed=s))) for s in (0, 0, 1)
    )
    assert same(one, two) and not same(one, other)
    assert not any(p.any() for name, p in one.items() if "lora_B" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_w_plus_alpha_by_rank_b_a_as_peft_says_too(tmp_path, family):
    """Against weights merged by hand, and against PEFT's own layers on PEFT's own reading of what was saved."""
    base, model = adapted(family)
    row = row_of(base)
    ours, _, _ = forward(model, row)
    assert (ours - forward(base, row)[0]).abs().max() > 0.01
    by_hand, tensors = tiny_model(family), adapters_of(model)
    for name, p in by_hand.named_parameters():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in tensors:
            p.data += 8 / 4 * tensors[f"{key}B.weight"].detach() @ tensors[f"{key}A.weight"].detach()
    assert torch.allclose(ours, forward(by_hand, row)[0], atol=2e-5)
    for name, value in merged(model).items():
        assert torch.allclose(value, dict(by_hand.named_parameters())[name], atol=1e-6)
    save_adapters(model, tmp_path, merge=False)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").base_model.model
    assert torch.allclose(ours, forward(theirs, row)[0], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_adapter_switched_off(family):
    base, model = adapted(family)
    before, reference = forward(model, row_of(base)), without_adapters(model)
    for ours, theirs in zip(forward(reference, row_of(base)), forward(base, row_of(base))):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(before, forward(model, row_of(base))))  # which stays switched on
    assert not adapters_of(reference) and not reference.training and model.training
    held = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in held for p in reference.parameters())  # no memory of its own


def test_rounded_to_bf16_most_of_what_is_learned_would_be_lost():
    """Why weights are not merged for sampling: an update of a thousandth of the weights changes few of them."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(512, 512, generator=generator) / 50).bfloat16()
    a, b = torch.randn(8, 512, generator=generator), torch.randn(512, 8, generator=generator)
    update = b @ a
    update *= 0.001 * weight.float().norm() / update.norm()
    added = (weight.float() + update).bfloat16()
    assert (added == weight).float().mean() > 0.75


def test_training_leaves_the_base_as_it_is_and_the_toy_learns(tmp_path):
    """Not one bit of a base weight moves, and the accuracy gains 10 points."""
    flags = ["--prompts_per_step", 16, "--updates_per_step", 4, "--steps", 8, "--eval_rows", 100, "--eval_every", 0]
    lines = train("grpo", tmp_path / "run", *LORA, *flags, "--learning_rate", 3e-3)
    accuracy = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    assert accuracy[1] > accuracy[0] + 0.1
    model = load_model(tmp_path / "run" / "last" / "adapter")
    held, whole = (m.state_dict() for m in (without_adapters(model), load_model(tmp_path / "run" / "last")))
    assert same(held, load_model(TOY).state_dict())
    changed = [name for name in whole if not torch.equal(whole[name], held[name])]
    assert len(changed) == 4 * 7 and all("_proj" in name and "language_model" in name for name in changed)


def test_a_resumed_run_is_bit_identical_and_its_files_open_everywhere(tmp_path):
    flags = [*LORA, "--prompts_per_step", 2, "--save_every", 1, "--schedule", "linear", "--keep", 0, "--steps", 3]
    train("grpo", tmp_path / "a", *flags)
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    (tmp_path / "b" / "last").unlink()
    (tmp_path / "b" / "last").symlink_to("step-1")
    train("grpo", tmp_path / "b", *flags, "--resume")
    assert same(weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last"))
    files = {path.name for path in (tmp_path / "a" / "step-2").iterdir()}
    assert {"adapter", "optimizer", "config.json", "trainer_state.json"} < files and "model.safetensors" not in files
    last = tmp_path / "a" / "last"
    Qwen2_5_VLForConditionalGeneration.from_pretrained(last)
    row = tiny_group(tiny_prompt(load_model(last), SHAPES["no image"]), [5, 3])
    shutil.copytree(last / "adapter", tmp_path / "bare")
    merged_logps, adapted_logps, bare = (
        forward(load_model(name), row)[0] for name in (last, last / "adapter", tmp_path / "bare")
    )
    assert torch.allclose(merged_logps, adapted_logps, atol=2e-5) and not torch.equal(merged_logps, adapted_logps)
    assert torch.equal(bare, adapted_logps) and load_processor(tmp_path / "bare").tokenizer("1 + 1").input_ids
    for name in ("last", "step-2", "step-2/adapter"):
        assert trained_with(str(tmp_path / "a" / name))["lora_rank"] == 8


@pytest.mark.parametrize(
    "script, dtype",
    [
        *((script, "float32") for script in ("grpo", "vepo", "vgpo", "prpo", "pepo", "saei", "vppo")),
        ("grpo", "bfloat16"),
    ],
)
def test_every_script_trains_them_without_a_line_of_its_own(tmp_path, script, dtype):
    """Old log-probs, reference and entropy bonus too; the merged model is the base and what was added, in fp32."""
    more = ["--updates_per_step", 2, "--kl_coef", 0.1, "--entropy_coef", 0.01, "--steps", 1, "--dtype", dtype]
    (line,) = train(script, tmp_path / "run", *LORA, *more)
    assert line["grad_norm"] > 0 and line["kl"] > 0 and line["learning_rate"] == 1e-3
    whole, before = load_file(tmp_path / "run/last/model.safetensors"), load_file(TOY / "model.safetensors")
    assert whole.keys() == before.keys() and {value.dtype for value in whole.values()} == {torch.float32}
    changed = [name for name in whole if not torch.equal(whole[name], before[name].to(getattr(torch, dtype)).float())]
    assert len(changed) == 4 * 7 and all("_proj" in name for name in changed)


def test_what_cannot_be_done_with_adapters(tmp_path):
    train("grpo", tmp_path / "run", *LORA, "--steps", 1)
    step = tmp_path / "run" / "step-1" / "adapter"
    for flags in ([], ["--dry_run", 1]):
        with pytest.raises(UserError, match="holds adapters: take a whole model"):
            train("grpo", tmp_path / "other", "--model", step, "--data", "toy", *flags)
    for wanted in ([], ["--allow_changed"]):
        with pytest.raises(UserError, match="lora_rank was 8, is 0"):
            train("grpo", tmp_path / "run", "--steps", 2, "--resume", "--learning_rate", 1e-3, *wanted)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"use_dora": True}, r"more than plain LoRA \(use_dora\)"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, r"\(bias\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_rslora": True}, "use_rslora"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"base_model_name_or_path": "/gone/away"}, "--model /gone/away cannot be opened"),
        ({"target_modules": ["q_proj", "lm_head"]}, "are in the head too"),
    ],
)
def test_adapters_that_would_be_another_model_are_refused(tmp_path, change, sentence):
    """What PEFT would compute and the formula does not say is never left out in silence."""
    add_adapters(model := load_model(TOY), SharedArgs(lora_rank=2))
    save_adapters(model, tmp_path, merge=False)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=sentence):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(next(iter(tensors))),
        lambda tensors: tensors.update(other=torch.zeros(1)),
        lambda tensors: tensors.update({k: v[..., :1].contiguous() for k, v in tensors.items()}),
    ],
)
def test_adapters_of_another_model(tmp_path, change):
    _, model = adapted()
    save_adapters(model, tmp_path, merge=False)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match="or not those of its adapter_config.json or of this run"):
        add_adapters(tiny_model("qwen2_5_vl"), SharedArgs(lora_rank=4, lora_alpha=8), tmp_path)
