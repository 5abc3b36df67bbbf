"""Images: training curves, a page of which tokens each method rewards, and what the methods presume, measured.

    python show.py curves runs/*                # curves.png and curves.svg, and a table; folders name-0, name-1: seeds
    python show.py tokens --model toy           # tokens.html: the same responses as every method sees them
    python show.py signals --model toy-faint    # signals.png, signals.json, and a table: do the papers' premises hold?
    python show.py signals --model runs/vepo/last --data mine.parquet --prompts 64

`python show.py signals --help` (curves, tokens) lists its flags.
"""

import base64
import contextlib
import dataclasses
import functools
import html
import io
import itertools
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import stdtrit
from tqdm.auto import tqdm

import pepo
import prpo
import saei
import vepo
import vgpo
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
    with_image,
)
from plumbing.arguments import (
    EMBEDDED,
    SharedArgs,
    UserError,
    cannot_write,
    check_numbers,
    flag,
    model_source,
    parse_args,
)
from plumbing.checkpoints import trained_with, write_text
from plumbing.data import Data
from plumbing.families import patches_of
from plumbing.metrics import draw_curves, read_runs
from toy.kinds import KINDS, kinds_of

# The flags of training that pages and signals read.
USED = ["data", "eval_split", "data_revision", "image_column", "problem_column", "answer_column", "instruction"]
USED += ["max_prompt_tokens", "min_pixels", "max_pixels", "group_size", "max_response_tokens", "temperature", "top_p"]
USED += ["top_k", "reward", "accuracy_weight", "format_weight", "check_seconds", "seed"]


def without_value(f):
    """A flag of the training scripts that has no value unless it is given: `ShownArgs` finds one."""
    text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
    return f.name, f.type, dataclasses.field(default=None, metadata={**f.metadata, "help": text})


OfTraining = dataclasses.make_dataclass(
    "OfTraining",
    [without_value(SharedArgs.__dataclass_fields__[name]) for name in USED],
    namespace={"__doc__": "of training; where not given, a checkpoint's own, then these defaults"},
)


@dataclasses.dataclass
class ShownArgs(OfTraining):
    """model"""

    model: str = flag("toy", "hub id, folder or checkpoint of a Qwen-VL or InternVL3; embedded: toy, toy-faint")
    model_revision: str = flag("main", "branch, tag or commit of a hub model")
    reshard_while_sampling = cuda_graphs = False  # flags of training's sampler: one process, one prompt at a time
    rollout_prompts, tokens_per_row = 1, SharedArgs.tokens_per_row

    def __post_init__(self):
        check_numbers(self)
        trained = trained_with(self.model)
        trained["data"] = trained.get("eval_data") or trained.get("data")  # --eval_split is a split of that one
        given = {name: value for name in USED if (value := getattr(self, name)) is not None}
        known = {name: trained[name] for name in USED if trained.get(name) is not None} | given
        training = SharedArgs(model=trained.get("model", self.model), **known)  # the toy's child has the toy's defaults
        vars(self).update({name: getattr(training, name) for name in USED})


@dataclasses.dataclass
class TokenArgs(ShownArgs):
    prompts: int = flag(3, "prompts that are shown, those with a right and a wrong response", gt=0)
    page: str = flag("tokens.html", "file that is written")


@dataclasses.dataclass
class SignalArgs(ShownArgs):
    prompts: int = flag(128, "prompts with an image that are measured, the first ones of the data", gt=0)
    output: str = flag(".", "folder that signals.json and signals.png are written to")


@dataclasses.dataclass
class CurveArgs:
    runs: list[str] = flag(dataclasses.MISSING, "folders, as in: curves runs/*; name-0, name-1 ...: seeds of a method")
    output: str = flag("curves", "file that is written, as .png and as .svg")
    window: int = flag(10, "steps that are averaged, but for evaluations; 1: none", gt=0)

    def __post_init__(self):
        check_numbers(self)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens: what the methods make of the same responses
# ---------------------------------------------------------------------------------------------------------------------

