"""plumbing/curves.py: seeds pooled by hand, and what a run draws at its end."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import grpo
from plumbing.arguments import UserError
from plumbing.metrics import draw_curves, pooled, read_runs, series


def write_run(folder, accuracies, seconds=2.0):
    folder.mkdir()
    lines = [{"step": 0, "eval_accuracy": accuracies[0]}]
    for step, accuracy in enumerate(accuracies[1:], 1):
        line = {"step": step, "reward": accuracy / 2, "entropy": 0.1, "response_tokens": 30, "seconds": seconds}
        lines += [line, {"step": step, "eval_accuracy": accuracy}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_seeds_are_pooled(tmp_path):
    folders = [write_run(tmp_path / f"vepo-{i}", [0.4, 0.5 + i / 10, 0.7], 2.0 + i) for i in range(3)]
    folders.append(write_run(tmp_path / "grpo", [0.4, 0.6]))
    runs = read_runs(folders)
    assert {name: len(seeds) for name, seeds in runs.items()} == {"vepo": 3, "grpo": 1}
    assert len(read_runs([folders[0], f"{folders[0]}/"])["vepo"]) == 1  # one folder, named twice
    assert series(runs["vepo"][1], "eval_accuracy") == {0: (0.0, 0.4), 1: (3.0, 0.6), 2: (6.0, 0.7)}
    steps, seconds, mean, half = pooled(runs["vepo"], "eval_accuracy")
    assert steps == [0, 1, 2] and seconds.tolist() == [0, 3, 6]
    assert mean.tolist() == pytest.approx([0.4, 0.6, 0.7])
    assert half.tolist() == pytest.approx([0, 4.3027 * 0.1 / 3**0.5, 0], abs=1e-4)  # Student's t of 2 degrees
    assert pooled(runs["grpo"], "reward")[3].tolist() == [0]
    assert pooled(runs["vepo"], "reward", 2)[2].tolist() == pytest.approx([0.3, 0.325])
    table = draw_curves(runs, tmp_path / "curves")
    assert "vepo" in table[1] and table[1].split()[1:3] == ["3", "2"] and table[2].split()[-1] == "60.0%"
    assert Image.open(tmp_path / "curves.png").width > 1000 and "<svg" in (tmp_path / "curves.svg").read_text()


def test_folders_that_are_no_runs_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "eval").mkdir()
    (tmp_path / "a file").write_text("")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="eval.*: no metrics.jsonl with a step in it"):
        read_runs([tmp_path / "eval", tmp_path / "a file"])
    run = write_run(tmp_path / "grpo", [0.4, 0.6])
    (run / "metrics.jsonl").open("a").write('{"step": 2, "half a li')  # while it runs
    assert list(read_runs(sorted(tmp_path.iterdir()))) == ["grpo"]
    said = capsys.readouterr().err
    assert "left out" in said and all(str(tmp_path / name) in said for name in ("eval", "a file", "begun"))


def test_the_title_says_what_was_evaluated_on(tmp_path):
    runs = {}
    for name in ("toy (test)", "rows held out of mine.jsonl"):
        line = {"step": 0, "eval_accuracy": 0.5, "eval_data": name}
        runs[name] = [[line, {"step": 1, "reward": 1.0, "entropy": 0.1, "response_tokens": 3, "seconds": 1.0}]]
    draw_curves(runs, tmp_path / "curves")
    text = (tmp_path / "curves.svg").read_text()
    assert "accuracy on rows held out of mine.jsonl, toy (test), %" in text


def test_a_run_ends_with_its_curves(monkeypatch, tmp_path):
    flags = ["--steps", "2", "--prompts_per_step", "2", "--group_size", "4", "--eval_rows", "5", "--show_every", "0"]
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--output", str(tmp_path / "run"), *flags])
    grpo.main()
    assert Image.open(tmp_path / "run" / "curves.png").width > 1000
    assert Path(tmp_path / "run" / "curves.svg").exists()
