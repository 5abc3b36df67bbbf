"""What several test files use: random models of the real classes, prompts, and runs of the scripts in this process."""

import contextlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import trainer  # noqa: E402
from common import Group  # noqa: E402
from plumbing.answers import Checker  # noqa: E402
from plumbing.data import Data, Prompt  # noqa: E402
from plumbing.families import patch_attention  # noqa: E402

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
transformers.utils.logging.disable_progress_bar()
TOKENS = dict(image_token_id=11, video_token_id=12, vision_start_token_id=9, vision_end_token_id=10)
END = [13, 0]  # token ids of the random models below
SHAPES = {  # images of a prompt as (h, w) in patches
    "one image": [(4, 6)],
    "two images of different sizes": [(2, 4), (6, 4)],
    "no image": [],
}


def text_config(**more):
    return dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], **more.pop("rope", {})},
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=13,
        pad_token_id=0,
        **more,
    )


QWEN = {  # configuration, and what its tower has of its own
    "qwen2_vl": (transformers.Qwen2VLConfig, dict(embed_dim=16, hidden_size=32, mlp_ratio=2)),
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, dict(window_size=56, fullatt_block_indexes=[1])),
    "qwen3_vl": (transformers.Qwen3VLConfig, dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=64)),
}


def tiny_model(family, seed=0):
    """A random model of the family's real classes, small enough for float64."""
    torch.manual_seed(seed)
    vision = dict(hidden_size=16, intermediate_size=24)
    if family in QWEN:
        vision |= dict(depth=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2, num_heads=2)
        cls, own = QWEN[family]
        text = text_config()
        if family == "qwen3_vl":
            text = text_config(head_dim=8, rope={"mrope_interleaved": True})
        config = cls(text_config=text, vision_config=vision | dict(out_hidden_size=32) | own, **TOKENS)
    else:  # InternVL's tiles of 4 x 4 patches, 4 tokens each
        vision |= dict(num_hidden_layers=2, num_attention_heads=2, image_size=56)
        vision |= dict(initializer_range=0.3, use_qk_norm=True, norm_type="rms_norm")
        text = text_config(max_position_embeddings=4096)
        text["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}  # as InternVL3's
        if family == "internvl":
            text = transformers.Qwen2Config(**text)
        else:
            text = transformers.Qwen3Config(**text, head_dim=8)
        more = {"vision_config": vision, "image_token_id": 11, "image_seq_length": 4}
        config = transformers.InternVLConfig(text_config=text, **more)
    kinds = {"text_config": "shared_prefix"}
    model = patch_attention(transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=kinds))
    model.generation_config.eos_token_id = END
    return model.float().train()


@contextlib.contextmanager
def json_file(path):
    """The dictionary in a json file, which gets the changes that are made to it."""
    saved = json.loads(path.read_text())
    yield saved
    path.write_text(json.dumps(saved))


TEMPLATE = (  # InternVL3's
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def save_internvl(folder):
    """A random InternVL with tiles of 28 x 28 pixels, one token each, and its processor, on the toy's tokenizer.

    Next to it eight rows with one image, two and none, of different sizes; and a reward that varies, in reward.py: a
    random model's answers are all wrong, and without a gradient AdamW makes steps out of rounding.
    """
    (folder / "reward.py").write_text(
        "def varies(problems, responses, answers):\n    return [len(response) % 3 for response in responses]\n"
    )
    for i, (width, height) in enumerate([(28, 28), (84, 56), (40, 150), (30, 29), (300, 100), (9, 9)]):
        noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    chosen = [[0], [1], [2, 3], [], [4], [5, 1], [], [2]]
    lines = [{"images": [f"{i}.png" for i in which], "problem": "How many?", "answer": "1"} for which in chosen]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names |= {"video_token": "<video>"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "toy/model", extra_special_tokens=names)
    scale = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, **scale)
    cls = common.image_only(transformers.InternVLProcessor)
    cls(images, tokenizer, image_seq_length=1, chat_template=TEMPLATE).save_pretrained(folder)
    config = tiny_model("internvl").config
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.eos_token_id, text.initializer_range = len(tokenizer), 2, 0.1
    vision.image_size, vision._attn_implementation, config.image_seq_length = (28, 28), "sdpa", 1
    config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    torch.manual_seed(0)
    config.tie_word_embeddings = False
    transformers.InternVLForConditionalGeneration(config).save_pretrained(folder)
    with json_file(folder / "config.json") as saved:  # as the hub has it: silent about the head, and older
        del saved["tie_word_embeddings"]
        text = saved["text_config"]
        text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
        text["rope_scaling"] = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    (folder / "generation_config.json").unlink()
    with json_file(folder / "processor_config.json") as saved:
        images = saved.pop("image_processor") | {"image_processor_type": "GotOcr2ImageProcessorFast"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images | {"crop_to_patches": False}))
    return folder


