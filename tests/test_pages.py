"""The lecture's pages: complete, self-contained, and of the code as it is now."""

import ast
import html
import re
import runpy
import sys

import pytest
import torch
from helpers import ROOT

from lecture.pages import METHODS, code_blocks, included, strip

FIGURES = (ROOT / "RESULTS.md").read_text() + (ROOT / "README.md").read_text()
NOTES = {name: (ROOT / f"lecture/notes/{name}.md").read_text() for name in ["index", *METHODS]}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{name: HTML} of `python show.py lecture`."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["show.py", "lecture", "--output", str(folder), "--model", "toy"])
        runpy.run_path(str(ROOT / "show.py"), run_name="__main__")
    return {path.stem: path.read_text() for path in folder.glob("*.html")}


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def test_every_page_is_made_and_needs_nothing_else(pages):
    assert pages.keys() == {"index", *METHODS, *(f"diff_{name}" for name in METHODS[1:])}
    for page in pages.values():
        assert len(page.encode()) < 300_000 and "<script" not in page and "<link" not in page
        assert not re.findall(r'src="(?!data:)', page)
        for target in re.findall(r'href="([^"]+)"', page):
            file, _, anchor = target.partition("#")
            if not target.startswith("https://arxiv.org/"):
                there = pages[file.removesuffix(".html")] if file else page
                assert not anchor or f'id="{anchor}"' in there, target


