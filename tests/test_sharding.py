"""Two gloo processes against one: equal rollouts, losses and weights; resume on another number; failures.

Most runs are jobs of two processes that stay (tests/pair.py); where a process must die, torchrun starts real ones.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock
from helpers import ROOT, assert_same_training, read_metrics, same, save_internvl, timeless, weights
from pair import Pair, run_job
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

FLAGS = ["--prompts_per_step", "4", "--group_size", "4", "--show_every", "0", "--steps", "2", "--learning_rate", "1e-4"]
FLAGS += ["--max_response_tokens", "40"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def pair():
    processes = Pair()
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    """A random InternVL in a folder, with data for it."""
    return save_internvl(tmp_path_factory.mktemp("internvl"))


@pytest.fixture
def start(pair):
    """A run on one or two processes: the exit code of each, and what the first wrote on the console."""

    def run(processes, output, *flags, script="grpo", patch=""):
        job = {"script": script, "output": str(output), "flags": [*FLAGS, *map(str, flags)], "patch": patch}
        done = pair.run(job) if processes == 2 else [run_job(job)]
        return [code for code, _ in done], done[0][1]

    return run


@pytest.fixture
def finished(start):
    """A run that must end well: (weights and optimiser, metrics)."""

    def run(processes, output, *flags, **more):
        codes, console = start(processes, output, *flags, **more)
        assert codes == [0] * processes, console[-3000:]
        return weights(output / "last"), timeless(read_metrics(output))

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that two processes are compared with, made once for all tests that ask for the same."""
    runs = {}

    def run(*flags, script="grpo"):
        key = (script, *map(str, flags))
        if key not in runs:
            output = tmp_path_factory.mktemp("alone") / "run"
            code, console = run_job({"script": script, "output": str(output), "flags": [*FLAGS, *map(str, flags)]})
            assert code == 0, console[-3000:]
            runs[key] = weights(output / "last"), timeless(read_metrics(output))
        return runs[key]

    return run


