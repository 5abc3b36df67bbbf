"""Things to look at and to copy: training curves, a page of which tokens each method rewards,
what the methods assume, measured, pages for a lecture, and a method's functions.

    python show.py curves runs/*                # curves.png and curves.svg, and a table; folders name-0, name-1: seeds
    python show.py tokens --model toy           # tokens.html: the same responses as every method sees them
    python show.py signals --model toy-faint    # signals.png, signals.json, a table: do the papers' assumptions hold?
    python show.py signals --model runs/vepo/last --data mine.parquet --prompts 64
    python show.py functions pepo > pepo_functions.py    # a method's plain functions, to copy: they need torch
    python show.py lecture                      # lecture/*.html: formulas, code and what it gives, side by side

`python show.py signals --help` (curves, tokens, lecture) lists its flags.
"""

import ast
import base64
import contextlib
import dataclasses
import html
import inspect
import io
import itertools
import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import stdtrit
from tqdm.auto import tqdm

import common
import grpo
import pepo
import prpo
import saei
import vepo
import vgpo
import vppo
from common import (
    Reward,
    compare_logits,
    forward,
    group_advantages,
    load_model,
    load_processor,
    min_max,
    rollout,
    seeded,
    split_group,
    still_noise,
    with_image,
)
from plumbing.arguments import EMBEDDED, SharedArgs, UserError, check_numbers, flag, model_source, parse_args
from plumbing.checkpoints import trained_with
from plumbing.data import Data
from plumbing.families import patches_of, unpatchify
from plumbing.metrics import draw_curves, read_runs
from toy.kinds import KINDS, kinds_of

# The flags of training that pages and signals read.
USED = ["data", "eval_split", "data_revision", "image_column", "problem_column", "answer_column", "instruction"]
USED += ["max_prompt_tokens", "min_pixels", "max_pixels", "group_size", "max_response_tokens", "temperature", "top_p"]
USED += ["top_k", "reward", "accuracy_weight", "format_weight", "check_seconds", "seed"]
FIELDS = [f for f in dataclasses.fields(SharedArgs) if f.name in USED]
OfTraining = dataclasses.make_dataclass(
    "OfTraining",
    [(f.name, f.type, dataclasses.field(default=None, metadata=f.metadata)) for f in FIELDS],
    namespace={"__doc__": "of training; where not given, a checkpoint's own, then the defaults of training"},
)


@dataclasses.dataclass
class ShownArgs(OfTraining):
    """model"""

    model: str = flag("toy", "hub id, folder or checkpoint of a Qwen-VL or InternVL3; built-in: toy, toy-faint")
    model_revision: str = flag("main", "branch, tag or commit of a hub model")

    def __post_init__(self):
        check_numbers(self)
        given = {name: value for name, value in vars(self).items() if value is not None}
        trained = trained_with(self.model)
        trained["data"] = trained.get("eval_data") or trained.get("data")  # --eval_split is a split of that one
        settings = {name: given.get(name, trained.get(name)) for name in USED}
        settings = {name: value for name, value in settings.items() if value is not None}
        base = trained.get("model", self.model)  # a checkpoint of the toy has the toy's defaults
        vars(self).update({**vars(SharedArgs(model=base, cuda_graphs=False, **settings)), **given})


@dataclasses.dataclass
class TokenArgs(ShownArgs):
    prompts: int = flag(3, "prompts that are shown, those with an image, a right and a wrong response", gt=0)
    page: str = flag("tokens.html", "file that is written")


@dataclasses.dataclass
class SignalArgs(ShownArgs):
    prompts: int = flag(128, "prompts with an image that are measured, the first ones of the data", gt=0)
    output: str = flag(".", "folder that signals.json and signals.png are written to")


@dataclasses.dataclass
class LectureArgs(ShownArgs):
    model: str = flag("toy-faint", "as of show.py tokens")
    output: str = flag("lecture", "folder that the pages are written to")


@dataclasses.dataclass
class CurveArgs:
    runs: list[str] = flag(dataclasses.MISSING, "folders, as in: curves runs/*; name-0, name-1 ...: seeds of a method")
    output: str = flag("curves", "file that is written, as .png and as .svg")
    window: int = flag(10, "steps that are averaged, except for evaluations; 1: none")


