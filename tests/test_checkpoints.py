"""Checkpoints: resumed bit-identically, after kill -9 too, and refused with a sentence."""

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import QUICK, ROOT, read_metrics, same, timeless, train, weights
from pair import free_port
from transformers import Qwen2_5_VLForConditionalGeneration

import grpo
from plumbing.arguments import UserError
from plumbing.checkpoints import remove_older, trained_with
from trainer import Trainer

SMALL = ["--prompts_per_step", 2, "--weight_decay", 0.01, "--max_response_tokens", 8]
LEARNS = ["--max_response_tokens", 40]  # most responses end, and rewards differ


def grpo_run(output, *flags):
    return train("grpo", output, *SMALL, *flags)


def child(output, flags, environment):
    torch.set_num_threads(1)
    os.environ |= environment
    sys.argv = ["grpo.py", "--output", str(output), *map(str, [*QUICK, "--group_size", 4, *SMALL, *flags])]
    os.dup2(os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), sys.stderr.fileno())
    threads = Path(f"/proc/{os.getppid()}/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, "a fork of several threads"
    grpo.main()


FORKS = multiprocessing.get_context("forkserver")  # starts a process without importing torch again
FORKS.set_forkserver_preload(["grpo"])
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # of numpy and of pyarrow


def start(output, *flags, **environment):
    """`python grpo.py` in a process that may be killed; its console goes to <output>.log.

    The first call starts the server that forks them, without the threads that libraries begin when they are imported:
    of a process with several threads a fork is half a process.
    """
    process = FORKS.Process(target=child, args=(output, flags, environment))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_THREAD.items():
            patch.setenv(name, value)
        process.start()
    return process


def go_back(output, step):
    """The next --resume continues from a step, as if the run had died after it."""
    (output / "last").unlink()
    (output / "last").symlink_to(f"step-{step}")


def test_resume_is_bit_identical_and_changes_nothing_in_the_log(monkeypatch, tmp_path):
    flags = [*LEARNS, "--steps", 4, "--save_every", 2, "--schedule", "linear"]
    whole = grpo_run(tmp_path / "a", *flags)
    log, calls = Trainer.log, iter(range(100))

    def dies(run):  # in the third step, after its update
        log(run)
        if next(calls) == 2:
            raise RuntimeError("power cut")

    monkeypatch.setattr(Trainer, "log", dies)
    with pytest.raises(RuntimeError):
        grpo_run(tmp_path / "b", *flags)
    monkeypatch.setattr(Trainer, "log", log)
    (tmp_path / "b" / "metrics.jsonl").open("a").write('{"step": 3, "half a li')  # killed while writing
    resumed = grpo_run(tmp_path / "b", *flags, "--resume")
    assert same(weights(tmp_path / "a" / "last"), weights(tmp_path / "b" / "last"))
    assert timeless(whole) == timeless(resumed)


def test_kill_9_at_any_moment(tmp_path):
    """A run killed again and again, wherever it is, ends with the weights of one that was left alone."""
    flags = [*LEARNS, "--steps", 6, "--save_every", 1]
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
    try:
        while not ((output / "last").exists() and list(output.glob("step-*.unfinished/model.safetensors"))):
            codes, said = [process.exitcode for process in pair], output.with_suffix(".log")
            assert codes == [None, None] and time.time() < deadline, (codes, said.exists() and said.read_text()[-3000:])
            time.sleep(0.0005)
    finally:
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


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_older_checkpoints_go(tmp_path, keep, left):
    for name in ("step-1", "step-2", "step-3", "step-4", "step-1.1", "step-2.unfinished"):
        (tmp_path / name).mkdir()
    remove_older(tmp_path / "step-4", keep)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*(f"step-{step}" for step in left), "step-1.1"}  # set aside, of an earlier run: not ours to remove


