"""Builds a toy task: a real Qwen2.5-VL of 1.1M parameters, its tokenizer, its tables of puzzles, a short warm-up.

    python toy/make.py                    # about 10 minutes on 2 cores; overwrites the model and the tables of toy
    python toy/make.py --toy toy-faint    # half an hour on one core; starts from the model of toy

toy/puzzles.py defines the tasks. The warm-up is supervised. Right answers teach the model to see and to write the
format. Then a teacher who miscounts makes the model less certain of what it sees, which reinforcement learning can
undo. On faint images a model of this size does not learn to count from scratch: it starts from the weights of `toy`,
and its vision tower learns to output for a faint image what that of `toy` outputs for the same scene in bold colours.
"""

import argparse
import functools
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
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))
from puzzles import CELL, COLOURS, SHAPES, TOY_TASKS, conclude, draw_scene, paint_faint, paint_plain  # noqa: E402

from common import image_only, load_model, load_processor  # noqa: E402
from plumbing.arguments import EMBEDDED, INSTRUCTION  # noqa: E402
from plumbing.data import prompt_text  # noqa: E402  (the warm-up sees exactly the prompts that training builds)
from toy.kinds import NUMBERS  # noqa: E402

VOCABULARY = {"toy": 448, "toy-faint": 560}
STEPS = {"toy": (200, 2600, 200), "toy-faint": (1000, 4500, 1000)}  # of the phases see, answer, doubt
MISCOUNTS = {"toy": 0.6, "toy-faint": 0.25}  # share of counts that the teacher of the last phase gets wrong


def write_parquet(path, puzzles):
    """A table in the schema of hiyouga/geometry3k, with two more columns: `family`, and `reads`, the true counts."""
    columns = {"images": List(Image()), "problem": Value("string"), "answer": Value("string")}
    columns |= {"family": Value("string"), "reads": List(Value("int8"))}
    rows = []
    for puzzle in puzzles:
        files = [io.BytesIO() for _ in puzzle.images]
        for image, file in zip(puzzle.images, files):
            image.save(file, "PNG", optimize=True)
        images = [{"bytes": file.getvalue(), "path": None} for file in files]
        answer = conclude(puzzle.family, puzzle.counts)
        rows.append(dict(zip(columns, [images, puzzle.problem, answer, puzzle.family, puzzle.counts])))
    Dataset.from_list(rows, features=Features(columns)).to_parquet(path)


# ---- tokenizer and model: the classes, special tokens and chat template of Qwen2.5-VL, with a small vocabulary ------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
SPECIAL += ["<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (TOY / "model" / "chat_template.jinja").read_text()  # an exact copy of Qwen2.5-VL's


def make_processor(texts, vocabulary):
    trained = Qwen2Tokenizer().train_new_from_iterator([texts], vocabulary, new_special_tokens=SPECIAL)
    spec = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=spec["vocab"],
        merges=[tuple(pair) for pair in spec["merges"]],
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * CELL**2, "longest_edge": 32 * CELL**2})
    return image_only(Qwen2_5_VLProcessor)(images, tokenizer, chat_template=CHAT_TEMPLATE)


def make_model(tokenizer):
    """A random model of the shape in toy/model/config.json; initializer_range 0.02, Qwen's, does not learn to count."""
    config = Qwen2_5_VLConfig.from_pretrained(TOY / "model", dtype=torch.float32)
    config.text_config.vocab_size = math.ceil(len(tokenizer) / 16) * 16
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(TOY / "model")
    return model


# ---- warm-up: see, answer, doubt ------------------------------------------------------------------------------------


