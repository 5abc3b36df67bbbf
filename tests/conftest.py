"""Fixtures that all test files know, and which file comes first.

Nothing here imports torch before a test asks for it: pytest's first process, which runs no test, starts at once.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
named = [Path(argument.split("::")[0]).name for argument in sys.argv]
if "PYTEST_XDIST_WORKER" not in os.environ and "test_gpu.py" not in named:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also of the processes that run the tests: CPU tests are that everywhere


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`train`, whose runs are shared between the tests that ask for the same one: (weights and optimiser, metrics)."""
    from helpers import train, weights

    runs = {}

    def shared(script, *flags):
        key = (script, *map(str, flags))
        if key not in runs:
            output = tmp_path_factory.mktemp(script) / "run"
            runs[key] = (train(script, output, *flags), output)
        lines, output = runs[key]
        return weights(output / "last"), lines

    return shared


LONGEST_FIRST = ["test_sharding", "test_methods", "test_compile", "test_checkpoints", "test_memory", "test_devices"]


def pytest_collection_modifyitems(items):
    """With two test processes each takes a file at a time: the long ones first."""
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(Path(item.fspath).stem, len(order)))


@pytest.fixture(autouse=True)
def given_back():
    """A run takes SIGINT and SIGTERM, and accelerate keeps its precision for the whole process; both are given back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if accelerate := sys.modules.get("accelerate"):
        accelerate.state.AcceleratorState._reset_state(True)


@pytest.fixture
def no_waiting(monkeypatch):
    """Libraries that ask a network again and again ask at once."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture(scope="session")
def toy():
    """The embedded model and processor."""
    from common import load_model, load_processor

    folder = str(ROOT / "toy" / "model")
    return load_model(folder), load_processor(folder)


@pytest.fixture
def args(tmp_path):
    """Arguments of a short run on the toy."""
    from plumbing.arguments import SharedArgs

    return SharedArgs(
        output=str(tmp_path / "run"), steps=2, prompts_per_step=2, group_size=4, eval_rows=0, show_every=0
    )


@pytest.fixture
def image_file(tmp_path):
    """A data set of three rows, one without an image, as json lines next to its images."""
    for i, (mode, colour) in enumerate([("RGB", "red"), ("RGBA", (0, 0, 255, 128))]):
        Image.new(mode, (56, 84), colour).save(tmp_path / f"{i}.png")
    rows = [
        {"images": ["0.png"], "problem": "<image>How many?", "answer": "3"},
        {"images": ["0.png", "1.png"], "problem": "Of <image> and <image>, which?", "answer": "A"},
        {"images": [], "problem": "One and one?", "answer": "2"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