def assert_equal(one, two):
    (tensors, lines), (others, other_lines) = one, two
    assert_same_training(tensors, others)
    for a, b in zip(lines, other_lines, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


EVERYTHING = ["--updates_per_step", 2, "--kl_coef", 0.05, "--entropy_coef", 0.01, "--gradient_checkpointing"]
EVERYTHING += ["--tokens_per_row", 130, "--temperature", 1.3, "--aggregation", "sequence", "--max_grad_norm", 0.1]
LORA = ["--lora_rank", 4, "--learning_rate", 1e-3]


@pytest.fixture
def compare(tmp_path, alone, finished):
    """Runs with the same flags on one process and on two: they must train the same."""

    def run(*flags, script="grpo", patch=""):
        one = alone(*(flag for flag in flags if flag != "--reshard_while_sampling"), script=script)
        two = finished(2, tmp_path / "two", *flags, script=script, patch=patch)
        assert_equal(one, two)
        return two[0]

    return run


@pytest.mark.parametrize(
    "flags",
    [
        ["--eval_rows", 7, "--eval_every", 1],
        ["--eval_rows", 7, "--steps", 1, "--reshard_while_sampling"],
        [*EVERYTHING, "--eval_rows", 0],
        [*EVERYTHING, "--eval_rows", 0, "--freeze_vision", "--steps", 1],
        [*EVERYTHING, *LORA, "--eval_rows", 7],
    ],
)
def test_two_processes_equal_one(compare, flags):
    """With text-only rows and images, responses of different lengths, groups cut into several rows."""
    tensors = compare(*flags)
    if "--freeze_vision" in flags:
        for name, value in load_file(ROOT / "toy/model/model.safetensors").items():
            assert torch.equal(value, tensors[name]) == ("visual" in name), name


def test_two_processes_with_compiled_layers(compare):
    """Traced as on a GPU, after sharding: before it, transformers would silently no longer checkpoint."""
    traced = """
import tracing
from plumbing import kernels
from torch.distributed.fsdp import FSDPModule
tracing.use(patch)
layers = []
def compiled(function, device, trace=kernels.compiled):  # a decoder layer; tests/test_compile.py traces the others
    owner = getattr(function, "__self__", None)
    assert isinstance(owner, FSDPModule | common.Batch | None)
    layers.extend([owner] if "Decoder" in type(owner).__name__ else [])
    return trace(function, device) if owner in layers[:1] else function
patch(kernels, "compiled", compiled)
"""
    flags = ["--eval_rows", 0, "--gradient_checkpointing", "--steps", 1, "--prompts_per_step", 2, "--group_size", 2]
    compare(*flags, "--max_response_tokens", 12, "--entropy_coef", 0.1, patch=traced)


SAEI = ["--n1", 2, "--n2", 2, "--step", 0.2, "--measure_every", 2]


@pytest.mark.parametrize(
    "method, updates", [("vepo", 1), ("vepo", 2), ("vgpo", 1), ("vppo", 2), ("prpo", 2), ("pepo", 1), ("saei", 1)]
)
def test_each_method_on_two_processes(compare, method, updates):
    flags = ["--eval_rows", 0, "--tokens_per_row", 130, "--temperature", 1.3, "--updates_per_step", updates]
    # with 2 prompts a step the first process begins with a text-only prompt alone; SaEI measures every second step
    flags += [*SAEI, "--prompts_per_step", 2] if method == "saei" else ["--steps", 1]
    compare(*flags, script=method)


def internvl_flags(folder):
    flags = ["--model", folder, "--data", folder / "rows.jsonl", "--reward", f"{folder / 'reward.py'}:varies"]
    flags += ["--min_pixels", 784, "--max_pixels", 784 * 6, "--max_response_tokens", 12, "--updates_per_step", 1]
    return [*flags, "--eval_rows", 0, "--kl_coef", 0.05]


@pytest.mark.parametrize("method, flags", [("pepo", []), ("prpo", ["--reshard_while_sampling"]), ("saei", SAEI)])
def test_internvl_on_two_processes(compare, internvl, method, flags):
    """Rows without an image, with one and with two, of one tile and of several."""
    compare(*internvl_flags(internvl), *flags, script=method)


def change_weights(model, keep):
    """Keeps only the tensors of a model whose names `keep` takes."""
    tensors = load_file(model / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if keep(name)}, model / "model.safetensors")


def test_what_only_the_main_process_sees_ends_both_with_one_sentence(tmp_path, start, internvl):
    """A damaged model, and a folder that another run writes to; and what each sees: more processes than prompts."""
    model = tmp_path / "model"
    shutil.copytree(internvl, model)
    change_weights(model, lambda name: "norm" not in name)
    locked, lock = tmp_path / "locked", FileLock(tmp_path / "locked" / ".lock")
    locked.mkdir()
    with lock:
        for output, flags, sentence in (
            (tmp_path / "a", ["--model", model, "--data", model / "rows.jsonl"], "is damaged, or not the model of its"),
            (locked, ["--eval_rows", 0], "another run writes to"),
            (tmp_path / "b", ["--prompts_per_step", 1], "--prompts_per_step 1 cannot be split over 2 processes"),
        ):
            codes, console = start(2, output, *flags)
            assert codes == [2, 2] and sentence in console and "Traceback" not in console


def test_an_internvl_whose_head_is_the_embeddings(tmp_path, compare, internvl):
    """A file without a head, and a decoder whose configuration ties it."""
    model = tmp_path / "model"
    shutil.copytree(internvl, model)
    change_weights(model, lambda name: "lm_head" not in name)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (model / "config.json").write_text(json.dumps(config))
    flags = [*internvl_flags(model), "--steps", 1, "--freeze_vision"]  # whose gradient would hide the others
    assert not any("lm_head" in name for name in compare(*flags))


LOCAL_DENOMINATOR = """
def denominator(self, rows):
    return 2 * sum(common.loss_denominator(row.loss_mask) for row in rows)
patch(trainer.Trainer, "denominator", denominator)
"""
ONE_PERCENT = """
import grpo
loss = grpo.policy_loss
rank = lambda: torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
patch(grpo, "policy_loss", lambda *rest: (loss(*rest)[0] * (1 + rank() / 100), loss(*rest)[1]))
"""


