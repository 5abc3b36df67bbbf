"""How things are computed: attention and its cache, compiled functions, CUDA graphs, pinned copies, CPU threads.

Not here: which keys a token attends to in a packed row, and what is sampled (common.py).
"""

import contextlib
import functools
import importlib.util
import itertools
import os
from pathlib import Path

import torch
import transformers
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if importlib.util.find_spec("flash_attn_interface"):  # the package flash-attn 3, in place of torch's own
    activate_flash_attention_impl("FA3")

HEAD_CHUNK = 512  # tokens whose logits exist at the same time: 512 x 152k x 4 bytes = 0.3 GB


def attend(query, key, value, starts, key_starts, longest, scale=None, seen=None):
    """Attention within segments of a row: (N, H, d) from query (N, H, d) and key, value (M, H', d), H' key-value heads.

    starts, key_starts (segments + 1,) int32: where the queries and the keys of each segment begin, and their number;
    longest: the most queries and the most keys of a segment. Without `seen`, attention is bidirectional in a segment.
    With `seen` (K,), it is causal: segment i reads key[seen[key_starts[i] : key_starts[i + 1]]], the last of which
    belong to its own queries. bf16 and fp16 on a GPU use flash attention (torch's own, or FA3 if flash_attn_interface
    is installed); everything else scaled_dot_product_attention, one call for all segments of the same lengths.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        if seen is not None:
            key, value = key.index_select(0, seen), value.index_select(0, seen)
        lengths, window = (starts, key_starts, *longest), (-1, -1) if seen is None else (-1, 0)  # -1: no limit
        return varlen_attn(query, key, value, *lengths, scale=scale, window_size=window, enable_gqa=True)
    batches, order = equal_lengths(tuple(starts.tolist()), tuple(key_starts.tolist()), seen is not None, query.device)
    parts = []
    for q, k, mask in batches:
        k = k if seen is None else seen[k]
        batch = (x.index_select(0, at.flatten()).unflatten(0, at.shape) for x, at in ((query, q), (key, k), (value, k)))
        batch = (x.transpose(1, 2) for x in batch)  # (segments, H, length, d)
        out = scaled_dot_product_attention(*batch, mask, scale=scale, enable_gqa=True)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, order)


@functools.lru_cache(maxsize=4)
def equal_lengths(starts, key_starts, causal, device):
    """[(queries (n, length), keys (n, length), mask)] of segments of equal lengths, and the order of all results."""
    kinds, batches = {}, []
    for (q, k), (q_end, k_end) in itertools.pairwise(zip(starts, key_starts)):
        kinds.setdefault((q_end - q, k_end - k), []).append((q, k))
    for lengths, begins in kinds.items():
        q, k = (torch.tensor(x)[:, None] + torch.arange(n) for x, n in zip(zip(*begins), lengths))
        mask = torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0]).to(device) if causal else None
        batches.append((q.to(device), k.to(device), mask))
    return batches, torch.cat([q.flatten() for q, _, _ in batches]).argsort()


def compiled(function, device):
    """The function, compiled on a GPU when it is first called, for inputs of any length; unchanged on a CPU.

    It is recompiled for each class of layer, with and without gradients, frozen or not: about ten graphs in all, more
    than torch's default limit.
    """
    many = {"dynamic": True, "fullgraph": True, "recompile_limit": 64}
    return torch.compile(function, **many) if device.type == "cuda" else function


def send(tensor, device):
    """A tensor of the host on the device, by a pinned copy: the host does not wait for the GPU."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


CACHE_STEP = 128  # the responses' cache grows by so many tokens at a time: shapes stay the same in between


class SharedPrefixCache(transformers.DynamicCache):
    """Keys and values of P prompts (a usual padded cache), and of the G responses to each, which grow.

    The prompts' part is computed once, some prompts at a time, and never copied while responses grow. The responses'
    part is written at `written`, a tensor, and read up to `capacity`, a number that seldom changes; 0 while prompts
    come.
    """

    def __init__(self, layers, device):
        super().__init__()
        self.prefix, self.suffix, self.capacity = [[] for _ in range(layers)], [None] * layers, 0
        self.written = torch.zeros(1, dtype=torch.long, device=device)  # tokens of each response so far

    def update(self, keys, values, layer, *args, **kwargs):
        keys = keys.to(values.dtype)  # autocast computes rotary embeddings in fp32
        if not self.capacity:  # some of the prompts: (p, heads, Lp, d)
            self.prefix[layer].append((keys, values))
            return keys, values
        for suffix, new in zip(self.suffix[layer], (keys, values)):  # one more token of each response: (P, heads, G, d)
            suffix.index_copy_(3, self.written, new[:, :, :, None])
        return list(zip(self.prefix[layer], self.suffix[layer]))

    def grow(self, group_size, capacity):
        """Makes space for so many tokens of each response, when all prompts are there."""
        more = capacity - self.capacity
        for i, prefix in enumerate(self.prefix):  # one layer at a time is held twice
            if not self.capacity:
                self.prefix[i] = prefix = tuple(map(torch.cat, zip(*prefix)))
                self.suffix[i] = tuple(x.new_zeros(*x.shape[:2], group_size, 0, x.shape[3]) for x in prefix)
            self.suffix[i] = tuple(pad(x, (0, 0, 0, more)) for x in self.suffix[i])
        self.capacity = capacity

    def select(self, prompts):
        """Forgets all prompts but these, when the others' responses have all ended."""
        for layers in (self.prefix, self.suffix):
            for i, pair in enumerate(layers):
                layers[i] = tuple(x[prompts] for x in pair)


