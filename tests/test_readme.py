"""What the pages promise: flags and links exist, commands run, the examples of custom rewards work."""

import dataclasses
import glob
import importlib
import re

import pytest
from helpers import ROOT, main_of

import eval
import show
from plumbing.answers import load_reward

PAGES = {f"{name}.md": (ROOT / f"{name}.md").read_text() for name in ("README", "GUIDE", "RESULTS", "CONTRIBUTING")}
GUIDE = PAGES["GUIDE.md"]
METHODS = ["grpo", "vepo", "vgpo", "prpo", "pepo", "saei", "vppo"]


def test_its_flags_exist():
    classes = [importlib.import_module(name).Args for name in METHODS]
    classes += [eval.Args, show.TokenArgs, show.SignalArgs, show.CurveArgs]
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    known |= {"help", "methods", "no_methods", "repeats", "image_tokens", "gpu"}  # of python and tests/bench.py
    known |= {"report", "search", "check", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}
    known |= {"external_plugins"}  # of ms-swift
    assert set(re.findall(r"--([a-z_0-9]+)", "".join(PAGES.values()))) <= known


@pytest.mark.parametrize("page", PAGES)
def test_its_links_exist(page):
    """Of files, and of headings: GitHub's anchor of a heading is its words in lower case, joined by hyphens."""
    headings = {name: re.findall(r"^#+ (.*)", text, re.MULTILINE) for name, text in PAGES.items()}
    for file, anchor in re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]*)#?([^)\"]*)", PAGES[page]):
        assert (ROOT / file).exists(), file
        titles = headings.get(file or page, [])
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, anchor


SHORT = {"eval": ["--rows", 4], "show": ["--prompts", 1]}  # of the pages' commands, which take minutes
SHORT |= dict.fromkeys(METHODS, ["--steps", 1, "--prompts_per_step", 2, "--eval_rows", 4])


def commands():
    """[script, flags] of README and GUIDE in the order of the pages, each once; not those that need a hub or a file."""
    text = PAGES["README.md"] + GUIDE
    found = dict.fromkeys(re.findall(r"\bpython (\w+)\.py\b *([^`\n#|]*?) *(?=[`\n#|])", text))
    return [[name, *flags.split()] for name, flags in found if not re.search(r"Qwen/|mmk12|mine\.|--nproc", flags)]


def test_its_commands_run_in_the_order_of_the_pages(tmp_path, monkeypatch):
    """In one folder, each as it stands there but for its length: none is in the way of a later one."""
    monkeypatch.chdir(tmp_path)
    done = []
    for name, *flags in commands():
        short = [] if {"--help", "--compare", "curves"} & set(flags) else SHORT[name]
        flags = [part for flag in flags for part in (sorted(glob.glob(flag)) if "*" in flag else [flag])]
        try:
            main_of(name, None, [*flags, *short])
        except SystemExit as end:
            assert not end.code, f"python {name}.py {' '.join(flags)}"
        done.append(name)
    assert {"grpo", "vepo", "show", "eval"} == set(done) and len(done) >= 9
    assert (tmp_path / "curves.png").exists() and (tmp_path / "runs/eval/vepo/results.json").exists()


def test_the_reward_of_boxes(tmp_path):
    """The guide's own lines, by hand."""
    (block,) = re.findall(r"```python\n(import re\n.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "boxes.py").write_text(block)
    overlap = load_reward(f"{tmp_path / 'boxes.py'}:overlap")
    rewards = {
        "so \\boxed{[0, 0, 10, 10]}": 1.0,
        "[5, 0, 15, 10]": 50 / 150,
        "from 3 to 7: [2.5, 0, 7.5, 10]": 0.5,
        "[10, 10, 20, 20]": 0.0,  # which touches
        "[10, 10, 0, 0]": 0.0,  # which ends before it begins
        "[0, 0, 10]": 0.0,
        "": 0.0,
    }
    boxes = ["[0, 0, 10, 10]"] * len(rewards)
    assert overlap(boxes, list(rewards), boxes) == pytest.approx(list(rewards.values()))
    assert overlap([""], ["[3, 3, 3, 3]"], ["[3, 3, 3, 3]"]) == [0.0]


def test_its_list_of_functions_is_what_show_prints():
    """A method's own functions, and those that they call, in the order of the table."""
    table = re.findall(r"^\| (\w+)[^|]* \| (`[^|]*) \| (`[^|]*) \|$", PAGES["README.md"], re.MULTILINE)
    assert [name.lower() for name, _, _ in table] == METHODS
    for name, own, called in table:
        own, called = (re.findall(r"`(\w+)`", cell) for cell in (own, called))
        assert own == show.FUNCTIONS[name.lower()][1]
        printed = re.findall(r"^def (\w+)", show.function_page(name.lower()), re.MULTILINE)
        assert sorted(own + called) == sorted(printed)
