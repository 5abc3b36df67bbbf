"""Whole runs of grpo.py on the toy: what is written, resumed, refused and survived."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import accelerate
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import common
import grpo
from common import Args, Run, UserError

SHORT = ["--prompts_per_step", "2", "--group_size", "4", "--eval_rows", "0", "--show_every", "0"]
FIELDS = ["step", "reward", "accuracy", "format", "response_tokens", "truncated", "entropy", "loss", "grad_norm"]
FIELDS += ["clip_fraction", "approx_kl", "zero_advantage_groups", "seconds", "seconds_rollout", "seconds_score"]
FIELDS += ["seconds_update", "tokens_per_second"]


@pytest.fixture(autouse=True)
def handlers():
    """A run takes SIGINT and SIGTERM; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(monkeypatch, output, *flags):
    """`python grpo.py` in this process; returns its metrics."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--output", str(output), *SHORT, *map(str, flags)])
    grpo.main()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def command(output, *flags):
    return [sys.executable, str(ROOT / "grpo.py"), "--output", str(output), *SHORT, *map(str, flags)]


def shell(*argv, **more):
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, **more)


def weights(folder):
    return load_file(folder / "model.safetensors") | {
        f"optimizer.{name}": value for name, value in load_file(folder / "optimizer.safetensors").items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_writes_what_it_says(monkeypatch, tmp_path, capsys):
    lines = train(monkeypatch, tmp_path / "run", "--steps", 3, "--eval_rows", 6, "--eval_every", 2, "--show_every", 1)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert not set(FIELDS) - set(line) and all(math.isfinite(line[name]) for name in FIELDS)
        assert line["approx_kl"] == 0 and line["clip_fraction"] == 0  # one update a step is on-policy
        assert 0 < line["entropy"] < math.log(448) and 1 < line["response_tokens"] <= 64
        assert line["seconds"] >= line["seconds_rollout"] + line["seconds_update"]
    evaluations = [line for line in lines if "eval_accuracy" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    for line in evaluations:
        p = line["eval_accuracy"]
        assert line["eval_rows"] == 6 and line["eval_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 6), abs=1e-6)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["group_size"] == 4
    console = capsys.readouterr().err
    assert "right answer" in console and "accuracy" in console and f"{tmp_path / 'run'}/" in console
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "run" / "last")
    assert (tmp_path / "run" / "last").resolve().name == "step-3"
    assert common.load_processor(tmp_path / "run" / "last").tokenizer.chat_template
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "toy" / "model")
    moved = {name: not torch.equal(p, q) for (name, p), q in zip(model.named_parameters(), before.parameters())}
    assert all(moved.values()), [name for name, changed in moved.items() if not changed]


def test_bfloat16_compute_with_float32_weights(monkeypatch, tmp_path):
    accelerate.state.AcceleratorState._reset_state(True)  # one process has one compute type; this one had another
    line = train(monkeypatch, tmp_path / "run", "--steps", 1, "--dtype", "bfloat16")[0]
    assert math.isfinite(line["loss"]) and line["grad_norm"] > 0
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run" / "last").values())
    accelerate.state.AcceleratorState._reset_state(True)


def test_every_update_in_bfloat16_sees_the_weights_of_the_one_before(monkeypatch, tmp_path):
    flags = ["--steps", 1, "--updates_per_step", 2, "--learning_rate", 1e-3]
    exact = train(monkeypatch, tmp_path / "fp32", *flags)[0]["approx_kl"]
    accelerate.state.AcceleratorState._reset_state(True)
    moved = train(monkeypatch, tmp_path / "bf16", *flags, "--dtype", "bfloat16")[0]["approx_kl"]
    accelerate.state.AcceleratorState._reset_state(True)
    assert exact > 1e-4 and moved == pytest.approx(exact, rel=0.5)


def test_freeze_vision(monkeypatch, tmp_path):
    train(monkeypatch, tmp_path / "run", "--steps", 1, "--freeze_vision")
    after, before = load_file(tmp_path / "run/last/model.safetensors"), load_file(ROOT / "toy/model/model.safetensors")
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("visual" in name), name


def test_several_updates_a_step_and_all_the_terms(monkeypatch, tmp_path):
    flags = ["--updates_per_step", 2, "--kl_coef", 0.05, "--entropy_coef", 0.01, "--clip_high", 0.28]
    flags += ["--aggregation", "sequence", "--learning_rate", 1e-3, "--schedule", "cosine", "--warmup_steps", 1]
    lines = train(monkeypatch, tmp_path / "run", "--steps", 2, "--gradient_checkpointing", *flags)
    assert (
        lines[0]["approx_kl"] == 0 < lines[1]["approx_kl"] and lines[1]["kl"] > 0 and lines[0]["seconds_score"] > 0.01
    )
    assert lines[0]["learning_rate"] == 5e-4 and 0 < lines[1]["learning_rate"] < 1e-3  # rising, then falling


def test_gradient_checkpointing_and_small_rows_give_the_same_weights(monkeypatch, tmp_path):
    train(monkeypatch, tmp_path / "a", "--steps", 2)
    train(monkeypatch, tmp_path / "b", "--steps", 2, "--gradient_checkpointing", "--tokens_per_row", 150)
    a, b = (load_file(tmp_path / run / "last/model.safetensors") for run in "ab")
    assert all(torch.allclose(a[name], b[name], atol=2e-5) for name in a)


def test_kl_against_itself_is_zero_at_first(monkeypatch, tmp_path):
    assert train(monkeypatch, tmp_path / "run", "--steps", 1, "--kl_coef", 0.1)[0]["kl"] == pytest.approx(0, abs=1e-9)


def test_the_loss_reported_is_that_of_the_whole_step(monkeypatch, tmp_path):
    """On-policy the token mean of -ratio * A is -sum_i A_i len_i / N: computed here from the groups."""
    kept = []
    keep = Run.keep
    monkeypatch.setattr(Run, "keep", lambda run, groups: (kept.extend(groups), keep(run, groups))[1])
    flags = ["--steps", 1, "--prompts_per_step", 6, "--temperature", 1.3]
    line = train(monkeypatch, tmp_path / "run", *flags)[0]
    advantages = common.group_advantages(torch.stack([group.rewards for group in kept]))
    lengths = torch.stack([group.mask.sum(1) for group in kept])
    assert line["loss"] == pytest.approx(-(advantages * lengths).sum().item() / lengths.sum().item(), abs=2e-6)
    assert line["reward"] == pytest.approx(torch.stack([g.rewards for g in kept]).mean().item(), abs=1e-6)
    assert line["zero_advantage_groups"] == pytest.approx((advantages == 0).all(1).float().mean().item(), abs=1e-6)


def test_filter_replaces_groups_of_one_mind(monkeypatch, tmp_path, capsys):
    counts = iter(range(100))
    seen = []

    def reward(self, groups):  # every other draw is hopeless
        hopeless = next(counts) % 2 == 0
        for group in groups:
            group.accuracy = torch.zeros(4) if hopeless else torch.tensor([1.0, 0, 0, 1])
            group.rewards = group.format = group.accuracy
        seen.append(hopeless)

    monkeypatch.setattr(common.Reward, "__call__", reward)
    lines = train(monkeypatch, tmp_path / "run", "--steps", 2, "--filter_groups")
    assert seen == [True, False, True, False] and [line["filtered_groups"] for line in lines] == [0.5, 0.5]
    state = json.loads((tmp_path / "run/last/trainer_state.json").read_text())
    assert state["position"] == 8  # four draws of two prompts


def test_filter_gives_up_after_its_tries(monkeypatch, tmp_path, capsys):
    def reward(self, groups):
        for group in groups:
            group.rewards = group.accuracy = group.format = torch.ones(4)

    monkeypatch.setattr(common.Reward, "__call__", reward)
    before = load_file(ROOT / "toy/model/model.safetensors")
    lines = train(monkeypatch, tmp_path / "run", "--steps", 1, "--filter_groups", "--filter_tries", 3)
    assert "0 prompts of mixed success in 3 draws" in capsys.readouterr().err
    assert lines[0]["loss"] == 0 and same(before, load_file(tmp_path / "run/last/model.safetensors"))


def test_equal_rewards_leave_the_gradient_at_zero(monkeypatch, tmp_path):
    def reward(self, groups):
        for group in groups:
            group.rewards = group.accuracy = group.format = torch.full((4,), 0.1)

    monkeypatch.setattr(common.Reward, "__call__", reward)
    line = train(monkeypatch, tmp_path / "run", "--steps", 1)[0]
    assert line["grad_norm"] == 0 and line["loss"] == 0 and line["zero_advantage_groups"] == 1


def test_leaving_out_a_backward_pass_of_zeros_changes_nothing(monkeypatch, tmp_path):
    """Groups of equal rewards are skipped in the backward pass; the weights are those of the full pass, to the bit."""
    flags = ["--steps", 3, "--prompts_per_step", 4, "--seed", 3]
    lines = train(monkeypatch, tmp_path / "a", *flags)
    assert 0 < sum(line["zero_advantage_groups"] for line in lines) < 3  # there are some, and there are others

    def everything(run, loss, info, row, mask):
        run.accelerator.backward(loss)

    monkeypatch.setattr(Run, "backward", everything)
    train(monkeypatch, tmp_path / "b", *flags)
    assert same(weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last"))


def test_the_first_update_is_rehearsed_on_the_largest_row_and_forgotten(args, monkeypatch):
    rows = []
    forward = common.forward
    monkeypatch.setattr(common, "forward", lambda model, row, *rest: (rows.append(row), forward(model, row, *rest))[1])
    run = Run(args)
    assert len(rows) == 1 and rows[0].mask.sum() == args.group_size * args.max_response_tokens
    assert len(rows[0].prompt.input_ids) == max(run.data.prompt_tokens(i) for i in run.data.indices)
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(ROOT / "toy" / "model")
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before.parameters(), strict=True))
    assert not run.optimizer.state and all(p.grad is None for p in run.model.parameters())
    args.tokens_per_row = 300
    args.output += "2"
    Run(args)
    assert len(rows[1].prompt.input_ids) + rows[1].mask.sum() <= 300


@pytest.mark.parametrize("phase, flag", [("rollout", "--rollout_prompts"), ("update", "--tokens_per_row")])
def test_out_of_memory_names_the_flags_to_turn(args, phase, flag):
    run = Run(args)
    with pytest.raises(UserError, match=f"out of memory in the {phase} phase: lower {flag}"), run.phase(phase):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_evaluation_takes_the_memory_of_sampling_and_fails_like_it(args, monkeypatch):
    args.rollout_prompts, args.eval_rows, args.max_response_tokens = 3, 60, 40
    run, batches = Run(args), []
    run.begin = time.perf_counter()

    def rollout(model, tokenizer, prompts, wide, step, part, temperature):
        batches.append(prompts)
        assert len(prompts) <= wide.rollout_prompts and temperature == args.eval_temperature
        memory = args.rollout_prompts * (run.data.width + args.group_size * args.max_response_tokens)
        assert len(prompts) * (run.eval_data.width + args.max_response_tokens) <= memory
        return common_rollout(model, tokenizer, prompts, wide, step, part, temperature)

    common_rollout = common.rollout
    monkeypatch.setattr(common, "rollout", rollout)
    run.evaluate()
    assert sum(map(len, batches)) == 60 and len({prompt.index for batch in batches for prompt in batch}) == 60
    assert args.rollout_prompts < len(batches[0]) < 60
    monkeypatch.setattr(common, "rollout", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("too much")))
    with pytest.raises(UserError, match="out of memory in the rollout phase: lower --rollout_prompts"):
        run.evaluate()


def test_truncated_responses_may_be_left_out(monkeypatch, tmp_path):
    def reward(self, groups):
        for group in groups:
            group.rewards = group.accuracy = group.format = torch.tensor([1.0, 0, 0, 1])

    monkeypatch.setattr(common.Reward, "__call__", reward)
    flags = ["--steps", 1, "--max_response_tokens", 5, "--temperature", 3]  # nobody ends in five tokens
    line = train(monkeypatch, tmp_path / "a", *flags)[0]
    assert line["truncated"] == 1 and line["response_tokens"] == 5 and line["grad_norm"] > 0
    line = train(monkeypatch, tmp_path / "b", *flags, "--drop_truncated")[0]
    assert line["loss"] == 0 and line["grad_norm"] == 0


def test_one_token_responses(monkeypatch, tmp_path):
    line = train(monkeypatch, tmp_path / "run", "--steps", 1, "--max_response_tokens", 1)[0]
    assert line["response_tokens"] == 1 and math.isfinite(line["loss"])


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(monkeypatch, tmp_path, capsys):
    backward, calls = Run.backward, iter([True, True, False, False])
    monkeypatch.setattr(
        Run, "backward", lambda run, loss, *r: backward(run, loss * (torch.inf if next(calls) else 1), *r)
    )
    lines = train(monkeypatch, tmp_path / "run", "--steps", 2, "--save_every", 1)
    assert [line["skipped_updates"] for line in lines] == [1, 0]
    assert "not finite" in capsys.readouterr().err
    folders = ROOT / "toy/model", tmp_path / "run/step-1", tmp_path / "run/step-2"
    before, first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert same(before, first) and not same(first, second)


def test_seed_decides_everything(monkeypatch, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train(monkeypatch, tmp_path / name, "--steps", 2, "--seed", seed)
    a, b, c = (weights(tmp_path / name / "last") for name in "abc")
    assert same(a, b) and not same(a, c)


def test_resume_is_bit_equal_and_changes_nothing_in_the_log(monkeypatch, tmp_path):
    whole = train(monkeypatch, tmp_path / "a", "--steps", 4, "--save_every", 2, "--schedule", "linear")
    flags = ["--steps", 4, "--save_every", 2, "--schedule", "linear"]
    log, calls = Run.log, iter(range(100))

    def dies(run):  # in the third step, after its update
        log(run)
        if next(calls) == 2:
            raise RuntimeError("power cut")

    monkeypatch.setattr(Run, "log", dies)
    with pytest.raises(RuntimeError):
        train(monkeypatch, tmp_path / "b", *flags)
    monkeypatch.setattr(Run, "log", log)
    (tmp_path / "b" / "metrics.jsonl").open("a").write('{"step": 3, "half a li')  # killed while writing
    resumed = train(monkeypatch, tmp_path / "b", *flags, "--resume")
    assert same(weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last"))
    timeless = [{k: v for k, v in line.items() if "second" not in k} for line in whole]
    assert timeless == [{k: v for k, v in line.items() if "second" not in k} for line in resumed]


def test_kill_9_at_any_moment(tmp_path):
    """A run killed again and again, wherever it is, ends with the weights of one that was left alone."""
    flags = ["--steps", 6, "--save_every", 1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert shell(*command(tmp_path / "a", *flags), env=environment).returncode == 0
    kills = 0
    for wait in (0.0, 0.4, 1.1):
        resume = ["--resume"] if (tmp_path / "b" / "last").exists() else []
        process = subprocess.Popen(command(tmp_path / "b", *flags, *resume), env=environment, stderr=subprocess.DEVNULL)
        there, deadline = len(list((tmp_path / "b").glob("step-*"))), time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if len(list((tmp_path / "b").glob("step-*"))) > there:
                break
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        if (tmp_path / "b" / "last").exists():
            Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "b" / "last")
    assert kills >= 2
    resume = ["--resume"] if (tmp_path / "b" / "last").exists() else []
    assert shell(*command(tmp_path / "b", *flags, *resume), env=environment).returncode == 0
    assert same(weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last"))
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(command(tmp_path / "run", "--steps", 500), stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    assert (tmp_path / "run" / "last" / "model.safetensors").exists()


def test_disk_full_while_saving_keeps_the_checkpoint_before(tmp_path):
    assert shell(*command(tmp_path / "run", "--steps", 1)).returncode == 0
    before = weights(tmp_path / "run" / "last")

    def full():  # no file of this process may grow beyond 1 MB: the weights do not fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    done = shell(*command(tmp_path / "run", "--steps", 2, "--resume"), preexec_fn=full)
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "last").resolve().name == "step-1" and same(before, weights(tmp_path / "run" / "last"))
    assert not list((tmp_path / "run").glob("step-2*"))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--group_size", "1"], "--group_size 1 leaves no group"),
        (["--updates_per_step", "3"], "cannot be split into --updates_per_step 3"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--steps", "many"], "invalid int value"),
        (["--learning_rate", "0"], "--learning_rate 0.0 must be above 0"),
        (["--top_p", "1.5"], "--top_p 1.5 must be between 0 and 1"),
        (["--eval_temperature", "-1"], "--eval_temperature -1.0 must be between 0 and 100"),
        (["--rollout_prompts", "0"], "--rollout_prompts 0 must be above 0"),
        (["--updates_per_step", "0"], "--updates_per_step 0 must be above 0"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_in_the_arguments(monkeypatch, capsys, flags, sentence):
    import re

    monkeypatch.setattr(sys, "argv", ["grpo.py", *SHORT, *flags])
    with pytest.raises(SystemExit) as error:
        common.parse_args(grpo.Args)
    assert error.value.code == 2 and re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"model": "nobody/nothing", "data": "toy"}, "--model nobody/nothing cannot be opened"),
        ({"model": "/nowhere", "data": "toy"}, "--model /nowhere cannot be opened"),
        ({"resume": True}, "there is no checkpoint"),
        ({"cuda_graphs": True}, "--cuda_graphs is for one process on a GPU"),
        ({"reward": "nowhere.py:f"}, "cannot be imported"),
        ({"report_to": "clouds"}, "--report_to clouds is not installed"),
        ({"eval_data": "/nowhere.parquet", "eval_rows": 5}, "--eval_data /nowhere.parquet cannot be opened"),
    ],
)
def test_mistakes_in_what_a_run_needs(args, more, sentence):
    for name, value in more.items():
        setattr(args, name, value)
    with pytest.raises(UserError, match=sentence) as error:
        Run(args)
    assert error.value.code == 2
    assert not list(common.Path(args.output).glob("*"))  # nothing is left behind


def test_a_batch_that_cannot_be_split_over_the_processes(args, monkeypatch):
    monkeypatch.setattr(common.Accelerator, "num_processes", 3)
    with pytest.raises(
        UserError, match="--prompts_per_step 2 cannot be split over 3 processes: make it a multiple of 3"
    ):
        Run(args)


def test_an_output_that_is_a_file(args, tmp_path):
    (tmp_path / "file").write_text("mine")
    args.output = str(tmp_path / "file")
    with pytest.raises(UserError, match="--output .*file cannot be made"):
        Run(args)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_holds_one_run(monkeypatch, tmp_path):
    train(monkeypatch, tmp_path / "run", "--steps", 1)
    with pytest.raises(UserError, match="--resume goes on with it, --output starts another"):
        train(monkeypatch, tmp_path / "run", "--steps", 1)
    with pytest.raises(UserError, match="holds a run with --model toy, not /some/where"):
        train(monkeypatch, tmp_path / "run", "--model", "/some/where", "--updates_per_step", 1, "--resume")
    with pytest.raises(UserError, match="holds a run with --seed 0, not 4"):
        train(monkeypatch, tmp_path / "run", "--seed", "4", "--resume")


def test_checkpoints_that_are_mixed_or_not_whole(monkeypatch, tmp_path):
    train(monkeypatch, tmp_path / "run", "--steps", 1, "--freeze_vision")
    with pytest.raises(UserError, match="optimiser state .* of other weights .*--freeze_vision"):
        train(monkeypatch, tmp_path / "run", "--steps", 2, "--resume")
    for name, sentence in (("model", "cannot be opened"), ("optimizer", "is not a whole checkpoint")):
        os.truncate(tmp_path / f"run/last/{name}.safetensors", 50_000)
        with pytest.raises(UserError, match=f"{sentence} .*not fully covered"):
            train(monkeypatch, tmp_path / "run", "--steps", 2, "--resume", "--freeze_vision")
    (tmp_path / "run/last/optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="is not a whole checkpoint .*optimizer.safetensors"):
        train(monkeypatch, tmp_path / "run", "--steps", 2, "--resume", "--freeze_vision")
    (tmp_path / "run/last/trainer_state.json").write_text("{")
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        train(monkeypatch, tmp_path / "run", "--steps", 2, "--resume", "--freeze_vision")


def test_the_console_shows_one_sentence_and_exit_code_2(tmp_path):
    done = shell(sys.executable, str(ROOT / "grpo.py"), "--group_size", "1", "--output", str(tmp_path / "run"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --group_size 1")


def test_help():
    done = shell(sys.executable, str(ROOT / "grpo.py"), "--help")
    assert done.returncode == 0
    for f in Args.__dataclass_fields__:
        assert f"--{f}" in done.stdout
    for group in ("model", "data", "rollout", "reward", "loss", "update", "run"):
        assert f"\n{group}:" in done.stdout


def test_defaults_for_a_real_model(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--model", "Qwen/Qwen2.5-VL-7B-Instruct"])
    args = common.parse_args(grpo.Args)
    assert args.data == args.eval_data == "hiyouga/geometry3k" and args.output == "runs/grpo"
    assert (args.prompts_per_step, args.group_size, args.updates_per_step) == (512, 8, 4)
    assert (args.learning_rate, args.max_prompt_tokens, args.max_response_tokens) == (1e-6, 2048, 2048)
    assert (args.min_pixels, args.max_pixels, args.gradient_checkpointing) == (262_144, 1_000_000, True)


def test_a_method_may_change_a_shared_default_and_add_a_flag(monkeypatch):
    from dataclasses import dataclass

    @dataclass
    class Method(Args):
        """A method."""

        entropy_coef: float = common.flag(0.25, "its own default")
        alpha: float = common.flag(0.7, "its own flag")

    monkeypatch.setattr(sys, "argv", ["x.py", "--alpha", "0.1", "--group_size", "12"])
    args = common.parse_args(Method)
    assert (args.entropy_coef, args.alpha, args.group_size, args.output) == (0.25, 0.1, 12, "runs/x")
