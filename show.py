"""Pictures: training curves, and a page that shows which tokens each method rewards.

    python show.py curves runs/*                # curves.png and curves.svg, and a table; folders name-0, name-1: seeds
    python show.py tokens --model toy           # tokens.html: the same responses as every method sees them
    python show.py tokens --model runs/vepo/last --data mine.parquet --prompts 4

`python show.py curves --help` and `python show.py tokens --help` list their flags.
"""

import base64
import contextlib
import dataclasses
import html
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

import pepo
import prpo
import saei
import vepo
import vgpo
from common import Reward, compare_logits, forward, group_advantages, load_model, load_processor, rollout
from plumbing.arguments import SharedArgs, model_source
from plumbing.checkpoints import trained_with
from plumbing.commandline import UserError, check_numbers, flag, parse_args
from plumbing.curves import draw_curves, read_runs
from plumbing.data import Data
from plumbing.files import write_text

# The flags of training that the page reads.
USED = ["data", "eval_split", "data_revision", "image_column", "problem_column", "answer_column", "instruction"]
USED += ["max_prompt_tokens", "min_pixels", "max_pixels", "group_size", "max_response_tokens", "temperature", "top_p"]
USED += ["top_k", "reward", "accuracy_weight", "format_weight", "check_seconds", "seed"]


def without_value(f):
    """A flag of the training scripts that has no value unless it is given: `TokenArgs` finds one."""
    text = f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})")
    return f.name, f.type, dataclasses.field(default=None, metadata={**f.metadata, "help": text})


OfTraining = dataclasses.make_dataclass(
    "OfTraining",
    [without_value(SharedArgs.__dataclass_fields__[name]) for name in USED],
    namespace={"__doc__": "of training; where not given, a checkpoint's own, then these defaults"},
)


@dataclasses.dataclass
class TokenArgs(OfTraining):
    model: str = flag("toy", "hub id, folder or checkpoint of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL; toy is embedded")
    model_revision: str = flag("main", "branch, tag or commit of a hub model")
    prompts: int = flag(3, "prompts that are shown, those with a right and a wrong response", above=0)
    page: str = flag("tokens.html", "file that is written")
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
class CurveArgs:
    runs: list[str] = flag(dataclasses.MISSING, "folders, as in: curves runs/*; name-0, name-1 ...: seeds of a method")
    output: str = flag("curves", "file that is written, as .png and as .svg")
    window: int = flag(10, "steps that are averaged, but for evaluations; 1: none", above=0)

    def __post_init__(self):
        check_numbers(self)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens: what the methods make of the same responses
# ---------------------------------------------------------------------------------------------------------------------

METHODS = {  # its score of a token, and what it makes of the advantage
    "GRPO": ("none", "the response's own, on every token: its reward against its group's mean, in standard deviations"),
    "VEPO": (
        "high where the policy is uncertain and noise on the picture moves what it predicts; 0 where it is certain",
        "only the best 20 % of a response's tokens are trained, the others have 0. Their number is fixed, rounded up "
        "and at least 1: where fewer stand out, tokens with a score next to 0 are kept too, of equal ones the earlier",
    ),
    "VGPO": (
        "visual focus, how near the token's last state is to the picture's, from 0 to 1",
        "the response's, times 0.1 to 2, more on tokens that look at the picture, the most on late ones; and times "
        "0.9 to 2, more for a response that looks more than the others of its group",
    ),
    "PRPO": (
        "near 1 where blackened patches move the token and weak noise does not (our reading of the paper)",
        "the response's, times 1 + 2 x score: on no token less than the response's",
    ),
    "PEPO": (
        "how similar the token's states, in all layers, are to the picture's, from -1 to 1",
        "the response's, times weights of mean 1: more on tokens that resemble the picture, or are uncertain",
    ),
    "SaEI": (
        "1 on the middle third of a response's tokens by entropy: the picture is attacked to raise that of these",
        "as GRPO's: the attack changes what half of the responses are sampled from, not the loss",
    ),
}
SIGNALS = {
    "entropy": "entropy {} nats",
    "JSD": "noise on the picture moves this token's distribution by JSD {} nats",
    "KL strong": "blackened patches by KL {} nats",
    "KL weak": "weak noise by KL {} nats",
    "focus": "visual focus {} (0 to 1)",
    "similarity": "similarity to the picture {} (-1 to 1)",
}
AMPLIFIED = 60  # so that a step of 2/255 spans half of the range of colours


def run_of(model, processor=None):
    """What a method's functions ask of a run, for a model that is not being trained."""
    metrics = SimpleNamespace(add=lambda *_: None, add_means=lambda *_: None)
    phase = lambda _: contextlib.nullcontext()  # noqa: E731
    return SimpleNamespace(model=model, processor=processor, world_size=1, phase=phase, metrics=metrics)