METHODS = {  # its score of a token, and what it makes of the advantage
    "GRPO": ("none", "the response's own, on every token: its reward against its group's mean, in standard deviations"),
    "VEPO": (
        "high where the policy is uncertain and noise on the image moves what it predicts; 0 where it is certain",
        "only the best 20 % of a response's tokens are trained, the others have 0. Their number is fixed, rounded up "
        "and at least 1: where fewer stand out, tokens with a score next to 0 are kept too, of equal ones the earlier",
    ),
    "VGPO": (
        "visual focus, how near the token's last state is to the image's, from 0 to 1",
        "the response's, times 0.1 to 2, more on tokens that look at the image, the most on late ones; and times "
        "0.9 to 2, more for a response that looks more than the others of its group",
    ),
    "PRPO": (
        "near 1 where blackened patches move the token and weak noise does not (our reading of the paper)",
        "the response's, times 1 + 2 x score: on no token less than the response's",
    ),
    "PEPO": (
        "how similar the token's states, in all layers, are to the image's, from -1 to 1",
        "the response's, times weights of mean 1: more on tokens that resemble the image, or are uncertain",
    ),
    "SaEI": (
        "1 on the middle third of a response's tokens by entropy: the image is attacked to raise that of these",
        "as GRPO's: the attack changes what half of the responses are sampled from, not the loss",
    ),
}
SIGNALS = {
    "entropy": "entropy {} nats",
    "JSD": "noise on the image moves this token's distribution by JSD {} nats",
    "KL strong": "blackened patches by KL {} nats",
    "KL weak": "weak noise by KL {} nats",
    "focus": "visual focus {} (0 to 1)",
    "similarity": "similarity to the image {} (-1 to 1)",
}
AMPLIFIED = 60  # so that a step of 2/255 spans half of the range of colours


def run_of(model, processor=None):
    """What a method's functions ask of a run, for a model that is not being trained."""
    metrics = SimpleNamespace(add=lambda *_: None, add_means=lambda *_: None)
    parts = {"model": model, "processor": processor, "metrics": metrics}
    parts["tokenizer"] = processor and processor.tokenizer
    return SimpleNamespace(**parts, world_size=1, phase=lambda _: contextlib.nullcontext())


def opened(args):
    """The model and the data that are shown."""
    source = model_source(args)
    processor = load_processor(source, args.model_revision, args.min_pixels, args.max_pixels)
    model = load_model(source, args.model_revision)
    if args.model not in EMBEDDED:
        model.activation_checkpointing_enable({"use_reentrant": False})  # SaEI's attack has a backward pass
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    split = "test" if args.data in EMBEDDED else args.eval_split
    return run_of(model, processor), Data(args.data, split, args, processor, model)


@torch.no_grad()
def judged(group, run, args):
    """What every method makes of the same responses, by its own functions, with its default constants.

    Returns {method: (scores or None, factors of the advantage)}, {signal: values}, all (G, T), {view: pixel_values}.
    Weights are PEPO's at the end of a run (lambda = 1) and the factors of a first update.
    """
    settings, seen = {"seed": args.seed, "temperature": args.temperature}, []

    def row():
        return dataclasses.replace(group, loss_mask=group.mask)

    def layer_hook(_, args, inputs):  # what is drawn is what was scored
        pixels = inputs.get("pixel_values")
        seen.append(pixels if pixels is None else patches_of(run.model.config, pixels, group.prompt.image_grid_thw))

    with run.model.model.register_forward_pre_hook(layer_hook, with_kwargs=True):
        vepo.scoring_forward(kept := row(), run, vepo.Args(**settings), 0)
        prpo.scoring_forward(raised := row(), run, prpo.Args(**settings), 0)
    pepo.scoring_forward(weighed := row(), run, pepo.Args(**settings))
    _, entropy, hidden = forward(run.model, group, args.temperature)
    signals, focused = {"entropy": entropy}, row()
    focused.scores = vgpo.row_focus(hidden, focused, vgpo.Args())
    vgpo.set_weights([focused], run, vgpo.Args())
    methods = {"GRPO": (None, group.mask)}
    for name, scored in {"VEPO": kept, "VGPO": focused, "PRPO": raised, "PEPO": weighed}.items():
        methods[name] = (scored.scores, scored.weights)
    methods["SaEI"] = (saei.middle_third(entropy, group.mask).float(), group.mask)
    if group.prompt.pixel_values is None:
        return {name: (x if name == "VEPO" else None, w) for name, (x, w) in methods.items()}, signals, {}
    noise, clean, strong, weak, _ = seen
    views = {"the image": clean, "VEPO: noise": noise, "PRPO: patches blackened": strong, "PRPO: weak noise": weak}
    noised = vepo.noised_hidden(group, run, vepo.Args(**settings), 0)
    moved = compare_logits(vepo.divergences, run.model, group, hidden, noised, temperature=args.temperature)
    perturbed = prpo.perturbed_hidden(group, run, prpo.Args(**settings), 0)
    kl = compare_logits(prpo.divergences, run.model, group, hidden, *perturbed, temperature=args.temperature)
    signals |= {"JSD": moved[0], "KL strong": kl[0], "KL weak": kl[1]}
    return methods, signals | {"focus": focused.scores, "similarity": weighed.scores}, views