@pytest.mark.parametrize("local", [LOCAL_DENOMINATOR, ONE_PERCENT])
def test_the_comparison_can_fail(tmp_path, alone, finished, local):
    """Each process divides its loss by its own tokens only, as many trainers do; or its gradients are 1 % larger."""
    flags = ["--eval_rows", 0, "--steps", 1, "--max_response_tokens", 33, "--temperature", 1.5]
    one, two = alone(*flags), finished(2, tmp_path / "two", *flags, patch=local)
    with pytest.raises(AssertionError):
        assert_same_training(one[0], two[0])


def test_a_process_whose_groups_are_all_filtered_out(tmp_path, finished):
    patch = """
def reward(self, groups):
    for group in groups:
        mixed = torch.tensor([1.0, 0.0, 0.0, 1.0])
        group.rewards = group.accuracy = group.format = mixed * (group.prompt.prompt_id % 2 == 0)
    return groups
patch(common.Reward, "__call__", reward)
"""
    flags = ["--filter_groups", "--eval_rows", 0, "--steps", 1]
    one = finished(1, tmp_path / "one", *flags, patch=patch)
    two = finished(2, tmp_path / "two", *flags, patch=patch)
    assert_equal(one, two)
    assert one[1][0]["filtered_groups"] == 0.5


FLAT = """
import grpo
def reward(self, groups):
    for group in groups:  # one of two on each process
        mixed = torch.tensor([1.0, 0.0, 0.0, 1.0])
        group.rewards = group.accuracy = group.format = mixed * (group.prompt.prompt_id // 2 % 2)
    return groups
patch(common.Reward, "__call__", reward)
plain, close, passes = grpo.forward, trainer.Trainer.close, []
patch(grpo, "forward", lambda *rest: (passes.append(rest), plain(*rest))[1])
patch(trainer.Trainer, "close", lambda self: (close(self), print(len(passes), "passes")))
"""
ALL_ROWS = """
rows = trainer.Trainer.with_gradient
patch(trainer.Trainer, "with_gradient", lambda self, given: rows(self, given, keep_zero_advantage=True))
"""


@pytest.mark.parametrize("flags, share", [([], 1 / 2), (["--kl_coef", 0.1], 1), (["--updates_per_step", 2], 1 / 2)])
def test_groups_of_equal_rewards_cause_no_pass_on_any_process(tmp_path, flags, share, start):
    """Fewer passes, the same losses and weights: what is left out counts in the denominator."""
    done, passes, short = [], [], ["--max_response_tokens", 8]
    for processes, more in ((2, ""), (2, ALL_ROWS), (1, "")):
        output = tmp_path / f"{processes}{bool(more)}"
        codes, console = start(processes, output, "--eval_rows", 0, "--steps", 1, *flags, *short, patch=FLAT + more)
        assert codes == [0] * processes, console[-2000:]
        passes.append(int(re.search(r"(\d+) passes", console)[1]))
        (line,) = read_metrics(output)
        line = {name: line[name] for name in ("loss", "grad_norm", "reward", "zero_advantage_groups")}
        done.append((weights(output / "last"), [line]))
    assert passes[0] == share * passes[1] == passes[2] / 2
    assert_equal(done[0], done[1])
    assert_equal(done[0], done[2])


FP32_ANGLES = """
def checked(run, check=trainer.Trainer.check_memory):
    def angles(_, args, kwargs):
        assert all(x.dtype == torch.float32 for x in kwargs["position_embeddings"])
    run.model.model.visual.blocks[0].attn.register_forward_pre_hook(angles, with_kwargs=True)
    assert torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 7200
    check(run)
patch(trainer.Trainer, "check_memory", checked)
"""