def shared_prefix_attention(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
    """Attention of G response tokens per prompt to the prompt's keys, shared, and to their own response's keys.

    query (P, H, G, d); key and value: (prefix (P, H', Lp, d), suffix (P, H', G, t, d)) from `SharedPrefixCache`, H' the
    key-value heads, t its capacity; attention_mask (P, 1, 1, Lp + t) bool. One softmax over both parts. Plain tensors
    take the usual path (prefill), or, with `segments` from `pack`, that of a packed row; attention_mask then holds
    indices, (1, 1, 1, K): the keys that each segment sees.
    """
    if segments:  # of a packed row
        query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (L, H, d)
        return attend(query, key, value, *segments, scaling, attention_mask.flatten())[None], None
    if isinstance(key, torch.Tensor):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (prefix_k, suffix_k), (prefix_v, suffix_v) = key, value
    P, H, G, d = query.shape
    heads, shared = prefix_k.shape[1], prefix_k.shape[2]
    query = query.view(P, heads, H // heads, G, d).transpose(2, 3)  # (P, H', G, H / H', d)
    to_prefix = (query.flatten(2, 3) @ prefix_k.mT).view(P, heads, G, H // heads, shared)
    scores = torch.cat([to_prefix, query @ suffix_k.mT], -1).float() * scaling
    scores = scores.masked_fill(~attention_mask.view(P, 1, 1, 1, -1), float("-inf"))
    weights = scores.softmax(-1).to(value[0].dtype)
    out = (weights[..., :shared].flatten(2, 3) @ prefix_v).view(P, heads, G, H // heads, d)
    out = out + weights[..., shared:] @ suffix_v
    return out.transpose(1, 2).flatten(2, 3), None  # (P, G, H, d)


AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)


def window_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """`attend` for transformers' vision towers, bidirectional within each window or image.

    query, key, value (1, H, N, d); cu_seq_lens_q: where the windows begin, and N. Returns (1, N, H, d). transformers
    itself would call its attention once per window.
    """
    x = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (N, H, d)
    starts, longest = cu_seq_lens_q.int(), kwargs["max_length_q"]
    return attend(*x, starts, starts, (longest, longest), scaling)[None], None


# transformers passes cu_seq_lens_q to names with "flash"
AttentionInterface.register("flash_windows", window_attention)


def product_weights(model):
    """[(module, "weight" or "bias")] of the model's matrix products, which autocast computes in bf16."""
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d)]
    return [(module, name) for module in modules for name, _ in module.named_parameters(recurse=False)]


def products_in_bf16(model):
    """The frozen model with the weights of its matrix products in bf16, so that autocast need not cast them again.

    Norms and embeddings stay, so the results are equal; a tied head gets a copy.
    """
    for module, name in product_weights(model):
        weight = getattr(module, name).bfloat16()
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    return model


@contextlib.contextmanager
def bf16_products(model, gradients):
    """Inside, matrix products use bf16 copies of the model's weights, made once, as autocast would at each call.

    (Autocast caches its copies, but not inside a compiled function.) With `gradients`, backward passes reach the fp32
    weights through the copies, which are those of before the optimizer's step.
    """
    places = product_weights(model)
    weights = [getattr(module, name) for module, name in places]
    with torch.set_grad_enabled(gradients):
        for (module, name), weight in zip(places, weights):
            module._parameters[name] = weight.bfloat16()
    try:
        yield
    finally:
        for (module, name), weight in zip(places, weights):
            module._parameters[name] = weight


def aligned(tokens, device):
    """The width of the prompts' cache: on a GPU a multiple of 8, which bf16 products need to be fast."""
    return -(-tokens // 8) * 8 if device.type == "cuda" else tokens


def tokens_between_checks(device):
    """After how many tokens sampling checks whether all responses have ended: the host waits for the GPU then."""
    return 16 if device.type == "cuda" else 1


def recorded(function, *inputs):
    """`function(*inputs)` as a CUDA graph, to be called without arguments: `inputs` and the result stay in place.

    The function runs here and at each replay, so it must be idempotent and may not wait for the GPU. The graph has its
    own memory pool, freed with the graph.
    """
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*inputs)  # initialises libraries before the recording
    torch.cuda.current_stream().wait_stream(stream)
    graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # NCCL's watchdog asks after events meanwhile
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
            out = function(*inputs)
    except RuntimeError as error:  # that a recording was broken off hides that memory has run out
        raise (error.__context__ if isinstance(error.__context__, torch.OutOfMemoryError) else error) from None

    def replay():
        graph.replay()
        return out

    return replay


@functools.cache
def capture_stream():
    return torch.cuda.Stream()


def use_cores():
    """Gives torch one thread per core that this process may use, unless OMP_NUM_THREADS is set; says so in words.

    Torch counts the machine's cores, but affinity or a container may allow fewer, and surplus threads block the others.
    """
    if "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1:
        return f"threads: {torch.get_num_threads()}, as set"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = Path("/sys/fs/cgroup/cpu.max")  # a container's
    if limit.exists() and not limit.read_text().startswith("max"):
        quota, period = map(int, limit.read_text().split())
        cores = min(cores, max(1, quota // period))
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, min(share, torch.get_num_threads())))
    return f"threads: {torch.get_num_threads()} of {cores} cores; OMP_NUM_THREADS sets it"
