"""Files of a model: damaged ones get one sentence before anything is trained; tokens and settings at the edges."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ROOT, chooser, json_file, tiny_group, tiny_model, tiny_prompt, train
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import common
from common import (
    Reward,
    banned_tokens,
    end_tokens,
    format_reward,
    forward,
    generate,
    load_config,
    load_model,
    load_processor,
    rollout,
)
from plumbing.arguments import INSTRUCTION, SharedArgs, UserError
from plumbing.data import Data

WEIGHTS = load_file(ROOT / "toy/model/model.safetensors")
ONE = next(name for name in WEIGHTS if "layers.0" in name)


def saved(**changes):
    """The toy's weights with some of them replaced, or left out where None."""
    changed = {name: value for name, value in (WEIGHTS | changes).items() if value is not None}
    return lambda folder: save_file(changed, folder / "model.safetensors", {"format": "pt"})


def in_file(name, **changes):
    """A damage: changes keys of a json file."""

    def write(folder):
        with json_file(folder / name) as saved:
            saved.update(changes)

    return write


def file(name, text=None):
    """A damage: another text in a file, or no such file."""
    return lambda folder: (folder / name).unlink() if text is None else (folder / name).write_text(text)


FOREIGN_CODE = in_file("config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"})
DAMAGES = {
    "a missing tensor": (saved(**{ONE: None}), "is damaged.* of its tensors 1 missing, such as model.language_model"),
    "a tensor too much": (saved(nonsense=torch.ones(2)), "of its tensors 1 unexpected, such as nonsense"),
    "another shape": (saved(**{ONE: torch.ones(2)}), "of its tensors 1 mismatched, such as .*layers.0"),
    "another image token": (in_file("config.json", image_token_id=17), "loses text or image of a question"),
    "a template without the image": (file("chat_template.jinja", "1 + 1?"), "loses text or image of a question"),
    "a template without the text": (file("chat_template.jinja", "<|image_pad|>"), "loses text or image"),
    "a broken config": (file("config.json", "{"), "cannot be opened"),
    "another family": (in_file("config.json", model_type="bert"), "is bert; use one of qwen2_vl, qwen2_5_vl, qwen3_vl"),
    "custom code": (FOREIGN_CODE, "cannot be opened .*custom code.*take the name that ends with -hf"),
}


