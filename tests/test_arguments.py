"""The command line: what it refuses, what --help shows, what a flag defaults to."""

import dataclasses
import importlib
import math
import re
import subprocess
import sys

import pytest
from helpers import ROOT

import eval
import grpo
from plumbing.arguments import SharedArgs, UserError, flag, model_source, parse_args


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--group_size 1", "--group_size 1 must be at least 2"),
        ("--updates_per_step 3", "cannot be split into --updates_per_step 3"),
        ("--updates_per_step 0", "--updates_per_step 0 must be above 0"),
        ("--lora_alpha 8", "--lora_alpha 8 is for adapters: give --lora_rank too"),
        ("--dtype float8", "invalid choice: 'float8'"),
        ("--steps many", "invalid int value"),
        ("--top_p 1.5", "--top_p 1.5 must be above 0 and at most 1"),
        ("--temperature 1e-7", "--temperature 1e-07 must be at least 1e-06 and at most 100"),
        ("--learning_rate inf", "--learning_rate inf must be above 0 and at most 1"),
        ("--max_grad_norm nan", "--max_grad_norm nan must be above 0"),
        ("--clip_high -1", "--clip_high -1.0 must be at least 0 and at most 1,000,000"),
        ("--beta2 1", "--beta2 1.0 must be at least 0 and below 1"),
        ("--eval_rows -2", "--eval_rows -2 must be at least -1"),
        ("--nonsense", "unrecognized arguments: --nonsense; --help lists"),
    ],
)
def test_mistakes_in_the_arguments(capsys, flags, sentence):
    with pytest.raises(SystemExit) as error:
        parse_args(grpo.Args, flags.split())
    assert error.value.code == 2 and re.search(sentence, capsys.readouterr().err)


def test_a_link_to_a_model_is_followed(tmp_path):
    """`last` of a run that goes on is another model: the one that was meant stays."""
    (tmp_path / "step-1").mkdir()
    (tmp_path / "last").symlink_to("step-1")
    real = (tmp_path / "step-1").resolve()
    assert SharedArgs(model=str(tmp_path / "last")).model == str(real)
    assert SharedArgs(model=str(real)).model == str(real) and SharedArgs(model="toy").model == "toy"
    assert SharedArgs(model="Qwen/Qwen2.5-VL-7B-Instruct").model == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_the_console_shows_one_sentence_and_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "grpo.py"), "--group_size", "1", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (2, "error: --group_size 1 must be at least 2.\n")


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(grpo.Args, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "--group_size " in text and "GROUP_SIZE" not in text and "--group-size" not in text  # by one name alone
    assert "--dtype {auto,float32,bfloat16}" in text
    for f in SharedArgs.__dataclass_fields__:
        assert f"--{f}" in text
    for group in ("model", "data", "rollout", "reward", "loss", "update", "run"):
        assert f"\n{group}:" in text


def test_defaults_for_a_real_model(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--model", "Qwen/Qwen2.5-VL-7B-Instruct"])
    args = parse_args(grpo.Args)
    assert args.data == "hiyouga/geometry3k" and args.eval_data is None and args.output == "runs/grpo"
    assert (args.prompts_per_step, args.group_size, args.updates_per_step) == (512, 8, 4)
    assert (args.learning_rate, args.max_prompt_tokens, args.max_response_tokens) == (1e-6, 2048, 2048)
    assert (args.min_pixels, args.max_pixels, args.gradient_checkpointing) == (262_144, 1_000_000, None)


def test_a_method_may_change_a_shared_default_and_add_a_flag(monkeypatch):
    @dataclasses.dataclass
    class Method(SharedArgs):
        """A method."""

        entropy_coef: float = flag(0.25, "its own default")
        alpha: float = flag(0.7, "its own flag")

    monkeypatch.setattr(sys, "argv", ["x.py", "--alpha", "0.1", "--group_size", "12"])
    args = parse_args(Method)
    assert (args.entropy_coef, args.alpha, args.group_size, args.output) == (0.25, 0.1, 12, "runs/x")


def test_every_argument_has_help_and_every_number_its_limits():
    for name in ("grpo", "vepo", "vgpo", "prpo", "pepo", "saei", "vppo", "eval"):
        for f in dataclasses.fields(importlib.import_module(name).Args):
            assert f.metadata["argparse"]["help"], f.name
            number = any(kind in str(f.type) for kind in ("int", "float")) and "Literal" not in str(f.type)
            assert f.metadata["limits"] or not number or f.name in ("seed", "group_size"), f"{name} --{f.name}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_that_is_not_finite(value):
    for f in dataclasses.fields(SharedArgs):
        if "float" in str(f.type) and "Literal" not in str(f.type):
            with pytest.raises(UserError, match=f"--{f.name} "):
                SharedArgs(**{f.name: value})


def test_both_embedded_models_have_the_toys_defaults():
    """And each its own data; eval.py asks each what it was made for."""
    plain, faint = vars(SharedArgs()), vars(SharedArgs(model="toy-faint"))
    differ = {name for name in plain if plain[name] != faint[name]}
    assert differ == {"model", "data"} and faint["data"] == "toy-faint"
    assert (eval.Args().benchmarks, eval.Args(model="toy-faint").benchmarks) == ("toy", "toy-faint")
    assert eval.Args(model="toy-faint").max_response_tokens == 64
    assert model_source(SharedArgs(model="toy-faint")).endswith("toy/faint/model")


def test_a_folder_called_like_a_world_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy-faint").mkdir()
    (tmp_path / "toy-faint" / "trainer_state.json").write_text("broken")
    assert eval.Args(model="toy-faint").trained == {}
