"""plumbing/metrics.py: means over tokens and processes by hand, and what a line of the log holds."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from plumbing import metrics
from plumbing.arguments import UserError
from plumbing.metrics import Metrics, means


def log(path, is_main=True):
    said = []
    accelerator = SimpleNamespace(is_main_process=is_main, log=lambda line, step: said.append((line, step)))
    return Metrics(accelerator, path), said


def test_means_are_over_tokens_and_processes(tmp_path, monkeypatch):
    mine, _ = log(tmp_path / "metrics.jsonl")
    mine.add_means({"entropy": torch.tensor(2.0)}, torch.tensor([[True, True, True], [False, False, False]]))
    mine.add_means({"entropy": torch.tensor(6.0)}, torch.tensor([[True, False]]))
    mine.add("loss", 0.25, 0)  # of a row; an update has the weight
    mine.add("loss", 0.5, 2)
    mine.add_means({"kl": torch.tensor(0.0)}, torch.zeros(1, 2, dtype=torch.bool))  # of no token
    other = {"entropy": (8.0, 4.0), "jsd": (1.0, 2.0)}  # of a process that measured something else too
    monkeypatch.setattr(metrics, "gather_object", lambda own: [*own, other])
    sums = mine.sums(["entropy"])
    found = means(sums)
    assert math.isnan(found.pop("kl"))
    assert found == {"entropy": (2 * 3 + 6 * 1 + 8) / 8, "loss": 0.375, "jsd": 0.5}
    monkeypatch.setattr(metrics, "gather_object", lambda own: own)
    assert math.isnan(means(mine.sums(["reward"]))["reward"])  # a new step


def test_a_disk_that_is_full_while_a_line_is_appended(tmp_path):
    own, _ = log("/dev/full")
    with pytest.raises(UserError, match="/dev/full could not be written .*No space left.*: free space .* --resume"):
        own.write({"step": 3})


def test_what_is_no_number_stays_in_the_file(tmp_path):
    own, said = log(tmp_path / "metrics.jsonl")
    own.write({"step": 3, "eval_data": "toy (test)", "changed": {"seed": (0, 1)}, "eval_accuracy": 0.5})
    assert said == [({"eval_accuracy": 0.5}, 3)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["changed"] == {"seed": [0, 1]}


def test_a_line_has_six_digits_and_no_nan(tmp_path):
    for is_main in (True, False):
        own, said = log(tmp_path / "metrics.jsonl", is_main)
        own.write({"step": 3, "loss": 1 / 3, "kl": math.nan, "count": 7})
        assert said == [({"loss": 0.333333, "kl": None, "count": 7}, 3)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # the main process alone wrote
    assert [json.loads(line) for line in lines] == [{"step": 3, "loss": 0.333333, "kl": None, "count": 7}]