def test_bfloat16_on_two_processes_is_close_to_float32(tmp_path, alone, finished):
    flags = ["--steps", 1, "--updates_per_step", 2, "--gradient_checkpointing", "--eval_rows", 0]
    flags += ["--max_response_tokens", 64]
    exact, (line,) = alone(*flags)
    tensors, (rounded,) = finished(2, tmp_path / "bf16", *flags, "--dtype", "bfloat16", patch=FP32_ANGLES)
    for name in ("entropy", "grad_norm", "approx_kl"):
        assert rounded[name] == pytest.approx(line[name], rel=0.3), name
        assert rounded[name] != line[name]
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    before = load_file(ROOT / "toy/model/model.safetensors")
    agree = [((tensors[k] - before[k]) * (exact[k] - before[k]) > 0).float().mean() for k in before]  # in sign
    assert min(agree) > 0.6 and sum(agree) / len(agree) > 0.8


DIES = """
log = trainer.Trainer.log
def dies(self):
    log(self)
    if self.step == 2:
        raise RuntimeError("power cut")
patch(trainer.Trainer, "log", dies)
"""


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_resume_on_another_number_of_processes(tmp_path, first, then, alone, start, finished):
    codes, console = start(first, tmp_path / "cut", "--eval_rows", 0, "--save_every", 1, patch=DIES)
    assert codes == [1] * first and "power cut" in console
    assert (tmp_path / "cut/last").resolve().name == "step-1"
    assert_equal(alone("--eval_rows", 0), finished(then, tmp_path / "cut", "--eval_rows", 0, "--resume"))


def test_a_resumed_run_of_adapters_on_two_processes_is_bit_identical(tmp_path, start, finished):
    flags = [*LORA, "--eval_rows", 0, "--save_every", 1]
    whole = finished(2, tmp_path / "whole", *flags)
    codes, _ = start(2, tmp_path / "cut", *flags, patch=DIES)
    assert codes == [1, 1] and len(list((tmp_path / "cut/last/optimizer").iterdir())) == 1
    resumed = finished(2, tmp_path / "cut", *flags, "--resume")
    assert same(whole[0], resumed[0]) and whole[1] == resumed[1]


SAVES_AT_ONCE = """
def again(self):
    self.saved = None
    self.save()
    return iter(())
patch(trainer.Trainer, "steps", again)
"""


def test_adapters_of_another_number_of_processes_are_bit_identical(tmp_path, finished):
    """Two processes write them, one reads and writes them, and two again."""
    flags, output = [*LORA, "--eval_rows", 0, "--steps", 1], tmp_path / "run"
    before, _ = finished(2, output, *flags)
    for processes in (1, 2):
        after, _ = finished(processes, output, *flags, "--resume", patch=SAVES_AT_ONCE)
        assert same(before, after)
    assert len(list(output.glob("step-1*"))) == 3  # it was written again


FULL_ON_THE_MAIN = """
from transformers import PreTrainedModel
save = PreTrainedModel.save_pretrained
def full(model, folder, **rest):
    if "step-2" in str(folder):
        raise OSError(28, "No space left on device")
    return save(model, folder, **rest)
patch(PreTrainedModel, "save_pretrained", full)
"""
FULL_ON_THE_SECOND = """
from torch.distributed.checkpoint import HuggingFaceStorageWriter
write = HuggingFaceStorageWriter.write_data
def full(writer, *rest):
    if os.environ["RANK"] == "1" and "step-2" in str(writer.path):
        raise OSError(28, "No space left on device")
    return write(writer, *rest)
patch(HuggingFaceStorageWriter, "write_data", full)
"""


