"""Builds an embedded world: a real Qwen2.5-VL of 1.1M parameters, its tokenizer, its image puzzles, a short warm-up.

    python toy/make.py                      # about 10 minutes on 2 cores; rewrites the model and the tables of toy
    python toy/make.py --world toy-faint    # half an hour on one core; goes on from the model of toy

What the worlds are stands in toy/worlds.py. The warm-up is supervised. Clean answers teach the model to see and to
write the format. Then a teacher who miscounts leaves a policy that can see but does not trust its eyes, and that
reinforcement learning can put right. In the faint world a model of 1.1M parameters does not learn to count from
nothing: it begins with the toy's weights, and its vision tower learns to say of faint images what the toy's says of
the same scenes in bold colours.
"""

import argparse
import io
import json
import math
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from tqdm import tqdm
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

TOY = Path(__file__).resolve().parent
sys.path[:0] = [str(TOY), str(TOY.parent)]
from worlds import CELL, COLOURS, SHAPES, WORLDS, conclude, draw_scene, paint_faint, paint_plain  # noqa: E402

from common import image_only, load_model, load_processor  # noqa: E402
from plumbing.arguments import EMBEDDED, INSTRUCTION  # noqa: E402
from plumbing.data import prompt_text  # noqa: E402  (the warm-up sees exactly the prompts that training builds)
from toy.kinds import NUMBERS  # noqa: E402


def write_parquet(path, puzzles):
    """A table in the schema of hiyouga/geometry3k, with two more columns: family, and the true numbers to be read."""

    def png(image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        return {"bytes": buffer.getvalue(), "path": None}

    def row(made):
        images, answer = [png(image) for image in made.images], conclude(made.family, made.counts)
        own = {"family": made.family, "reads": made.counts}
        return {"images": images, "problem": made.problem, "answer": answer, **own}

    text, reads = Value("string"), List(Value("int8"))
    features = {"images": List(Image()), "problem": text, "answer": text, "family": text, "reads": reads}
    Dataset.from_list([row(made) for made in puzzles], features=Features(features)).to_parquet(path)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model: Qwen2.5-VL's own classes, special tokens and chat template, a small vocabulary
# ---------------------------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
SPECIAL += ["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

CHAT_TEMPLATE = (  # Qwen2.5-VL's, word for word
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] "
    "== 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)


def make_processor(texts, vocabulary):
    tokenizer = Qwen2Tokenizer().train_new_from_iterator([texts], vocabulary, new_special_tokens=SPECIAL)
    tokenizer = Qwen2Tokenizer(
        vocab=json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"],
        merges=[tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]],
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * CELL**2, "longest_edge": 32 * CELL**2})
    return image_only(Qwen2_5_VLProcessor)(images, tokenizer, chat_template=CHAT_TEMPLATE)


def make_model(tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=math.ceil(len(tokenizer) / 16) * 16,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            initializer_range=0.06,  # 0.02, Qwen's, does not learn to count at this size
            bos_token_id=ids("<|endoftext|>"),
            eos_token_id=ids("<|im_end|>"),
            pad_token_id=ids("<|endoftext|>"),
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=192,
            num_heads=4,
            out_hidden_size=128,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=56,
            fullatt_block_indexes=[1],
            tokens_per_second=2,
            initializer_range=0.06,
        ),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids("<|im_end|>"), ids("<|endoftext|>")]
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Warm-up, supervised: see, answer, doubt
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak):
    """Linear warm-up over 50 steps, cosine down to 2 % of the peak."""
    return peak * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(parameters, steps, peak, name, loss_of):
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01)
    recent = 0.0
    with tqdm(range(steps), desc=name) as bar:
        for step in bar:
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
            loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent += 0.02 * (loss.item() - recent) if step else loss.item()
            bar.set_postfix(loss=f"{recent:.4f}", refresh=False)


def see(model, processor, rng, steps):
    """The vision tower learns what is in each cell, read off its image tokens by a linear probe."""
    names = [None, *[(colour, shape) for colour in COLOURS for shape in SHAPES]]
    probe, tower = torch.nn.Linear(model.config.text_config.hidden_size, len(names)), model.model.visual

    def loss_of():
        scenes = [draw_scene(rng) for _ in range(48)]
        logits = probe(image_states(tower, processor, map(paint_plain, scenes)))
        labels = torch.tensor([names.index(cell and cell[:2]) for scene in scenes for cell in scene.cells])
        return torch.nn.functional.cross_entropy(logits, labels)

    train([*tower.parameters(), *probe.parameters()], steps, 2e-3, "see", loss_of)


def image_states(tower, processor, images):
    """What a vision tower makes of images: (image tokens of all of them, D)."""
    inputs = processor.image_processor(list(images), return_tensors="pt")
    return tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output


def begin_with(model, processor, bold, bold_processor):
    """Weights of the model for bold images: embeddings of the tokens that both have, and digits' for number words."""
    tokens, old = processor.tokenizer.get_vocab(), bold_processor.tokenizer.get_vocab()
    weights, own = bold.state_dict(), model.state_dict()
    known = {token: token for token in tokens if token in old}
    known |= {f"\u0120{word}": str(i) for i, word in enumerate(NUMBERS[:10])}  # \u0120: the tokenizer's space
    for name in [name for name in own if own[name].shape != weights[name].shape]:  # embeddings and head, tied
        rows = weights[name].mean(0) + 0.6 * weights[name].std(0) * torch.randn(own[name].shape)
        for token, same in known.items():
            rows[tokens[token]] = weights[name][old[same]]
        weights[name] = rows
    model.load_state_dict(weights)
    model.tie_weights()


