"""Whole runs of grpo.py on the toy: what is written, filtered, skipped and refused."""

import contextlib
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    QUICK,
    ROOT,
    assert_same_training,
    main_of,
    read_metrics,
    same,
    tiny_group,
    tiny_model,
    tiny_prompt,
    train,
    weights,
)
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import grpo
import trainer
from common import Reward, SharedPrefixCache, forward, group_advantages, load_processor, rollout
from plumbing import kernels
from plumbing.arguments import SharedArgs, UserError
from trainer import Trainer

FIELDS = {*trainer.LOGGED, "grad_norm", "seconds", "seconds_score", "seconds_update", "tokens_per_second"}
SMALL = ["--prompts_per_step", 2, "--weight_decay", 0.01]
SHORT = ["--max_response_tokens", 3]


def grpo_run(output, *flags):
    return train("grpo", output, *SMALL, *flags)


def give_rewards(monkeypatch, rewards):
    """Replaces the reward by `rewards(group)`; returns the list of the groups that get one."""
    groups = []

    def reward(self, sampled):
        for group in sampled:
            group.rewards = group.accuracy = group.format = torch.tensor(rewards(group))
        groups.extend(sampled)
        return sampled

    monkeypatch.setattr(Reward, "__call__", reward)
    return groups


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_a_run_writes_what_it_says(tmp_path, capsys):
    """Files and console: results on stdout, all else on stderr; no `<image>` in a sample, no bar of a library."""
    flags = ["--group_size", 4, "--steps", 3, "--eval_rows", 6, "--eval_every", 2, "--show_every", 1]
    main_of("grpo", tmp_path / "run", [*QUICK, *SMALL, *flags])
    lines, last = read_metrics(tmp_path / "run"), tmp_path / "run" / "last"
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line.keys() >= FIELDS and all(math.isfinite(line[name]) for name in FIELDS)
        assert line["approx_kl"] == 0 and line["clip_fraction"] == 0  # one update a step is on-policy
        assert 0 < line["entropy"] < math.log(448) and 1 < line["response_tokens"] <= 64
        assert line["seconds"] >= line["seconds_rollout"] + line["seconds_update"]
    evaluations = [line for line in lines if "eval_accuracy" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    for line in evaluations:
        p = line["eval_accuracy"]
        assert line["eval_rows"] == 6 and line["eval_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 6), abs=1e-6)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["group_size"] == 4
    out, err = capsys.readouterr()
    assert "accuracy" in out and "toy (test)" in out and f"{tmp_path / 'run'}/" in out and "the model in last/" in out
    assert "right answer" in err and "<image>" not in err and "threads: " in err
    assert "training on toy (train): 2002 prompts" in err and "evaluating on toy (test): 504 prompts" in err
    assert "Loading weights" not in err and "Generating" not in err
    assert last.resolve().name == "step-3" and load_processor(last).tokenizer.chat_template
    model, before = map(Qwen2_5_VLForConditionalGeneration.from_pretrained, (last, ROOT / "toy" / "model"))
    moved = {name: not torch.equal(p, q) for (name, p), q in zip(model.named_parameters(), before.parameters())}
    assert all(moved.values()), [name for name, changed in moved.items() if not changed]


def test_bfloat16_compute_with_float32_weights(tmp_path):
    """Every update computes with the weights that the one before has changed."""
    flags = ["--steps", 1, "--updates_per_step", 2, "--learning_rate", 1e-3]
    exact = grpo_run(tmp_path / "fp32", *flags)[0]
    rounded = grpo_run(tmp_path / "bf16", *flags, "--dtype", "bfloat16")[0]
    assert math.isfinite(rounded["loss"]) and rounded["grad_norm"] > 0
    assert exact["approx_kl"] > 1e-4 and rounded["approx_kl"] == pytest.approx(exact["approx_kl"], rel=0.5)
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16" / "last").values())


def test_freeze_vision_and_kl_against_itself(tmp_path):
    (line,) = grpo_run(tmp_path / "run", "--steps", 1, "--freeze_vision", "--kl_coef", 0.1)
    assert line["kl"] == pytest.approx(0, abs=1e-9)
    after, before = load_file(tmp_path / "run/last/model.safetensors"), load_file(ROOT / "toy/model/model.safetensors")
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("visual" in name), name


def test_several_updates_a_step_and_all_the_terms(tmp_path):
    flags = ["--updates_per_step", 2, "--kl_coef", 0.05, "--entropy_coef", 0.01, "--clip_high", 0.28]
    flags += ["--aggregation", "sequence", "--learning_rate", 1e-3, "--schedule", "cosine", "--warmup_steps", 1]
    lines = grpo_run(tmp_path / "run", "--steps", 2, "--gradient_checkpointing", *flags)
    assert lines[0]["approx_kl"] == 0 < lines[1]["approx_kl"] and lines[1]["kl"] > 0
    assert lines[0]["learning_rate"] == 5e-4 and 0 < lines[1]["learning_rate"] < 1e-3  # rising, then falling


def test_checkpointing_small_rows_and_a_configuration_of_accelerate_change_nothing(trained, monkeypatch):
    """The latter would divide the gradient by its number of steps."""
    plain, _ = trained("grpo", *SMALL, "--steps", 1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    other, _ = trained("grpo", *SMALL, "--steps", 1, "--gradient_checkpointing", "--tokens_per_row", 150)
    assert_same_training(plain, other)


def test_the_loss_reported_is_that_of_the_whole_step(monkeypatch, tmp_path):
    """On-policy the token mean of -ratio * A is -sum_i A_i len_i / N: computed here from the groups."""
    kept = []
    keep = Trainer.keep_groups
    monkeypatch.setattr(Trainer, "keep_groups", lambda t, groups, new: (kept.extend(new), keep(t, groups, new))[1])
    flags = ["--steps", 1, "--prompts_per_step", 6, "--temperature", 1.3]
    line = grpo_run(tmp_path / "run", *flags)[0]
    advantages = group_advantages(torch.stack([group.rewards for group in kept]))
    lengths = torch.stack([group.mask.sum(1) for group in kept])
    assert line["loss"] == pytest.approx(-(advantages * lengths).sum().item() / lengths.sum().item(), abs=2e-6)
    assert line["reward"] == pytest.approx(torch.stack([g.rewards for g in kept]).mean().item(), abs=1e-6)
    assert line["zero_advantage_groups"] == pytest.approx((advantages == 0).all(1).float().mean().item(), abs=1e-6)


def test_filter_replaces_groups_that_are_all_wrong(monkeypatch, tmp_path):
    seen = give_rewards(monkeypatch, lambda _: [len(seen) // 2 % 2 * x for x in (1.0, 0, 0, 1)])
    lines = grpo_run(tmp_path / "run", "--steps", 2, "--filter_groups", *SHORT)
    assert len(seen) == 8 and [line["filtered_groups"] for line in lines] == [0.5, 0.5]
    state = json.loads((tmp_path / "run/last/trainer_state.json").read_text())
    assert state["position"] == 8  # four draws of two prompts


def test_filter_gives_up_after_its_tries(monkeypatch, tmp_path, capsys):
    give_rewards(monkeypatch, lambda _: [1.0] * 4)
    before = load_file(ROOT / "toy/model/model.safetensors")
    lines = grpo_run(tmp_path / "run", "--steps", 1, "--filter_groups", "--filter_tries", 3, *SHORT)
    assert "0 prompts of mixed success in 3 draws" in capsys.readouterr().err
    assert all(lines[0][name] is None for name in ("loss", "entropy", "grad_norm", "learning_rate"))
    assert same(before, load_file(tmp_path / "run/last/model.safetensors"))


def test_equal_rewards_leave_the_gradient_at_zero(monkeypatch, tmp_path):
    give_rewards(monkeypatch, lambda _: [0.1] * 4)
    line = grpo_run(tmp_path / "run", "--steps", 1, *SHORT)[0]
    assert line["grad_norm"] == 0 and line["loss"] == 0 and line["zero_advantage_groups"] == 1


@pytest.mark.parametrize("updates", [1, 2])
def test_leaving_out_groups_of_equal_rewards_changes_nothing(monkeypatch, tmp_path, updates):
    """They have no gradient; the weights are bit-identical to those of a run that makes all passes."""
    flags = ["--steps", 1, "--prompts_per_step", 4, "--updates_per_step", updates, "--max_response_tokens", 8]
    passes = []
    give_rewards(monkeypatch, lambda group: [(group.prompt.prompt_id + 1) % 2 * x for x in (1.0, 0, 0, 1)])
    monkeypatch.setattr(grpo, "forward", lambda *x: (passes.append(1), forward(*x))[1])
    (line,) = grpo_run(tmp_path / "a", *flags)
    assert line["zero_advantage_groups"] == 0.5 and len(passes) == 2 * updates
    plain = Trainer.with_gradient
    monkeypatch.setattr(Trainer, "with_gradient", lambda trainer, rows: plain(trainer, rows, keep_zero_advantage=True))
    grpo_run(tmp_path / "b", *flags)
    assert len(passes) == (2 + 4) * updates
    assert same(weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last"))


@pytest.mark.parametrize("more, left", [({}, 1), ({"kl_coef": 0.1}, 2), ({"entropy_coef": 0.1}, 2)])
def test_terms_that_give_equal_rewards_a_gradient_keep_their_rows(more, left):
    rows = [tiny_group(tiny_prompt(tiny_model("qwen2_5_vl"), []), [n]) for n in (3, 5)]
    rows[0].zero_advantage = True
    kept = Trainer.with_gradient(SimpleNamespace(args=SharedArgs(**more), sampled=rows), rows)
    assert [row.lengths for row in kept] == [[5], [3]][:left]


def test_memory_of_the_first_update_is_checked_with_the_largest_row_and_changes_nothing(args, monkeypatch):
    rows = []

    def spy(model, row, *rest):
        assert all(p.grad is not None for p in model.parameters())  # as after earlier rows
        rows.append(row)
        return forward(model, row, *rest)

    monkeypatch.setattr(trainer, "forward", spy)
    made = Trainer(args)
    assert len(rows) == 1 and rows[0].mask.sum() == args.group_size * args.max_response_tokens
    assert len(rows[0].prompt.input_ids) == max(made.data.tokens[i] for i in made.data.indices)
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "toy" / "model")
    assert all(torch.equal(p, q) for p, q in zip(made.model.parameters(), before.parameters(), strict=True))
    assert len(made.optimizer.state) == len(made.parameters) and all(p.grad is None for p in made.model.parameters())
    assert not any(value.any() for state in made.optimizer.state.values() for value in state.values())
    args.tokens_per_row = 300
    args.output += "2"
    Trainer(args)
    assert len(rows[1].prompt.input_ids) + rows[1].mask.sum() <= 300


def test_memory_of_sampling_is_checked_with_a_full_cache(args, monkeypatch):
    """All prompts that are sampled together, the longest ones, and one token when every response has full length."""
    shapes, grow, sampled = [], SharedPrefixCache.grow, []

    def watch(cache, *size):
        grow(cache, *size)
        shapes.append(cache.suffix[-1][0].shape[:4])

    def spy(model, tokenizer, prompts, *rest, **more):
        sampled.append([len(prompt.input_ids) for prompt in prompts])
        return rollout(model, tokenizer, prompts, *rest, **more)

    monkeypatch.setattr(SharedPrefixCache, "grow", watch)
    monkeypatch.setattr(trainer, "rollout", spy)
    args.rollout_prompts, args.prompts_per_step, args.max_response_tokens = 3, 4, 200
    made = Trainer(args)
    assert sampled == [[made.data.longest_tokens] * 3] and made.model.training
    assert [(P, G, tokens) for P, _, G, tokens in shapes] == [(3, args.group_size, 200)]


def test_a_memory_check_that_fails_turns_checkpointing_on(args, monkeypatch, capsys):
    def full(model, *rest):
        if not model.model.language_model.layers[0].gradient_checkpointing:
            out_of_memory()
        return forward(model, *rest)

    monkeypatch.setattr(trainer, "forward", full)
    made = Trainer(args)
    assert made.args.gradient_checkpointing is True
    assert "gradient checkpointing: on, an update does not fit without it" in capsys.readouterr().err
    monkeypatch.setattr(trainer, "forward", out_of_memory)
    with pytest.raises(UserError, match="out of memory in the update phase: lower --tokens_per_row"):
        Trainer(args)


@pytest.mark.parametrize("compiled", [True, False])
def test_compile_false_compiles_nothing(args, monkeypatch, compiled):
    def broken(*_):
        raise ValueError("compiled")

    torch.compiler.set_stance("default")  # show.py sets another
    monkeypatch.setattr(kernels, "compiled", lambda function, device: torch.compile(function, backend=broken))
    args.compile, args.prompts_per_step = compiled, 4
    fails = pytest.raises(UserError, match="compiling failed .*--compile false")
    try:
        with fails if compiled else contextlib.nullcontext():
            Trainer(args)
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()


def test_minibatches_are_shares_of_the_steps_prompts():
    """Each prompt is in one of them, with all of its rows."""
    run = SimpleNamespace(args=SimpleNamespace(updates_per_step=2), bf16_weights=lambda **_: contextlib.nullcontext())
    rows = [SimpleNamespace(prompt=SimpleNamespace(prompt_id=i)) for i in (4, 7, 5, 4, 9)]
    shares = [[row.prompt.prompt_id for row in share] for share in Trainer.minibatches(run, rows)]
    assert shares == [[4, 5, 4], [7, 9]]


def test_evaluation_takes_the_memory_of_sampling_and_fails_like_it(args, monkeypatch):
    args.rollout_prompts, args.eval_rows, args.max_response_tokens = 3, 60, 40
    made, batches = Trainer(args), []
    made.begin = time.perf_counter()

    def spy(model, tokenizer, prompts, wide, step, part, temperature):
        batches.append(prompts)
        assert len(prompts) <= wide.rollout_prompts and temperature == args.eval_temperature
        memory = args.rollout_prompts * (made.data.longest_tokens + args.group_size * args.max_response_tokens)
        assert len(prompts) * (made.eval_data.longest_tokens + args.max_response_tokens) <= memory
        return rollout(model, tokenizer, prompts, wide, step, part, temperature)

    monkeypatch.setattr(trainer, "rollout", spy)
    made.evaluate()
    assert sum(map(len, batches)) == 60 and len({prompt.index for batch in batches for prompt in batch}) == 60
    assert args.rollout_prompts < len(batches[0]) < 60
    monkeypatch.setattr(trainer, "rollout", out_of_memory)
    with pytest.raises(UserError, match="out of memory in the rollout phase: lower --rollout_prompts"):
        made.evaluate()


def test_truncated_responses_may_be_left_out(monkeypatch, tmp_path):
    """Nothing is measured then, and what was not measured is null: an entropy of 0 would read as a collapse."""
    give_rewards(monkeypatch, lambda _: [1.0, 0, 0, 1])
    flags = [*SMALL, "--steps", 1, "--max_response_tokens", 1, "--temperature", 3]  # none ends after one token
    (line,) = train("pepo", tmp_path / "kept", *flags)
    assert line["truncated"] == 1 and line["response_tokens"] == 1 and line["grad_norm"] > 0
    (line,) = train("pepo", tmp_path / "left", *flags, "--drop_truncated")
    assert line["truncated"] == 1 and line["loss"] == 0 and line["grad_norm"] == 0
    assert all(line[name] is None for name in ("entropy", "clip_fraction", "approx_kl", "weight_p50"))


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(monkeypatch, tmp_path, capsys):
    policy_loss, calls = grpo.policy_loss, iter([True, True, False, False])

    def explodes(*rest):
        loss, info = policy_loss(*rest)
        return loss * (torch.inf if next(calls) else 1), info

    monkeypatch.setattr(grpo, "policy_loss", explodes)
    lines = grpo_run(tmp_path / "run", "--steps", 2, "--save_every", 1)
    assert [line["skipped_updates"] for line in lines] == [1, 0]
    assert "not finite" in capsys.readouterr().err
    folders = ROOT / "toy/model", tmp_path / "run/step-1", tmp_path / "run/step-2"
    before, first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert same(before, first) and not same(first, second)


def test_a_run_that_learns_nothing_any_more_ends(monkeypatch, tmp_path):
    """20 updates in a row without a finite gradient: one sentence, and no checkpoint of it. 19 are no reason to end."""
    good = iter([*[False] * 19, True, *[False] * 100])
    norm = lambda *_, **__: torch.tensor(1.0 if next(good) else torch.inf)  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    flags = ["--steps", 3, "--save_every", 1, "--prompts_per_step", 20, "--updates_per_step", 20, *SHORT]
    with pytest.raises(UserError, match="20 updates in a row had no finite gradient, the last in step 2: "):
        grpo_run(tmp_path / "run", *flags)
    assert (tmp_path / "run/last").resolve().name == "step-1"


def test_local_data_is_never_evaluated_on_what_it_trains_on(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"question": "What is {i}?", "answer": "{i}"}}\n' for i in range(30)))
    lines = grpo_run(tmp_path / "run", "--steps", 1, "--data", path, "--eval_rows", -1, *SHORT)
    assert [line["eval_rows"] for line in lines if "eval_rows" in line] == [3, 3]
    assert {line["eval_data"] for line in lines if "eval_rows" in line} == {"rows held out of mine.jsonl"}
    assert "training on mine.jsonl: 27 prompts" in capsys.readouterr().err


def test_seed_decides_everything(trained, tmp_path):
    flags = [*SMALL, "--steps", 1]
    one, _ = trained("grpo", *flags)
    train("grpo", tmp_path / "again", *flags)
    assert same(one, weights(tmp_path / "again" / "last"))
    assert not same(one, trained("grpo", *flags, "--seed", 2)[0])


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"model": "nobody/nothing", "data": "toy"}, "--model nobody/nothing cannot be opened"),
        ({"resume": True}, "there is no checkpoint"),
        ({"reward": "nowhere.py:f"}, "there is no file nowhere.py"),
        ({"report_to": "wandb"}, "--report_to wandb is none of those that are installed: .*all"),
        ({"eval_data": "/nowhere.parquet", "eval_rows": 5}, "data /nowhere.parquet cannot be opened"),
    ],
)
def test_mistakes_in_what_a_run_needs(args, no_waiting, more, sentence):
    for name, value in more.items():
        setattr(args, name, value)
    with pytest.raises(UserError, match=sentence) as error:
        Trainer(args)
    assert error.value.code == 2
    assert not list(Path(args.output).glob("*"))  # nothing is left behind


def test_an_output_that_is_a_file(args, tmp_path):
    (tmp_path / "file").write_text("mine")
    args.output = str(tmp_path / "file")
    with pytest.raises(UserError, match="--output .*file could not be written .*: check its permissions"):
        Trainer(args)
    assert (tmp_path / "file").read_text() == "mine"