def drawn(group, run, args, views):
    """{caption: images (3, H, W) in [0, 1]} of a group's prompt: as the methods scored it, and as SaEI attacks it."""
    if not views:
        return {}
    processor, grids, found = run.processor.image_processor, group.prompt.image_grid_thw, {}
    attacked = saei.attack(group, run, saei.Args(seed=args.seed, temperature=args.temperature)).pixel_values
    for name, pixels in {**views, f"SaEI: attacked, {255 * saei.Args.step:.0f}/255": attacked}.items():
        parts = zip(pixels.cpu().split(grids.prod(1).tolist()), grids)
        found[name] = [saei.unpatchify(part, grid, processor).clamp(0, 1) for part, grid in parts]
    pairs = zip(found["the image"], found[name])
    added = [(0.5 + AMPLIFIED * (after - before)).clamp(0, 1) for before, after in pairs]
    return found | {f"SaEI: what the attack adds, {AMPLIFIED} times, around grey": added}


def notes(name, scores, weights, advantage):
    """Yields what is said of each token of a response: a method's score (T,), and what its weight (T,) makes of it."""
    kept = int((weights > 0).sum())
    for i, weight in enumerate(weights.tolist()):
        score = None if scores is None else scores[i].item()
        why = f"the response's {advantage:+.3g} x {weight:.2f}"
        if name == "VEPO":
            why = "kept" if weight else "not among the best 20 %: left out of the policy loss"
            if weight and score < 0.005:
                why += f", at a score next to 0: 20 % of {len(weights)} tokens, rounded up, are always {kept}"
        if name == "SaEI" and score:
            why += "; the image is attacked to raise this token's entropy"
        shown = "" if score is None else f"score {score:.2g}, "
        yield f"{name}: {shown}advantage {f'{advantage * weight:+.3g}' if weight else '0'} ({why})"


# ---------------------------------------------------------------------------------------------------------------------
# Tokens: the page
# ---------------------------------------------------------------------------------------------------------------------

INTRO = """
<p>The same responses, as each method with its default constants sees them. <span class="s" style="--v:1">Violet</span>
is its score, from the lowest (clear) to the highest (full) of the two responses to a prompt. An advantage is
<span class="p" style="--v:1">blue</span> on tokens that the update makes likelier,
<span class="n" style="--v:1">orange and dotted</span> on those that it makes less likely,
<span class="z">pale</span> where it is 0: not trained. All advantages under a question have one scale, whatever the
response and the method: the colour is full at the largest of them.</p>
"""
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #6b6b6b; --line: #d8d8d8;
        --score: #8e6bd1; --up: #3d8bd9; --down: #e08a1e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #eceff1; --soft: #9aa0a6; --line: #3a3f44;
          --score: #9d7be0; --up: #4b97e6; --down: #d9801a; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
       max-width: 70rem; padding: 1rem 1rem 12rem; }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; font-size: 1.1rem; }
figure { display: inline-block; width: min-content; margin: 0 1rem 1rem 0; text-align: center; vertical-align: top;
         font-size: .8rem; color: var(--soft); }
figure img { display: block; width: 8.5rem; image-rendering: pixelated; border: 1px solid var(--line);
             margin: .15rem auto; }
.method { display: grid; grid-template-columns: 4.5rem 5.5rem 1fr; gap: .1rem .6rem; align-items: baseline;
          margin: .15rem 0; }
.method b { grid-row: span 2; }
.method i, .soft { color: var(--soft); font-size: .8rem; font-style: normal; }
.words { font-size: .85rem; }
.tokens { font-family: ui-monospace, monospace; font-size: .9rem; overflow-wrap: anywhere; white-space: pre-wrap; }
[style] { border-radius: 3px; padding: .1em 0;
          background: color-mix(in srgb, var(--c) calc(var(--v) * 75%), transparent); }
