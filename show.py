"""Pictures: training curves, and a page that shows which tokens each method rewards.

python show.py curves runs/*                  # curves.png and curves.svg, and a table; folders name-0, name-1: seeds
python show.py tokens --model toy             # tokens.html: one page, no network
python show.py tokens --model runs/vepo/last --data mine.parquet --prompts 4
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
from transformers import HfArgumentParser

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
    rollout,
    seeded,
    with_picture,
)
from plumbing.arguments import SharedArgs, UserError, flag, model_source, parse_args, within
from plumbing.checkpoints import write_text
from plumbing.curves import draw_curves, read_runs
from plumbing.data import Data


@dataclasses.dataclass
class CurveArgs:
    """curves"""

    runs: list[str] = dataclasses.field(
        metadata={"help": "folders of runs; name-0, name-1 ... are seeds of one method"}
    )
    output: str = flag("curves", "file that is written, as .png and as .svg")
    window: int = flag(10, "steps that are averaged, but for evaluations; 1: none")


@dataclasses.dataclass
class TokenArgs(SharedArgs):
    """What the page of tokens takes, besides what training does."""

    prompts: int = flag(3, "prompts that are shown, those with a right and a wrong response")
    page: str = flag("tokens.html", "file that is written")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def run_of(model, processor=None):
    """What a method's functions ask of a run, for a model that is not being trained."""
    metrics = SimpleNamespace(add=lambda *_: None, add_means=lambda *_: None)
    phase = lambda _: contextlib.nullcontext()  # noqa: E731
    return SimpleNamespace(model=model, processor=processor, world_size=1, phase=phase, metrics=metrics)


def views(group, run):
    """{what it is: pictures (3, H, W)} of a group's prompt: as it is, and as the methods perturb it."""
    prompt, pictures, args = group.prompt, run.processor.image_processor, SimpleNamespace(seed=0)
    if prompt.pixel_values is None:
        return {}
    noisy = lambda pixels: vepo.add_noise(pixels, seeded(args.seed, "show"))  # noqa: E731
    scale = {"image_mean": pictures.image_mean, "image_std": pictures.image_std}
    black = lambda pixels: prpo.blacken(pixels, seeded(args.seed, "show"), **scale)  # noqa: E731
    weak = lambda pixels: prpo.add_pixel_noise(pixels, seeded(args.seed, "show"), **scale)  # noqa: E731
    seen = {
        "the picture": prompt,
        "VEPO: noise": with_picture(group, noisy).prompt,
        "PRPO: patches blackened": with_picture(group, black).prompt,
        "PRPO: weak noise": with_picture(group, weak).prompt,
        "SaEI: attacked, 2/255": saei.attack(group, run, saei.Args()),
    }
    sizes = prompt.image_grid_thw.prod(1).tolist()
    return {
        name: [
            saei.unpatchify(part.cpu(), grid, pictures).clamp(0, 1)
            for part, grid in zip(prompt.pixel_values.split(sizes), prompt.image_grid_thw)
        ]
        for name, prompt in seen.items()
    }


