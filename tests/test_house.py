"""The layers: a module imports from the layers below it alone; no import hides in a function; no module is too long."""

import ast

import pytest
from helpers import ROOT

LAYERS = [  # the lowest first; modules of one layer do not import each other
    ["plumbing"],
    ["common"],
    ["trainer"],
    ["grpo", "vepo", "vgpo", "prpo", "pepo", "saei", "vppo"],
    ["eval", "show", "ports"],
    ["toy", "lecture", "tests"],
]
PLUMBING = ["arguments kernels", "families answers adapters", "data memory", "sharding metrics", "checkpoints"]
LINES = {"common.py": 820, "trainer.py": 372, "README.md": 110, "CONTRIBUTING.md": 60, "plumbing": 395, "methods": 290}
LINES |= {"trl.py": 130, "trl_base.py": 80, "verl.py": 90, "pages.py": 150}
ALL_LINES = 7_820  # of Python outside tests/
METHODS = LAYERS[3]
FILES = sorted(path for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")] if path.parent.name != "tests")


def layer_of(path):
    """(layer, module) of a file; plumbing has layers of its own."""
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    layer = next(i for i, names in enumerate(LAYERS) if name in names)
    return layer, path.stem if name == "plumbing" else name


def imports(tree):
    """(module, whether the import stands at the top of the file) of every import of a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node in tree.body) for alias in node.names)


def arrows(source, own):
    """What is wrong with the imports of a module `own`, as sentences."""
    layer, name = own
    for module, at_the_top in imports(ast.parse(source)):
        top, _, rest = module.partition(".")
        inner = rest.partition(".")[0]
        ours = next((i for i, names in enumerate(LAYERS) if top in names), None)
        if not at_the_top and name != "answers":  # whose maths worker is the source of another process
            yield f"{name} imports {module} inside"
        if ours is None or module.startswith("toy.kinds"):  # which imports nothing of ours
            continue
        if top == "plumbing" == LAYERS[layer][0]:
            own_level, level = (next(i for i, x in enumerate(PLUMBING) if n in x.split()) for n in (name, inner))
            if level >= own_level:
                yield f"plumbing/{name} imports {inner}, which is not under it"
        elif ours >= layer and top != name:  # a file of ports/ may import another
            yield f"{name} imports {top}, which is not under it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert list(arrows(path.read_text(), layer_of(path))) == []


@pytest.mark.parametrize(
    "source, own, sentence",
    [
        ("import trainer", (1, "common"), "common imports trainer"),
        ("from vepo import add_noise", (3, "prpo"), "prpo imports vepo"),  # of the same layer
        ("from common import forward", (0, "data"), "data imports common"),
        ("from plumbing.metrics import pooled", (0, "data"), "plumbing/data imports metrics"),
        ("def f():\n    from json import loads", (2, "trainer"), "trainer imports json.loads inside"),
    ],
)
def test_an_arrow_that_runs_back_is_seen(source, own, sentence):
    assert any(sentence in found for found in arrows(source, own))


def test_every_module_has_its_layer():
    names = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert names == {name for layer in LAYERS for name in layer}
    modules = {path.stem for path in ROOT.glob("plumbing/*.py")} - {"__init__"}
    assert modules == {name for layer in PLUMBING for name in layer.split()}
    described = (ROOT / "plumbing/__init__.py").read_text()
    assert all(
        f"\n{name}" in described and "Not here:" in (ROOT / f"plumbing/{name}.py").read_text() for name in modules
    )


def test_what_differs_between_model_families_stands_in_one_place():
    others = [path for path in FILES if path.stem != "families" and path.parent.name != "ports"]
    assert [path.name for path in others if "internvl" in path.read_text() or ".visual" in path.read_text()] == [
        "make.py"
    ]


@pytest.mark.parametrize("path", [*FILES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_no_module_is_longer_than_its_number(path):
    kind = "methods" if path.stem in METHODS else "plumbing" if path.parent.name == "plumbing" else path.name
    lines = len(path.read_text().splitlines())
    assert lines <= LINES.get(kind, lines), f"{lines} lines: what in it is not its own?"


def test_all_modules_together_are_no_longer_than_their_number():
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= ALL_LINES