.s { --c: var(--score); } .p { --c: var(--up); } .n { --c: var(--down); } .z { color: var(--soft); }
.n { text-decoration: underline dotted var(--down); text-underline-offset: .2em; }
.tokens span:hover, .tokens span.on { outline: 2px solid var(--ink); }
#about { position: fixed; inset: auto 0 0 0; background: var(--page); border-top: 1px solid var(--line);
         padding: .5rem 1rem; font-size: .85rem; min-height: 2.6rem; white-space: pre-line; }
@media (max-width: 40rem) { .method { grid-template-columns: 1fr; gap: 0; } figure img { width: 6.5rem; } }
"""
SCRIPT = """
const about = document.getElementById("about"), said = about.textContent;
for (const event of ["pointerover", "click"]) document.addEventListener(event, e => {
  const token = e.target.closest("[data-t]");
  document.querySelectorAll(".on").forEach(x => x.classList.remove("on"));
  if (!token) { about.textContent = said; return; }
  document.querySelectorAll(`[data-t="${token.dataset.t}"]`).forEach(x => x.classList.add("on"));
  about.textContent = SIGNALS[token.dataset.t] + "\\n" + token.dataset.w;
});
"""


def spans(tokens, ids, said, shares, kinds):
    """Tokens as spans: of a kind of colour, a share (T,) in [0, 1] of it, and what is said when one points at them."""
    found = []
    for token, id, note, share, kind in zip(tokens, ids, said, shares.tolist(), kinds):
        text = html.escape(token).replace("\n", "↵\n")
        shown = f'data-t="{id}" data-w="{html.escape(note)}"'
        found.append(f'<span class="{kind}" style="--v:{share:.2f}" {shown}>{text}</span>')
    return "".join(found)


def lines_of(name, kind, **lines):
    """A method's name beside its lines, {what it is: HTML}, of `kind` tokens or words."""
    shown = (f'<i>{what}</i><div class="{kind}">{line}</div>' for what, line in lines.items())
    return f'<div class="method"><b>{name}</b>{"".join(shown)}</div>'


