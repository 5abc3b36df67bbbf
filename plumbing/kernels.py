"""What computes, and how much of it at a time: threads, attention kernels that are installed, CUDA graphs, chunks.

Not here: what attention attends to (common.py).
"""

import functools
import os
import re
import time
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

BLOCK = 128  # tokens: what a packed row's responses do not see is skipped in blocks of so many
HEAD_CHUNK = 512  # tokens whose logits exist at the same time: 512 x 152k x 4 bytes = 0.3 GB


@functools.cache
def flex():
    """Flex attention, compiled for rows of any length: too many compilations raise, and do not build L x L scores.

    By the usual kernel: the one that torch takes for rows of less than 128 tokens does not compile for any length.
    """
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return functools.partial(compiled, kernel_options={"BACKEND": "TRITON"})


def takes_block_mask(device):
    return device.type == "cuda"  # flex attention has no backward pass on a CPU


def block_mask(owner, sees):
    """The block mask of a packed row from owner (L,), ascending, 0 for the prompt; nothing of size L x L exists.

    A block of keys is read where it holds a part of the prompt, or ends with the response that the block of queries
    begins with; it needs no mask where all of it is the prompt, or both are of one response.
    """
    L = len(owner)
    first, last = owner[::BLOCK], torch.cat([owner[BLOCK - 1 :: BLOCK], owner[-1:]])[: -(-L // BLOCK)]
    earlier = torch.ones(len(first), len(first), dtype=torch.bool, device=owner.device).tril(-1)
    own = last[None] == first[:, None]  # (blocks of queries, blocks of keys)
    full = earlier & ((last == 0)[None] | (own & (first == last)[None] & (first == last)[:, None]))
    part = earlier & ((first == 0)[None] | own) & ~full
    part.fill_diagonal_(True)
    blocks = []
    for chosen in (part, full):
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        blocks += [chosen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]]
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(L, L))


def window_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """Attention of each window's patches to those of the same window, for transformers' vision towers.

    query, key, value (1, H, N, d); cu_seq_lens_q: where the windows begin, and N. Returns (1, N, H, d). One call on
    CUDA, of flash attention for windows of any length, which torch brings; elsewhere one for each length. transformers
    itself would call another attention window by window, 2,272 times for a picture of a megapixel.
    """
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (N, H, d)
    if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16):
        cu, longest = cu_seq_lens_q.int(), kwargs["max_length_q"]
        return varlen_attn(query, key, value, cu, cu, longest, longest, scale=scaling)[None], None
    ends = cu_seq_lens_q.tolist()
    windows = {}  # length: indices of the patches of all windows of this length
    for start, end in zip(ends, ends[1:]):
        windows.setdefault(end - start, []).append(torch.arange(start, end, device=value.device))
    order = [torch.stack(indices) for indices in windows.values()]  # (windows, length)
    parts = []
    for index in order:
        q, k, v = (x[index].transpose(1, 2) for x in (query, key, value))  # (windows, H, length, d)
        parts.append(scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
    order = torch.cat([index.flatten() for index in order])
    return torch.cat(parts)[order.argsort()][None], None


AttentionInterface.register("flash_windows", window_attention)  # only a "flash" is told where the windows begin


def products_in_bf16(model):
    """The frozen model with the weights of its products in bf16, as autocast would make them anew at each use.

    Autocast keeps its copies of what has a gradient alone. Norms and embeddings stay, so that the results are equal.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            for name, p in list(module.named_parameters(recurse=False)):  # a head that is the embeddings gets its own
                setattr(module, name, torch.nn.Parameter(p.bfloat16(), requires_grad=False))
    return model


def aligned(tokens, device):
    """A prompt's cache is so many tokens wide: on a GPU a multiple of 8, which products of bf16 want."""
    return -(-tokens // 8) * 8 if device.type == "cuda" else tokens


def tokens_between_checks(device):
    """After how many tokens sampling asks whether all responses have ended: a GPU stands still while it is asked."""
    return 16 if device.type == "cuda" else 1


def recorded(function, *inputs):
    """`function(*inputs)` as a CUDA graph, to be called without arguments: `inputs` and the result stay in place.

    Its memory is a pool of its own, which is given back when it is gone: torch refuses a pool without a living graph.
    """
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*inputs)  # libraries set themselves up, and autocast fills its cache, before the recording
    torch.cuda.current_stream().wait_stream(stream)
    graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # NCCL's watchdog asks after events meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        out = function(*inputs)

    def replay():
        graph.replay()
        return out

    return replay


@functools.cache
def capture_stream():
    return torch.cuda.Stream()


def use_cores():
    """Gives torch as many threads as there are cores that this process may use and that are free; says so in words.

    Torch counts cores, neither a container's limit nor who else is at work, and a thread without a core of its own
    keeps the others waiting: with two threads on one free core a step of the toy took 4 to 9 times as long as with one.
    OMP_NUM_THREADS, where it is set, stands: set it for runs that are to be equal to the bit on a machine with others.
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
    share = min(most, free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, min(share, torch.get_num_threads())))
    return f"threads: {torch.get_num_threads()}, as {min(free, most)} of {most} cores are free; OMP_NUM_THREADS sets it"


def idle_seconds():
    """{core: seconds that it has been idle, or has waited for a disk} since the machine was started."""
    rows = re.findall(r"^cpu(\d+) \d+ \d+ \d+ (\d+) (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
    return {int(core): (int(idle) + int(disk)) / os.sysconf("SC_CLK_TCK") for core, idle, disk in rows}
