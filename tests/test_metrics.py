"""plumbing/metrics.py: means over tokens and processes by hand, lines of the log, and curves of pooled seeds."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import grpo
from plumbing import metrics
from plumbing.arguments import UserError
from plumbing.metrics import Metrics, draw_curves, means, pooled, read_runs


def test_means_are_over_tokens_and_processes(monkeypatch):
    mine = Metrics(None, None)
    mine.add_means({"entropy": torch.tensor(2.0)}, torch.tensor([[True, True, True], [False, False, False]]))
    mine.add_means({"entropy": torch.tensor(6.0)}, torch.tensor([[True, False]]))
    mine.add("loss", 0.25, 0)  # of a row; an update has the weight
    mine.add("loss", 0.5, 2)
    mine.add_means({"kl": torch.tensor(0.0)}, torch.zeros(1, 2, dtype=torch.bool))  # of no token
    other = {"entropy": (8.0, 4.0), "jsd": (1.0, 2.0)}  # of a process that measured something else too
    monkeypatch.setattr(metrics, "gather_object", lambda own: [*own, other])
    found = means(mine.sums(["entropy"]))
    assert math.isnan(found.pop("kl"))
    assert found == {"entropy": (2 * 3 + 6 * 1 + 8) / 8, "loss": 0.375, "jsd": 0.5}
    monkeypatch.setattr(metrics, "gather_object", lambda own: own)
    assert math.isnan(means(mine.sums(["reward"]))["reward"])  # a new step


def test_a_line_has_six_digits_and_no_nan_and_trackers_get_its_numbers(tmp_path):
    said, path = [], tmp_path / "metrics.jsonl"
    numbers = {"loss": 0.333333, "kl": None, "count": 7}
    for is_main in (True, False):
        accelerator = SimpleNamespace(is_main_process=is_main, log=lambda line, step: said.append((line, step)))
        line = {"step": 3, "loss": 1 / 3, "kl": math.nan, "count": 7, "changed": {"seed": (0, 1)}, "eval_data": "toy"}
        Metrics(accelerator, path).write(line)
    assert said == [(numbers, 3)] * 2
    (text,) = path.read_text().splitlines()  # the main process alone wrote
    assert json.loads(text) == {"step": 3, **numbers, "changed": {"seed": [0, 1]}, "eval_data": "toy"}


# ---- curves ---------------------------------------------------------------------------------------------------------


def write_run(folder, accuracies, seconds=2.0, data="toy (test)"):
    folder.mkdir()
    lines = [{"step": 0, "eval_accuracy": accuracies[0], "eval_data": data}]
    for step, accuracy in enumerate(accuracies[1:], 1):
        line = {"step": step, "reward": accuracy / 2, "entropy": None, "response_tokens": 30, "seconds": seconds}
        lines += [line, {"step": step, "eval_accuracy": accuracy}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_seeds_are_pooled(tmp_path):
    folders = [write_run(tmp_path / f"vepo-{i}", [0.4, 0.5 + i / 10, 0.7], 2.0 + i) for i in range(3)]
    folders.append(write_run(tmp_path / "grpo", [0.4, 0.6], data="rows held out of mine.jsonl"))
    write_run(tmp_path / "long", [0.4, 0.5, 0.6, 0.9]).rename(tmp_path / "vepo-3")  # has a step more than the others
    runs = read_runs([*folders, f"{folders[0]}/"])  # one folder is named twice
    assert runs.groupby("method", sort=False)["run"].nunique().to_dict() == {"vepo": 3, "grpo": 1}
    vepo, longer = runs[runs["method"] == "vepo"], read_runs([tmp_path / "vepo-1", tmp_path / "vepo-3"])
    curve = pooled(vepo, "eval_accuracy")
    assert curve.index.tolist() == [0, 1, 2] and curve["seconds"].tolist() == [0, 3, 6]
    assert curve["mean"].tolist() == pytest.approx([0.4, 0.6, 0.7])
    assert curve["half"].tolist() == pytest.approx([0, 4.3027 * 0.1 / 3**0.5, 0], abs=1e-4)  # t of 2 degrees
    assert pooled(runs[runs["method"] == "grpo"], "reward")["half"].tolist() == [0]
    assert pooled(vepo, "reward", 2)["mean"].tolist() == pytest.approx([0.3, 0.325])
    curve = pooled(longer, "eval_accuracy")  # only where both seeds have a value
    assert curve["mean"].tolist() == pytest.approx([0.4, 0.55, 0.65]) and curve["seconds"].tolist() == [0, 2.5, 5]
    heading, *table = (line.split() for line in draw_curves(runs, tmp_path / "curves"))
    assert table == [["vepo", "3", "2", "6", "40.0%", "70.0%", "±", "0.0%"], ["grpo", "1", "1", "2", "40.0%", "60.0%"]]
    assert Image.open(tmp_path / "curves.png").width > 1000
    assert "accuracy on rows held out of mine.jsonl, toy (test), %" in (tmp_path / "curves.svg").read_text()


def test_folders_that_are_no_runs_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "eval").mkdir()
    (tmp_path / "a file").write_text("")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="eval.*: no metrics.jsonl with a step in it"):
        read_runs([tmp_path / "eval", tmp_path / "a file"])
    run = write_run(tmp_path / "grpo", [0.4, 0.6])
    (run / "metrics.jsonl").open("a").write('{"step": 2, "half a li')  # while it runs
    assert read_runs(sorted(tmp_path.iterdir()))["method"].unique().tolist() == ["grpo"]
    said = capsys.readouterr().err
    assert "left out" in said and all(str(tmp_path / name) in said for name in ("eval", "a file", "begun"))


def test_a_run_that_was_only_evaluated_has_curves(tmp_path):
    table = draw_curves(read_runs([write_run(tmp_path / "grpo", [0.4])]), tmp_path / "curves")
    assert table[1].split() == ["grpo", "1", "0", "0", "40.0%", "40.0%"]


def test_a_run_ends_with_its_curves(monkeypatch, tmp_path):
    flags = ["--steps", "1", "--prompts_per_step", "2", "--group_size", "4", "--eval_rows", "0", "--show_every", "0"]
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--output", str(tmp_path / "run"), *flags])
    grpo.main()
    assert Image.open(tmp_path / "run" / "curves.png").width > 1000 and (tmp_path / "run" / "curves.svg").exists()