def test_each_process_writes_its_own_part_of_the_optimiser(tmp_path, finished, start):
    output = tmp_path / "run"
    whole, _ = finished(2, output, "--eval_rows", 0, "--steps", 1)
    parts = [load_file(path) for path in sorted((output / "last/optimizer").glob("*.safetensors"))]
    assert len(parts) == 2
    for name, value in whole.items():
        if name.startswith("optimizer.") and value.dim():
            rows = [len(part[name[10:]]) for part in parts]
            assert rows[0] == -(-len(value) // 2) and sum(rows) == len(value)
    for full in (FULL_ON_THE_SECOND, FULL_ON_THE_MAIN):  # all processes end, and none waits for another
        codes, console = start(2, output, "--eval_rows", 0, "--steps", 2, "--resume", patch=full)
        assert codes == [2, 2] and "No space left on device): free space on the disk; the checkpoint before" in console
        assert "Traceback" not in console and not list(output.glob("step-2*"))
    assert (output / "last").resolve().name == "step-1"
    one, other = sorted((output / "last/optimizer").glob("*.safetensors"))
    other.rename(tmp_path / "kept")
    shutil.copy(one, other)  # one part twice
    codes, console = start(2, output, "--eval_rows", 0, "--steps", 2, "--resume")
    assert codes == [2, 2] and "optimizer are not all of this checkpoint: point" in console
    other.unlink()
    codes, console = start(2, output, "--eval_rows", 0, "--steps", 2, "--resume")
    assert codes == [2, 2] and "optimizer are not all of this checkpoint: point" in console


def written(folder):
    results = json.loads((folder / "results.json").read_text())
    return results["scores"], (folder / "toy.jsonl").read_text()


def test_evaluation_on_two_processes_and_one_that_was_stopped(tmp_path, pair):
    flags = ["--rows", 45, "--samples", 2, "--temperature", 1, "--rollout_prompts", 16, "--max_response_tokens", 12]
    one, two, stopped = (tmp_path / name for name in ("one", "two", "stopped"))

    def job(output, *more):
        return {"script": "eval", "output": str(output), "flags": [*flags, *more]}

    code, console = run_job(job(one))
    assert code == 0 and "toy" in console and "pass" in console, console[-2000:]
    (code, console), other = pair.run(job(two))
    assert code == other[0] == 0, console[-2000:]
    assert written(one) == written(two)
    stopped.mkdir()
    with FileLock(stopped / ".lock"):
        assert [code for code, _ in pair.run(job(stopped))] == [2, 2]
    shutil.copytree(one, stopped, dirs_exist_ok=True)  # as a killed process leaves it: some rows, and half a line
    lines = (stopped / "toy.jsonl").read_text().splitlines(keepends=True)
    (stopped / "results.json").unlink()
    (stopped / "toy.jsonl").write_text("".join(lines[20:23]) + lines[9][:40])
    shutil.copytree(stopped, tmp_path / "again")
    assert "holds an evaluation" in run_job(job(stopped))[1]
    code, console = run_job(job(stopped, "--resume", "--seed", 1))
    assert code == 2 and "begun with another seed" in console and "Traceback" not in console
    assert run_job(job(stopped, "--resume"))[0] == 0
    assert [code for code, _ in pair.run(job(tmp_path / "again", "--resume"))] == [0, 0]
    assert written(stopped) == written(tmp_path / "again") == written(one)


def test_one_process_dying_ends_the_other_with_the_reason(tmp_path):
    script = tmp_path / "patched.py"
    script.write_text("""
import grpo, trainer
log = trainer.Trainer.log
def dies(self):
    if self.rank == 1 and self.step == 2:
        raise RuntimeError("a process failed")
    log(self)
trainer.Trainer.log = dies
grpo.main()
""")
    begin, flags = time.time(), ["--output", str(tmp_path / "two"), *FLAGS, "--eval_rows", "0", "--save_every", "1"]
    done = subprocess.run(
        [*TORCHRUN, str(script), *flags], capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert done.returncode != 0 and "a process failed" in done.stderr and time.time() - begin < 60
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "two" / "last")


ONE_IS_STOPPED = """
log = trainer.Trainer.log
def stopped(self):
    log(self)
    if self.rank == 1:
        self.stop()
patch(trainer.Trainer, "log", stopped)
"""


def test_a_signal_that_reached_one_process_stops_both_before_they_evaluate(tmp_path, start):
    flags = ["--eval_rows", 3, "--eval_every", 1]
    codes, console = start(2, tmp_path / "two", *flags, patch=ONE_IS_STOPPED)
    assert codes == [130, 130], console[-2000:]
    assert (tmp_path / "two/last").resolve().name == "step-1"
    assert [line["step"] for line in read_metrics(tmp_path / "two") if "eval_accuracy" in line] == [0]
