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
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from PIL import Image
from torch.nn.functional import pad

import common
import pepo
import prpo
import saei
import vepo
import vgpo
from common import UserError, flag

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass
class CurveArgs:
    """curves"""

    runs: list[str] = dataclasses.field(
        metadata={"help": "folders of runs; name-0, name-1 ... are seeds of one method"}
    )
    output: str = flag("curves", "file that is written, as .png and as .svg")
    window: int = flag(10, "steps that are averaged, but for evaluations; 1: none")


@dataclasses.dataclass
class TokenArgs(common.Args):
    """What the page of tokens takes, besides what training does."""

    prompts: int = flag(3, "prompts that are shown, those with a right and a wrong response")
    page: str = flag("tokens.html", "file that is written")


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------

PANELS = {  # metric: (title, share of 1)
    "eval_accuracy": ("accuracy on test data", True),
    "reward": ("reward of sampled responses", False),
    "entropy": ("entropy, nats per token", False),
    "response_tokens": ("response length, tokens", False),
}
STYLES = ["-", "--", "-.", ":"]


def read_runs(folders):
    """{method: [metrics of a seed]}; the method is the folder's name without -0, -1 ... at its end."""
    runs = defaultdict(list)
    for folder in map(Path, folders):
        if not (folder / "metrics.jsonl").exists():
            raise UserError(f"{folder} holds no metrics.jsonl: give folders that a training script wrote.")
        try:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        except ValueError as error:
            raise UserError(
                f"{folder}/metrics.jsonl is broken ({error}): mend its last line, or leave it out."
            ) from None
        if lines:
            runs[re.sub(r"-\d+$", "", folder.resolve().name)].append(lines)
    if not runs:
        raise UserError("nothing was logged in these folders yet: wait for the first step.")
    return dict(runs)


def series(lines, name):
    """{step: (seconds of training so far, value)} of one run."""
    seconds, found = 0.0, {}
    for line in lines:
        seconds += line.get("seconds", 0.0)
        if line.get(name) is not None:
            found[line["step"]] = (seconds, line[name])
    return found


def pooled(seeds, name, window=1):
    """(steps, mean seconds, mean, half width of the 95 % interval) at the steps that all seeds have.

    Each seed's values are first averaged over the last `window` steps. The interval is Student's t over seeds; 0 for
    one seed.
    """
    found = [series(lines, name) for lines in seeds]
    steps = sorted(set.intersection(*(set(one) for one in found)))
    seconds, values = (torch.tensor([[one[s][i] for s in steps] for one in found], dtype=torch.float64) for i in (0, 1))
    values = running_mean(values, window)
    half = torch.zeros(len(steps), dtype=torch.float64)
    if len(found) > 1:
        half = student(len(found) - 1) * values.std(0) / math.sqrt(len(found))
    return steps, seconds.mean(0), values.mean(0), half


def running_mean(values, window):
    """The mean of each value (..., n) and those before it, `window` of them in all, or as many as there are.

    >>> running_mean(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    tensor([1., 2., 4., 5.])
    """
    total = pad(values.cumsum(-1), (window, 0))
    return (total[..., window:] - total[..., :-window]) / torch.arange(1, values.shape[-1] + 1).clamp(max=window)


def student(degrees, cells=100_000):
    """The 97.5 % quantile of Student's t: its density over t = sqrt(degrees) tan(angle), summed up to 0.95 of a half.

    >>> [round(student(n), 3) for n in (1, 2, 4, 9)]
    [12.706, 4.303, 2.776, 2.262]
    """
    width = math.pi / 2 / cells
    density = ((torch.arange(cells, dtype=torch.float64) + 0.5) * width).cos() ** (degrees - 1)
    share = density.cumsum(0) / density.sum()
    cell = torch.searchsorted(share, 0.95).item()
    angle = width * (cell + 1 - ((share[cell] - 0.95) / (share[cell] - share[cell - 1])).item())
    return math.sqrt(degrees) * math.tan(angle)