def test_older_checkpoints_go_when_the_new_one_is_whole(tmp_path, monkeypatch):
    output, rename, seen = tmp_path / "run", Path.rename, []

    def watched(path, name):
        if re.fullmatch(r"step-\d+", path.name):  # is removed: a newer one is whole, and found
            seen.append(json.loads((output / "last/trainer_state.json").read_text())["step"] > int(path.name[5:]))
        return rename(path, name)

    monkeypatch.setattr(Path, "rename", watched)
    grpo_run(output, "--steps", 4, "--save_every", 1)  # keeps two
    assert sorted(path.name for path in output.glob("step-*")) == ["step-3", "step-4"]
    assert seen == [True, True] and (output / "last").resolve().name == "step-4"


def test_what_is_later_than_the_resumed_step_is_set_aside(tmp_path, capsys):
    output = tmp_path / "run"
    grpo_run(output, "--steps", 2, "--save_every", 1)
    go_back(output, 1)
    grpo_run(output, "--steps", 3, "--save_every", 1, "--resume", "--keep", 1)
    assert "step-2 is later than the resumed step: set aside" in capsys.readouterr().err
    assert sorted(path.name for path in [*output.glob("step-*"), output / "last"]) == ["last", "step-2.1", "step-3"]


def test_a_first_update_that_was_skipped_leaves_a_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    clip_gradients = Trainer.clip_gradients

    def skips(trainer):
        next(iter(trainer.parameters.values())).grad.fill_(torch.nan)
        return clip_gradients(trainer)

    monkeypatch.setattr(Trainer, "clip_gradients", skips)
    assert grpo_run(tmp_path / "run", *LEARNS, "--steps", 1)[0]["skipped_updates"] == 1
    monkeypatch.setattr(Trainer, "clip_gradients", clip_gradients)
    assert grpo_run(tmp_path / "run", *LEARNS, "--steps", 2, "--resume")[1]["skipped_updates"] == 0


