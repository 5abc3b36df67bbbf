"""Checkpoints: resumed to the bit, survived kill -9, and refused with a sentence."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time

import pytest
import torch
from helpers import QUICK, read_metrics, same, timeless, train, weights
from pair import free_port
from transformers import Qwen2_5_VLForConditionalGeneration

import grpo
from plumbing.arguments import UserError
from run import Run

SMALL = ["--prompts_per_step", 2, "--weight_decay", 0.01]


def grpo_run(output, *flags):
    return train("grpo", output, *SMALL, *flags)


def child(output, flags, environment):
    torch.set_num_threads(1)
    os.environ |= environment
    sys.argv = ["grpo.py", "--output", str(output), *map(str, [*QUICK, "--group_size", 4, *SMALL, *flags])]
    with open(output.with_suffix(".log"), "w") as sys.stderr:
        grpo.main()


FORKS = multiprocessing.get_context("forkserver")  # starts a process without importing torch anew
FORKS.set_forkserver_preload(["grpo"])


def start(output, *flags, **environment):
    """`python grpo.py` in a process that may be killed; its console goes to <output>.log."""
    process = FORKS.Process(target=child, args=(output, flags, environment))
    process.start()
    return process


def test_resume_is_bit_equal_and_changes_nothing_in_the_log(monkeypatch, tmp_path):
    whole = grpo_run(tmp_path / "a", "--steps", 4, "--save_every", 2, "--schedule", "linear")
    flags = ["--steps", 4, "--save_every", 2, "--schedule", "linear"]
    log, calls = Run.log, iter(range(100))

    def dies(run):  # in the third step, after its update
        log(run)
        if next(calls) == 2:
            raise RuntimeError("power cut")

    monkeypatch.setattr(Run, "log", dies)
    with pytest.raises(RuntimeError):
        grpo_run(tmp_path / "b", *flags)
    monkeypatch.setattr(Run, "log", log)
    (tmp_path / "b" / "metrics.jsonl").open("a").write('{"step": 3, "half a li')  # killed while writing
    resumed = grpo_run(tmp_path / "b", *flags, "--resume")
    assert same(weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last"))
    assert timeless(whole) == timeless(resumed)


def test_kill_9_at_any_moment(tmp_path):
    """A run killed again and again, wherever it is, ends with the weights of one that was left alone."""
    flags = ["--steps", 6, "--save_every", 1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    grpo_run(tmp_path / "a", *flags)
    torch.set_num_threads(threads)
    kills = 0
    for wait in (0.0, 0.4, 1.1):
        resume = ["--resume"] if (tmp_path / "b" / "last").exists() else []
        process = start(tmp_path / "b", *flags, *resume)
        there, deadline = len(list((tmp_path / "b").glob("step-*"))), time.time() + 120
        while process.is_alive() and time.time() < deadline:
            if len(list((tmp_path / "b").glob("step-*"))) > there:
                break
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if (tmp_path / "b" / "last").exists():
            Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "b" / "last")
    assert kills >= 2
    resume = ["--resume"] if (tmp_path / "b" / "last").exists() else []
    process = start(tmp_path / "b", *flags, *resume)
    process.join()
    assert process.exitcode == 0
    assert same(weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last"))
    assert [line["step"] for line in read_metrics(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]


def test_two_processes_killed_while_saving(tmp_path):
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    output, flags = tmp_path / "two", ["--steps", 50, "--save_every", 1]
    pair = [start(output, *flags, RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]
    deadline = time.time() + 120
    while not ((output / "last").exists() and list(output.glob("step-*.unfinished/model.safetensors"))):
        assert all(process.is_alive() for process in pair) and time.time() < deadline
        time.sleep(0.0005)
    for process in pair:
        process.kill()
        process.join()
    last = (output / "last").resolve()
    Qwen2_5_VLForConditionalGeneration.from_pretrained(last)
    assert json.loads((last / "trainer_state.json").read_text())["step"] == int(last.name[5:])


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path / "run", "--steps", 500)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.is_alive():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=60)
    errors = (tmp_path / "run.log").read_text()
    assert process.exitcode == 130 and "--resume" in errors and "Traceback" not in errors
    assert (tmp_path / "run" / "last" / "model.safetensors").exists()


def test_disk_full_while_saving_keeps_the_checkpoint_before(tmp_path):
    grpo_run(tmp_path / "run", "--steps", 1)
    before, limits = weights(tmp_path / "run" / "last"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10**6, limits[1])
    )  # no file may grow beyond 1 MB: the weights do not fit
    try:
        with pytest.raises(UserError, match="could not be written") as error:
            grpo_run(tmp_path / "run", "--steps", 2, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.code == 2
    assert (tmp_path / "run" / "last").resolve().name == "step-1" and same(before, weights(tmp_path / "run" / "last"))
    assert not list((tmp_path / "run").glob("step-2*"))


def test_a_folder_holds_one_run(tmp_path):
    grpo_run(tmp_path / "run", "--steps", 1)
    with pytest.raises(UserError, match="--resume goes on with it, --output starts another"):
        grpo_run(tmp_path / "run", "--steps", 1)
    with pytest.raises(UserError, match="holds a run with --model toy, not /some/where"):
        grpo_run(tmp_path / "run", "--model", "/some/where", "--updates_per_step", 1, "--resume")
    with pytest.raises(UserError, match="holds a run with --seed 0, not 4"):
        grpo_run(tmp_path / "run", "--seed", "4", "--resume")


def test_checkpoints_that_are_mixed_or_not_whole(tmp_path):
    grpo_run(tmp_path / "run", "--steps", 1, "--freeze_vision")
    with pytest.raises(UserError, match="optimiser state .* of other weights .*--freeze_vision"):
        grpo_run(tmp_path / "run", "--steps", 2, "--resume")
    for name, sentence in (("model", "cannot be opened"), ("optimizer", "is not a whole checkpoint")):
        os.truncate(tmp_path / f"run/last/{name}.safetensors", 50_000)
        with pytest.raises(UserError, match=f"{sentence} .*not fully covered"):
            grpo_run(tmp_path / "run", "--steps", 2, "--resume", "--freeze_vision")
    (tmp_path / "run/last/optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="is not a whole checkpoint .*optimizer.safetensors"):
        grpo_run(tmp_path / "run", "--steps", 2, "--resume", "--freeze_vision")
    (tmp_path / "run/last/trainer_state.json").write_text("{")
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        grpo_run(tmp_path / "run", "--steps", 2, "--resume", "--freeze_vision")