def curves(runs, output, window=10):
    """Draws {method: [metrics of a seed]}, all panels, against steps and against seconds; returns a table's lines."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5), layout="constrained")
    colours = plt.get_cmap("tab10" if len(runs) <= 10 else "tab20").colors
    for column, (name, (title, percent)) in enumerate(PANELS.items()):
        steps_averaged = 1 if name == "eval_accuracy" else window
        title += (", %" if percent else "") + (f" (mean of {window} steps)" if steps_averaged > 1 else "")
        for place, (method, seeds) in enumerate(runs.items()):
            steps, seconds, mean, half = pooled(seeds, name, steps_averaged)
            scale = 100 if percent else 1
            for row, x in enumerate((steps, seconds)):
                style = {"color": colours[place % len(colours)], "linestyle": STYLES[place // 5 % 4]}
                label = f"{method} ({len(seeds)})" if len(seeds) > 1 else method
                axes[row, column].plot(x, scale * mean, label=label, linewidth=1.3, **style)
                axes[row, column].fill_between(x, scale * (mean - half), scale * (mean + half), alpha=0.15, **style)
        for row, label in enumerate(("step", "seconds of training")):
            axes[row, column].set(xlabel=label, title=title if row == 0 else "")
            axes[row, column].title.set_fontsize(10)
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    for kind in ("png", "svg"):
        beside = Path(f"{output}.{kind}.unfinished")
        figure.savefig(beside, dpi=110, format=kind)
        beside.replace(f"{output}.{kind}")
    plt.close(figure)
    return summary(runs)


def summary(runs):
    lines = [f"{'method':16s}{'seeds':>6s}{'steps':>7s}{'seconds':>9s}{'first':>9s}{'last, 95 % interval':>22s}"]
    for method, seeds in runs.items():
        steps, seconds, mean, half = pooled(seeds, "eval_accuracy")
        _, total, _, _ = pooled(seeds, "reward")
        first, last = (f"{mean[0]:.1%}", f"{mean[-1]:.1%}") if steps else ("-", "-")
        if len(seeds) > 1 and steps:
            last += f" ± {half[-1]:.1%}"
        done = max(line["step"] for line in seeds[0])
        lines.append(f"{method:16s}{len(seeds):6d}{done:7d}{total[-1] if len(total) else 0:9.0f}{first:>9s}{last:>22s}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def views(group, run):
    """{what it is: pictures (3, H, W)} of a group's prompt: as it is, and as the methods perturb it."""
    prompt, pictures, args = group.prompt, run.processor.image_processor, SimpleNamespace(seed=0)
    if prompt.pixel_values is None:
        return {}
    noisy = lambda pixels: common.add_noise(pixels, common.seeded(args.seed, "show"))  # noqa: E731
    scale = {"image_mean": pictures.image_mean, "image_std": pictures.image_std}
    black = lambda pixels: common.blacken(pixels, common.seeded(args.seed, "show"), **scale)  # noqa: E731
    weak = lambda pixels: common.add_pixel_noise(pixels, common.seeded(args.seed, "show"), **scale)  # noqa: E731
    seen = {
        "the picture": prompt,
        "VEPO: noise": common.with_picture(group, noisy).prompt,
        "PRPO: patches blackened": common.with_picture(group, black).prompt,
        "PRPO: weak noise": common.with_picture(group, weak).prompt,
        "SaEI: attacked, 2/255": saei.attack(group, run, saei.Args()),
    }
    sizes = prompt.image_grid_thw.prod(1).tolist()
    return {
        name: [
            common.unpatchify(part.cpu(), grid, pictures).clamp(0, 1)
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

    _, entropy, hidden = common.forward(run.model, group)
    signals["entropy"] = entropy
    methods["GRPO"] = (None, advantages)
    if group.prompt.pixel_values is not None:
        noised = vepo.noised_hidden(group, run, vepo.Args(), 0)
        signals["JSD"] = common.compare_heads(vepo.divergences, run.model, group, hidden, noised)[0]
        strong, weak = prpo.perturbed_hidden(group, run, prpo.Args(), 0)
        signals["KL strong"], signals["KL weak"] = common.compare_heads(
            prpo.divergences, run.model, group, hidden, strong, weak
        )
    vepo.choosing_forward(kept := row(), run, vepo.Args(), 0)
    methods["VEPO"] = (kept.scores, advantages * kept.weights)
    focus = row()
    focus.scores = vgpo.row_focus(hidden, focus, vgpo.Args())
    vgpo.set_weights([focus], run, vgpo.Args())
    signals["focus"] = focus.scores
    methods["VGPO"] = (focus.scores, advantages * focus.weights)
    prpo.weighing_forward(raised := row(), run, prpo.Args(), 0)
    rvd = raised.scores if raised.scores is not None else torch.zeros_like(entropy)
    methods["PRPO"] = (rvd, advantages * raised.weights)
    pepo.weighted_forward(run.model, weighed := row(), pepo.Args())
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


def spans(tokens, values, places, signed, what):
    """Tokens as spans, coloured by their value's share of the largest one in the response."""
    largest = values.abs().max().clamp(min=1e-12)
    low = 0.0 if signed else values.min()
    found = []
    for token, value, place in zip(tokens, values, places):
        share = (value.abs() / largest if signed else (value - low) / (values.max() - low).clamp(min=1e-12)).item()
        kind = ("p" if value >= 0 else "n") if signed else "s"
        text = html.escape(token).replace("\n", "↵\n")
        shown = f'data-t="{place}" data-w="{what} {value.item():.3g}"'
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
        places = [f"{number}-{kind}-{t}" for t in range(len(tokens))]
        for t, place in enumerate(places):
            values = [f"{name} {value[response][valid][t].item():.3g}" for name, value in signals.items()]
            about[place] = f"{tokens[t].strip() or 'space'}:  " + ",  ".join(values)
        answer = f"advantage {group.advantages[response]:+.2f}, the answer is {html.escape(group.prompt.answer)}"
        parts.append(f"<h3>A {kind} response <small>({answer})</small></h3>")
        for name, (scores, advantages) in methods.items():
            lines = [f"<b>{name}</b>"]
            if scores is not None:
                shown = spans(tokens, scores[response][valid], places, False, f"{name} score")
                lines.append(f'<i>score</i><div class="tokens">{shown}</div>')
            shown = spans(tokens, advantages[response][valid], places, True, f"{name} advantage")
            lines.append(f'<i>advantage</i><div class="tokens">{shown}</div>')
            parts.append(f'<div class="method">{"".join(lines)}</div>')
    return "\n".join(parts), about


def token_page(args):
    """One self-contained HTML page for --prompts prompts whose group has a right and a wrong response."""
    source = str(common.TOY / "model") if args.model == "toy" else args.model
    processor = common.load_processor(source, args.model_revision, args.min_pixels, args.max_pixels)
    model = common.load_model(source, args.model_revision)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    split = args.eval_split if args.data != "toy" else "test"
    data = common.Data(args.data, split, args, processor, model.model.get_rope_index)
    nothing = SimpleNamespace(
        model=model,
        processor=processor,
        world=1,
        phase=lambda _: contextlib.nullcontext(),
        add=lambda *_: None,
        note=lambda *_: None,
    )
    reward, sections, about = common.Reward(args), [], {}
    for place, index in enumerate(data.indices[:200]):
        prompt = dataclasses.replace(data.prompt(index), place=place)
        (group,) = common.rollout(model, processor.tokenizer, [prompt], args, "show")
        group.advantages = common.group_advantages(reward([group]))[0].to(group.mask.device)
        if 0 < group.accuracy.sum() < len(group.accuracy):
            text, said = section(len(sections), group, nothing)
            sections.append(text)
            about |= said
        if len(sections) == args.prompts:
            break
    reward.check.close()
    if not sections:
        raise UserError(f"none of {place + 1} prompts had a right and a wrong response: raise --group_size.")
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
        args = common.HfArgumentParser(CurveArgs).parse_args_into_dataclasses(["--runs", *sys.argv[2:]])[0]
        common.within(args, window=(1, 10**9))
        writable("--output", args.output)
        print("\n".join(curves(read_runs(args.runs), args.output, args.window)))
        print(f"{args.output}.png, {args.output}.svg")
    else:
        args = common.parse_args(TokenArgs, sys.argv[2:])
        common.within(args, prompts=(1, 1000))
        writable("--page", args.page)
        common.write_text(Path(args.page), token_page(args))
        print(args.page)


if __name__ == "__main__":
    main()