def train(parameters, steps, peak, name, loss_of):
    """AdamW; the learning rate rises linearly over 50 steps, then falls to 2 % of its peak along a cosine."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01)
    bar = tqdm(range(steps), desc=name)
    for step in bar:
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50) * decay
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def see(model, processor, rng, steps):
    """The vision tower learns what is in each cell, with a linear probe on its image tokens."""
    names = [None, *[(colour, shape) for colour in COLOURS for shape in SHAPES]]
    probe, tower = torch.nn.Linear(model.config.text_config.hidden_size, len(names)), model.model.visual

    def loss_of(_):
        scenes = [draw_scene(rng) for _ in range(48)]
        logits = probe(image_states(tower, processor, map(paint_plain, scenes)))
        labels = torch.tensor([names.index(cell and cell[:2]) for scene in scenes for cell in scene.cells])
        return torch.nn.functional.cross_entropy(logits, labels)

    train([*tower.parameters(), *probe.parameters()], steps, 2e-3, "see", loss_of)


def image_states(tower, processor, images):
    """The output of a vision tower for images: (image tokens of all of them, D)."""
    inputs = processor.image_processor(list(images), return_tensors="pt")
    return tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output


def start_from(model, processor, bold, bold_processor):
    """Copies the weights of the model for bold images; number words start from the embeddings of the digits."""
    tokens, old = processor.tokenizer.get_vocab(), bold_processor.tokenizer.get_vocab()
    weights = bold.state_dict()
    known = {token: token for token in tokens if token in old}
    known |= {f"\u0120{word}": str(i) for i, word in enumerate(NUMBERS[:10])}  # \u0120: the tokenizer's space
    for name, own in model.state_dict().items():
        if own.shape != weights[name].shape:  # embeddings and head, tied
            rows = weights[name].mean(0) + 0.6 * weights[name].std(0) * torch.randn(own.shape)
            for token, same in known.items():
                rows[tokens[token]] = weights[name][old[same]]
            weights[name] = rows
    model.load_state_dict(weights)
    model.tie_weights()


def see_faint(model, bold, processor, rng, steps):
    """The vision tower learns the output of the model for bold images on the same scenes."""
    tower, teacher = model.model.visual, bold.model.visual

    def loss_of(step):
        scenes, easy = [draw_scene(rng, 0.4, 1.0) for _ in range(40)], 50 * max(0, 1 - step / (0.3 * steps))
        with torch.no_grad():
            targets = image_states(teacher, processor, map(paint_plain, scenes))
        states = image_states(tower, processor, [paint_faint(scene, rng, easy) for scene in scenes])
        return (states - targets).square().mean() / targets.var(0).mean()

    train(list(tower.parameters()), steps, 2e-3, "see", loss_of)


def answer(model, processor, puzzles, words, rng, steps, peak, name, reported=list, weight=1.0, size=32):
    """Next-token prediction on `size` responses, which read `reported(true counts)` and conclude from them.

    `words`: numbers in words; `weight`: that of a token that is a number, in the mean.
    """
    vocabulary = processor.tokenizer.get_vocab()
    numbers = torch.tensor([i for token, i in vocabulary.items() if token.strip("\u0120") in [*"0123456789", *NUMBERS]])

    def loss_of(_):
        batch = [next(puzzles) for _ in range(size)]
        prompts = [prompt_text(processor, puzzle.problem, INSTRUCTION) for puzzle in batch]
        answers = [puzzle.response(reported(puzzle.counts), rng, words) + "<|im_end|>" for puzzle in batch]
        images = [image for puzzle in batch for image in puzzle.images]
        texts = [prompt + text for prompt, text in zip(prompts, answers)]
        inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        labels = inputs["input_ids"].clone()
        for row, text in enumerate(answers):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", choices=[*TOY_TASKS], default="toy")
    parser.add_argument("--seed", type=int, default=0, help="of images, puzzles, weights and warm-up")
    parser.add_argument("--output", type=Path, help="folder for model/, train.parquet and test.parquet (toy/...)")
    args = parser.parse_args()
    task, output = TOY_TASKS[args.toy], args.output or EMBEDDED[args.toy]
    torch.manual_seed(args.seed)
    rng, word_rng = random.Random(args.seed), random.Random(f"{args.seed} words")
    train_rows = list(task.puzzles(f"{args.seed} train", task.train))
    output.mkdir(parents=True, exist_ok=True)
    write_parquet(output / "train.parquet", train_rows)
    write_parquet(output / "test.parquet", task.puzzles(f"{args.seed} test", task.test))

    texts = []
    for puzzle in train_rows:
        question = "You are a helpful assistant. " + INSTRUCTION + " " + puzzle.problem.replace("<image>", "")
        texts.append(question + puzzle.response(puzzle.counts, word_rng, task.words))
    if task.words:
        texts += [" " + " ".join(NUMBERS)] * 300  # often enough for each to be a token
    processor = make_processor(texts, VOCABULARY[args.toy])
    model = make_model(processor.tokenizer)
    puzzles = task.puzzles(f"{args.seed} warm-up", sys.maxsize)  # endless, with other images than the two files
    see_steps, answer_steps, doubt_steps = STEPS[args.toy]
    teach = functools.partial(answer, model, processor, puzzles, task.words, word_rng)
    miscounted = miscount(rng, MISCOUNTS[args.toy])
    if args.toy == "toy":
        see(model, processor, rng, see_steps)
        teach(answer_steps, 1e-3, "answer")
        teach(doubt_steps, 3e-4, "doubt", miscounted)
    else:
        bold, bold_processor = load_model(EMBEDDED["toy"] / "model"), load_processor(EMBEDDED["toy"] / "model")
        start_from(model, processor, bold, bold_processor)
        see_faint(model, bold, processor, rng, see_steps)
        teach(answer_steps, 1e-3, "answer", weight=6.0, size=16)
        teach(doubt_steps, 3e-4, "doubt", miscounted, size=16)
        model.bfloat16()  # half the size; all scripts load it in fp32
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")
    video = {"video_processor_type": "Qwen2VLVideoProcessor"}  # needed where torchvision is installed
    (output / "model" / "video_preprocessor_config.json").write_text(json.dumps(video) + "\n")


if __name__ == "__main__":
    main()
