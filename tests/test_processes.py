"""Two gloo processes under torchrun against one: equal rollouts, losses and weights; resume across their number."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

FLAGS = ["--prompts_per_step", "4", "--group_size", "4", "--show_every", "0", "--steps", "3", "--learning_rate", "1e-4"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def run(processes, output, *flags, script=ROOT / "grpo.py"):
    launcher = TORCHRUN if processes == 2 else []
    command = [sys.executable, *launcher, str(script), "--output", str(output), *FLAGS, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    return done


def finished(processes, output, *flags, script=ROOT / "grpo.py"):
    done = run(processes, output, *flags, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    tensors = {**load_file(output / "last/model.safetensors"), **load_file(output / "last/optimizer.safetensors")}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def assert_equal(one, two):
    (tensors, lines), (others, other_lines) = one, two
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert torch.allclose(value, others[name], atol=1e-5), name
    for a, b in zip(lines, other_lines, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.fixture
def patched(tmp_path):
    """grpo.py with some of common.py replaced by the given lines."""

    def write(lines):
        script = tmp_path / "patched.py"
        script.write_text(f"import common, grpo, os, torch\n{lines}\ngrpo.main()\n")
        return script

    return write


EVERYTHING = ["--updates_per_step", 2, "--kl_coef", 0.05, "--entropy_coef", 0.01, "--gradient_checkpointing"]
EVERYTHING += ["--tokens_per_row", 130, "--temperature", 1.3, "--aggregation", "sequence", "--max_grad_norm", 0.1]


@pytest.mark.parametrize("flags", [["--eval_rows", 7, "--eval_every", 2], [*EVERYTHING, "--eval_rows", 0]])
def test_two_processes_equal_one(tmp_path, flags):
    """With text-only rows beside pictures, responses of different lengths, groups cut into several rows."""
    assert_equal(finished(1, tmp_path / "one", *flags), finished(2, tmp_path / "two", *flags))


SAEI = ["--n1", 2, "--n2", 2, "--step", 0.2, "--measure_every", 2]
METHOD_FLAGS = ["--eval_rows", 0, "--steps", 2, "--tokens_per_row", 130, "--temperature", 1.3]


@pytest.mark.parametrize(
    "method, updates", [("vepo", 1), ("vepo", 2), ("vgpo", 1), ("prpo", 2), ("pepo", 1), ("saei", 1)]
)
def test_each_method_on_two_processes(tmp_path, method, updates):
    flags, script = [*METHOD_FLAGS, "--updates_per_step", updates], ROOT / f"{method}.py"
    if method == "saei":  # with 2 prompts a step the first process begins with a text-only prompt alone
        flags += [*SAEI, "--old_logps_image", "attacked", "--prompts_per_step", 2]
    assert_equal(
        finished(1, tmp_path / "one", *flags, script=script), finished(2, tmp_path / "two", *flags, script=script)
    )


def test_sampling_from_sharded_weights(tmp_path):
    """Token by token together, over text-only rows and uneven lengths: the same rollouts again."""
    flags = ["--eval_rows", 7, "--steps", 1]
    one = finished(1, tmp_path / "one", *flags)
    assert_equal(one, finished(2, tmp_path / "two", *flags, "--reshard_while_sampling"))


def test_the_comparison_can_fail(tmp_path, patched):
    """The negative twin: each process divides its loss by its own tokens only, as many trainers do."""
    local = """
def denominator(self, rows):
    return 2 * sum(common.loss_denominator(row.loss_mask) for row in rows)
common.Run.denominator = denominator
"""
    flags = ["--eval_rows", 0, "--max_response_tokens", 33, "--temperature", 1.5]
    one = finished(1, tmp_path / "one", *flags)
    with pytest.raises(AssertionError):
        assert_equal(one, finished(2, tmp_path / "two", *flags, script=patched(local)))


def test_a_process_whose_groups_are_all_filtered_out(tmp_path, patched):
    script = patched("""
def reward(self, groups):
    for group in groups:
        mixed = torch.tensor([1.0, 0.0, 0.0, 1.0])
        group.rewards = group.accuracy = group.format = mixed * (group.prompt.place % 2 == 0)