def judged(group, run):
    """What every method makes of the same responses, by its own functions.

    Returns {method: (scores (G, T), token advantages (G, T))} and {signal: (G, T)}. Weights are PEPO's at the end of a
    run (lambda = 1) and the factors of a first update; the advantages are the group's.
    """
    signals, advantages, methods = {}, group.advantages[:, None] * group.mask, {}

    def row():
        return dataclasses.replace(group, loss_mask=group.mask)

    _, entropy, hidden = forward(run.model, group)
    signals["entropy"] = entropy
    methods["GRPO"] = (None, advantages)
    if group.prompt.pixel_values is not None:
        noised = vepo.noised_hidden(group, run, vepo.Args(), 0)
        signals["JSD"] = compare_logits(vepo.divergences, run.model, group, hidden, noised)[0]
        strong, weak = prpo.perturbed_hidden(group, run, prpo.Args(), 0)
        signals["KL strong"], signals["KL weak"] = compare_logits(
            prpo.divergences, run.model, group, hidden, strong, weak
        )
    vepo.scoring_forward(kept := row(), run, vepo.Args(), 0)
    methods["VEPO"] = (kept.scores, advantages * kept.weights)
    focus = row()
    focus.scores = vgpo.row_focus(hidden, focus, vgpo.Args())
    vgpo.set_weights([focus], run, vgpo.Args())
    signals["focus"] = focus.scores
    methods["VGPO"] = (focus.scores, advantages * focus.weights)
    prpo.scoring_forward(raised := row(), run, prpo.Args(), 0)
    rvd = raised.scores if raised.scores is not None else torch.zeros_like(entropy)
    methods["PRPO"] = (rvd, advantages * raised.weights)
    pepo.scoring_forward(weighed := row(), run, pepo.Args())
    signals["similarity"] = weighed.scores
    methods["PEPO"] = (weighed.scores, advantages * weighed.weights)
    methods["SaEI"] = (saei.middle_third(entropy, group.mask).float(), advantages)
    return methods, signals


STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #6b6b6b; --line: #d8d8d8;
        --score: #8e6bd1; --up: #3d8bd9; --down: #e08a1e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #eceff1; --soft: #9aa0a6; --line: #3a3f44;
          --score: #9d7be0; --up: #4b97e6; --down: #d9801a; }
}
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
       max-width: 70rem; padding: 1rem 1rem 6rem; }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; font-size: 1.1rem; }
figure { display: inline-block; margin: 0 1rem 1rem 0; text-align: center; font-size: .8rem; color: var(--soft); }
figure img { display: block; width: 8.5rem; image-rendering: pixelated; border: 1px solid var(--line);
             margin: .15rem auto; }
.method { display: grid; grid-template-columns: 4.5rem 5.5rem 1fr; gap: .1rem .6rem; align-items: baseline;
          margin: .15rem 0; }
.method b { grid-row: span 2; }
.method i { color: var(--soft); font-size: .8rem; font-style: normal; }
.tokens { font-family: ui-monospace, monospace; font-size: .9rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.tokens span { border-radius: 3px; padding: .1em 0;
               background: color-mix(in srgb, var(--c) calc(var(--v) * 75%), transparent); }
.s { --c: var(--score); } .p { --c: var(--up); } .n { --c: var(--down); }
.n { text-decoration: underline dotted; text-underline-offset: .2em; }
.tokens span:hover, .tokens span.on { outline: 2px solid var(--ink); }
#about { position: fixed; inset: auto 0 0 0; background: var(--page); border-top: 1px solid var(--line);
         padding: .5rem 1rem; font-size: .85rem; min-height: 2.6rem; }
@media (max-width: 40rem) { .method { grid-template-columns: 1fr; gap: 0; } figure img { width: 6.5rem; } }
"""

SCRIPT = """
const about = document.getElementById("about"), said = about.textContent;
for (const event of ["pointerover", "click"]) document.addEventListener(event, e => {
  const token = e.target.closest("[data-t]");
  document.querySelectorAll(".on").forEach(x => x.classList.remove("on"));
  if (!token) { about.textContent = said; return; }
  document.querySelectorAll(`[data-t="${token.dataset.t}"]`).forEach(x => x.classList.add("on"));
  about.textContent = SIGNALS[token.dataset.t] + (token.dataset.w ? "   " + token.dataset.w : "");
});
"""


def spans(tokens, values, names, signed, what):
    """Tokens as spans, coloured by their value's share of the largest one in the response."""
    largest = values.abs().max().clamp(min=1e-12)
    low = 0.0 if signed else values.min()
    found = []
    for token, value, name in zip(tokens, values, names):
        share = (value.abs() / largest if signed else (value - low) / (values.max() - low).clamp(min=1e-12)).item()
        kind = ("p" if value >= 0 else "n") if signed else "s"
        text = html.escape(token).replace("\n", "↵\n")
        shown = f'data-t="{name}" data-w="{what} {value.item():.3g}"'
        found.append(f'<span class="{kind}" style="--v:{share:.2f}" {shown}>{text}</span>')
    return "".join(found)


