"""What computes, and how much of it at a time: threads, attention kernels that are installed, CUDA graphs, chunks.

Not here: what attention attends to (common.py).
"""

import importlib.util
import os
import re
import time
from pathlib import Path

import torch

FLEX_ATTENTION = torch.cuda.is_available()  # a packed row skips what its responses do not see, block by block
HEAD_CHUNK = 512  # tokens whose logits exist at the same time: 512 x 152k x 4 bytes = 0.3 GB


def vision_attention(bf16):
    """transformers' name for the attention of the vision tower; flash-attn takes no fp32."""
    flash = bf16 and torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
    return "flash_attention_2" if flash else "sdpa"


def recorded(function, *inputs):
    """`function(*inputs)` as a CUDA graph, to be called without arguments: `inputs` and the result stay in place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*inputs)  # libraries set themselves up, and autocast fills its cache, before the recording
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*inputs)

    def replay():
        graph.replay()
        return out

    return replay


def use_cores():
    """Gives torch as many threads as there are cores that this process may use and that are free; says so in words.

    Torch counts cores, neither a container's limit nor who else is at work, and a thread without a core of its own
    keeps the others waiting: with two threads on one free core a step of the toy took 4 to 9 times as long as with one.
    OMP_NUM_THREADS, where it is set, stands. Runs of as many threads are equal to the bit.
    """
    if "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1:
        return f"threads: {torch.get_num_threads()}, as set"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    most, free, limit = len(cores), len(cores), Path("/sys/fs/cgroup/cpu.max")
    if limit.exists() and not limit.read_text().startswith("max"):
        quota, period = map(int, limit.read_text().split())
        most = min(most, max(1, quota // period))
    if Path("/proc/stat").exists():
        before = idle_seconds()
        time.sleep(0.2)
        after = idle_seconds()
        free = sum(after[core] - before[core] > 0.1 for core in cores)
    share = min(most // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), free)
    torch.set_num_threads(max(1, min(share, torch.get_num_threads())))
    return f"threads: {torch.get_num_threads()}, as {min(free, most)} of {most} cores are free; OMP_NUM_THREADS sets it"


def idle_seconds():
    """{core: seconds that it has been idle, or has waited for a disk} since the machine was started."""
    rows = re.findall(r"^cpu(\d+) \d+ \d+ \d+ (\d+) (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
    return {int(core): (int(idle) + int(disk)) / os.sysconf("SC_CLK_TCK") for core, idle, disk in rows}
