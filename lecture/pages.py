"""Pages for a lecture: formula and explanation, the code that computes it, and what it gives on one response.

    pip install -r lecture/requirements.txt
    python show.py lecture                          # lecture/*.html, with a response of the toy with faint shapes
    python show.py lecture --model runs/vepo/last   # with one of a model that you trained

The notes are Markdown with LaTeX, lecture/notes/*.md: a section for each function, `## name`. A page is refused where a
function has no note or a note no function, and where the code cites an equation, "eq. 4", without a `\\tag{4}` in them.
"""

import dataclasses
import difflib
import html
import re
import sys
from pathlib import Path

import torch
from pygments.formatters import HtmlFormatter

from lecture.markup import HERE, ROOT, code, code_blocks, read_notes
from lecture.values import values_of
from plumbing.arguments import UserError, flag, parse_args
from show import ShownArgs, image_tag, load, mixed_groups, spans, split_images

METHODS = ["grpo", "vepo", "vgpo", "prpo", "pepo", "saei", "vppo"]
SHARED = {  # functions of common.py that a page explains, before `main`
    "grpo": ["group_advantages", "loss_denominator", "aggregate", "policy_loss", "kl_penalty"],
    "vepo": ["kept_tokens", "select_top"],
    "prpo": ["blacken"],
    "vppo": ["blacken", "kept_tokens", "select_top"],
}
WORDS = {  # sections of the notes without code, and what stands above
    "results": "Points: percent of the sampled responses that are right. ±: 95 % over 8 seeds (clear shapes: 5).",
    "exercises": "Write your answer in lecture/exercises/exercises.py. In brackets: the lines that it takes.",
}
STYLE = (HERE / "style.css").read_text()


@dataclasses.dataclass
class LectureArgs(ShownArgs):
    model: str = flag("toy-faint", "as of show.py tokens")
    output: str = flag("lecture", "folder that the pages are written to")


def opcodes(name):
    """(whether they are equal, lines of grpo.py, lines of a method's file), part by part."""
    files = [(ROOT / file).read_text().splitlines() for file in ("grpo.py", f"{name}.py")]
    for kind, *ends in difflib.SequenceMatcher(None, *files, autojunk=False).get_opcodes():
        a, b, c, d = (n + 1 for n in ends)
        yield kind == "equal", range(a, b), range(c, d)


def strip(label, values, tokens):
    """The tokens of a response, coloured by a value (T,): violet, or blue and orange where it has a sign."""
    low, high = values.min(), values.max()
    kinds = ["n" if value < 0 else "p" if "advantage" in label else "s" for value in values.tolist()]
    shares = (
        values.abs() / values.abs().max() if "advantage" in label else (values - low) / (high - low).clamp(min=1e-9)
    )
    shown = spans(tokens, [f"{value:.3g}" for value in values.tolist()], shares, kinds)
    scale = f"{html.escape(label)}: {low:.2g} to {high:.2g}"
    return f'<p class="soft">{scale}</p><p class="tokens">{shown}</p>'


def framed(title, body):
    links = "".join(f'<a href="{name}.html">{name}</a> ' for name in ["index", *METHODS])
    styles = [HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark")]
    head = f"<style>{styles[0]} @media (prefers-color-scheme: dark) {{ {styles[1]} }} {STYLE}</style>"
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    top = f'<!doctype html><html lang="en"><meta charset="utf-8">{viewport}<title>{title}</title>{head}'
    return f"{top}<nav>{links}</nav><h1>{title}</h1>{body}</html>\n"


def method_page(name, gives, tokens, picture):
    """A page of rows: notes, code, and what it gives on the response `tokens`."""
    notes, blocks = read_notes(name), code_blocks(f"{name}.py")
    main, shared = blocks.pop("main"), code_blocks("common.py")
    own = SHARED.get(name, [])
    blocks |= {function: shared[function] for function in own} | {"main": main}
    files = dict.fromkeys(blocks, f"{name}.py") | dict.fromkeys(own, "common.py")
    if wrong := notes.keys() ^ {*blocks, *WORDS}:
        raise UserError(f"lecture/notes/{name}.md: function without note, or note without: {', '.join(sorted(wrong))}.")
    new, rows = {n for equal, _, lines in opcodes(name) if not equal for n in lines}, []
    for block, numbers in blocks.items():
        shown = code(files[block], numbers, new if block == "main" else ())
        values = "".join(strip(label, x, tokens) for label, x in gives.get(block, {}).items())
        kind, values = ("top", picture) if block == "header" else ("three" if values else "two", values)
        kind, below = ("two", values) if block == "main" else (kind, "")  # whose lines are long
        left = f"<div><h2>{block} <small>{files[block]}</small></h2>{notes[block]}{below}</div>"
        right = f"<div>{values}</div>" if kind in ("top", "three") else ""
        rows.append(f'<section class="{kind}" id="{block}">{left}{shown}{right}</section>')
    rows += [f'<article id="{w}"><h2>{w.title()}</h2><p class="soft">{WORDS[w]}</p>{notes[w]}</article>' for w in WORDS]
    page = framed(f"{name}.py", "\n".join(rows))
    cited = {n for a, b in re.findall(r"eq\. (\d+)(?:-(\d+))?", page) for n in range(int(a), int(b or a) + 1)}
    if lost := cited - {int(n) for n in re.findall(r'id="eq(\d+)"', page)}:
        raise UserError(f"lecture/notes/{name}.md lacks equations that the code cites: {sorted(lost)}.")
    return page


def diff_page(name):
    """grpo.py and a method's file, side by side."""
    rows = []
    for equal, left, right in opcodes(name):
        pair = [code(f"{file}.py", lines, () if equal else lines) for file, lines in (("grpo", left), (name, right))]
        rows.append(f'<section class="pair">{"".join(pair)}</section>')
    return framed(f"grpo.py | {name}.py", "".join(rows))


def main():
    args = parse_args(LectureArgs, sys.argv[2:])
    torch.compiler.set_stance("force_eager")
    folder = Path(args.output)
    if folder.is_file():
        raise UserError(f"--output {folder} is a file: name a folder.")
    trainer, data = load(args)
    group = max(mixed_groups(trainer, data, args, 8), key=lambda group: group.lengths[int(group.accuracy.argmax())])
    i = int(group.accuracy.argmax())
    tokens = [trainer.tokenizer.decode([token]) for token in group.responses[i, : group.lengths[i]].tolist()]
    images = "".join(map(image_tag, split_images(group.prompt.pixel_values, group.prompt, trainer)))
    question = html.escape(group.prompt.problem.replace("<image>", ""))
    response = f"<p class='soft'>{question} A right response:</p><p class='tokens'>{html.escape(''.join(tokens))}</p>"
    index = "".join(f"<h2>{title}</h2>{body}" for title, body in read_notes("index").items())
    pages = {"index": framed("Token-level reinforcement learning", index)}
    for name, gives in values_of(group, trainer, args).items():
        own = {f: {label: x[i, : len(tokens)].float().cpu() for label, x in v.items()} for f, v in gives.items()}
        pages[name] = method_page(name, own, tokens, images + response)
        if name != "grpo":
            pages[f"diff_{name}"] = diff_page(name)
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page)
    print(f"{folder}/index.html")


if __name__ == "__main__":
    main()