def image(pixels):
    """An image (3, H, W) in [0, 1] as an image of the page itself."""
    file = io.BytesIO()
    Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy()).save(file, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def section(number, group, run, args):
    """The HTML of one prompt with a right and a wrong response to it, and {token: what its signals are}."""
    methods, signals, views = judged(group, run, args)
    advantages = {name: group.advantages[:, None] * weights for name, (_, weights) in methods.items()}  # (G, T)
    shown = [int(group.accuracy.argmax()), int(group.accuracy.argmin())]
    largest = max(values[shown].abs().max().item() for values in advantages.values())  # one scale for all methods
    scale = f"Full colour: an advantage of {largest:.3g} or {-largest:.3g}."
    scale += "" if views else " No image: VEPO's score is the entropy, the others' advantages are GRPO's."
    parts = [f"<h2>{html.escape(group.prompt.problem.replace('<image>', '').strip())}</h2><p class=soft>{scale}</p>"]
    for caption, images in drawn(group, run, args, views).items():
        parts.append(f"<figure>{''.join(map(image, images))}{html.escape(caption)}</figure>")
    about = {}
    for kind, response in zip(("right", "wrong"), shown):
        valid, advantage = group.mask[response], group.advantages[response].item()
        tokens = [run.processor.tokenizer.decode([token]) for token in group.responses[response][valid].tolist()]
        ids = [f"{number}-{kind}-{t}" for t in range(len(tokens))]
        for t, (id, token) in enumerate(zip(ids, tokens)):
            said = [SIGNALS[name].format(f"{value[response][valid][t].item():.2g}") for name, value in signals.items()]
            about[id] = f"“{token}”: {'; '.join(said)}"
        answer = f"advantage {advantage:+.2f}, the answer is {html.escape(group.prompt.answer)}"
        parts.append(f"<h3>A {kind} response <small>({answer})</small></h3>")
        for name, (scores, weights) in methods.items():
            lines, own = {}, advantages[name][response][valid]
            score = None if scores is None else scores[response][valid]
            said = list(notes(name, score, weights[response][valid], advantage))
            if score is not None:
                low, high = scores[shown][group.mask[shown]].aminmax()  # one scale for both responses
                shares = (score - low) / (high - low).clamp(min=1e-5)  # what is closer is equal but for rounding
                lines["score"] = spans(tokens, ids, said, shares, "s" * len(tokens))
            kinds = ["zpn"[sign] for sign in own.sign().int().tolist()]  # zero, positive, negative: the last one
            lines["advantage"] = spans(tokens, ids, said, own.abs() / max(largest, 1e-12), kinds)
            parts.append(lines_of(name, "tokens", **lines))
    return "\n".join(parts), about


def token_page(args):
    """One self-contained HTML page for --prompts prompts whose group has a right and a wrong response."""
    run, data = opened(args)
    reward, sections, about = Reward(args), [], {}
    for prompt_id, index in enumerate(data.indices[:200]):
        prompt = dataclasses.replace(data.prompt(index), prompt_id=prompt_id)
        (group,) = rollout(run.model, run.tokenizer, [prompt], args, "show")
        group.advantages = group_advantages(reward([group])[0].rewards[None])[0].to(group.mask.device)
        if 0 < group.accuracy.sum() < len(group.accuracy):
            text, said = section(len(sections), group, run, args)
            sections.append(text)
            about |= said
        if len(sections) == args.prompts:
            break
    reward.check.close()
    if not sections:
        raise UserError(f"none of {prompt_id + 1} prompts had a right and a wrong response: raise --group_size.")
    words = (lines_of(name, "words", score=score, advantage=gain) for name, (score, gain) in METHODS.items())
    signals = json.dumps(about).replace("<", "\\u003c")  # no text of a response ends the script
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Tokens</title>'
        f"<style>{STYLE}</style><h1>Which tokens does each method reward?</h1>"
        f"{INTRO}{''.join(words)}{''.join(sections)}"
        '<div id="about">Point at a token, or tap it.</div>'
        f"<script>const SIGNALS = {signals};{SCRIPT}</script></html>\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Signals: what the methods presume of a model, measured
# ---------------------------------------------------------------------------------------------------------------------

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
    "focus_and_position": "VGPO: correlation of focus with place in the response",
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
    **{
        f"entropy_{third}{after}": f"SaEI: entropy of the {third} third{said}"
        for third in ("lowest", "middle", "highest")
        for after, said in (
            ("", ", nats per token"),
            ("_attacked", " after the attack, on the responses that it was made from"),
            ("_random", " after a step as large with random signs"),
        )
    },
    "changed_by_attack": "SaEI: sampled tokens that the attack would change (total variation)",
    "changed_by_random": "SaEI: sampled tokens that the random step would change",
}
PAPERS = {"missed_by_entropy": "0.41 (VEPO, Qwen2.5-VL-7B)"}
BY_KIND = ["entropy", "jsd", "changed_by_noise", "kl_strong", "kl_weak", "rvd", "focus", "similarity", "weight"]
BY_KIND += ["changed_by_attack", "changed_by_random", "kept_by_entropy", "kept_by_vepo"]
CLEAR = 1e-3  # nats of JSD: what is far less is moved by rounding as well
BINS = 10  # of a response, for focus against position


def total_variations(logits, *others):
    """The share of draws that have to change, sum |p - q| / 2, for each of the others: (...) each from logits (..., V).

    >>> total_variations(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log())
    [tensor([0.2500])]
    """
    return [(logits.softmax(-1) - other.softmax(-1)).abs().sum(-1) / 2 for other in others]


def random_step(prompt, run, seed):
    """The prompt's pixel_values after a step as large as SaEI's, with random signs: what any small change does."""
    processor, generator = run.processor.image_processor, seeded(seed, prompt.index, "signs")
    parts = prompt.pixel_values.split(prompt.image_grid_thw.prod(1).tolist())
    images = [saei.unpatchify(part, grid, processor) for part, grid in zip(parts, prompt.image_grid_thw)]
    signs = [torch.randn(image.shape, generator=generator) for image in images]
    moved = [saei.adversarial_step(*both, saei.Args.step) for both in zip(images, signs)]
    return torch.cat([saei.patchify(image, processor) for image in moved])