def run_of(model, processor=None):
    """The parts of a trainer that a method's functions use, for a model that is not being trained."""
    return SimpleNamespace(
        model=model,
        processor=processor,
        tokenizer=getattr(processor, "tokenizer", None),
        metrics=SimpleNamespace(add=lambda *_: None, add_means=lambda *_: None),
        world_size=1,
        phase=lambda _: contextlib.nullcontext(),
        with_gradient=lambda rows, **_: rows,
    )


def load(args):
    """The model, as a trainer has it, and the data."""
    source = model_source(args)
    processor = load_processor(source, args.model_revision, args.min_pixels, args.max_pixels)
    model = load_model(source, args.model_revision)
    if args.model not in EMBEDDED:
        model.activation_checkpointing_enable({"use_reentrant": False})  # SaEI's attack has a backward pass
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    split = "test" if args.data in EMBEDDED else args.eval_split
    return run_of(model, processor), Data(args.data, split, args, processor, model)


def vppo_row(row, logps, trainer, args):
    """A row with VPPO's scores and weights, with default constants, as if it were the whole mini-batch."""
    row = dataclasses.replace(row, old_logps=logps, loss_mask=row.mask)
    vppo.set_scores([row], trainer, vppo.Args(seed=args.seed, temperature=args.temperature), 0)
    vppo.set_weights([row], trainer, vppo.Args())
    return row


@torch.no_grad()
def image_signals(row, trainer, args):
    """What the methods, with their default constants, measure on the responses to a prompt with an image.

    Returns {name: (G, T)}, and the row's hidden states (L, D) under the clean and under VEPO's noised image. `weight`
    is PEPO's at the end of a run (lambda = 1).
    """
    model, mask, temperature = trainer.model, row.mask, args.temperature
    settings = {"seed": args.seed, "temperature": temperature}
    noised = vepo.noised_hidden(row, trainer, vepo.Args(**settings), 0)
    views = prpo.perturbed_hidden(row, trainer, prpo.Args(**settings), 0)
    logps, entropy, hidden = forward(model, row, temperature)
    jsd, _, noised_entropy = compare_logits(vepo.divergences, model, row, hidden, noised, temperature=temperature)
    kl_strong, kl_weak = compare_logits(prpo.divergences, model, row, hidden, *views, temperature=temperature)
    reweighted = dataclasses.replace(row)
    pepo.scoring_forward(reweighted, trainer, pepo.Args(**settings))
    dependent, brittle = (min_max(kl.log1p(), mask) > 0.5 for kl in (kl_strong, kl_weak))
    vepo_score = vepo.token_scores(jsd, entropy, noised_entropy, mask)
    focus = vgpo.row_focus(hidden, row, vgpo.Args())
    _, psi, compensated = vgpo.group_factors(focus, mask)
    signals = {
        "probability": logps.exp(),
        "entropy": entropy,
        "entropy_gap": (noised_entropy - entropy).abs(),
        "jsd": jsd,
        "vepo_score": vepo_score,
        "kept_by_entropy": vepo.select_top(entropy, mask, vepo.Args.keep_ratio),
        "kept_by_vepo": vepo.select_top(vepo_score, mask, vepo.Args.keep_ratio),
        "kept_by_jsd": vepo.select_top(jsd, mask, vepo.Args.keep_ratio) & (jsd > 0),
        "focus": focus,
        "compensated": compensated,
        "late_gate": vgpo.late_gate(focus, mask),
        "psi": psi,
        "kl_strong": kl_strong,
        "kl_weak": kl_weak,
        "dependent_stable": dependent & ~brittle,
        "dependent_brittle": dependent & brittle,
        "rvd": prpo.robust_visual_dependency(kl_strong, kl_weak, mask),
        "similarity": reweighted.scores,
        "weight": reweighted.weights,
    }
    return {name: values.float() for name, values in signals.items()}, hidden, noised


def split_images(pixel_values, prompt, trainer):
    """The images (3, H, W) in [0, 1] of a prompt's pixel_values."""
    grids, processor = prompt.image_grid_thw, trainer.processor.image_processor
    return unpatchify(saei.to_pixels(pixel_values, processor)[0].clamp(0, 1), grids, processor)


# ---- Tokens: a page of what the methods make of the same responses --------------------------------------------------

