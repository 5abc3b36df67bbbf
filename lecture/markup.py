"""As HTML: the notes (Markdown with LaTeX, lines of code, tables of other pages, exercises), and the code of a file."""

import ast
import re
import textwrap
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from plumbing.arguments import UserError

HERE = Path(__file__).resolve().parent
ROOT, PYTHON = HERE.parent, PythonLexer(stripnl=False)


def formula(latex, options):
    """LaTeX as MathML; one with a \\tag is an anchor that the code's comments link to."""
    tag = re.search(r"\\tag\{(\d+)\}", latex)
    body = convert(re.sub(r"\\tag\{\d+\}", "", latex), display="block" if options["display_mode"] else "inline")
    if tag:
        return f'<div class="eq" id="eq{tag[1]}">{body}<small>({tag[1]})</small></div>'
    return f'<div class="eq">{body}</div>' if options["display_mode"] else body


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
    text = re.sub(r"^\{\{(.*)\}\}$", included, (HERE / f"notes/{name}.md").read_text(), flags=re.MULTILINE)
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return {title: MARKDOWN.render(body) for title, body in zip(parts[1::2], parts[2::2])}


def code_blocks(file):
    """{name: numbers of its lines} of the docstring of a file, `header`, and of its functions and classes."""
    blocks = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            blocks[node.name] = range(first, node.end_lineno + 1)
        elif node.lineno == 1:
            blocks["header"] = range(1, node.end_lineno + 1)
    return blocks


def code(file, numbers, marked=()):
    """These lines of a file as HTML, with their numbers, some of them marked; equations are links to the notes."""
    lines = highlight((ROOT / file).read_text(), PYTHON, HtmlFormatter(nowrap=True)).split("\n")
    plain = (ROOT / file).read_text().splitlines()
    shown = []
    for n in numbers:
        indent = min(24, len(plain[n - 1]) - len(plain[n - 1].lstrip()))
        kind = "line hll" if n in marked else "line"
        shown.append(f'<span class="{kind}" style="--i:{indent}ch"><i>{n}</i>{lines[n - 1]}</span>')
    page = file.replace(".py", ".html").replace("common", "grpo")  # whose notes have the equations of common.py
    shown = re.sub(r"eq\. (\d+)(-\d+)?", rf'<a href="{page}#eq\1">eq. \1\2</a>', "".join(shown))
    return f'<pre class="highlight">{shown}</pre>'