common.Reward.__call__ = reward
""")
    flags = ["--filter_groups", "--eval_rows", 0]
    one = finished(1, tmp_path / "one", *flags, script=script)
    two = finished(2, tmp_path / "two", *flags, script=script)
    assert_equal(one, two)
    assert one[1][0]["filtered_groups"] == 0.5


FP32_ANGLES = """
def checked(run, rehearse=common.Run.rehearse):
    def angles(_, args, kwargs):
        assert all(x.dtype == torch.float32 for x in kwargs["position_embeddings"])
    run.model.model.visual.blocks[0].attn.register_forward_pre_hook(angles, with_kwargs=True)
    assert torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 7200
    rehearse(run)
common.Run.rehearse = checked
"""


def test_bfloat16_on_two_processes_is_close_to_float32(tmp_path, patched):
    flags = ["--steps", 1, "--updates_per_step", 2, "--gradient_checkpointing", "--eval_rows", 0]
    exact, (line,) = finished(1, tmp_path / "fp32", *flags)
    tensors, (rounded,) = finished(2, tmp_path / "bf16", *flags, "--dtype", "bfloat16", script=patched(FP32_ANGLES))
    for name in ("entropy", "grad_norm", "approx_kl"):
        assert rounded[name] == pytest.approx(line[name], rel=0.3), name
        assert rounded[name] != line[name]
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    before = load_file(ROOT / "toy/model/model.safetensors")
    agree = [((tensors[k] - before[k]) * (exact[k] - before[k]) > 0).float().mean() for k in before]  # in sign
    assert min(agree) > 0.6 and sum(agree) / len(agree) > 0.8


def test_freeze_vision_on_two(tmp_path):
    tensors, _ = finished(2, tmp_path / "two", "--freeze_vision", "--eval_rows", 0)
    before = load_file(ROOT / "toy/model/model.safetensors")
    for name, value in before.items():
        assert torch.equal(value, tensors[name]) == ("visual" in name), name


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_resume_on_another_number_of_processes(tmp_path, first, then, patched):
    whole = finished(1, tmp_path / "whole", "--eval_rows", 0)
    dies = patched("""
log = common.Run.log
def dies(self):
    log(self)
    if self.step == 2:
        os._exit(1)
common.Run.log = dies
""")
    assert run(first, tmp_path / "cut", "--eval_rows", 0, "--save_every", 1, script=dies).returncode != 0
    assert (tmp_path / "cut/last").resolve().name == "step-1"
    assert_equal(whole, finished(then, tmp_path / "cut", "--eval_rows", 0, "--resume"))


def test_one_process_dying_ends_the_other_with_the_reason(tmp_path, patched):
    script = patched("""
log = common.Run.log
def dies(self):
    if self.rank == 1 and self.step == 2:
        raise RuntimeError("the fan fell off")
    log(self)
common.Run.log = dies
""")
    start = time.time()
    done = run(2, tmp_path / "two", "--eval_rows", 0, "--save_every", 1, script=script)
    assert done.returncode != 0 and "the fan fell off" in done.stderr and time.time() - start < 60
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "two" / "last")


def test_killed_while_saving(tmp_path):
    command = [sys.executable, *TORCHRUN, str(ROOT / "grpo.py"), "--output", str(tmp_path / "two"), *FLAGS]
    command += ["--steps", "50", "--save_every", "1", "--eval_rows", "0"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 120
    while not (
        (tmp_path / "two/last").exists() and list((tmp_path / "two").glob("step-*.unfinished/model.safetensors"))
    ):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.0005)
    os.killpg(process.pid, 9)
    process.wait()
    subprocess.run(["pkill", "-9", "-f", str(tmp_path / "two")], check=False)
    last = (tmp_path / "two" / "last").resolve()
    Qwen2_5_VLForConditionalGeneration.from_pretrained(last)
    assert json.loads((last / "trainer_state.json").read_text())["step"] == int(last.name[5:])


def test_more_processes_than_prompts(tmp_path):
    done = run(2, tmp_path / "two", "--prompts_per_step", 1)
    assert done.returncode != 0 and "--prompts_per_step 1 cannot be split over 2 processes" in done.stderr
    assert 'Traceback (most recent call last):\n  File "/' not in done.stderr.split("cannot be split")[0]