def see_faint(model, bold, processor, rng, steps):
    """The vision tower learns to say of faint images what the model for bold ones says of the same scenes."""
    tower, teacher, done = model.model.visual, bold.model.visual, iter(range(steps))

    def loss_of():
        scenes, easy = [draw_scene(rng, 0.4, 1.0) for _ in range(40)], 50 * max(0, 1 - next(done) / (0.3 * steps))
        with torch.no_grad():
            wanted = image_states(teacher, processor, map(paint_plain, scenes))
        got = image_states(tower, processor, [paint_faint(scene, rng, easy) for scene in scenes])
        return (got - wanted).square().mean() / wanted.var(0).mean()

    train(list(tower.parameters()), steps, 2e-3, "see", loss_of)


def answer(model, processor, puzzles, words, steps, peak, name, rng, reported=list, weight=1.0, size=32):
    """Next-token prediction on `size` responses that report `reported(true counts)` and reason on from there.

    `words`: numbers in words; `weight`: of a token that is a number, in the mean.
    """
    vocabulary = processor.tokenizer.get_vocab()
    numbers = torch.tensor([i for token, i in vocabulary.items() if token.strip("\u0120") in [*"0123456789", *NUMBERS]])

    def loss_of():
        batch = [next(puzzles) for _ in range(size)]
        prompts = [prompt_text(processor, made.problem, INSTRUCTION) for made in batch]
        answers = [made.response(reported(made.counts), rng, words) + "<|im_end|>" for made in batch]
        images = [image for made in batch for image in made.images]
        texts = [prompt + text for prompt, text in zip(prompts, answers)]
        inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs["input_ids"].clone()
        for row, text in zip(range(len(batch)), answers):
            end = int(inputs["attention_mask"][row].sum())
            labels[row, : end - len(processor.tokenizer(text).input_ids)] = -100
            labels[row, end:] = -100
        logits, labels = model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        weights = (labels != -100) * torch.where(torch.isin(labels, numbers), weight, 1.0)
        return (losses * weights).sum() / weights.sum()

    train(list(model.parameters()), steps, peak, name, loss_of)


def miscount(rng, rate):
    """A teacher whose every count is off by one, up or down, with probability `rate`."""
    return lambda counts: [max(0, n + rng.choice([-1, 1])) if rng.random() < rate else n for n in counts]


VOCABULARY = {"toy": 448, "toy-faint": 560}
STEPS = {"toy": (200, 2600, 200), "toy-faint": (1000, 4500, 1000)}  # of the phases see, answer, doubt
MISCOUNTS = {"toy": 0.6, "toy-faint": 0.25}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=[*WORLDS], default="toy")
    parser.add_argument("--seed", type=int, default=0, help="of images, puzzles, weights and warm-up")
    parser.add_argument("--see_steps", type=int, help=f"steps of the vision tower alone {STEPS}")
    parser.add_argument("--answer_steps", type=int, help="steps on right answers")
    parser.add_argument("--doubt_steps", type=int, help="steps on answers from miscounts")
    parser.add_argument("--miscounts", type=float, help=f"share of counts that the last teacher gets wrong {MISCOUNTS}")
    parser.add_argument("--output", type=Path, help="folder for model/, train.parquet and test.parquet (toy/...)")
    args = parser.parse_args()
    world, output = WORLDS[args.world], args.output or EMBEDDED[args.world]
    given = args.see_steps, args.answer_steps, args.doubt_steps
    see_steps, answer_steps, doubt_steps = [d if g is None else g for g, d in zip(given, STEPS[args.world])]
    rate = MISCOUNTS[args.world] if args.miscounts is None else args.miscounts
    torch.manual_seed(args.seed)
    rng, say = random.Random(args.seed), random.Random(f"{args.seed} words")
    train_rows = list(world.puzzles(f"{args.seed} train", world.train))
    output.mkdir(parents=True, exist_ok=True)
    write_parquet(output / "train.parquet", train_rows)
    write_parquet(output / "test.parquet", world.puzzles(f"{args.seed} test", world.test))

    head = "You are a helpful assistant. " + INSTRUCTION + " "
    texts = [
        head + made.problem.replace("<image>", "") + made.response(made.counts, say, world.words) for made in train_rows
    ]
    texts += [" " + " ".join(NUMBERS)] * (300 if world.words else 0)  # often enough for each to be a token
    processor = make_processor(texts, VOCABULARY[args.world])
    model = make_model(processor.tokenizer)
    puzzles = world.puzzles(f"{args.seed} warm-up", sys.maxsize)  # endless, of other images than the two files
    learn = model, processor, puzzles, world.words
    doubt = {"rng": say, "reported": miscount(rng, rate)}
    if args.world == "toy":
        see(model, processor, rng, see_steps)
        answer(*learn, answer_steps, 1e-3, "answer", say)
        answer(*learn, doubt_steps, 3e-4, "doubt", **doubt)
    else:
        bold, bold_processor = load_model(EMBEDDED["toy"] / "model"), load_processor(EMBEDDED["toy"] / "model")
        begin_with(model, processor, bold, bold_processor)
        see_faint(model, bold, processor, rng, see_steps)
        answer(*learn, answer_steps, 1e-3, "answer", say, weight=6.0, size=16)
        answer(*learn, doubt_steps, 3e-4, "doubt", **doubt, size=16)
        model.bfloat16()  # half the size; all scripts read it in fp32
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    video = {"video_processor_type": "Qwen2VLVideoProcessor"}  # as hub models have it, for where torchvision is
    (output / "model" / "video_preprocessor_config.json").write_text(json.dumps(video) + "\n")


if __name__ == "__main__":
    main()