def tiny_prompt(model, grids, words=(20, 21, 22), index=0, seed=0):
    """A prompt with one image per grid (h, w in patches), words before, between and after.

    InternVL's images are whole tiles, and a thumbnail follows what is more than one.
    """
    internvl = model.config.model_type == "internvl"
    if internvl:
        canvases = [(-(-h // 4) * 4, -(-w // 4) * 4) for h, w in grids]
        grids = [grid for canvas in canvases for grid in (canvas, (4, 4))[: 1 + (canvas != (4, 4))]]
    ids = torch.tensor([*words, *(token for h, w in grids for token in (9, *[11] * (h * w // 4), 10, 30))])
    positions = torch.arange(len(ids)).expand(1 if internvl else 3, -1)
    pixels = thw = None
    if grids:
        thw = torch.tensor([[1, h, w] for h, w in grids])
        pixels = torch.randn(int(thw.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(seed))
        if internvl:  # whose tower sees an image once
            pixels = pixels.view(-1, 3, 2, 196)[:, :, :1].expand(-1, -1, 2, -1).flatten(1)
        else:
            kinds = (ids == 11).long()[None]
            positions = model.model.get_rope_index(ids[None], kinds, image_grid_thw=thw)[0][:, 0]
    return Prompt(index, "", "", ids, positions, pixels, thw, ids == 11)


def tiny_group(prompt, lengths, seed=0):
    """A group with responses of the given lengths and garbage on the padding."""
    generator = torch.Generator().manual_seed(seed)
    T = max(lengths)
    responses = torch.randint(20, 96, (len(lengths), T), generator=generator)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return Group(prompt, responses, mask, torch.zeros(len(lengths), dtype=torch.bool), [""] * len(lengths))


MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]  # CLIP's, as Qwen-VL's
SCALE = {"image_mean": MEAN, "image_std": STD}
MEAN_ROW, STD_ROW = (torch.tensor(x).repeat_interleave(392) for x in (MEAN, STD))


def chooser(model, temperature=1.0, top_p=1.0, top_k=0):
    """`make_sampler` for a model whose tokens all have a text, but for placeholders of images and videos."""
    words = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(model.config.text_config.vocab_size)})
    return common.make_sampler(common.banned_tokens(model, words), temperature, top_p, top_k)


def normalised_pixels(count=2000, seed=0):
    """Normalised pixel_values (count, 1176) of random images in [0, 1], the same at both times."""
    still = torch.rand(count, 3, 1, 196, generator=torch.Generator().manual_seed(seed))
    return (still.expand(-1, -1, 2, -1).flatten(1) - MEAN_ROW) / STD_ROW


def times_agree(values):
    values = values.view(len(values), 3, 2, -1)
    return torch.equal(values[:, :, 0], values[:, :, 1])


def lengths(*numbers, width=None):
    """The mask (B, T) of responses of these lengths."""
    return torch.arange(width or max(numbers)) < torch.tensor(numbers)[:, None]


def random_signals(count, scale=1.0, seed=0):
    """Random numbers (4, 9) in [0, scale), and the mask of responses of 9, 4, 1 and 0 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return *(torch.rand(4, 9, generator=generator) * scale for _ in range(count)), lengths(9, 4, 1, 0)


def assert_row_wise(function, *values, mask):
    """function(*values, mask), (B, T), is 0 on padding, whatever is there, and of no other row."""
    want = function(*values, mask)
    assert want.any() and not want[~mask].any()
    for garbage in (torch.nan, torch.inf, -1e30):
        assert torch.equal(function(*(x.masked_fill(~mask, garbage) for x in values), mask), want)
    for rows in ([2, 0, 3, 1], [0], [1]):
        torch.testing.assert_close(function(*(x[rows] for x in values), mask[rows]), want[rows])


def padded_inputs(model, group):
    """A group the usual way: G copies of prompt and images, right-padded."""
    prompt, mask = group.prompt, group.mask
    G = len(mask)
    ids = torch.cat([prompt.input_ids.expand(G, -1), group.responses.masked_fill(~mask, 0)], 1)
    attention = torch.cat([torch.ones(G, len(prompt.input_ids), dtype=torch.bool), mask], 1)
    inputs = {"input_ids": ids, "attention_mask": attention.long()}
    if prompt.pixel_values is not None and model.config.model_type != "internvl":
        inputs["mm_token_type_ids"] = torch.cat([prompt.image_mask.expand(G, -1), torch.zeros_like(mask)], 1).int()
    model.model.rope_deltas = None
    return inputs | plain_images(model, prompt, G)


def plain_images(model, prompt, copies):
    """The images of some copies of a prompt as the model's own arguments, InternVL's tiles pixel by pixel."""
    if prompt.pixel_values is None:
        return {}
    if model.config.model_type != "internvl":
        repeated = prompt.pixel_values.repeat(copies, 1), prompt.image_grid_thw.repeat(copies, 1)
        return dict(zip(("pixel_values", "image_grid_thw"), repeated))
    tiles, start, side = [], 0, model.config.vision_config.image_size[0]
    for _, h, w in prompt.image_grid_thw.tolist():
        canvas = torch.empty(3, 14 * h, 14 * w).to(prompt.pixel_values)
        for i in range(h * w):
            row, column = 14 * (i // w), 14 * (i % w)
            canvas[:, row : row + 14, column : column + 14] = prompt.pixel_values[start + i].view(3, 2, 14, 14)[:, 0]
        start += h * w
        tiles += [tile for rows in canvas.split(side, 1) for tile in rows.split(side, 2)]
    return {"pixel_values": torch.stack(tiles).repeat(copies, 1, 1, 1)}


def plain_states(model, group):
    """All hidden states of a padded batch, L + 1 of each: of the response tokens (G, T, D), of the image (1, N, D)."""
    read, hooks = [], []
    for layer in model.model.language_model.layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, args: read.append(args[0].clone())))
    with torch.no_grad():
        states = model(**padded_inputs(model, group), output_hidden_states=True, use_cache=False).hidden_states
    for hook in hooks:
        hook.remove()
    if model.config.model_type == "qwen3_vl":  # whose output_hidden_states lack the image's deep features
        states = [*read, states[-1]]
    shared = len(group.prompt.input_ids)
    return [s[:, shared:] for s in states], [s[:1, :shared][:, group.prompt.image_mask] for s in states]


MEASURED, measure = {}, Data.measure


def measured_once(data):
    """`Data.measure`, which reads 2,500 rows of the toy, once for each process."""
    key = (type(data), data.name, len(data.rows), data.args.instruction, data.args.max_prompt_tokens)
    if data.name != "toy" or key not in MEASURED:
        measure(data)
        names = ("rows", "indices", "dropped", "tokens", "unusable", "checksum")
        MEASURED[key] = {name: getattr(data, name) for name in names}
    vars(data).update(MEASURED[key])


class OneChecker(Checker):
    """One for all runs of a process: its worker takes seconds to import sympy."""

    def close(self):
        pass


CHECKER = OneChecker()


def main_of(script, output, flags):
    """`python script.py --output output flags` in this process, without curves; output None: the script's default."""
    accelerate.state.AcceleratorState._reset_state(True)  # of the run before, which may have had another precision
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *(["--output", str(output)] if output else []), *map(str, flags)])
        patch.setattr(Data, "measure", measured_once)
        patch.setattr(trainer, "draw_curves", lambda *_: None)
        patch.setattr(common, "Checker", lambda seconds: CHECKER)
        try:
            importlib.import_module(script).main()
        finally:
            for number, handler in handlers.items():  # the run's own would keep it, and its lock, after a failure
                signal.signal(number, handler)


QUICK = ["--prompts_per_step", 4, "--eval_rows", 0, "--show_every", 0, "--weight_decay", 0]
QUICK += ["--max_response_tokens", 40]  # most responses end at 30
GROUP = {"saei": ["--n1", 2, "--n2", 2]}  # the others: --group_size 4


def train(script, output, *flags):
    """A short run of a script in this process; returns the lines of its metrics.jsonl."""
    with contextlib.redirect_stdout(sys.stderr):
        main_of(script, output, [*QUICK, *GROUP.get(script, ["--group_size", 4]), *flags])
    return read_metrics(output)


def read_metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def timeless(lines):
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def weights(folder):
    """Weights and optimiser state of a checkpoint."""
    state = {}
    for part in sorted(folder.glob("optimizer/*.safetensors")):  # rows of each tensor, process by process
        for name, value in load_file(part).items():
            state.setdefault(f"optimizer.{name}", []).append(value)
    state = {name: torch.cat(parts) if parts[0].dim() else parts[0] for name, parts in state.items()}
    return load_file(folder / "model.safetensors") | state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_training(one, other):
    """What two runs trained, by `weights` of each, is the same but for rounding.

    Gradients are compared, as AdamW's moments have averaged them: their difference in norm, over all parameters. One
    weight in a thousand may differ: AdamW makes whole steps out of gradients that are nothing but rounding.
    """
    assert one.keys() == other.keys()

    def norm(name, tensors):
        return torch.stack([x.double().norm() for key, x in tensors.items() if key.endswith(name)]).norm()

    difference = {name: one[name] - other[name] for name in one}
    assert norm(".exp_avg", one) > 1e-4  # there is a gradient, and not rounding alone
    for moment in (".exp_avg", ".exp_avg_sq"):
        assert norm(moment, difference) < 1e-3 * norm(moment, one), moment
    trained = [x for name, x in difference.items() if not name.startswith("optimizer.")]
    far = sum((x.abs() > 1e-5).sum().item() for x in trained)
    assert far <= 1e-3 * sum(x.numel() for x in trained)
