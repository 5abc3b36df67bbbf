"""Models that are damaged, or none: one sentence before anything is trained."""

import importlib.util
import json
import shutil

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file, save_file

from common import load_model, load_processor
from plumbing.commandline import UserError

WEIGHTS = load_file(ROOT / "toy/model/model.safetensors")
ONE = next(name for name in WEIGHTS if "layers.0" in name)


def saved(**changes):
    """The toy's weights with some of them replaced, or left out where None."""
    changed = {name: value for name, value in (WEIGHTS | changes).items() if value is not None}
    return lambda folder: save_file(changed, folder / "model.safetensors", {"format": "pt"})


def pickled(folder):
    torch.save(WEIGHTS, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def configured(**changes):
    def write(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return write


def file(name, text=None):
    return lambda folder: (folder / name).unlink() if text is None else (folder / name).write_text(text)


FOREIGN_CODE = configured(model_type="mine", auto_map={"AutoConfig": "code.Config"})
DAMAGES = {
    "a missing tensor": (saved(**{ONE: None}), "is damaged.* of its tensors 1 missing, such as model.language_model"),
    "a tensor too much": (saved(nonsense=torch.ones(2)), "of its tensors 1 unexpected, such as nonsense"),
    "another shape": (saved(**{ONE: torch.ones(2)}), "of its tensors 1 mismatched, such as .*layers.0"),
    "pickled weights": (pickled, "has no safetensors; pickled weights may run code"),
    "no tokenizer.json": (file("tokenizer.json"), "loses text or picture of a question"),
    "a broken tokenizer": (file("tokenizer.json", "{"), "cannot be opened"),
    "another image token": (configured(image_token_id=17), "loses text or picture of a question"),
    "a broken chat template": (file("chat_template.jinja", "{% for x in %}"), "has no chat template that works"),
    "no chat template": (file("chat_template.jinja"), "has no chat template that works"),
    "a template without the picture": (file("chat_template.jinja", "1 + 1?"), "loses text or picture of a question"),
    "a template without the text": (file("chat_template.jinja", "<|image_pad|>"), "loses text or picture"),
    "a broken config": (file("config.json", "{"), "cannot be opened"),
    "another family": (
        configured(model_type="bert"),
        "is bert; use one of qwen2_vl, qwen2_5_vl, qwen3_vl, internvl",
    ),
    "code of its own": (FOREIGN_CODE, "cannot be opened .*custom code.*take the name that ends with -hf"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_gets_a_sentence(tmp_path, name, monkeypatch):
    damage, sentence = DAMAGES[name]
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "toy" / "model", folder)
    damage(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the console"))
    with pytest.raises(UserError, match=sentence) as error:
        load_processor(folder)
        load_model(folder)
    assert error.value.code == 2


def test_a_tied_head_that_is_saved_is_not_unexpected(tmp_path):
    shutil.copytree(ROOT / "toy" / "model", tmp_path / "model")
    saved(**{"lm_head.weight": WEIGHTS["model.embed_tokens.weight"].clone()})(tmp_path / "model")
    assert load_model(tmp_path / "model").lm_head.weight.shape[0] == 448


def test_limits_of_pixels_that_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="--max_pixels 1000 is below 3136, the least"):
        load_processor(ROOT / "toy" / "model", max_pixels=1000)


def test_a_processor_for_videos_too_is_taken_without_it_where_torchvision_is_not(tmp_path):
    """Hub models have one; it cannot be made without torchvision. The toy has none, and opens where torchvision is."""
    shutil.copytree(ROOT / "toy" / "model", tmp_path / "model")
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "size": {"shortest_edge": 3136, "longest_edge": 10**6}}
    (tmp_path / "model" / "video_preprocessor_config.json").write_text(json.dumps(video))
    ours, plain = load_processor(tmp_path / "model"), load_processor(ROOT / "toy" / "model")
    assert hasattr(ours, "video_processor") == bool(importlib.util.find_spec("torchvision"))
    assert not hasattr(plain, "video_processor")
    for processor in (ours, plain):
        assert processor.tokenizer("1 + 1").input_ids == plain.tokenizer("1 + 1").input_ids
