"""Checkpoints: resumed bit-identically, after kill -9 too, and refused with a sentence."""

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import QUICK, read_metrics, same, timeless, train, weights
from pair import free_port
from transformers import Qwen2_5_VLForConditionalGeneration

import grpo
import pepo
from plumbing.arguments import SharedArgs, UserError
from plumbing.checkpoints import State, changes, trained_with
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


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    output = tmp_path_factory.mktemp("two_steps") / "run"
    grpo_run(output, "--steps", 2, "--save_every", 1)
    return output


@pytest.fixture
def begun(two_steps, tmp_path):
    """The folder of a run of two steps, with a checkpoint of each."""
    return shutil.copytree(two_steps, tmp_path / "run", symlinks=True)


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
    output, flags = tmp_path / "b", [*LEARNS, "--steps", 4, "--save_every", 1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    grpo_run(tmp_path / "a", *flags)
    torch.set_num_threads(threads)

    def started():
        return start(output, *flags, *(["--resume"] if (output / "last").exists() else []))

    for wait in (0.0, 0.3):
        there, process, deadline = len(list(output.glob("step-*"))), started(), time.time() + 120
        while len(list(output.glob("step-*"))) <= there and process.is_alive() and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if (output / "last").exists():
            Qwen2_5_VLForConditionalGeneration.from_pretrained(output / "last")
    process = started()
    process.join()
    assert process.exitcode == 0
    assert same(weights(tmp_path / "a" / "last"), weights(output / "last"))
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3, 4]


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


def test_ctrl_c_saves_and_one_run_writes_to_a_folder_at_a_time(tmp_path):
    output = tmp_path / "run"
    process = start(output, "--steps", 500)
    while not (output / "args.json").exists() and process.is_alive():
        time.sleep(0.05)
    with pytest.raises(UserError, match="another run writes to .*: wait for its end, or name another --output"):
        grpo_run(output, "--steps", 1)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=60)
    errors = output.with_suffix(".log").read_text()
    assert process.exitcode == 130 and "--resume" in errors and "Traceback" not in errors
    done = len(read_metrics(output))
    assert len(grpo_run(output, "--steps", done + 1, "--resume")) == done + 1  # the lock ended with its process


@pytest.mark.parametrize("keep, left", [(0, "1234"), (1, "4"), (3, "234")])
def test_older_checkpoints_go_when_the_new_one_is_whole(tmp_path, monkeypatch, keep, left):
    output, rename, seen = tmp_path / "run", Path.rename, []
    for name in ("step-1.1", "step-7.unfinished"):  # of an earlier run: set aside, not ours to remove; and half a one
        (output / name).mkdir(parents=True)

    def watched(path, name):
        if path.suffix == "" and "step-" in path.name:  # is removed: a newer one is whole, and found
            seen.append(json.loads((output / "last/trainer_state.json").read_text())["step"] > int(path.name[5:]))
        return rename(path, name)

    monkeypatch.setattr(Path, "rename", watched)
    grpo_run(output, "--steps", 4, "--save_every", 1, "--keep", keep)
    assert {path.name for path in output.glob("step-*")} == {"step-1.1", *(f"step-{step}" for step in left)}
    assert seen == [True] * (4 - len(left)) and (output / "last").resolve().name == "step-4"


def test_a_first_update_that_was_skipped_leaves_a_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    clip_gradients = Trainer.clip_gradients

    def skips(trainer):
        next(iter(trainer.parameters.values())).grad.fill_(torch.nan)
        return clip_gradients(trainer)

    monkeypatch.setattr(Trainer, "clip_gradients", skips)
    assert grpo_run(tmp_path / "run", *LEARNS, "--steps", 1)[0]["skipped_updates"] == 1
    monkeypatch.setattr(Trainer, "clip_gradients", clip_gradients)
    assert grpo_run(tmp_path / "run", *LEARNS, "--steps", 2, "--resume")[1]["skipped_updates"] == 0