@pytest.fixture
def model_with(tmp_path):
    """A copy of the toy's model with some changes."""

    def make(*changes):
        shutil.copytree(ROOT / "toy" / "model", tmp_path / "model")
        for change in changes:
            change(tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_gets_a_sentence(model_with, name, monkeypatch):
    damage, sentence = DAMAGES[name]
    folder = model_with(damage)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the console"))
    with pytest.raises(UserError, match=sentence) as error:
        load_processor(folder)
        load_model(folder)
    assert error.value.code == 2


def test_pickled_weights_are_not_read(model_with):
    folder = model_with(file("model.safetensors"))
    torch.save(WEIGHTS, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(folder)


def test_a_tied_head_that_is_saved_is_not_unexpected(model_with):
    folder = model_with(saved(**{"lm_head.weight": WEIGHTS["model.embed_tokens.weight"].clone()}))
    assert load_model(folder).lm_head.weight.shape[0] == 448


def test_a_processor_for_videos_too_is_taken_without_it_where_torchvision_is_not(model_with):
    """Hub models and the toy have one, which needs torchvision. One without it opens where torchvision is."""
    folder = model_with(file("video_preprocessor_config.json"))
    ours, plain = load_processor(ROOT / "toy" / "model"), load_processor(folder)
    assert hasattr(ours, "video_processor") == bool(importlib.util.find_spec("torchvision"))
    assert not hasattr(plain, "video_processor")
    assert ours.tokenizer("1 + 1").input_ids == plain.tokenizer("1 + 1").input_ids


def with_tokens(*names, special=False):
    """Adds tokens to tokenizer.json, on rows of the embeddings that the toy's tokenizer leaves free."""

    def write(folder):
        with json_file(folder / "tokenizer.json") as spec:
            known = spec["model"]["vocab"]
            for name in names:  # in place of words that are rare in the toy task
                word, index = max((pair for pair in known.items() if len(pair[0]) > 1), key=lambda pair: pair[1])
                spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) != word]
                del known[word]
                token = {"id": index, "content": name, "special": special, "normalized": False}
                spec["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))

    return write


def in_template(old, new):
    def write(folder):
        path = folder / "chat_template.jinja"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return write


def prompt_of(folder, data="toy", split="test"):
    model, processor = load_model(folder), load_processor(folder)
    return model, processor, Data(str(data), split, SharedArgs(), processor, model).prompt(0)


TAGS = ["<think>", "</think>"]
OPENED = in_template("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
COPY = ["--data", "toy", "--min_pixels", 3136, "--max_pixels", 25088, "--updates_per_step", 1, "--steps", 1]


def test_tags_that_were_never_trained_are_plain_text(model_with):
    """Qwen3-VL Instruct's: tokens of their own, which its chat template never writes; they are decoded all the same."""
    folder = model_with(with_tokens(*TAGS))
    raw = transformers.AutoTokenizer.from_pretrained(folder)
    ids = raw.convert_tokens_to_ids(TAGS)
    assert raw(INSTRUCTION).input_ids.count(ids[0]) == 1
    model, processor, prompt = prompt_of(folder)
    assert not set(ids) & set(prompt.input_ids.tolist())
    assert INSTRUCTION in processor.tokenizer.decode(prompt.input_ids)
    assert processor.tokenizer.decode(ids) == "<think></think>"
    assert not banned_tokens(model, processor.tokenizer)[ids].any()


def test_tags_that_the_template_writes_are_tokens(model_with):
    folder = model_with(with_tokens("<think>"), OPENED)
    _, processor, prompt = prompt_of(folder)
    token = processor.tokenizer.convert_tokens_to_ids("<think>")
    assert prompt.input_ids.tolist().count(token) == 2  # of the instruction, and the one that is open


def sampled(model, tokenizer, prompt, tokens, monkeypatch):
    """A group of two responses that are the given tokens."""
    responses = torch.tensor([tokens, tokens])
    monkeypatch.setattr(common, "generate", lambda *_, **__: (responses, torch.ones_like(responses).bool()))
    return rollout(model, tokenizer, [prompt], SharedArgs(group_size=2), 0)[0]


def test_a_response_begins_inside_of_what_the_template_has_opened(model_with, monkeypatch):
    """As Thinking models' do: the format counts what the template has written."""
    model, processor, prompt = prompt_of(model_with(OPENED))
    assert prompt.opened == "<think>"
    tokens = processor.tokenizer("1</think> \\boxed{1}<|im_end|>").input_ids
    group = sampled(model, processor.tokenizer, prompt, tokens, monkeypatch)
    assert group.texts == ["<think>1</think> \\boxed{1}"] * 2
    assert format_reward(group.texts[0]) == 1 and Reward(SharedArgs())([group])[0].rewards.shape == (2,)
    assert prompt_of(ROOT / "toy" / "model")[2].opened == ""


def test_tags_that_are_special_tokens_stay_in_the_text(model_with, monkeypatch):
    written = in_template("a helpful assistant.", "a helpful assistant. <think></think>")  # and so they were trained
    model, processor, prompt = prompt_of(model_with(with_tokens(*TAGS, special=True), written))
    tokenizer = processor.tokenizer
    tokens = [*tokenizer.convert_tokens_to_ids(TAGS), *tokenizer("\\boxed{1}").input_ids, 2, 0]
    group = sampled(model, tokenizer, prompt, tokens, monkeypatch)
    assert group.texts == ["<think></think>\\boxed{1}"] * 2  # what ends or pads a turn is gone


def test_a_response_ends_with_the_tokenizers_end_of_turn_too(model_with):
    """generation_config.json knows another end alone; the toy was trained to end with <|im_end|>."""
    folder = model_with(in_file("generation_config.json", eos_token_id=447))
    model, processor = load_model(folder), load_processor(folder)
    assert end_tokens(model, processor.tokenizer) == [2, 447]


def test_no_end_of_a_response(model_with):
    model, processor = load_model(ROOT / "toy" / "model"), load_processor(ROOT / "toy" / "model")
    model.generation_config.eos_token_id = processor.tokenizer.eos_token = None
    with pytest.raises(UserError, match="names no token that ends a response: set eos_token_id"):
        end_tokens(model, processor.tokenizer)


def test_embeddings_beyond_the_tokenizer_are_never_sampled(toy):
    known = set(toy[1].tokenizer.get_vocab().values())
    wide = tiny_model("qwen2_5_vl").config
    wide.text_config.vocab_size = 500
    banned = banned_tokens(SimpleNamespace(config=wide, device="cpu"), toy[1].tokenizer)
    assert set(banned.nonzero()[:, 0].tolist()) == set(range(500)) - known | {11, 12}


def test_dropout_of_a_configuration_is_off(model_with):
    """Sampling has none: with it, policy and reference of the same weights would differ."""
    text = json.loads((ROOT / "toy/model/config.json").read_text())["text_config"]
    folder = model_with(in_file("config.json", text_config=text | {"attention_dropout": 0.1}))
    assert load_config(folder).text_config.attention_dropout == 0
    assert all(layer.self_attn.attention_dropout == 0 for layer in load_model(folder).model.language_model.layers)


def test_a_chat_template_in_the_tokenizers_file_alone(model_with):
    template = (ROOT / "toy/model/chat_template.jinja").read_text()
    folder = model_with(file("chat_template.jinja"), in_file("tokenizer_config.json", chat_template=template))
    assert torch.equal(prompt_of(folder)[2].input_ids, prompt_of(ROOT / "toy/model")[2].input_ids)


def test_limits_of_length_stored_with_a_tokenizer_cut_nothing(model_with, tmp_path):
    """As after a call with padding or truncation, when it is saved."""
    stored = {"truncation": {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>", "pad_to_multiple_of": None}
    stored["padding"] = pad | {"strategy": {"Fixed": 200}, "direction": "Right"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "How many? " * 60, "answer": "1"}) + "\n")
    ours = prompt_of(model_with(in_file("tokenizer.json", **stored)), rows, "train")[2]
    assert torch.equal(ours.input_ids, prompt_of(ROOT / "toy" / "model", rows, "train")[2].input_ids)


class Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "conv" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_patches_are_embedded_without_a_convolution(family):
    """Forward, backward and sampling; the product gives what the convolution gives, from parameters of its name."""
    model = tiny_model(family)
    prompt, kinds = tiny_prompt(model, [(4, 8), (4, 4)]), (torch.nn.Conv2d, torch.nn.Conv3d)
    ((name, conv),) = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    pixels = torch.randn(3, 3, 2, 14, 14) if isinstance(conv, torch.nn.Conv3d) else torch.randn(2, 3, 28, 42)
    plain, ours = type(conv).forward(conv, pixels).flatten(2), conv(pixels)
    assert torch.allclose(plain, ours, atol=1e-5) and f"{name}.weight" in model.state_dict()
    with Convolutions() as counted:
        forward(model, tiny_group(prompt, [3, 2]))[0].sum().backward()
        generate(model.eval(), [prompt], 2, chooser(model), torch.rand(2, 3), [], 0)
        type(conv).forward(conv, pixels)
    assert counted.count == 1 and conv.weight.grad.abs().sum() > 0


def with_preprocessor_config(folder):
    """The image processor in a file of its own, as the hub has it, and next to it one for videos."""
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "size": {"shortest_edge": 3136, "longest_edge": 10**6}}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    with json_file(folder / "processor_config.json") as saved:
        flat = saved.pop("image_processor") | {"min_pixels": 3136, "max_pixels": 25088}
    del flat["size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(flat))


@pytest.mark.parametrize("changes", [[], [with_preprocessor_config]])
def test_a_checkpoint_has_the_processor_files_of_its_source(model_with, tmp_path, changes):
    """They agree but for the sizes; as transformers saves them, the part for videos would be gone."""
    source, last = model_with(*changes), tmp_path / "run" / "last"
    train("grpo", tmp_path / "run", "--model", source, *COPY, "--max_pixels", 6272, "--max_response_tokens", 2)
    files = {path.name for path in source.iterdir()} - {"model.safetensors", "config.json", "generation_config.json"}
    assert files <= {path.name for path in last.iterdir()} and ("preprocessor_config.json" in files) == bool(changes)
    for name in files:
        before, after = (source / name).read_text(), (last / name).read_text()
        if name in ("preprocessor_config.json", "processor_config.json"):
            before, after = json.loads(before), json.loads(after)
            for saved in (before, after, before.get("image_processor", {}), after.get("image_processor", {})):
                for size in ("size", "min_pixels", "max_pixels"):
                    saved.pop(size, None)
        assert before == after, name
    size = load_processor(last).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (3136, 6272)