def token_signals(group, run, args):
    """{name: (G, T)} of what the methods, with their default constants, see in the responses to one prompt."""
    settings, found = {"seed": args.seed, "temperature": args.temperature}, []
    attacked = saei.attack(group, run, saei.Args(**settings)).pixel_values
    shaken = random_step(group.prompt, run, args.seed)
    with torch.no_grad():
        for row in split_group(group, args.tokens_per_row):
            mask = row.mask
            _, entropy, hidden = forward(run.model, row, args.temperature)
            steps = [with_image(row, lambda _, pixels=pixels: pixels) for pixels in (attacked, shaken)]
            (_, by_attack, hidden_attacked), (_, by_chance, hidden_shaken) = (
                forward(run.model, moved, args.temperature) for moved in steps
            )
            noised = vepo.noised_hidden(row, run, vepo.Args(**settings), 0)
            views = prpo.perturbed_hidden(row, run, prpo.Args(**settings), 0)
            compare = functools.partial(compare_logits, temperature=args.temperature)
            jsd, _, noised_entropy = compare(vepo.divergences, run.model, row, hidden, noised)
            kl_strong, kl_weak = compare(prpo.divergences, run.model, row, hidden, *views)
            moved = noised, hidden_attacked, hidden_shaken
            changed = compare(total_variations, run.model, row, hidden, *moved)
            pepo.scoring_forward(weighed := dataclasses.replace(row), run, pepo.Args(**settings))
            score = vepo.token_scores(jsd, entropy, noised_entropy, mask)
            found.append(
                {
                    "entropy": entropy,
                    "entropy_attacked": by_attack,
                    "entropy_random": by_chance,
                    "jsd": jsd,
                    "changed_by_noise": changed[0],
                    "changed_by_attack": changed[1],
                    "changed_by_random": changed[2],
                    "kept_by_entropy": vepo.select_top(entropy, mask).float(),
                    "kept_by_vepo": vepo.select_top(score, mask).float(),
                    "kept_by_jsd": (vepo.select_top(jsd, mask) & (jsd > 0)).float(),
                    "focus": vgpo.row_focus(hidden, row, vgpo.Args()),
                    "kl_strong": kl_strong,
                    "kl_weak": kl_weak,
                    "dependency": min_max(kl_strong.log1p(), mask),
                    "instability": min_max(kl_weak.log1p(), mask),
                    "rvd": prpo.robust_visual_dependency(kl_strong, kl_weak, mask),
                    "similarity": weighed.scores,
                    "weight": weighed.weights,
                }
            )
    return {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]}


def correlation(x, y):
    """Pearson's, of two tensors (n,); NaN where one of them does not vary."""
    if len(x) < 2:
        return math.nan
    return torch.corrcoef(torch.stack([x.float(), y.float()]))[0, 1].item()


