"""Pages for a lecture: formula and explanation, the code that computes it, and what it gives on one response.

    pip install -r lecture/requirements.txt
    python show.py lecture                          # lecture/*.html, with a response of the toy with faint shapes
    python show.py lecture --model runs/vepo/last   # with one of a model that you trained

lecture/notes/*.md: Markdown with LaTeX, a section `## name` for each function; `$$ ... $$ (4)` is an equation that the
code cites as eq. 4. `=> psi: label`, at the end of a section, colours the tokens of the response by a value.
`{{vepo.py def diffuse +3}}`: three lines of a file from that text on; without +3 the whole function, or table.
"""

import ast
import difflib
import html
import re
import textwrap
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

import show
from plumbing.arguments import UserError

ROOT, PYTHON = Path(__file__).resolve().parent.parent, PythonLexer(stripnl=False)
METHODS = [*show.FUNCTIONS]
MATHS = {"renderer": lambda latex, how: convert(latex, display=["inline", "block"][how["display_mode"]])}
MATHS["label_renderer"] = "<small>({})</small>".format  # of an equation's number
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").use(dollarmath_plugin, **MATHS)
MARKDOWN.add_render_rule("fence", lambda _, tokens, i, *more: highlight(tokens[i].content, PYTHON, HtmlFormatter()))


def read(file):
    return (ROOT / file).read_text()


def included(match):
    """Lines of a file as Markdown; a table without its links to other files."""
    file, text, count = match.groups()
    source = read(file)
    rest = source[source.rindex("\n", 0, source.index(text)) + 1 :]
    if file.endswith(".md"):
        return re.sub(r"\[([^]]+)\]\((?!http)[^)]*\)", r"\1", re.match(r"(\|.*\n)*", rest)[0])
    lines = rf"(.*\n){{{count}}}" if count else r".*\n(?: .*\n|\n+(?= ))*"
    return f"```\n{textwrap.dedent(re.match(lines, rest)[0])}```"


def notes(name):
    """lecture/notes/name.md, with what it includes."""
    return re.sub(r"^\{\{(\S+) (.+?)(?: \+(\d+))?\}\}$", included, read(f"lecture/notes/{name}.md"), flags=re.M)


def code_blocks(file):
    """{name: numbers of its lines} of a file's docstring, `header`, and of its functions and classes."""
    nodes = [node for node in ast.parse(read(file)).body if isinstance(node, ast.Expr | ast.FunctionDef | ast.ClassDef)]
    first = [(getattr(node, "decorator_list", None) or [node])[0].lineno for node in nodes]
    return {getattr(node, "name", "header"): range(n, node.end_lineno + 1) for node, n in zip(nodes, first)}


def code(file, numbers, marked=()):
    """These lines of a file as HTML, with their numbers, some of them marked; equations are links to the notes."""
    style = HtmlFormatter(linenos="inline", linespans=file, hl_lines=[*marked])
    lines = highlight(read(file), PYTHON, style).partition("</pre>")[0].split('<span id="')  # [0]: before the first
    shown = "".join(f'<span id="{line}' for line in lines[numbers.start : numbers.stop])
    page = file.replace("common.py", "grpo.py").replace(".py", ".html")  # grpo.md has the equations of common.py
    shown = re.sub(r"eq\. (\d+)(-\d+)?", rf'<a href="{page}#\1">eq. \1\2</a>', shown)
    return f'<div class="highlight"><pre>{shown}</pre></div>'


def opcodes(name):
    """(whether they are equal, lines of grpo.py, lines of a method's file), part by part."""
    files = read("grpo.py").splitlines(), read(f"{name}.py").splitlines()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *files, autojunk=False).get_opcodes():
        yield kind == "equal", range(a + 1, b + 1), range(c + 1, d + 1)