@torch.no_grad()
def judged(group, run, args):
    """What every method makes of the same responses, by its own functions, with its default constants.

    Returns {method: (scores or None, factors of the advantage)}, {signal: values}, all (G, T), {view: pixel_values}.
    Weights are PEPO's at the end of a run (lambda = 1) and the factors of a first update.
    """
    settings, seen = {"seed": args.seed, "temperature": args.temperature}, []

    def row():
        return dataclasses.replace(group, loss_mask=group.mask)

    def watch(_, args, inputs):  # what is drawn is what was scored
        seen.append(inputs.get("pixel_values"))

    with run.model.model.register_forward_pre_hook(watch, with_kwargs=True):
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
    views = {"the picture": clean, "VEPO: noise": noise, "PRPO: patches blackened": strong, "PRPO: weak noise": weak}
    noised = vepo.noised_hidden(group, run, vepo.Args(**settings), 0)
    moved = compare_logits(vepo.divergences, run.model, group, hidden, noised, temperature=args.temperature)
    perturbed = prpo.perturbed_hidden(group, run, prpo.Args(**settings), 0)
    kl = compare_logits(prpo.divergences, run.model, group, hidden, *perturbed, temperature=args.temperature)
    signals |= {"JSD": moved[0], "KL strong": kl[0], "KL weak": kl[1]}
    return methods, signals | {"focus": focused.scores, "similarity": weighed.scores}, views


def drawn(group, run, args, views):
    """{caption: pictures (3, H, W) in [0, 1]} of a group's prompt: as the methods scored it, and as SaEI attacks it."""
    if not views:
        return {}
    processor, grids, found = run.processor.image_processor, group.prompt.image_grid_thw, {}
    attacked = saei.attack(group, run, saei.Args(seed=args.seed, temperature=args.temperature)).pixel_values
    for name, pixels in {**views, f"SaEI: attacked, {255 * saei.Args.step:.0f}/255": attacked}.items():
        parts = zip(pixels.cpu().split(grids.prod(1).tolist()), grids)
        found[name] = [saei.unpatchify(part, grid, processor).clamp(0, 1) for part, grid in parts]
    pairs = zip(found["the picture"], found[name])
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
            why += "; the picture is attacked to raise this token's entropy"
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


def picture(pixels):
    """A picture (3, H, W) in [0, 1] as an image of the page itself."""
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
    scale += "" if views else " No picture: VEPO's score is the entropy, the others' advantages are GRPO's."
    parts = [f"<h2>{html.escape(group.prompt.problem.replace('<image>', '').strip())}</h2><p class=soft>{scale}</p>"]
    for caption, pictures in drawn(group, run, args, views).items():
        parts.append(f"<figure>{''.join(map(picture, pictures))}{html.escape(caption)}</figure>")
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
    source = model_source(args)
    processor = load_processor(source, args.model_revision, args.min_pixels, args.max_pixels)
    model = load_model(source, args.model_revision)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    split = args.eval_split if args.data != "toy" else "test"
    data = Data(args.data, split, args, processor, model.model.get_rope_index)
    run = run_of(model, processor)
    reward, sections, about = Reward(args), [], {}
    for serial, index in enumerate(data.indices[:200]):
        prompt = dataclasses.replace(data.prompt(index), serial=serial)
        (group,) = rollout(model, processor.tokenizer, [prompt], args, "show")
        group.advantages = group_advantages(reward([group]))[0].to(group.mask.device)
        if 0 < group.accuracy.sum() < len(group.accuracy):
            text, said = section(len(sections), group, run, args)
            sections.append(text)
            about |= said
        if len(sections) == args.prompts:
            break
    reward.check.close()
    if not sections:
        raise UserError(f"none of {serial + 1} prompts had a right and a wrong response: raise --group_size.")
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


def writable(option, path):
    """Raises UserError, before the work is done, where a file cannot be written."""
    folder = Path(path).resolve().parent
    if Path(path).is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"{option} {path} cannot be written: name a file, in a folder that exists.")


def main():
    command, rest = [*sys.argv, ""][1], sys.argv[2:]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in ("curves", "tokens"):
        raise UserError("say what to show: python show.py curves runs/*, or python show.py tokens --model toy.")
    sys.argv[0] += f" {command}"  # as --help calls it
    if command == "curves":
        args = parse_args(CurveArgs, rest if not rest or rest[0].startswith("-") else ["--runs", *rest])
        for kind in ("png", "svg"):
            writable("--output", f"{args.output}.{kind}")
        print("\n".join(draw_curves(read_runs(args.runs), args.output, args.window)))
        print(f"{args.output}.png, {args.output}.svg")
    else:
        args = parse_args(TokenArgs, rest)
        writable("--page", args.page)
        write_text(Path(args.page), token_page(args))
        print(args.page)


if __name__ == "__main__":
    main()
