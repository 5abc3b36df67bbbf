"""Compiled as on a GPU, but with plain kernels: `kernels.compiled` on a CPU, traced and differentiated ahead of time.

Attention is one operation that nothing looks into, as its kernel is on a GPU.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from plumbing import kernels

attend, elsewhere = kernels.attend, ThreadPoolExecutor(1)  # in whose thread an operation may be differentiated


INPUTS = "Tensor query, Tensor key, Tensor value"
NUMBERS = "Tensor starts, Tensor key_starts, SymInt[] longest, float scale, Tensor? seen"


@torch.library.custom_op("tests::attend", mutates_args=(), schema=f"({INPUTS}, {NUMBERS}) -> Tensor")
def opaque(*inputs):
    return attend(*inputs).contiguous()


@torch.library.custom_op(
    "tests::attend_backward", mutates_args=(), schema=f"({INPUTS}, Tensor gradient, {NUMBERS}) -> Tensor[]"
)
def opaque_backward(query, key, value, gradient, *numbers):
    def differentiate():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        return [x.contiguous() for x in torch.autograd.grad(attend(*inputs, *numbers), inputs, gradient)]

    return elsewhere.submit(differentiate).result()


def remember(ctx, inputs, output):
    query, key, value, starts, key_starts, longest, scale, seen = inputs
    ctx.save_for_backward(query, key, value, starts, key_starts, seen)
    ctx.numbers = longest, scale


def backward(ctx, gradient):
    *inputs, starts, key_starts, seen = ctx.saved_tensors
    found = opaque_backward(*inputs, gradient.contiguous(), starts, key_starts, *ctx.numbers, seen)
    return *found, None, None, None, None, None


opaque.register_fake(lambda query, *rest: torch.empty_like(query))
opaque.register_autograd(backward, setup_context=remember)
opaque_backward.register_fake(lambda query, key, value, *rest: [torch.empty_like(x) for x in (query, key, value)])


def traced_attend(query, key, value, starts, key_starts, longest, scale=None, seen=None):
    return opaque(query, key, value, starts, key_starts, list(longest), scale, seen)


def traced(function, device):
    return torch.compile(function, backend="aot_eager", dynamic=True, fullgraph=True, recompile_limit=64)


def traced_but_decode(function, device):
    """A decode step, which takes longest to trace, stays as it is; test_compile.py has a test of its own for it."""
    if function.__name__ == "decode_once":
        return torch.compiler.set_stance("force_eager")(function)
    return traced(function, device)


def use(patch):
    """`patch(module, name, value)`, such as monkeypatch.setattr."""
    patch(kernels, "attend", traced_attend)
    patch(kernels, "compiled", traced_but_decode)


@contextlib.contextmanager
def nothing_compiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "compiled", lambda function, device: function)
        yield
