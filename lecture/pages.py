"""Pages for a lecture: formula and explanation, the code that computes it, and what it gives on one response.

    pip install -r lecture/requirements.txt
    python show.py lecture                          # lecture/*.html, with a response of the built-in toy
    python show.py lecture --model runs/vepo/last   # with one of a model that you trained

The notes are Markdown with LaTeX, lecture/notes/*.md: a section for each function, `## name`. A page is refused where a
function has no note or a note no function, and where the code cites an equation, "eq. 4", without a `\\tag{4}` in them.
"""

import ast
import dataclasses
import difflib
import html
import re
import sys
import textwrap
from pathlib import Path

import torch
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from lecture.values import values_of
from plumbing.arguments import UserError, flag, parse_args
from show import ShownArgs, image_tag, load, mixed_groups, spans, split_images

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
METHODS = ["grpo", "vepo", "vgpo", "prpo", "pepo", "saei"]
SHARED = ["group_advantages", "loss_denominator", "aggregate", "policy_loss", "kl_penalty"]  # of common.py, with GRPO
WORDS = ["results", "exercises"]  # sections of the notes without code
PYTHON, STYLE = PythonLexer(stripnl=False), (HERE / "style.css").read_text()


@dataclasses.dataclass
class LectureArgs(ShownArgs):
    output: str = flag("lecture", "folder that the pages are written to")


def formula(latex, options):
    """LaTeX as MathML; one with a \\tag is an anchor that the code's comments link to."""
    tag = re.search(r"\\tag\{(\d+)\}", latex)
    body = convert(re.sub(r"\\tag\{\d+\}", "", latex), display="block" if options["display_mode"] else "inline")
    return f'<div class="eq" id="eq{tag[1]}">{body}<small>({tag[1]})</small></div>' if tag else body


def coloured(text, language, _):
    return (
        f'<pre class="highlight">{highlight(text, PYTHON, HtmlFormatter(nowrap=True))}</pre>'
        if language == "python"
        else ""
    )


MARKDOWN = MarkdownIt("commonmark", {"html": False, "highlight": coloured}).enable("table")
MARKDOWN.use(dollarmath_plugin, renderer=formula)


def included(match):
    """`{{common.py | def aggregate | 3}}`: three lines from that text on. `{{README.md | Title}}`: a section's table.

    `{{exercises | psi | k3}}`: what these ask.
    """
    file, text, *more = (part.strip() for part in match[1].split("|"))
    if file == "exercises":
        tree = ast.parse((HERE / "exercises/exercises.py").read_text())
        asked = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
        return "\n\n".join(f"**{name}**\n\n```text\n{asked[name]}\n```" for name in (text, *more))
    source = (ROOT / file).read_text()
    if text not in source:
        raise UserError(f"lecture/notes: {file} has no {text!r}.")
    if more:
        first = source[: source.index(text)].count("\n")
        return "```python\n" + textwrap.dedent("\n".join(source.splitlines()[first : first + int(more[0])])) + "\n```"
    section = re.search(rf"^## {re.escape(text)}\n(.*?)(?=^## |\Z)", source, re.DOTALL | re.MULTILINE)[1]
    section = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    section = re.sub(r"\]\((\w+)\.py\)", r"](\1.html)", section)  # a method's page instead of its file
    return re.sub(r"\[([^]]+)\]\((?!http|\w+\.html)[^)]*\)", r"\1", section)  # no link to pages that are not there


def read_notes(name):
    """{section: HTML} of lecture/notes/name.md."""
    text = re.sub(r"\{\{(.*?)\}\}", included, (HERE / f"notes/{name}.md").read_text())
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return {title: MARKDOWN.render(body) for title, body in zip(parts[1::2], parts[2::2])}


def code_blocks(file):
    """{name: (first line, lines)} of the docstring of a file, `header`, and of its functions and classes."""
    lines, blocks = (ROOT / file).read_text().splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            blocks[node.name] = (first, lines[first - 1 : node.end_lineno])
        elif node.lineno == 1:
            blocks["header"] = (1, lines[: node.end_lineno])
    return blocks


def differing(lines):
    """Numbers, from 1, of the lines of a method's `main` that are not in that of grpo.py."""
    matcher = difflib.SequenceMatcher(None, code_blocks("grpo.py")["main"][1], lines, autojunk=False)
    return [n + 1 for kind, _, _, a, b in matcher.get_opcodes() if kind != "equal" for n in range(a, b)]


def strip(label, values, tokens):
    """The tokens of a response, coloured by a value (T,): violet, or blue and orange where it has a sign."""
    low, high = min(0.0, values.min().item()), max(values.max().item(), 1e-9)
    shares = values.abs() / max(high, -low)
    kinds = ["n" if value < 0 else "p" if low < 0 else "s" for value in values.tolist()]
    shown = spans(tokens, [f"{value:.3g}" for value in values.tolist()], shares, kinds)
    scale = f"{html.escape(label)}: {values.min():.2g} to {values.max():.2g}"
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
    if name == "grpo":
        shared = code_blocks("common.py")
        main = blocks.pop("main")
        blocks |= {function: shared[function] for function in SHARED} | {"main": main}
    if wrong := notes.keys() ^ {*blocks, *WORDS}:
        raise UserError(f"lecture/notes/{name}.md: function without note, or note without: {', '.join(sorted(wrong))}.")
    rows = []
    for block, (first, lines) in blocks.items():
        marked = differing(lines) if block == "main" and name != "grpo" else []
        style = HtmlFormatter(linenos="inline", linenostart=first, hl_lines=marked)
        shown = highlight("\n".join(lines), PYTHON, style)
        shown = re.sub(r"eq\. (\d+)(-\d+)?", r'<a href="#eq\1">eq. \1\2</a>', shown)
        values = "".join(strip(label, x, tokens) for label, x in gives.get(block, {}).items())
        kind, values = ("top", picture) if block == "header" else ("three" if values else "two", values)
        left, right = f"<div><h2>{block}</h2>{notes[block]}</div>", f"<div>{values}</div>"
        rows.append(f'<section class="{kind}" id="{block}">{left}{shown}{right}</section>')
    rows += [f'<article id="{word}"><h2>{word.title()}</h2>{notes[word]}</article>' for word in WORDS]
    page = framed(f"{name}.py", "\n".join(rows))
    cited = {n for a, b in re.findall(r"eq\. (\d+)(?:-(\d+))?", page) for n in range(int(a), int(b or a) + 1)}
    if lost := cited - {int(n) for n in re.findall(r'id="eq(\d+)"', page)}:
        raise UserError(f"lecture/notes/{name}.md lacks equations that the code cites: {sorted(lost)}.")
    return page


def diff_page(name):
    """grpo.py and a method's file, side by side."""
    files = [(ROOT / file).read_text().splitlines() for file in ("grpo.py", f"{name}.py")]
    return framed(f"grpo.py | {name}.py", difflib.HtmlDiff(wrapcolumn=95).make_table(*files, "grpo.py", f"{name}.py"))


def main():
    args = parse_args(LectureArgs, sys.argv[2:])
    torch.compiler.set_stance("force_eager")
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
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page)
    print(f"{folder}/index.html")


if __name__ == "__main__":
    main()
