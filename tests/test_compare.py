"""toy/compare.py: its table against hand counts, and what it runs again."""

import json
import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "toy"))
import compare  # noqa: E402


def record(arm, seed, last, seconds=1.0):
    lines = [{"step": 0, "eval_accuracy": 0.4}]
    lines += [{"step": s, "reward": 0.5, "entropy": 0.1, "response_tokens": 30, "seconds": seconds} for s in (1, 2)]
    lines.append({"step": 2, "eval_accuracy": last})
    found = {"arm": arm, "seed": seed, **compare.compact(lines)}
    assert compare.metrics(found) == lines
    return found


def test_the_table_by_hand(tmp_path, monkeypatch, capsys):
    found = [record("GRPO", 0, 0.7), record("GRPO", 1, 0.8), record("PEPO", 1, 1.0, 2.0), record("PEPO", 0, 0.6, 2.0)]
    found += [record("PEPO", 2, 0.1)]  # GRPO has no such seed yet: left out
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "TOY", tmp_path)
    compare.RESULTS.write_text("".join(json.dumps(line) + "\n" for line in found))
    compare.report()
    rows = {
        line.split(" | ")[0][2:]: line.strip("| ").split(" | ")[1:] for line in capsys.readouterr().out.splitlines()
    }
    t = 12.7062 / 2**0.5  # of 1 degree, over the root of 2 seeds
    assert rows["GRPO"][1:4] == [f"75.0 ± {t * 7.0711:.1f} %", "-", "-"] and rows["GRPO"][5] == "1.00"
    assert rows["GRPO"][4].startswith("2 ± ")  # 2 and 1.5 steps
    assert rows["PEPO"][0] == "2" and rows["PEPO"][1].startswith("80.0 ± ")
    assert rows["PEPO"][2] == f"+5.0 ± {t * 21.2132:.1f}" and rows["PEPO"][5] == "2.00"  # gains of -10 and +20 points
    assert rows["PEPO"][3] == f"+2.5 ± {t * 10.6066:.1f}" and rows["PEPO"][4] == "- (1 of 2 seeds)"
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.jsonl", "comparison.png"}


def test_mistakes_get_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    for argv, text, sentence in (
        (["x", "--report"], '{"arm": "GR', "is broken"),
        (["x", "--jobs", "0"], "", "--jobs 0 must be above 0"),
    ):
        compare.RESULTS.write_text(text)
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as error:
            compare.main()
        assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_a_run_that_fails_says_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "TOY", tmp_path / "toy")
    monkeypatch.setattr(compare, "SEEDS", range(3))
    monkeypatch.setattr(compare, "ARMS", {"GRPO": ("nothing.py", "GRPO")})
    with pytest.raises(compare.UserError, match="GRPO, seed . ended with exit code 2: .*GRPO-..log says why"):
        compare.run(1)
    assert compare.records() == []


def test_goal():
    assert compare.steps_to(0.7, [(0, 0.4), (2, 0.6)]) is None
    assert compare.steps_to(0.7, [(0, 0.6), (2, 0.8)]) == pytest.approx(1.0)
    assert compare.steps_to(0.7, [(0, 0.6), (2, 0.7)]) == pytest.approx(2.0)


def test_what_is_recorded_is_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "TOY", tmp_path / "toy")
    monkeypatch.setattr(compare, "SEEDS", range(2))
    monkeypatch.setattr(compare, "ARMS", {"GRPO": ("grpo.py", "GRPO"), "PEPO": ("pepo.py", "GRPO")})
    monkeypatch.setattr(compare, "one", lambda arm, seed, core: ran.append((arm, seed)) or record(arm, seed, 0.5))
    compare.RESULTS.write_text(json.dumps(record("GRPO", 0, 0.5)) + "\n")
    compare.run(2)
    assert sorted(ran) == [("GRPO", 1), ("PEPO", 0), ("PEPO", 1)] and len(compare.records()) == 4
    compare.run(2)
    assert len(ran) == 3
