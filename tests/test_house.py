"""The floors: a file imports from the floors under it alone; no import hides in a function; no room is too large."""

import ast

import pytest
from helpers import ROOT

FLOORS = [  # from the ground up; files of one floor may not import each other
    ["plumbing"],
    ["common"],
    ["run"],
    ["grpo", "vepo", "vgpo", "prpo", "pepo", "saei"],
    ["eval", "show"],
    ["toy", "tests"],
]
OF_PLUMBING = ["commandline kinds kernels", "arguments families files rewards", "rows pictures answers adapters"]
OF_PLUMBING += ["data memory stream", "sharding metrics", "checkpoints curves"]
LINES = {"common.py": 800, "run.py": 445, "README.md": 200, "CONTRIBUTING.md": 60, "plumbing": 260, "methods": 290}
METHODS = FLOORS[3]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("toy/*.py")])


def room(path):
    """(floor, room) of a file; a room of plumbing has floors of its own."""
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    floor = next(i for i, names in enumerate(FLOORS) if name in names)
    return floor, path.stem if name == "plumbing" else name


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
    """What is wrong with the imports of a file in room `own`, as sentences."""
    floor, name = own
    for module, where in imports(ast.parse(source)):
        top, _, rest = module.partition(".")
        ours = next((i for i, names in enumerate(FLOORS) if top in names), None)
        if where is not None and name != "answers":  # whose maths worker is the source of another process
            yield f"{name} imports {module} inside of {where}"
        if ours is None:
            continue
        inner = rest.partition(".")[0]
        if top == "plumbing" == FLOORS[floor][0]:
            levels = [i for i, rooms in enumerate(OF_PLUMBING) for n in (name, inner) if n in rooms.split()]
            below = [i for i, rooms in enumerate(OF_PLUMBING) if inner in rooms.split()]
            if not below or max(levels) == below[0]:
                yield f"plumbing/{name} imports {inner}, which is not under it"
        elif ours >= floor:
            yield f"{name} imports {top}, which is not under it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert list(arrows(path.read_text(), room(path))) == []


@pytest.mark.parametrize(
    "source, own, sentence",
    [
        ("import run", (1, "common"), "common imports run"),
        ("from vepo import add_noise", (3, "prpo"), "prpo imports vepo"),  # beside it
        ("from common import forward", (0, "data"), "data imports common"),
        ("from plumbing.curves import pooled", (0, "data"), "plumbing/data imports curves"),
        ("from plumbing import curves", (0, "checkpoints"), "plumbing/checkpoints imports curves"),
        ("def f():\n    import show", (2, "run"), "run imports show inside of f"),
        ("class A:\n    def f(self):\n        from json import loads", (2, "run"), "inside of"),
        ("import show", (4, "eval"), "eval imports show"),
    ],
)
def test_an_arrow_that_runs_back_is_seen(source, own, sentence):
    assert any(sentence in found for found in arrows(source, own))


def test_every_file_has_its_floor():
    names = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert names == {name for floor in FLOORS for name in floor}
    rooms = {path.stem for path in ROOT.glob("plumbing/*.py")} - {"__init__"}
    assert rooms == {name for floor in OF_PLUMBING for name in floor.split()}
    described = (ROOT / "plumbing/__init__.py").read_text()
    assert all(f"\n{name}" in described for name in rooms)


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
    assert "common" in graph["run"]  # the graph is not empty


@pytest.mark.parametrize("path", [*FILES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_no_room_is_larger_than_its_number(path):
    kind = "methods" if path.stem in METHODS else "plumbing" if path.parent.name == "plumbing" else path.name
    lines = len(path.read_text().splitlines())
    assert lines <= LINES.get(kind, lines), f"{lines} lines: what in it is not its own?"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "plumbing"], ids=lambda p: p.stem)
def test_a_room_says_what_lives_there_and_what_does_not(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    assert path.stem == "__init__" or "Not here:" in header