@pytest.mark.parametrize("name", METHODS)
def test_the_code_of_a_page_is_that_of_the_file(pages, name):
    """Every line of every function, with its number; in `main` those that grpo.py lacks are marked."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    line = rf'<span id="{name}\.py-(\d+)">(<span class="hll">)?<span class="linenos"> *\d+</span>(.*)'
    shown = re.findall(line, pages[name])
    found = {(int(number), text_of(line)) for number, _, line in shown}
    for numbers in code_blocks(f"{name}.py").values():
        assert {(n, lines[n - 1]) for n in numbers} <= found
    plain = (ROOT / "grpo.py").read_text().splitlines()
    marked = [lines[int(number) - 1] for number, mark, _ in shown if mark]
    assert bool(marked) == (name != "grpo") and all(line not in plain or not line.strip() for line in marked)
    changed = {line for n in code_blocks(f"{name}.py")["main"] if (line := lines[n - 1]) not in plain}
    assert changed <= set(marked)


def test_values_of_one_response_stand_on_the_pages(pages):
    labels = {
        "vepo": ["JSD", "score", "chosen"],
        "vgpo": ["focus rho", "psi", "gated"],
        "prpo": ["RVD", "KL, weak view"],
    }
    labels |= {
        "vppo": ["S", "m f"],
        "pepo": ["VS", "w"],
        "saei": ["1 on the middle third"],
        "grpo": ["probability of the sampled token"],
    }
    for name, values in labels.items():
        for label in [*values, "advantage that the token is trained with"]:
            assert re.search(rf'<p class="soft">{re.escape(label)}: -?[\d.e-]+ to ', pages[name]), (name, label)
    advantage = pages["grpo"].split("advantage A: ")[1].split("</section>")[0]
    assert 'class="p"' in advantage and 'class="s"' not in advantage  # of a right response
    choice = pages["vepo"].split("chosen: 0 to 1")[1].split("</p>")[1]
    kept, T = choice.count('data-w="1"'), choice.count("data-w=")
    assert kept == -(-T // 5)


def test_every_exercise_stands_on_one_page():
    exercises = re.findall(r"^def (\w+)", (ROOT / "lecture/exercises/exercises.py").read_text(), re.MULTILINE)
    asked = re.findall(r"exercises\.py def (\w+)\(\}\}", "".join(NOTES.values()))
    assert sorted(asked) == sorted(exercises)


@pytest.mark.parametrize("name", METHODS)
def test_numbers_of_the_comparison_are_those_of_its_report(name):
    results = NOTES[name].partition("## results")[2].partition("## exercises")[0]
    figures = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", results)
    assert figures and all(figure in FIGURES for figure in figures), figures


def incomplete(name, text):
    """Functions without a note, constants (no page shows them), sections without a function, equations that the notes
    lack although the code cites them."""
    own, shared = code_blocks(f"{name}.py"), code_blocks("common.py")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    lines = {n for block in own.values() for n in block}
    tree = ast.parse((ROOT / f"{name}.py").read_text()).body
    outside = {node.targets[0].id for node in tree if isinstance(node, ast.Assign) and node.lineno not in lines}
    wrong = outside | (own.keys() - titles) | (set(titles) - {*own, *shared, "results", "exercises"})
    cited = (ROOT / f"{name}.py").read_text()
    if name == "grpo":
        lines = (ROOT / "common.py").read_text().splitlines()
        cited += "\n".join(lines[n - 1] for title in titles for n in shared.get(title, []) if title != "header")
    equations = {n for a, b in re.findall(r"eq\. (\d+)(?:-(\d+))?", cited) for n in range(int(a), int(b or a) + 1)} - {
        int(n) for n in re.findall(r"\$\$ \((\d+)\)$", text, re.MULTILINE)
    }
    return wrong | equations


@pytest.mark.parametrize("name", METHODS)
def test_every_function_has_a_note_and_every_equation_stands_in_the_notes(name):
    assert incomplete(name, NOTES[name]) == set()
    titles = re.findall(r"^## (.+)$", NOTES[name], re.MULTILINE)
    assert titles[0] == "header" and titles[-3:] == ["main", "results", "exercises"]


@pytest.mark.parametrize(
    "change, missed",
    [
        (lambda text: text.replace("## compensate\n", "## compensated\n"), {"compensate", "compensated"}),
        (lambda text: text.replace("## rescaled\n", ""), {"rescaled"}),
        (lambda text: text.replace("$$ (7)", "$$"), {7}),
    ],
)
def test_incomplete_notes_are_found(change, missed):
    assert incomplete("vgpo", change(NOTES["vgpo"])) == missed


def test_what_notes_include():
    def lines(text):
        return included(re.match(r"(\S+) (.+?)(?: \+(\d+))?$", text))

    assert re.fullmatch("```\ndef loss_denominator\\(.*\n```", lines("common.py def loss_denominator +1"))
    assert lines("vepo.py chosen = mask & row +1").startswith("```\nchosen = mask")  # without its indentation
    whole = lines("lecture/exercises/exercises.py def psi(")
    assert whole.count("def ") == 1 and whole.endswith("    raise NotImplementedError\n```")
    table = lines("README.md | method | m, N")
    assert table.count("\n") == 2 + len(METHODS) + 1 and "](vepo.py)" not in table and "](https://arxiv.org/" in table
    with pytest.raises(ValueError, match="substring not found"):
        lines("common.py def not_there +2")


def test_mistakes_get_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["show.py", "lecture", "--output", str(ROOT / "README.md")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "show.py"), run_name="__main__")
    assert "README.md is a file" in str(end.value)
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "show.py"), run_name="__main__")
    assert "pip install -r lecture/requirements.txt" in str(end.value)


def test_the_notebook_runs(monkeypatch, tmp_path):
    """With one step, and without its installation, in a kernel of its own."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    book = nbformat.read(ROOT / "lecture/first_command.ipynb", as_version=4)
    book.cells = [cell for cell in book.cells if not cell.source.startswith("%pip")]
    for cell in book.cells:
        cell.source = cell.source.replace("steps = 150", "steps = 1").replace(
            "{steps}", "{steps} --eval_rows 4 --prompts_per_step 4"
        )
        cell.source = cell.source.replace("runs/notebook", str(tmp_path / "run"))
        cell.source = cell.source.replace("tokens.html", str(tmp_path / "tokens.html")).replace(
            "!python", f"!{sys.executable}"
        )
    nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT / "lecture"}}
    ).execute()
    printed = "".join(out.get("text", "") for cell in book.cells for out in cell.get("outputs", []))
    shown = [kind for cell in book.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
    assert re.search(r"accuracy [\d.]+% -> [\d.]+%", printed) and "image/png" in shown and "text/html" in shown


def test_a_value_that_is_equal_on_all_tokens_has_a_colour():
    for label in ("weight", "advantage"):
        for value in (0.0, 2.0):
            assert "nan" not in strip(label, torch.full((2,), value), ["a", "b"])