def test_disk_full_while_saving_keeps_the_checkpoint_before(tmp_path):
    grpo_run(tmp_path / "run", "--steps", 1)
    before, limits = weights(tmp_path / "run" / "last"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # of any file: the weights are larger than 1 MB
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
    with pytest.raises(UserError, match="--resume continues it, --output starts another"):
        grpo_run(tmp_path / "run", "--steps", 1)
    with pytest.raises(UserError, match="was begun otherwise .*model was toy, is /some/where"):
        grpo_run(tmp_path / "run", "--model", "/some/where", "--updates_per_step", 1, "--resume")


CHANGES = [["--seed", 4], ["--learning_rate", 1e-3], ["--temperature", 0.9], ["--instruction", "Hm."]]
CHANGES += [["--max_response_tokens", 30], ["--check_seconds", 2.0], ["--data", "/nowhere"], ["--schedule", "cosine"]]
CHANGES += [["--prompts_per_step", 4], ["--reward", "mine.py:f"], ["--answer_column", "x"], ["--group_size", 6]]
SAME = ["--rollout_prompts", 8, "--tokens_per_row", 500, "--gradient_checkpointing", "--show_every", 1]
SAME += ["--eval_every", 1, "--save_every", 1, "--eval_temperature", 0]


def test_a_resumed_run_trains_what_it_was_begun_with(tmp_path, capsys):
    """What would change the result is refused, by name; what changes none is not; evidence and checkpoint stay."""
    output = tmp_path / "run"
    grpo_run(output, "--steps", 1)
    before, arguments = weights(output / "last"), (output / "args.json").read_text()
    for flags in CHANGES:
        with pytest.raises(UserError, match=rf"was begun otherwise .{flags[0][2:]} was .*, is {flags[1]}[;)]"):
            grpo_run(output, "--steps", 2, *flags, "--resume")
    sentence = r"was begun otherwise .script was grpo, is vepo; entropy_coef was 0.0, is 0.001"
    with pytest.raises(UserError, match=sentence):
        train("vepo", output, *SMALL, "--steps", 2, "--resume")
    assert arguments == (output / "args.json").read_text() and same(before, weights(output / "last"))
    lines = grpo_run(output, "--steps", 2, *SAME, "--resume")
    assert [line["step"] for line in lines] == [1, 2] and not any("changed" in line for line in lines)


def test_a_run_does_not_write_among_its_rows(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n' * 4)
    for flag in ("--data", "--eval_data"):
        with pytest.raises(UserError, match="data/runs/x lies in .*data, all of which is data: name another one"):
            grpo_run(tmp_path / "data/runs/x", flag, tmp_path / "data", "--steps", 1)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["rows.jsonl"]
    assert len(grpo_run(tmp_path / "x", "--data", tmp_path / "data", "--steps", 1)) == 1


@pytest.mark.parametrize("script, flags", [("grpo", ["--schedule", "linear"]), ("pepo", [])])
def test_the_number_of_steps_is_a_part_of_a_schedule(tmp_path, script, flags):
    """The learning rate falls over the whole run, PEPO's lambda rises over it."""
    train(script, tmp_path / "run", *SMALL, "--steps", 1, *flags)
    with pytest.raises(UserError, match=r"was begun otherwise .steps was 1, is 2\)"):
        train(script, tmp_path / "run", *SMALL, "--steps", 2, *flags, "--resume")
    if script == "pepo":
        train(script, tmp_path / "constant", *SMALL, "--steps", 1, "--weight_schedule", "constant")
        train(script, tmp_path / "constant", *SMALL, "--steps", 2, "--weight_schedule", "constant", "--resume")


def test_a_model_behind_a_link_that_has_moved(tmp_path):
    """The reference of the KL term is what the run was begun with."""
    for name in ("step-1", "step-2"):
        shutil.copytree(ROOT / "toy/model", tmp_path / "k" / name)
    (tmp_path / "k/last").symlink_to("step-1")
    flags = ["--model", tmp_path / "k/last", "--data", "toy", "--kl_coef", 0.1, "--updates_per_step", 1]
    grpo_run(tmp_path / "run", *flags, "--steps", 1)
    (tmp_path / "k/last").unlink()
    (tmp_path / "k/last").symlink_to("step-2")
    with pytest.raises(UserError, match="was begun otherwise .model was .*step-1, is .*step-2"):
        grpo_run(tmp_path / "run", *flags, "--steps", 2, "--resume")
    flags[1] = tmp_path / "k/step-1"
    assert len(grpo_run(tmp_path / "run", *flags, "--steps", 2, "--resume")) == 2


def test_changed_on_purpose_is_written_down(tmp_path):
    grpo_run(tmp_path / "run", "--steps", 1)
    flags = ["--steps", 2, "--learning_rate", 1e-3, "--resume", "--allow_changed"]
    for _ in range(2):  # the second time after a death before step 2 was saved
        lines = train("vepo", tmp_path / "run", *SMALL, *flags)
        go_back(tmp_path / "run", 1)
    said = {"script": ["grpo", "vepo"], "learning_rate": [1e-4, 1e-3], "entropy_coef": [0.0, 1e-3]}
    assert [line for line in lines if "changed" in line] == [{"step": 1, "changed": said}]
    assert [line["step"] for line in lines] == [1, 1, 2] and lines[2]["learning_rate"] == 1e-3
    assert (tmp_path / "run" / "step-2.1").is_dir()  # the first step 2 is not overwritten


def test_other_rows_behind_the_same_name_are_noticed(tmp_path):
    path = tmp_path / "mine.jsonl"
    flags = ["--data", path, "--eval_rows", -1]

    def write(rows, answer):
        path.write_text("".join(f'{{"question": "{i}?", "answer": "{answer}"}}\n' for i in range(rows)))

    write(40, 1)
    grpo_run(tmp_path / "run", "--steps", 1, *flags)
    for rows, answer, prompts in ((60, 1, 54), (40, 2, 36)):
        write(rows, answer)
        with pytest.raises(UserError, match=rf"begun otherwise .prompts was 36 \(\w{{8}}\), is {prompts} \("):
            grpo_run(tmp_path / "run", "--steps", 2, *flags, "--resume")


def test_links_that_were_not_copied(tmp_path, capsys):
    output = tmp_path / "run"
    grpo_run(output, "--steps", 2, "--save_every", 1)
    (output / "last").unlink()  # rsync without -l
    with pytest.raises(UserError, match="holds a run: --resume continues"):
        grpo_run(output, "--steps", 3)
    grpo_run(output, "--steps", 3, "--resume")
    assert "resuming after step 2, from " in capsys.readouterr().err and (output / "last").resolve().name == "step-3"
    (output / "last").unlink()
    shutil.copytree(output / "step-3", output / "last")  # cp -rL
    with pytest.raises(UserError, match="holds a run: --resume continues"):
        grpo_run(output, "--steps", 4)
    grpo_run(output, "--steps", 4, "--resume")
    assert (output / "last").resolve().name == "step-4"
    assert same(weights(output / "last.1"), weights(output / "step-3"))  # set aside: nothing is lost


def test_two_runs_in_one_folder_at_a_time(tmp_path):
    process = start(tmp_path / "run", "--steps", 500)
    while not (tmp_path / "run" / "args.json").exists() and process.is_alive():
        time.sleep(0.05)
    with pytest.raises(UserError, match="another run writes to .*: wait for its end, or name another --output"):
        grpo_run(tmp_path / "run", "--steps", 1)
    process.kill()
    process.join()
    grpo_run(tmp_path / "run", "--steps", 1)  # the lock ended with its process
    assert (tmp_path / "run" / "metrics.1.jsonl").exists()  # and what the first one had logged is kept


def test_a_checkpoint_of_another_trainer_or_without_its_keys(tmp_path):
    state = tmp_path / "trainer_state.json"
    for text in ("{", "{}"):
        state.write_text(text)
        with pytest.raises(UserError, match="is not a whole checkpoint of this project"):
            trained_with(tmp_path)
    state.write_text('{"global_step": 3}')
    assert trained_with(tmp_path) == trained_with("toy") == {}


@pytest.mark.parametrize("error, advice", [(errno.ENOSPC, "free space"), (errno.EACCES, "check its permissions")])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, error, advice):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text("mine")

    def refuse(path, text):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match=f"--output .*run could not be written .*{os.strerror(error)}.*: {advice}"):
        grpo_run(tmp_path / "run", "--steps", 1)
    assert (tmp_path / "run" / "args.json").read_text() == "mine"


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    log = Trainer.log

    def ruin(run):
        log(run)
        if run.step == 2:
            next(iter(run.parameters.values())).data[0] = torch.nan

    monkeypatch.setattr(Trainer, "log", ruin)
    with pytest.raises(UserError, match="after step 2 the weights are not finite, and are not saved"):
        grpo_run(tmp_path / "run", "--steps", 3, "--save_every", 1)
    assert (tmp_path / "run" / "last").resolve().name == "step-1" and not list((tmp_path / "run").glob("step-2*"))


def test_optimizers_that_are_mixed_or_not_whole(tmp_path):
    output = tmp_path / "run"
    grpo_run(output, "--steps", 2, "--save_every", 1, "--freeze_vision")
    with pytest.raises(UserError, match="optimizer are not all of this checkpoint: point .*--freeze_vision"):
        grpo_run(output, "--steps", 3, "--resume", "--allow_changed")
    shutil.rmtree(output / "step-2/optimizer")
    shutil.copytree(output / "step-1/optimizer", output / "step-2/optimizer")
    with pytest.raises(UserError, match="optimizer are not all of this checkpoint: point .*/last to"):
        grpo_run(output, "--steps", 3, "--resume", "--freeze_vision")
    shutil.rmtree(output / "step-2/optimizer")
    with pytest.raises(UserError, match="is not a whole checkpoint: its optimizer/ holds 0 files of 1; point .*/last"):
        grpo_run(output, "--steps", 3, "--resume", "--freeze_vision")