def strip(label, values, tokens):
    """The tokens of a response, coloured by a value (T,): violet, or blue and orange for an advantage."""
    (low, high), signed = values.aminmax(), "advantage" in label
    shares = (
        values.abs() / values.abs().max().clamp(min=1e-9) if signed else (values - low) / (high - low).clamp(min=1e-9)
    )
    kinds = ["s" if not signed else "n" if value < 0 else "p" for value in values.tolist()]
    shown = show.spans(tokens, [f"{value:.3g}" for value in values.tolist()], shares, kinds)
    return f'<p class="soft">{html.escape(label)}: {low:z.2g} to {high:z.2g}</p><p class="tokens">{shown}</p>'


def framed(title, body):
    links = "".join(f'<a href="{name}.html">{name}</a> ' for name in ["index", *METHODS])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    style = f"<style>{read('lecture/style.css')}</style>"
    return f'<!doctype html><html lang="en">{head}{style}<nav>{links}</nav><h1>{title}</h1>{body}\n'


def method_page(name, values, tokens, question):
    """A page of rows: notes, code, and what it gives on the response `tokens`: {name: (T,)}."""
    own, shared, page = code_blocks(f"{name}.py"), code_blocks("common.py"), ""
    new = [n for equal, _, lines in opcodes(name) if not equal for n in lines]
    _, *parts = re.split(r"^## (.+)\n", notes(name), flags=re.M)
    for title, text in zip(parts[::2], parts[1::2]):
        text, *shown = text.split("\n=> ")
        pairs = [line.strip().split(": ", 1) for line in shown]
        right = question if title == "header" else "".join(strip(label, values[x], tokens) for x, label in pairs)
        file = f"{name}.py" if title in own else "common.py" if title in shared else ""
        block = code(file, (shared | own)[title], new if title == "main" else ()) if file else ""
        kind = title if title in ("header", "main") or not file else "three" if right else "two"
        left = f"<div><h2>{title} <small>{file}</small></h2>{MARKDOWN.render(text)}</div>"
        page += f'<section class="{kind}" id="{title}">{left}{block}<div>{right}</div></section>\n'
    return framed(f"{name}.py", page)


def diff_page(name):
    """grpo.py and a method's file, side by side."""
    files, page = ("grpo.py", f"{name}.py"), ""
    for equal, *sides in opcodes(name):
        pair = (code(file, lines, () if equal else lines) for file, lines in zip(files, sides))
        page += f'<section class="pair">{"".join(pair)}</section>\n'
    return framed(" | ".join(files), page)


def write_pages(args):
    """Writes index.html, and a page and a diff page for each method, to the folder `args.output`."""
    folder = Path(args.output)
    if folder.is_file():
        raise UserError(f"--output {folder} is a file: name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    trainer, data = show.load(args)
    # of 8 groups the one whose first right response is longest
    group = max(show.mixed_groups(trainer, data, args, 8), key=lambda x: x.lengths[int(x.accuracy.argmax())])
    i = int(group.accuracy.argmax())
    tokens = [trainer.tokenizer.decode([token]) for token in group.responses[i, : group.lengths[i]].tolist()]
    methods, values, _ = show.score_tokens(group, trainer, args)
    for method, (score, weight) in methods.items():
        A = group.advantages[:, None] * weight
        values |= {f"{method} score": score, f"{method} weight": weight, f"{method} advantage": A}
    values = {name: x[i, : len(tokens)].float().cpu() for name, x in values.items() if x is not None}
    images = "".join(map(show.image_tag, show.split_images(group.prompt.pixel_values, group.prompt, trainer)))
    question = f"{images}<p>{html.escape(group.prompt.problem.replace('<image>', ''))}</p>"
    pages = {"index": framed("Token-level reinforcement learning", MARKDOWN.render(notes("index")))}
    pages |= {name: method_page(name, values, tokens, question) for name in METHODS}
    pages |= {f"diff_{name}": diff_page(name) for name in METHODS[1:]}
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page)
    print(f"{folder}/index.html")
