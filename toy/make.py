"""Builds the toy: a real Qwen2.5-VL of 1.1M parameters, its tokenizer, its picture puzzles, and a short warm-up.

    python toy/make.py            # about 10 minutes on 2 cores; rewrites toy/model and toy/*.parquet from --seed

The pictures are grids of coloured shapes, one cell per image token. The puzzles ask for counts, sums, differences,
comparisons and choices, over one picture, two pictures or none. A response reads the picture first (counts: tokens that
depend on the image) and reasons about what it read next (arithmetic: tokens that do not):

    <think>I count 2 red shapes and 3 blue circles. So 2 + 3 = 5.</think> \\boxed{5}

The warm-up is supervised, in two phases. Clean answers teach the model to see and to write the format. Then a teacher
who miscounts leaves a policy that can see but does not trust its eyes, and that reinforcement learning can put right.
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
from PIL import Image as Pillow
from PIL import ImageDraw
from tqdm import tqdm
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))
from common import image_only  # noqa: E402
from plumbing.arguments import INSTRUCTION  # noqa: E402
from plumbing.data import prompt_text  # noqa: E402  (the warm-up sees exactly the prompts that training builds)

CELL = 28  # pixels; patch 14, merged 2 x 2: one cell is one image token
COLOURS = {"red": (214, 48, 49), "green": (39, 174, 96), "blue": (41, 98, 255), "yellow": (241, 196, 15)}
SHAPES = ["circle", "square", "triangle"]
GRIDS = [(2, 2), (2, 3), (3, 2), (3, 3)]
FAMILIES = ["count", "sum", "difference", "compare", "choice", "pictures", "text"]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def draw_scene(rng):
    """A picture and the list of (colour, shape) in it. The grid's size varies, so pictures have different sizes."""
    rows, columns = rng.choice(GRIDS)
    background = rng.randint(235, 255)
    picture = Pillow.new("RGB", (columns * CELL, rows * CELL), (background,) * 3)
    pen, things, cells = ImageDraw.Draw(picture), [], []
    density = rng.uniform(0.4, 0.95)
    for cell in range(rows * columns):
        if rng.random() > density:
            cells.append(None)
            continue
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        things.append((colour, shape))
        cells.append((colour, shape))
        size = rng.randint(14, 22)
        x = (cell % columns) * CELL + rng.randint(2, CELL - size - 2)
        y = (cell // columns) * CELL + rng.randint(2, CELL - size - 2)
        fill = tuple(max(0, min(255, value + rng.randint(-20, 20))) for value in COLOURS[colour])
        if shape == "circle":
            pen.ellipse([x, y, x + size, y + size], fill=fill)
        elif shape == "square":
            pen.rectangle([x, y, x + size, y + size], fill=fill)
        else:
            pen.polygon([(x + size // 2, y), (x, y + size), (x + size, y + size)], fill=fill)
    return picture, things, cells


# ---------------------------------------------------------------------------------------------------------------------
# Puzzles: a question about what is in the picture, and a response that reads first and reasons next
# ---------------------------------------------------------------------------------------------------------------------


def description(rng):
    """What to count: its words, and the test that a (colour, shape) must pass."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    kind = rng.choice(["colour", "colour", "shape", "both"])
    if kind == "colour":
        return f"{colour} shapes", lambda thing: thing[0] == colour
    if kind == "shape":
        return f"{shape}s", lambda thing: thing[1] == shape
    return f"{colour} {shape}s", lambda thing: thing == (colour, shape)


def puzzle(rng, family):
    """Images, problem, true counts, and `solve(counts) -> (thought, answer)`, for right counts or wrong ones."""
    pictures, scenes, _ = zip(*[draw_scene(rng) for _ in range(2 if family == "pictures" else 1)])
    (one, is_one), (two, is_two) = description(rng), description(rng)
    while two == one:
        two, is_two = description(rng)
    counts = [sum(map(is_one, scenes[0])), sum(map(is_two, scenes[0]))]
    seen = "I count {} " + one + " and {} " + two + ". "

    if family == "count":
        problem, counts = f"<image>How many {one} are there?", counts[:1]

        def solve(a):
            return f"I count {a} {one}.", a
    elif family == "sum":
        problem = f"<image>How many {one} and {two} are there together, each kind counted by itself?"

        def solve(a, b):
            return seen.format(a, b) + f"So {a} + {b} = {a + b}.", a + b
    elif family == "difference":
        if counts[0] < counts[1]:
            one, two, counts = two, one, counts[::-1]
            seen = "I count {} " + one + " and {} " + two + ". "
        problem = f"<image>How many more {one} than {two} are there?"

        def solve(a, b):
            return seen.format(a, b) + f"So {a} - {b} = {a - b}.", a - b
    elif family == "compare":
        problem = f"<image>Are there more {one} than {two}?"

        def solve(a, b):
            return seen.format(a, b) + f"So {a} > {b} is {'true' if a > b else 'false'}.", "yes" if a > b else "no"
    elif family == "choice":
        names = rng.sample(list(COLOURS), 3)
        counts = [sum(colour == name for colour, _ in scenes[0]) for name in names]
        if sorted(counts)[-1] == sorted(counts)[-2]:  # a tie for the most common colour: draw another picture
            return puzzle(rng, family)
        options = " ".join(f"({letter}) {name}" for letter, name in zip("ABC", names))
        problem = f"<image>Which colour is the most common? {options}"

        def solve(*numbers):
            best = max(range(3), key=lambda i: numbers[i])
            counted = ", ".join(f"{n} {name}" for n, name in zip(numbers, names))
            return f"I count {counted}. So the most common is {names[best]}.", "ABC"[best]
    elif family == "pictures":
        problem = f"<image><image>How many {one} are there in the two pictures together?"
        counts = [sum(map(is_one, scene)) for scene in scenes]

        def solve(a, b):
            return f"I count {a} in the first and {b} in the second. So {a} + {b} = {a + b}.", a + b
    else:
        pictures, counts = [], [rng.randint(0, 9), rng.randint(0, 9)]
        problem = f"A box holds {counts[0]} {one} and {counts[1]} {two}. How many things does it hold?"

        def solve(a, b):
            return f"The box holds {a} {one} and {b} {two}. So {a} + {b} = {a + b}.", a + b

    return {"images": list(pictures), "problem": problem, "counts": counts, "solve": solve}


def response(thought, answer):
    return f"<think>{thought}</think> \\boxed{{{answer}}}"


def rows(seed, count):
    """`count` puzzles of all families in turn, in the schema of hiyouga/geometry3k."""
    rng = random.Random(seed)
    for i in range(count):
        made = puzzle(rng, FAMILIES[i % len(FAMILIES)])
        yield {**made, "answer": str(made["solve"](*made["counts"])[1])}


def write_parquet(path, made):
    def png(picture):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        return {"bytes": buffer.getvalue(), "path": None}

    features = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})
    table = [{"images": [png(p) for p in r["images"]], "problem": r["problem"], "answer": r["answer"]} for r in made]
    Dataset.from_list(table, features=features).to_parquet(path)


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


def make_processor(texts, vocabulary=448):
    tokenizer = Qwen2Tokenizer().train_new_from_iterator([texts], vocabulary, new_special_tokens=SPECIAL)
    tokenizer = Qwen2Tokenizer(
        vocab=json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"],
        merges=[tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]],
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * CELL**2, "longest_edge": 32 * CELL**2})
    return image_only(Qwen2_5_VLProcessor)(pictures, tokenizer, chat_template=CHAT_TEMPLATE)


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
        pictures, _, cells = zip(*[draw_scene(rng) for _ in range(48)])
        inputs = processor.image_processor(list(pictures), return_tensors="pt")
        logits = probe(tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output)
        labels = torch.tensor([names.index(cell) for scene in cells for cell in scene])
        return torch.nn.functional.cross_entropy(logits, labels)

    train([*tower.parameters(), *probe.parameters()], steps, 2e-3, "see", loss_of)


def answer(model, processor, puzzles, steps, peak, name, reported=lambda counts: counts):
    """Next-token prediction on responses that report `reported(true counts)` and reason on from there."""

    def loss_of():
        batch = [next(puzzles) for _ in range(32)]
        prompts = [prompt_text(processor, made["problem"], INSTRUCTION) for made in batch]
        answers = [response(*made["solve"](*reported(made["counts"]))) + "<|im_end|>" for made in batch]
        images = [picture for made in batch for picture in made["images"]]
        texts = [prompt + text for prompt, text in zip(prompts, answers)]
        inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs["input_ids"].clone()
        for row, text in zip(range(len(batch)), answers):
            end = int(inputs["attention_mask"][row].sum())
            labels[row, : end - len(processor.tokenizer(text).input_ids)] = -100
            labels[row, end:] = -100
        logits = model(**inputs).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    train(list(model.parameters()), steps, peak, name, loss_of)


def miscount(rng, rate):
    """A teacher whose every count is off by one, up or down, with probability `rate`."""
    return lambda counts: [max(0, n + rng.choice([-1, 1])) if rng.random() < rate else n for n in counts]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of pictures, puzzles, weights and warm-up")
    parser.add_argument("--see_steps", type=int, default=200, help="steps of the vision tower alone")
    parser.add_argument("--answer_steps", type=int, default=2600, help="steps on right answers")
    parser.add_argument("--doubt_steps", type=int, default=200, help="steps on answers from miscounts")
    parser.add_argument("--miscounts", type=float, default=0.6, help="share of counts that the last teacher gets wrong")
    parser.add_argument("--output", type=Path, default=TOY, help="folder for model/, train.parquet and test.parquet")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    train_rows, test_rows = list(rows(f"{args.seed} train", 2002)), list(rows(f"{args.seed} test", 504))
    args.output.mkdir(parents=True, exist_ok=True)
    write_parquet(args.output / "train.parquet", train_rows)
    write_parquet(args.output / "test.parquet", test_rows)

    head = "You are a helpful assistant. " + INSTRUCTION + " "
    texts = [
        head + made["problem"].replace("<image>", "") + response(*made["solve"](*made["counts"])) for made in train_rows
    ]
    processor = make_processor(texts)
    model = make_model(processor.tokenizer)
    puzzles = rows(f"{args.seed} warm-up", sys.maxsize)  # endless, and never those of the two files
    see(model, processor, rng, args.see_steps)
    answer(model, processor, puzzles, args.answer_steps, 1e-3, "answer")
    answer(model, processor, puzzles, args.doubt_steps, 3e-4, "doubt", miscount(rng, args.miscounts))
    model.save_pretrained(args.output / "model")
    processor.save_pretrained(args.output / "model")


if __name__ == "__main__":
    main()