SCORES = {
    "GRPO": "none",
    "VEPO": "high where the policy is uncertain and noise on the image changes its prediction; 0 where it is certain",
    "VGPO": "visual focus: how similar the token's last hidden state is to the image's, from 0 to 1",
    "PRPO": "near 1 where blackened patches change the token and weak noise does not (our reading of the paper)",
    "PEPO": "how similar the token's hidden states, in all layers, are to the image's, from -1 to 1",
    "SaEI": "1 on the middle third of a response's tokens by entropy: the attack aims to raise their entropy",
    "VPPO": "how much blackened patches change the token's probability: exp(d) - d - 1, from 0 to 10",
}
ADVANTAGES = {
    "GRPO": "the response's, on every token: its reward minus its group's mean, in standard deviations",
    "VEPO": "only on the best 20 % of a response's tokens, rounded up: tokens with a score next to 0 may be kept too",
    "VGPO": "times 0.1 to 2, more on tokens with a high focus, the most on late ones; times 0.9 to 2 for the response",
    "PRPO": "times 1 + 2 x score: on no token less than the response's",
    "PEPO": "times weights of mean 1: more on tokens that are similar to the image, or uncertain",
    "SaEI": "as GRPO's: the attack changes what half of the responses are sampled from, not the loss",
    "VPPO": "only on the best 40 % of a response's tokens; times f, 0.9 or more, mean 1 over the responses",
}
SIGNALS = {
    "entropy": "entropy {} nats",
    "jsd": "noise on the image moves this token's distribution by JSD {} nats",
    "kl_strong": "blackened patches by KL {} nats",
    "kl_weak": "weak noise by KL {} nats",
    "focus": "visual focus {} (0 to 1)",
    "similarity": "similarity to the image {} (-1 to 1)",
}
AMPLIFIED = 60  # so that a step of 2/255 spans half of the range of colours
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Tokens</title><style>
:root { color-scheme: light dark; --soft: color-mix(in srgb, CanvasText 65%, Canvas); }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem 1rem 12rem; }
h2 { border-top: 1px solid; padding-top: 1rem; font-size: 1.1rem; }
figure { display: inline-block; width: min-content; margin: 0 1rem 1rem 0; text-align: center; vertical-align: top; }
figure img { display: block; width: 8.5rem; image-rendering: pixelated; margin: auto; }
figure, .soft, .method i { color: var(--soft); font-size: .8rem; font-style: normal; }
.method { display: grid; grid-template-columns: 4rem 5rem 1fr; align-items: baseline; }
.method b { grid-row: span 2; }
.tokens { font-family: monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
[style] { background: color-mix(in srgb, var(--c) calc(var(--v) * 75%), transparent); }
.s { --c: #8e6bd1; } .p { --c: #3d8bd9; } .n { --c: #e08a1e; } .z { color: var(--soft); }
.n { text-decoration: underline dotted var(--c); }
[data-w]:hover { outline: 2px solid; }
[data-w]:hover::after { content: attr(data-w); position: fixed; inset: auto 0 0 0; padding: .5rem 1rem;
                        font-size: .85rem; color: CanvasText; background: Canvas; white-space: pre-line; }
</style><h1>Which tokens does each method reward?</h1>
<p>The same responses, as each method with its default constants sees them. A score is
<span class="s" style="--v:1">violet</span>, from the lowest (clear) to the highest (full) of the two responses to a
prompt. An advantage is <span class="p" style="--v:1">blue</span> on tokens that the update makes likelier,
<span class="n" style="--v:1">orange and dotted</span> on those that it makes less likely,
<span class="z">pale</span> where it is 0: not trained. All advantages under a question have one scale: the colour is
full at the largest of them. Point at a token, or tap it.</p>
"""


def score_tokens(group, trainer, args):
    """What every method, with its default constants, makes of the same responses; factors are those of a first update.

    Returns {method: (scores or None, factors of the advantage)}, {signal: values}, all (G, T), and the prompt's images
    as the methods see them: {caption: [(3, H, W) in [0, 1]]}.
    """
    mask, seen = group.mask, []

    def keep_images(_, args, inputs):  # the page shows what the model was given
        seen.append(patches_of(trainer.model.config, inputs["pixel_values"], group.prompt.image_grid_thw))

    with trainer.model.model.register_forward_pre_hook(keep_images, with_kwargs=True):
        signals, _, _ = image_signals(group, trainer, args)
    focused = dataclasses.replace(group, scores=signals["focus"])
    vgpo.set_weights([focused], trainer, vgpo.Args())
    dependent = vppo_row(group, signals["probability"].log(), trainer, args)
    methods = {
        "GRPO": (None, mask),
        "VEPO": (signals["vepo_score"], signals["kept_by_vepo"]),
        "VGPO": (signals["focus"], focused.weights),
        "PRPO": (signals["rvd"], prpo.token_weights(signals["rvd"], mask)),
        "PEPO": (signals["similarity"], signals["weight"]),
        "SaEI": (saei.middle_third(signals["entropy"], mask).float(), mask),
        "VPPO": (dependent.scores, dependent.weights),
    }
    noise, strong, weak, clean, _ = seen
    views = {"the image": clean, "VEPO: noise": noise, "PRPO: patches blackened": strong, "PRPO: weak noise": weak}
    attack = saei.Args(seed=args.seed, temperature=args.temperature)
    views["SaEI: attacked, 2/255"] = saei.attack(group, trainer, attack).pixel_values
    images = {caption: split_images(pixels.cpu(), group.prompt, trainer) for caption, pixels in views.items()}
    pairs = zip(images["the image"], images["SaEI: attacked, 2/255"])
    added = [(0.5 + AMPLIFIED * (after - before)).clamp(0, 1) for before, after in pairs]
    return methods, signals, images | {f"SaEI: what the attack adds, {AMPLIFIED} times, around grey": added}


def note(method, score, weight, advantage):
    """The text of a token: a method's score of it, and its weight on the response's advantage."""
    value = f"{advantage * weight:+.3g}" if weight else "0"
    reason = f"the response's {advantage:+.3g} x {weight:.2f}"
    if method in ("VEPO", "VPPO") and not weight:
        reason = f"not among the best {20 if method == 'VEPO' else 40} %: left out of the policy loss"
    elif method == "VEPO":
        reason = "kept"
    return f"{method}: {'' if score is None else f'score {score:.2g}, '}advantage {value} ({reason})"


def spans(tokens, notes, shares, kinds):
    """Tokens as HTML: each in the colour of its kind, with a share (T,) in [0, 1] of it, and with its hover text."""
    parts = []
    for token, said, share, kind in zip(tokens, notes, shares.tolist(), kinds):
        text = html.escape(token).replace("\n", "↵\n")
        parts.append(f'<span class="{kind}" style="--v:{share:.2f}" data-w="{html.escape(said)}">{text}</span>')
    return "".join(parts)


def method_row(name, kind, **lines):
    """The HTML of a method's name next to its lines of `kind` "tokens" or "words"."""
    parts = [f'<i>{what}</i><div class="{kind}">{line}</div>' for what, line in lines.items()]
    return f'<div class="method"><b>{name}</b>{"".join(parts)}</div>'


def image_tag(image):
    """An image (3, H, W) in [0, 1], inside the page itself."""
    file = io.BytesIO()
    Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(file, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def section(group, trainer, args):
    """The HTML of one prompt that has an image, with a right and a wrong response to it."""
    methods, signals, images = score_tokens(group, trainer, args)
    advantages = {name: group.advantages[:, None] * weights for name, (_, weights) in methods.items()}  # (G, T)
    shown = [int(group.accuracy.argmax()), int(group.accuracy.argmin())]
    largest = max(values[shown].abs().max().item() for values in advantages.values())  # one scale for all methods
    scale = f"Full colour: an advantage of {largest:.3g} or {-largest:.3g}."
    parts = [f"<h2>{html.escape(group.prompt.problem.replace('<image>', '').strip())}</h2><p class=soft>{scale}</p>"]
    for caption, of_prompt in images.items():
        parts.append(f"<figure>{''.join(map(image_tag, of_prompt))}{html.escape(caption)}</figure>")
    for kind, i in zip(("right", "wrong"), shown):
        length, advantage = group.lengths[i], group.advantages[i].item()
        answer = f"advantage {advantage:+.2f}, the answer is {html.escape(group.prompt.answer)}"
        parts.append(f"<h3>A {kind} response <small>({answer})</small></h3>")
        tokens = [trainer.tokenizer.decode([token]) for token in group.responses[i, :length].tolist()]
        for name, (scores, weights) in methods.items():
            notes, lines = [], {}
            for t, token in enumerate(tokens):
                measured = [text.format(f"{signals[signal][i, t]:.2g}") for signal, text in SIGNALS.items()]
                said = note(name, None if scores is None else scores[i, t], weights[i, t].item(), advantage)
                notes.append(f"“{token}”: {'; '.join(measured)}\n{said}")
            if scores is not None:
                low, high = scores[shown][group.mask[shown]].aminmax()  # one scale for both responses
                shares = (scores[i, :length] - low) / (high - low).clamp(min=1e-5)  # smaller differences are rounding
                lines["score"] = spans(tokens, notes, shares, "s" * length)
            own = advantages[name][i, :length]
            kinds = ["zpn"[sign] for sign in own.sign().int().tolist()]  # 0: zero, 1: positive, -1: negative
            lines["advantage"] = spans(tokens, notes, own.abs() / max(largest, 1e-12), kinds)
            parts.append(method_row(name, "tokens", **lines))
    return "\n".join(parts)


def mixed_groups(trainer, data, args, count):
    """`count` groups, at most, with a right and a wrong response, to the first prompts with an image. Or UserError."""
    reward, groups, prompt_id = Reward(args), [], -1
    for prompt_id, index in enumerate(data.indices[:200]):
        prompt = dataclasses.replace(data.prompt(index), prompt_id=prompt_id)
        if prompt.pixel_values is None:
            continue
        (group,) = reward(rollout(trainer.model, trainer.tokenizer, [prompt], args, "show"))
        group.advantages = group_advantages(group.rewards[None])[0].to(group.mask.device)
        if 0 < group.accuracy.sum() < len(group.accuracy):
            groups.append(group)
        if len(groups) == count:
            break
    reward.check.close()
    if not groups:
        what = f"no prompt of {prompt_id + 1} has an image, a right and a wrong response"
        raise UserError(f"{what}: raise --group_size, or use data with images and a model that solves some of it.")
    return groups


def token_page(args):
    """One self-contained HTML page for --prompts prompts with an image, a right and a wrong response."""
    trainer, data = load(args)
    sections = [section(group, trainer, args) for group in mixed_groups(trainer, data, args, args.prompts)]
    words = [method_row(name, "words", score=SCORES[name], advantage=text) for name, text in ADVANTAGES.items()]
    return "\n".join([PAGE, *words, *sections, "</html>\n"])


# ---- Signals: what the methods assume of a model, measured ----------------------------------------------------------

THIRDS = ["lowest", "middle", "highest"]
TITLES = {  # name in signals.json: what it is
    "accuracy": "responses that are right",
    "format": "responses in the right format",
    "response_tokens": "tokens of a response",
    "missed_by_entropy": "VEPO: of the top 20 % of tokens by JSD (if above 0), those not among the top 20 % by entropy",
    "missed_by_entropy_clearly": "VEPO: the same, of those with a JSD above 0.001 nats",
    "jsd_kept_by_jsd": "VEPO: share of all JSD on the top 20 % of tokens by JSD, the most that a choice can keep",
    "jsd_kept_by_entropy": "VEPO: the same by entropy",
    "jsd_kept_by_vepo": "VEPO: the same by its score",
    "changed_by_noise": "VEPO: sampled tokens that its noise would change (total variation)",
    "focus_and_position": "VGPO: correlation of focus with position in the response",
    "focus_and_accuracy": "VGPO: correlation of a response's mean focus with being right, in a group",
    "kl_strong": "PRPO: KL under the strong view, nats per token",
    "kl_weak": "PRPO: KL under the weak view",
    "rvd": "PRPO: robust visual dependency",
    "dependent_stable": "PRPO: tokens that are dependent and stable (VD above 1/2, VI below)",
    "dependent_brittle": "PRPO: tokens that are dependent and brittle (both above 1/2)",
    "similarity": "PEPO: similarity to the image, -1 to 1",
    "similarity_right_minus_wrong": "PEPO: similarity, right minus wrong responses of a group",
    "entropy_right_minus_wrong": "PEPO: entropy, right minus wrong, nats per token",
    "weight_spread": "PEPO: standard deviation of the weights in a response",
    **{f"entropy_{third}": f"SaEI: entropy of the {third} third, nats per token" for third in THIRDS},
    **{f"entropy_{third}_attacked": f"SaEI: the {third} third, after the attack" for third in THIRDS},
    **{f"entropy_{third}_random": f"SaEI: the {third} third, after a step of random signs" for third in THIRDS},
    "changed_by_attack": "SaEI: sampled tokens that the attack would change (total variation)",
    "changed_by_random": "SaEI: sampled tokens that the random step would change",
}
PAPERS = {"missed_by_entropy": "0.41 (VEPO, Qwen2.5-VL-7B)"}
BY_KIND = ["entropy", "jsd", "changed_by_noise", "kl_strong", "kl_weak", "rvd", "focus", "similarity", "weight"]
BY_KIND += ["changed_by_attack", "changed_by_random", "kept_by_entropy", "kept_by_vepo"]
CLEAR = 1e-3  # nats of JSD: rounding alone causes far smaller values
BINS = 10  # of a response, for focus against position


def total_variations(logits, *others):
    """The share of draws that have to change, sum |p - q| / 2, for each of the others: (...) each from logits (..., V).

    >>> total_variations(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log())
    [tensor([0.2500])]
    """
    return [(logits.softmax(-1) - other.softmax(-1)).abs().sum(-1) / 2 for other in others]


def random_step(prompt, trainer, seed):
    """The prompt's pixel_values after a step as large as SaEI's, with random signs: what any small change does."""
    generator, step = seeded(seed, prompt.index, "signs"), saei.Args.step
    pixels, mean, std = saei.to_pixels(prompt.pixel_values, trainer.processor.image_processor)
    return (saei.adversarial_step(pixels, still_noise(pixels, generator), step) - mean) / std


def token_signals(group, trainer, args):
    """{name: (G, T)} of one prompt: `image_signals`, and what noise, SaEI's attack and a random step change."""
    model, temperature, rows = trainer.model, args.temperature, []
    attacked = saei.attack(group, trainer, saei.Args(seed=args.seed, temperature=temperature)).pixel_values
    steps = {"attacked": attacked, "random": random_step(group.prompt, trainer, args.seed)}
    for row in split_group(group, args.tokens_per_row):
        signals, hidden, noised = image_signals(row, trainer, args)
        states = [noised]
        with torch.no_grad():
            for name, pixels in steps.items():
                moved = with_image(row, lambda _, pixels=pixels: pixels)
                _, signals[f"entropy_{name}"], moved_hidden = forward(model, moved, temperature)
                states.append(moved_hidden)
            changed = compare_logits(total_variations, model, row, hidden, *states, temperature=temperature)
        signals |= zip(("changed_by_noise", "changed_by_attack", "changed_by_random"), changed)
        rows.append(signals)
    return {name: torch.cat([signals[name] for signals in rows]).cpu() for name in rows[0]}


def correlation(x, y):
    """Pearson's, of two tensors (n,); NaN where one of them does not vary."""
    return torch.corrcoef(torch.stack([x, y.float()]))[0, 1].item()


def response_signals(tokens, kinds):
    """{name: value} of one response, from its tokens' signals (T,) and their kinds, None where these are not known."""
    jsd, focus, T = tokens["jsd"], tokens["focus"], len(tokens["jsd"])
    found = {name: tokens[name].mean() for name in BY_KIND}
    missed = tokens["kept_by_jsd"] * (1 - tokens["kept_by_entropy"])
    clear = jsd > CLEAR
    found["response_tokens"] = T
    found["missed_by_entropy"] = missed.sum() / tokens["kept_by_jsd"].sum()
    found["missed_by_entropy_clearly"] = missed[clear].sum() / tokens["kept_by_jsd"][clear].sum()
    for name in ("jsd", "entropy", "vepo"):
        found[f"jsd_kept_by_{name}"] = (jsd * tokens[f"kept_by_{name}"]).sum() / jsd.sum()
    position = torch.arange(T)
    found["focus_and_position"] = correlation(focus, position)
    for b in range(BINS):
        found[f"focus_{b}"] = focus[position * BINS // T == b].mean()
    for name in ("dependent_stable", "dependent_brittle"):
        found[name] = tokens[name].mean()
    found["weight_spread"] = tokens["weight"].std(correction=0)
    order = tokens["entropy"].sort(stable=True).indices
    for third, part in zip(THIRDS, order.tensor_split((T // 3, 2 * T // 3))):
        for after in ("", "_attacked", "_random"):
            found[f"entropy_{third}{after}"] = tokens[f"entropy{after}"][part].mean()
    for kind in KINDS if kinds else ():
        own = torch.tensor([k == kind for k in kinds])
        found[f"{kind}_share"] = own.float().mean()
        for name in BY_KIND:
            found[f"{kind}_{name}"] = tokens[name][own].mean()  # NaN where there is none
    return {name: float(value) for name, value in found.items()}


def group_signals(group, trainer, args, embedded):
    """{name: value} of one prompt: means over its responses, and how the right ones differ from the wrong ones."""
    signals, responses = token_signals(group, trainer, args), []
    for i, valid in enumerate(group.mask.cpu()):
        tokens = [trainer.tokenizer.decode([token]) for token in group.responses[i].cpu()[valid].tolist()]
        own = {name: values[i][valid] for name, values in signals.items()}
        responses.append(response_signals(own, kinds_of(tokens) if embedded else None))
    values = {name: torch.tensor([response[name] for response in responses]) for name in responses[0]}
    found = {name: x.nanmean() for name, x in values.items()}
    found["accuracy"], found["format"] = group.accuracy.mean(), group.format.mean()
    right = group.accuracy > 0.5
    for name in [f"focus_{b}" for b in range(BINS)]:
        found[f"{name}_right"], found[f"{name}_wrong"] = values[name][right].nanmean(), values[name][~right].nanmean()
    for name in ("similarity", "entropy"):
        found[f"{name}_right_minus_wrong"] = values[name][right].mean() - values[name][~right].mean()
    found["focus_and_accuracy"] = correlation(values["focus"], right)
    return {name: float(value) for name, value in found.items()}


def interval(values):
    """Mean, 95 % interval and number of the finite values, one for each prompt; None where there is none."""
    values = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    n = len(values)
    if n < 2:
        return {"mean": values.item() if n else None, "low": None, "high": None, "prompts": n}
    mean, half = values.mean().item(), stdtrit(n - 1, 0.975) * values.std().item() / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "prompts": n}


def measure_signals(args):
    """{name: {mean, low, high, prompts}} over --prompts prompts that have an image."""
    trainer, data = load(args)
    reward, found, device = Reward(args), [], trainer.model.device.type
    with_images = (prompt for prompt in map(data.prompt, data.indices) if prompt.pixel_values is not None)
    bar = tqdm(itertools.islice(with_images, args.prompts), desc="signals", total=args.prompts, unit="prompt")
    for prompt_id, prompt in enumerate(bar):
        prompt = dataclasses.replace(prompt, prompt_id=prompt_id)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # as in training
            (group,) = reward(rollout(trainer.model, trainer.tokenizer, [prompt], args, "signals"))
            found.append(group_signals(group, trainer, args, args.data in EMBEDDED))
    reward.check.close()
    if not found:
        raise UserError(f"--data {args.data} has no prompt with an image: there is nothing to perturb.")
    return {name: interval([values[name] for values in found]) for name in found[0]}


def signal_table(found):
    """Yields the lines of a table: each signal with its interval, and the paper's figure; then by kind of token."""

    def shown(name):
        mean, high = found[name]["mean"], found[name]["high"]
        if mean is None:
            return "-"
        return f"{mean:.3g}" if high is None else f"{mean:.3g} ± {high - mean:.2g}"

    width = max(map(len, TITLES.values()))
    heading = f"mean over {found['accuracy']['prompts']} prompts, 95 % interval"
    yield f"{heading:{width}s}  measured             the paper"
    for name, title in TITLES.items():
        yield f"{title:{width}s}  {shown(name):20s} {PAPERS.get(name, '')}".rstrip()
    if "read_share" in found:
        yield f"{'by kind of token':20s}" + "".join(f"{kind:>22s}" for kind in KINDS)
        for name in ("share", *BY_KIND):
            yield f"{name:20s}" + "".join(f"{shown(f'{kind}_{name}'):>22s}" for kind in KINDS)


def draw_signals(found, path):
    """Draws what has an interval: a panel for each method, for focus by position, and by kind of token where known."""
    methods = ("VEPO", "VGPO", "PRPO", "PEPO", "SaEI")
    panels = [{name: title for name, title in TITLES.items() if title.startswith(method)} for method in methods]
    bins = {b: f"VGPO: focus from {100 * b // BINS} % of the response on" for b in range(BINS)}
    panels.append({f"focus_{b}_{kind}": f"{title}, {kind}" for kind in ("right", "wrong") for b, title in bins.items()})
    if "read_share" in found:
        panels.append({f"{kind}_{name}": f"{kind}: {name}" for name in BY_KIND[:3] for kind in KINDS})
    figure = Figure(figsize=(18, 14), layout="constrained")
    for number, titles in enumerate(panels, 1):
        axes = figure.add_subplot(4, 2, number)
        for i, name in enumerate(titles):
            mean, high = found[name]["mean"], found[name]["high"]
            if high is not None:
                axes.errorbar(mean, i, xerr=high - mean, fmt="o", capsize=3, color="#8e6bd1")
        axes.set_yticks(range(len(titles)), titles.values(), fontsize=8)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        if "entropy_lowest" in titles:  # which is far smaller than the others
            axes.set_xscale("log")
    figure.savefig(path, dpi=80)


# ---- Functions: the plain ones of a method, and those that they call, as one file -----------------------------------

FUNCTIONS = {
    "grpo": (grpo, ["group_advantages", "policy_loss", "kl_penalty"]),
    "vepo": (vepo, ["add_noise", "diffuse", "compare_states", "divergences", "token_scores", "select_top"]),
    "vgpo": (vgpo, ["visual_focus", "group_factors"]),
    "prpo": (
        prpo,
        ["blacken", "add_pixel_noise", "compare_states", "divergences", "robust_visual_dependency", "token_weights"],
    ),
    "pepo": (pepo, ["visual_similarity", "token_weights", "mixing_strength"]),
    "saei": (saei, ["middle_third", "adversarial_step", "attack_pixels"]),
    "vppo": (vppo, ["blacken", "visual_dependency", "select_top", "response_factors"]),
}


def add_source(function, sources, imports):
    """Adds the source of a function to `sources`, {name: source}, after those of ours that it calls.

    `imports`: lines for what it uses of torch and math.
    """
    known, source = vars(inspect.getmodule(function)), inspect.getsource(function)
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    for name in sorted(names & known.keys() - sources.keys() - {function.__name__}):
        value = known[name]
        if inspect.ismodule(value):
            imports.add(f"import {name}")
        elif value is getattr(torch.nn.functional, name, None):
            imports.add(f"from torch.nn.functional import {name}")
        elif inspect.isfunction(value):
            add_source(value, sources, imports)
        else:
            sources[name] = f"{name} = {value!r}\n"
    sources[function.__name__] = source


def function_page(method):
    """The plain functions of a method as a Python file that imports torch and math alone, with their doctests."""
    module, names = FUNCTIONS[method]
    sources, imports = {}, {"import torch"}
    for name in names:
        add_source(vars(module).get(name) or getattr(common, name), sources, imports)
    formulas = module.__doc__.partition("\n    python ")[0].rstrip()
    header = [f'"""{formulas}', "", f"Printed by `python show.py functions {method}`. MIT licence.", '"""', ""]
    lines = [*header, *sorted(imports, key=lambda line: (line.startswith("from"), line))]
    return "\n".join(lines) + "\n" + "".join(f"\n\n{source}" for source in sources.values())


def main():
    command, *flags = sys.argv[1:] or [""]
    classes = {"curves": CurveArgs, "tokens": TokenArgs, "signals": SignalArgs, "lecture": LectureArgs}
    if command == "functions" and flags and flags[0] in FUNCTIONS:
        print(function_page(flags[0]), end="")
        return
    if command not in classes:
        print(__doc__)
        sys.exit(0 if command in ("-h", "--help") else 2)
    if command == "curves" and flags and not flags[0].startswith("-"):
        flags = ["--runs", *flags]
    sys.argv[0] += f" {command}"  # as --help calls it
    args = parse_args(classes[command], flags)
    torch.compiler.set_stance("force_eager")  # for a few prompts: compiling would take longer than it saves
    if command == "curves":
        lines = draw_curves(read_runs(args.runs), args.output, args.window)
        print(*lines, f"{args.output}.png, {args.output}.svg", sep="\n")
    elif command == "tokens":
        Path(args.page).parent.mkdir(parents=True, exist_ok=True)  # before the work is done
        Path(args.page).write_text(token_page(args))
        print(args.page)
    elif command == "lecture":
        try:
            pages = runpy.run_module("lecture.pages")
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is missing: pip install -r lecture/requirements.txt") from None
        pages["write_pages"](args)
    else:
        file = Path(args.output) / "signals.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        found = measure_signals(args)
        print(*signal_table(found), sep="\n")
        settings = {name: getattr(args, name) for name in ("model", "data", "seed", "group_size", "temperature")}
        file.write_text(json.dumps({**settings, "papers": PAPERS, "signals": found}, indent=1) + "\n")
        draw_signals(found, file.with_suffix(".png"))
        print(f"{file}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
