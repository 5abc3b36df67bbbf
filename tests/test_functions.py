"""Plain functions that others copy: as files of their own, and on another device than the generator."""

import subprocess
import sys

import pytest
import torch
from helpers import tiny_group, tiny_model, tiny_prompt

import prpo
import vepo
from common import compare_logits, compare_states, forward, pack, seeded
from show import FUNCTIONS, function_page


def test_printed_functions_need_nothing_of_this_project(tmp_path):
    """Their doctests, in a process that cannot import it; `-I` leaves out PYTHONPATH and the current folder."""
    for method in FUNCTIONS:
        (tmp_path / f"{method}_functions.py").write_text(function_page(method))
    code = """
import doctest, importlib.util, inspect, sys
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("copied", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runner = doctest.DocTestRunner()
    for name, function in vars(module).items():
        if getattr(function, "__module__", "") == "copied":  # testmod would leave out what torch.no_grad wraps
            for test in doctest.DocTestFinder().find(inspect.unwrap(function), name, module=False, globs=vars(module)):
                runner.run(test)
    assert not runner.failures and not {"common", "plumbing"} & sys.modules.keys()
    print(runner.tries)
"""
    paths = sorted(map(str, tmp_path.glob("*.py")))
    done = subprocess.run([sys.executable, "-I", "-c", code, *paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(paths) == 7 and all(int(count) >= 2 for count in done.stdout.split())


@pytest.mark.parametrize("function", [vepo.add_noise, vepo.diffuse, prpo.blacken, prpo.add_pixel_noise])
def test_perturbations_of_pixels_on_another_device_than_the_generators(function):
    more = {prpo.blacken: ([0.5] * 3, [0.2] * 3, 0.6), prpo.add_pixel_noise: ([0.5] * 3, [0.2] * 3)}.get(function, ())
    moved = function(torch.rand(4, 1176, device="meta"), seeded(0), *more)
    assert moved.device.type == "meta" and moved.shape == (4, 1176)


def test_states_are_compared_as_rows_are():
    """By a plain head and hidden states (N, D), the ones that predict the tokens."""
    model = tiny_model("qwen2_5_vl")
    row = tiny_group(tiny_prompt(model, [(4, 6)]), [7, 1, 4])
    hidden = forward(model, row)[2].detach()
    read = pack(row, hidden.device)["read"]
    settings = {"temperature": 0.7}
    plain = compare_states(vepo.divergences, model.lm_head.weight, hidden[read], hidden[read] + 1, chunk=6, **settings)
    ours = compare_logits(vepo.divergences, model, row, hidden, hidden + 1, **settings)
    for a, b in zip(plain, ours, strict=True):
        assert torch.allclose(a, b[row.mask], atol=1e-6) and a.shape == (12,)