def test_disk_full_while_saving_keeps_the_checkpoint_before(begun):
    before, limits = weights(begun / "last"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # of any file: the weights are larger than 1 MB
    try:
        with pytest.raises(UserError, match="could not be written .*: free space on the disk") as error:
            grpo_run(begun, "--steps", 3, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.code == 2
    assert (begun / "last").resolve().name == "step-2" and same(before, weights(begun / "last"))
    assert not list(begun.glob("step-3*"))


def test_a_folder_holds_one_run(tmp_path, begun):
    with pytest.raises(UserError, match="--resume continues it, --output starts another"):
        grpo_run(begun, "--steps", 3)
    output = tmp_path / "died"
    output.mkdir()
    (output / "metrics.jsonl").write_text("before its first checkpoint")
    with pytest.raises(UserError, match="--resume: there is no checkpoint in .*; start without it"):
        grpo_run(output, "--steps", 1, "--resume")
    assert len(grpo_run(output, "--steps", 1)) == 1
    assert (output / "metrics.1.jsonl").read_text() == "before its first checkpoint"


CHANGES = [["--seed", 4], ["--learning_rate", 1e-3], ["--temperature", 0.9], ["--instruction", "Hm."]]
CHANGES += [["--max_response_tokens", 30], ["--check_seconds", 2.0], ["--data", "/nowhere"], ["--schedule", "cosine"]]
CHANGES += [["--prompts_per_step", 4], ["--reward", "mine.py:f"], ["--answer_column", "x"], ["--group_size", 6]]
CHANGES += [["--model", "/some/where"]]
SAME = ["--rollout_prompts", 8, "--tokens_per_row", 500, "--gradient_checkpointing", "--show_every", 1]
SAME += ["--eval_every", 1, "--save_every", 1, "--eval_temperature", 0]


def test_a_resumed_run_trains_what_it_was_begun_with(begun):
    """What would change the result is refused, by name; what changes none is not; evidence and checkpoint stay."""
    before, arguments = weights(begun / "last"), (begun / "args.json").read_text()
    for flags in CHANGES:
        with pytest.raises(UserError, match=rf"was begun otherwise .*{flags[0][2:]} was .*, is {flags[1]}[;)]"):
            grpo_run(begun, "--steps", 3, "--updates_per_step", 1, *flags, "--resume")
    sentence = r"was begun otherwise .script was grpo, is vepo; entropy_coef was 0.0, is 0.001"
    with pytest.raises(UserError, match=sentence):
        train("vepo", begun, *SMALL, "--steps", 3, "--resume")
    assert arguments == (begun / "args.json").read_text() and same(before, weights(begun / "last"))
    lines = grpo_run(begun, "--steps", 3, *SAME, "--resume")
    assert [line["step"] for line in lines] == [1, 2, 3] and not any("changed" in line for line in lines)


def test_a_run_does_not_write_among_its_rows(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n' * 4)
    for flag in ("--data", "--eval_data"):
        with pytest.raises(UserError, match="data/runs/x lies in .*data, all of which is data: name another one"):
            grpo_run(tmp_path / "data/runs/x", flag, tmp_path / "data", "--steps", 1)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "cls, flags, part",
    [
        (SharedArgs, {"schedule": "linear"}, True),
        (SharedArgs, {}, False),
        (pepo.Args, {}, True),  # whose lambda rises over the whole run
        (pepo.Args, {"weight_schedule": "constant"}, False),
    ],
)
def test_the_number_of_steps_is_a_part_of_a_schedule(cls, flags, part):
    then, now = (cls(steps=steps, **flags) for steps in (1, 2))
    state = State(1, 1, 1, "contents", 1, {}, Path(sys.argv[0]).stem, dataclasses.asdict(then))
    with pytest.raises(UserError, match=r"was begun otherwise .steps was 1, is 2\)") if part else nullcontext():
        assert changes(now, state, "contents") == {}


def test_changed_on_purpose_is_written_down_and_what_is_later_set_aside(begun, capsys):
    flags = ["--steps", 2, "--learning_rate", 1e-3, "--resume", "--allow_changed"]
    for _ in range(2):  # the second time after a death before step 2 was saved
        (begun / "last").unlink()
        (begun / "last").symlink_to("step-1")
        lines = train("vepo", begun, *SMALL, *flags)
    said = {"script": ["grpo", "vepo"], "learning_rate": [1e-4, 1e-3], "entropy_coef": [0.0, 1e-3]}
    assert [line for line in lines if "changed" in line] == [{"step": 1, "changed": said}]
    assert [line["step"] for line in lines] == [1, 1, 2] and lines[2]["learning_rate"] == 1e-3
    assert "step-2 is later than the resumed step: set aside" in capsys.readouterr().err
    assert {path.name for path in begun.glob("step-*")} == {"step-1", "step-2", "step-2.1", "step-2.2"}


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


def test_links_that_were_not_copied(begun, capsys):
    (begun / "last").unlink()  # rsync without -l
    with pytest.raises(UserError, match="holds a run: --resume continues"):
        grpo_run(begun, "--steps", 3)
    grpo_run(begun, "--steps", 3, "--resume")
    assert "resuming after step 2, from " in capsys.readouterr().err and (begun / "last").resolve().name == "step-3"
    (begun / "last").unlink()
    shutil.copytree(begun / "step-3", begun / "last")  # cp -rL
    with pytest.raises(UserError, match="holds a run: --resume continues"):
        grpo_run(begun, "--steps", 4)
    grpo_run(begun, "--steps", 4, "--resume")
    assert (begun / "last").resolve().name == "step-4"
    assert same(weights(begun / "last.1"), weights(begun / "step-3"))  # set aside: nothing is lost


def test_a_checkpoint_of_another_trainer(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    assert trained_with(tmp_path) == trained_with("toy") == {}


def test_weights_that_are_not_finite_are_not_saved(begun, monkeypatch):
    log = Trainer.log

    def ruin(run):
        log(run)
        next(iter(run.parameters.values())).data[0] = torch.nan

    monkeypatch.setattr(Trainer, "log", ruin)
    with pytest.raises(UserError, match="after step 3 the weights are not finite, and are not saved"):
        grpo_run(begun, "--steps", 3, "--resume")
    assert (begun / "last").resolve().name == "step-2" and not list(begun.glob("step-3*"))


def test_optimizers_that_are_mixed_or_not_whole(tmp_path):
    output, sentence = tmp_path / "run", "optimizer are not all of this checkpoint: point .*/last to .*--freeze_vision"
    grpo_run(output, "--steps", 2, "--save_every", 1, "--freeze_vision")
    with pytest.raises(UserError, match=sentence):
        grpo_run(output, "--steps", 3, "--resume", "--allow_changed")  # without --freeze_vision
    state = output / "step-2/trainer_state.json"
    whole = state.read_text()
    state.write_text(whole.replace('"processes": 1', '"processes": 2'))  # as where one of several parts is missing
    with pytest.raises(UserError, match=sentence):
        grpo_run(output, "--steps", 3, "--resume", "--freeze_vision")
    state.write_text(whole)
    for change in (lambda part: shutil.copytree(output / "step-1/optimizer", part), lambda part: None):
        shutil.rmtree(output / "step-2/optimizer")
        change(output / "step-2/optimizer")
        with pytest.raises(UserError, match=sentence):
            grpo_run(output, "--steps", 3, "--resume", "--freeze_vision")
