"""Which kernels a part of the model runs on, and how much of it at a time: what is installed, CUDA graphs, chunks.

Not here: what attention attends to (common.py).
"""

import importlib.util

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
