"""The layers: a module imports from the layers below it alone; no import hides in a function; no module is too long."""

import ast

import pytest
from helpers import ROOT

LAYERS = [  # the lowest first; modules of one layer do not import each other
    ["plumbing"],
    ["common"],
    ["trainer"],
    ["grpo", "vepo", "vgpo", "prpo", "pepo", "saei"],
    ["eval", "show"],
    ["toy", "tests"],
]
PLUMBING = ["arguments kernels", "families answers adapters", "data memory", "sharding metrics", "checkpoints"]
LINES = {"common.py": 880, "trainer.py": 380, "README.md": 110, "CONTRIBUTING.md": 60, "plumbing": 450, "methods": 290}
METHODS = LAYERS[3]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("toy/*.py")])


def layer_of(path):
    """(layer, module) of a file; plumbing has layers of its own."""
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    layer = next(i for i, names in enumerate(LAYERS) if name in names)
    return layer, path.stem if name == "plumbing" else name


def imports(tree):
    """(module, where) of every import of a syntax tree; where: the function it hides in, or None."""
    hidden = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            for inside in ast.walk(node):
                hidden.setdefault(inside, getattr(node, "name", "lambda"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, hidden.get(node)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from ((f"{node.module}.{alias.name}", hidden.get(node)) for alias in node.names)
        elif isinstance(node, ast.Call) and "__import__" in ast.dump(node.func) + "".join(map(ast.dump, node.args)):
            yield "__import__", "a call"


def arrows(source, own):
    """What is wrong with the imports of a module `own`, as sentences."""
    layer, name = own
    for module, where in imports(ast.parse(source)):
        top, _, rest = module.partition(".")
        ours = next((i for i, names in enumerate(LAYERS) if top in names), None)
        if where is not None and name != "answers":  # whose maths worker is the source of another process
            yield f"{name} imports {module} inside of {where}"
        if ours is None or module.startswith("toy.kinds"):  # which imports nothing of ours
            continue
        inner = rest.partition(".")[0]
        if top == "plumbing" == LAYERS[layer][0]:
            levels = [i for i, modules in enumerate(PLUMBING) for n in (name, inner) if n in modules.split()]
            below = [i for i, modules in enumerate(PLUMBING) if inner in modules.split()]
            if not below or max(levels) == below[0]:
                yield f"plumbing/{name} imports {inner}, which is not under it"
        elif ours >= layer:
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
        ("from plumbing import checkpoints", (0, "metrics"), "plumbing/metrics imports checkpoints"),
        ("def f():\n    import show", (2, "trainer"), "trainer imports show inside of f"),
        ("class A:\n    def f(self):\n        from json import loads", (2, "trainer"), "inside of"),
        ("import show", (4, "eval"), "eval imports show"),
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
    assert all(f"\n{name}" in described for name in modules)


def test_what_differs_between_model_families_stands_in_one_place():
    others = [path for path in FILES if path.stem != "families"]
    assert [path.name for path in others if "internvl" in path.read_text() or ".visual" in path.read_text()] == [
        "make.py"
    ]


def test_no_module_imports_itself_in_a_circle():
    """Followed from file to file, no way leads back."""
    graph = {}
    for path in FILES:
        names = {".".join(module.split(".")[:2]) for module, _ in imports(ast.parse(path.read_text()))}
        own = f"plumbing.{path.stem}" if path.parent.name == "plumbing" else path.stem
        graph[own] = {name if name.startswith("plumbing") else name.partition(".")[0] for name in names}

    def visit(name, above):
        assert name not in above, f"{name} imports itself through {above}"
        for other in graph.get(name, ()):
            visit(other, (*above, name))

    for name in graph:
        visit(name, ())
    assert "common" in graph["trainer"]  # the graph is not empty


@pytest.mark.parametrize("path", [*FILES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_no_module_is_longer_than_its_number(path):
    kind = "methods" if path.stem in METHODS else "plumbing" if path.parent.name == "plumbing" else path.name
    lines = len(path.read_text().splitlines())
    assert lines <= LINES.get(kind, lines), f"{lines} lines: what in it is not its own?"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "plumbing"], ids=lambda p: p.stem)
def test_a_module_says_what_lives_there_and_what_does_not(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert path.stem == "__init__" or "Not here:" in header
