"""plumbing/kernels.py: which attention is chosen where, and how many threads."""

import importlib.util
import os
import time
from pathlib import Path

import pytest
import torch
import transformers

from common import load_model
from plumbing import kernels
from plumbing.arguments import TOY


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_flash_attention_is_for_bf16_on_a_gpu(monkeypatch, gpu, bf16):
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # everything is installed
    loader = transformers.AutoModelForImageTextToText
    none_wrong = {f"{kind}_keys": [] for kind in ("missing", "unexpected", "mismatched")}
    monkeypatch.setattr(loader, "from_pretrained", lambda name, **options: (given.update(options), none_wrong))
    load_model(TOY / "model", bf16=bf16)
    vision = given["attn_implementation"]["vision_config"]
    assert vision == ("flash_attention_2" if gpu and bf16 else "sdpa")


@pytest.mark.parametrize(
    "busy, limit, processes, threads",
    [
        ([], "max 100000", 1, 4),
        ([1, 3], "max 100000", 1, 2),  # others are at work
        ([0, 1, 2, 3], "max 100000", 1, 1),
        ([], "250000 100000", 1, 2),  # a container's limit of 2.5 cores
        ([], "50000 100000", 1, 1),
        ([], "max 100000", 2, 2),
        ([7], "max 100000", 1, 4),  # not one of this process's cores
    ],
)
def test_threads_are_those_that_find_a_core(monkeypatch, tmp_path, busy, limit, processes, threads):
    """On cores 0 to 3 of 8, torch having taken 4 threads."""
    now, said = [0], []
    (tmp_path / "cpu.max").write_text(limit)

    def stat():
        rows = [f"cpu{core} 5 5 5 {100 + (core not in busy) * now[0]} 7 0 0 0 0 0" for core in range(8)]
        (tmp_path / "stat").write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *rows, "intr 12"]))

    stat()
    monkeypatch.setattr(kernels, "Path", lambda name: tmp_path / Path(name).name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(
        time, "sleep", lambda seconds: (now.__setitem__(0, int(seconds * os.sysconf("SC_CLK_TCK"))), stat())
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: said[-1] if said else 4)
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert kernels.use_cores().startswith(f"threads: {threads}, as ") and said == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert kernels.use_cores() == f"threads: {threads}, as set" and len(said) == 1
