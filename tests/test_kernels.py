"""plumbing/kernels.py: which attention is chosen where."""

import importlib.util

import pytest
import torch
import transformers

from common import load_model
from plumbing.arguments import TOY


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_flash_attention_is_for_bf16_on_a_gpu(monkeypatch, gpu, bf16):
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # everything is installed
    loader = transformers.AutoModelForImageTextToText
    monkeypatch.setattr(loader, "from_pretrained", lambda name, **options: given.update(options))
    load_model(TOY / "model", bf16=bf16)
    vision = given["attn_implementation"]["vision_config"]
    assert vision == ("flash_attention_2" if gpu and bf16 else "sdpa")