def picture(pixels):
    """A picture (3, H, W) in [0, 1] as an image of the page itself."""
    file = io.BytesIO()
    Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy()).save(file, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def section(number, group, run):
    """The HTML of one prompt, and what to say of each of its tokens."""
    with torch.no_grad():
        methods, signals = judged(group, run)
    parts = [f"<h2>{html.escape(group.prompt.problem.replace('<image>', '').strip())}</h2>"]
    for name, pictures in views(group, run).items():
        parts.append(f"<figure>{''.join(map(picture, pictures))}{html.escape(name)}</figure>")
    about = {}
    right, wrong = (int(x) for x in (group.accuracy.argmax(), group.accuracy.argmin()))
    for kind, response in (("right", right), ("wrong", wrong)):
        valid = group.mask[response]
        tokens = [run.processor.tokenizer.decode([token]) for token in group.responses[response][valid].tolist()]
        ids = [f"{number}-{kind}-{t}" for t in range(len(tokens))]
        for t, id in enumerate(ids):
            values = [f"{name} {value[response][valid][t].item():.3g}" for name, value in signals.items()]
            about[id] = f"{tokens[t].strip() or 'space'}:  " + ",  ".join(values)
        answer = f"advantage {group.advantages[response]:+.2f}, the answer is {html.escape(group.prompt.answer)}"
        parts.append(f"<h3>A {kind} response <small>({answer})</small></h3>")
        for name, (scores, advantages) in methods.items():
            lines = [f"<b>{name}</b>"]
            if scores is not None:
                shown = spans(tokens, scores[response][valid], ids, False, f"{name} score")
                lines.append(f'<i>score</i><div class="tokens">{shown}</div>')
            shown = spans(tokens, advantages[response][valid], ids, True, f"{name} advantage")
            lines.append(f'<i>advantage</i><div class="tokens">{shown}</div>')
            parts.append(f'<div class="method">{"".join(lines)}</div>')
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
            text, said = section(len(sections), group, run)
            sections.append(text)
            about |= said
        if len(sections) == args.prompts:
            break
    reward.check.close()
    if not sections:
        raise UserError(f"none of {serial + 1} prompts had a right and a wrong response: raise --group_size.")
    signals = json.dumps(about).replace("<", "\\u003c")  # no text of a response ends the script
    intro = (
        "The same responses, as each method sees them. Violet: the method's score, from the lowest to the highest of "
        "the response. Blue: tokens that the update makes likelier; orange, dotted: less likely; the stronger the more."
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Tokens</title>'
        f"<style>{STYLE}</style>"
        f"<h1>Which tokens does each method reward?</h1><p>{intro}</p>{''.join(sections)}"
        '<div id="about">Point at a token, or tap it.</div>'
        f"<script>const SIGNALS = {signals};{SCRIPT}</script></html>\n"
    )


def writable(option, path):
    """Raises UserError, before the work is done, where a file cannot be written."""
    if not os.access(Path(path).resolve().parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written: name a file in a folder that exists.")


def main():
    commands = ("curves", "tokens")
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in commands:
        raise UserError("say what to show: python show.py curves runs/*, or python show.py tokens --model toy.")
    if command == "curves":
        args = HfArgumentParser(CurveArgs).parse_args_into_dataclasses(["--runs", *sys.argv[2:]])[0]
        within(args, window=(1, 10**9))
        writable("--output", args.output)
        print("\n".join(draw_curves(read_runs(args.runs), args.output, args.window)))
        print(f"{args.output}.png, {args.output}.svg")
    else:
        args = parse_args(TokenArgs, sys.argv[2:])
        within(args, prompts=(1, 1000))
        writable("--page", args.page)
        write_text(Path(args.page), token_page(args))
        print(args.page)


if __name__ == "__main__":
    main()