def response_signals(tokens, kinds):
    """{name: value} of one response, from its tokens' signals (T,) and their kinds, None where these are not known."""
    entropy, jsd, T = tokens["entropy"], tokens["jsd"], len(tokens["entropy"])
    found = {name: tokens[name].mean().item() for name in BY_KIND} | {"response_tokens": T}
    by_jsd, dependent, brittle = tokens["kept_by_jsd"], tokens["dependency"] > 0.5, tokens["instability"] > 0.5
    found["missed_by_entropy"] = ((by_jsd * (1 - tokens["kept_by_entropy"])).sum() / by_jsd.sum()).item()
    clear = by_jsd * (jsd > CLEAR)
    found["missed_by_entropy_clearly"] = ((clear * (1 - tokens["kept_by_entropy"])).sum() / clear.sum()).item()
    for name in ("jsd", "entropy", "vepo"):
        found[f"jsd_kept_by_{name}"] = ((jsd * tokens[f"kept_by_{name}"]).sum() / jsd.sum()).item()
    found["focus_and_position"] = correlation(tokens["focus"], torch.arange(T))
    place = torch.arange(T) * BINS // T
    found |= {f"focus_{b}": tokens["focus"][place == b].mean().item() for b in range(BINS)}
    found["dependent_stable"] = (dependent & ~brittle).float().mean().item()
    found["dependent_brittle"] = (dependent & brittle).float().mean().item()
    found["weight_spread"] = tokens["weight"].std(correction=0).item()
    order = entropy.sort(stable=True).indices
    for third, part in zip(("lowest", "middle", "highest"), order.tensor_split((T // 3, 2 * T // 3))):
        found[f"entropy_{third}"] = entropy[part].mean().item()
        for after in ("attacked", "random"):
            found[f"entropy_{third}_{after}"] = tokens[f"entropy_{after}"][part].mean().item()
    for kind in KINDS if kinds else ():
        own = torch.tensor([k == kind for k in kinds])
        found[f"{kind}_share"] = own.float().mean().item()
        found |= {f"{kind}_{name}": tokens[name][own].mean().item() for name in BY_KIND}  # NaN where there is none
    return found


def group_signals(group, run, args, embedded):
    """{name: value} of one prompt: means over its responses, and what tells the right ones from the wrong ones."""
    signals, responses, decode = token_signals(group, run, args), [], run.processor.tokenizer.decode
    for i, valid in enumerate(group.mask.cpu()):
        words = [decode([token]) for token in group.responses[i].cpu()[valid].tolist()]
        tokens = {name: values[i][valid] for name, values in signals.items()}
        responses.append(response_signals(tokens, kinds_of(words) if embedded else None))
    values = {name: torch.tensor([float(response[name]) for response in responses]) for name in responses[0]}
    found, right = {name: x.nanmean().item() for name, x in values.items()}, group.accuracy > 0.5
    found |= {"accuracy": group.accuracy.mean().item(), "format": group.format.mean().item()}
    for name in (f"focus_{b}" for b in range(BINS)):
        found |= {f"{name}_right": values[name][right].nanmean().item()}
        found |= {f"{name}_wrong": values[name][~right].nanmean().item()}
    for name in ("similarity", "entropy"):
        found[f"{name}_right_minus_wrong"] = (values[name][right].mean() - values[name][~right].mean()).item()
    found["focus_and_accuracy"] = correlation(values["focus"], right)
    return found


def interval(values):
    """Mean, 95 % interval and number of the values that are no NaN, one for each prompt."""
    values = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    n = len(values)
    if n < 2:  # of one there is no interval, and of none no mean
        return {"mean": values.item() if n else None, "low": None, "high": None, "prompts": n}
    mean, half = values.mean().item(), stdtrit(n - 1, 0.975) * values.std().item() / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "prompts": n}


def measure_signals(args):
    """{name: {mean, low, high, prompts}} over --prompts prompts that have an image."""
    run, data = opened(args)
    reward, found, device = Reward(args), [], run.model.device.type
    with_images = (prompt for prompt in map(data.prompt, data.indices) if prompt.pixel_values is not None)
    bar = tqdm(itertools.islice(with_images, args.prompts), desc="signals", total=args.prompts, unit="prompt")
    for prompt_id, prompt in enumerate(bar):
        prompt = dataclasses.replace(prompt, prompt_id=prompt_id)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # as in training
            (group,) = rollout(run.model, run.tokenizer, [prompt], args, "signals")
            reward([group])
            found.append(group_signals(group, run, args, args.data in EMBEDDED))
    reward.check.close()
    if not found:
        raise UserError(f"--data {args.data} has no prompt with an image: there is nothing to perturb.")
    if len(found) < args.prompts:
        print(f"{data}: no more than {len(found)} prompts with an image, of --prompts {args.prompts}", file=sys.stderr)
    return {name: interval([values[name] for values in found]) for name in found[0]}


def means_and_halves(found, names):
    """Of some signals the means, and half the widths of their intervals; NaN where there is none."""
    number = lambda name, side: math.nan if found[name][side] is None else found[name][side]  # noqa: E731
    return [number(n, "mean") for n in names], [number(n, "high") - number(n, "mean") for n in names]


def signal_table(found):
    """Yields the lines of a table: each signal with its interval, and the paper's figure; then by kind of token."""

    def shown(name):
        mean, half = means_and_halves(found, [name])
        return f"{mean[0]:.3g} ± {half[0]:.2g}".replace(" ± nan", "").replace("nan", "-")

    width = max(map(len, TITLES.values()))
    yield f"{'mean over prompts, 95 % interval':{width}s}  measured             the paper"
    for name, title in TITLES.items():
        yield f"{title:{width}s}  {shown(name):20s} {PAPERS.get(name, '')}".rstrip()
    if "read_share" in found:
        yield f"{'by kind of token':20s}" + "".join(f"{kind:>22s}" for kind in KINDS)
        for name in ("share", *BY_KIND):
            yield f"{name:20s}" + "".join(f"{shown(f'{kind}_{name}'):>22s}" for kind in KINDS)


def draw_signals(found, path):
    """Draws the most of what the table says: a panel for each method, and one by kind of token where that is known."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat

    def bars(title, groups, legend=("",)):
        axes, width = next(panels), 0.8 / len(legend)
        for i, label in enumerate(legend):
            mean, half = means_and_halves(found, [names[i] for names in groups.values()])
            places = [g + (i - (len(legend) - 1) / 2) * width for g in range(len(groups))]
            colour = ("#8e6bd1", "#e08a1e", "#b5b5b5")[i]
            axes.bar(places, mean, 0.9 * width, yerr=half, capsize=3, color=colour, label=label)
        axes.set_xticks(range(len(groups)), groups, fontsize=8)
        axes.set_title(title, fontsize=10)
        if len(legend) > 1:
            axes.legend(fontsize=8)
        return axes

    kept = {f"JSD kept\nby {name}": [f"jsd_kept_by_{name.lower()}"] for name in ("JSD", "entropy", "VEPO")}
    of_vepo = {"missed\nby entropy": ["missed_by_entropy"], "tokens that\nnoise changes": ["changed_by_noise"]}
    bars("VEPO: the top 20 % of tokens, and its noise", kept | of_vepo)
    axes = next(panels)
    for kind, colour in (("right", "#3d8bd9"), ("wrong", "#e08a1e")):
        mean, half = means_and_halves(found, [f"focus_{b}_{kind}" for b in range(BINS)])
        places = [100 * (b + 0.5) / BINS for b in range(BINS)]
        axes.errorbar(places, mean, yerr=half, color=colour, capsize=3, label=f"{kind} responses")
    axes.set_title("VGPO: focus against place in the response, %", fontsize=10)
    axes.legend(fontsize=8)
    dependent = {"dependent\nand stable": ["dependent_stable"], "dependent\nand brittle": ["dependent_brittle"]}
    bars("PRPO: share of tokens", dependent)
    apart = {f"{name}, right\nminus wrong": [f"{name}_right_minus_wrong"] for name in ("similarity", "entropy")}
    bars("PEPO: right and wrong responses, and its weights", apart | {"spread of\nweights": ["weight_spread"]})
    ends = {"clean": "", "attacked": "_attacked", "random signs": "_random"}
    thirds = {third: [f"entropy_{third}{end}" for end in ends.values()] for third in ("lowest", "middle", "highest")}
    bars("SaEI: entropy of each third, nats", thirds, [*ends]).set_yscale("log")
    if "read_share" in found:
        names = {"entropy, nats": "entropy", "changed by noise": "changed_by_noise"}
        bars("by kind of token", {kind: [f"{kind}_{name}" for name in names.values()] for kind in KINDS}, [*names])
    for axes in panels:
        axes.axis("off")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    beside = path.with_name(f"{path.name}.unfinished")
    figure.savefig(beside, dpi=110, format="png")
    beside.replace(path)


def writable(option, path):
    """Raises UserError, before the work is done, where a file cannot be written."""
    folder = Path(path).resolve().parent
    if Path(path).is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"{option} {path} cannot be written: name a file, in a folder that exists.")


def show_curves(args):
    for kind in ("png", "svg"):
        writable("--output", f"{args.output}.{kind}")
    print("\n".join(draw_curves(read_runs(args.runs), args.output, args.window)))
    print(f"{args.output}.png, {args.output}.svg")


def show_tokens(args):
    writable("--page", args.page)
    write_text(Path(args.page), token_page(args))
    print(args.page)


def show_signals(args):
    files = [Path(args.output) / f"signals.{kind}" for kind in ("json", "png")]
    if not Path(args.output).is_dir():
        raise UserError(f"--output {args.output} must be a folder that exists.")
    for file in files:
        writable("--output", file)
    found = measure_signals(args)
    print("\n".join(signal_table(found)))
    stated = {name: getattr(args, name) for name in ("model", "data", "seed", "group_size", "temperature")}
    try:
        draw_signals(found, files[1])
        write_text(files[0], json.dumps(stated | {"papers": PAPERS, "signals": found}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{cannot_write(args.output, error)}; the table above is whole.") from None
    print(*files, sep=", ")


COMMANDS = {"curves": (CurveArgs, show_curves), "tokens": (TokenArgs, show_tokens)}
COMMANDS |= {"signals": (SignalArgs, show_signals)}


def main():
    command, rest = [*sys.argv, ""][1], sys.argv[2:]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in COMMANDS:
        said = "python show.py curves runs/*, python show.py tokens --model toy, or python show.py signals --model toy"
        raise UserError(f"say what to show: {said}.")
    sys.argv[0] += f" {command}"  # as --help calls it
    cls, show = COMMANDS[command]
    torch.compiler.set_stance("force_eager")  # for a few prompts: compiling would take longer than it saves
    named = command == "curves" and rest and not rest[0].startswith("-")
    try:
        show(parse_args(cls, ["--runs", *rest] if named else rest))
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        raise UserError("out of memory: lower --group_size, --max_response_tokens or --max_pixels.") from None


if __name__ == "__main__":
    main()
