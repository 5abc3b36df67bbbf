"""show.py: pooled curves by hand, and a page of tokens that a browser can read."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import show
from show import pooled, read_runs, series, spans, student


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
    assert series(runs["vepo"][1], "eval_accuracy") == {0: (0.0, 0.4), 1: (3.0, 0.6), 2: (6.0, 0.7)}
    steps, seconds, mean, half = pooled(runs["vepo"], "eval_accuracy")
    assert steps == [0, 1, 2] and seconds.tolist() == [0, 3, 6]
    assert mean.tolist() == pytest.approx([0.4, 0.6, 0.7])
    assert half.tolist() == pytest.approx([0, 4.3027 * 0.1 / 3**0.5, 0], abs=1e-4)  # Student's t of 2 degrees
    assert pooled(runs["grpo"], "reward")[3].tolist() == [0]
    assert pooled(runs["vepo"], "reward", 2)[2].tolist() == pytest.approx([0.3, 0.325])
    table = show.curves(runs, tmp_path / "curves")
    assert "vepo" in table[1] and table[1].split()[1:3] == ["3", "2"] and table[2].split()[-1] == "60.0%"
    assert Image.open(tmp_path / "curves.png").width > 1000 and "<svg" in (tmp_path / "curves.svg").read_text()
    assert not list(tmp_path.glob("*.unfinished"))


def test_student():
    assert [round(student(n), 3) for n in (3, 5, 30)] == [3.182, 2.571, 2.042]


def test_mistakes_get_a_sentence(tmp_path, monkeypatch, capsys):
    for argv, sentence in (
        (["show.py"], "say what to show"),
        (["show.py", "curves", str(tmp_path)], "holds no metrics.jsonl"),
        (["show.py", "tokens", "--page", str(tmp_path / "no/x.html")], "cannot be written"),
        (["show.py", "curves", str(tmp_path), "--output", str(tmp_path / "no/x")], "cannot be written"),
        (["show.py", "curves", str(tmp_path), "--window", "0"], "--window 0 must be between 1"),
        (["show.py", "tokens", "--prompts", "0"], "--prompts 0 must be between 1 and 1000"),
        (["show.py", "tokens", "--model", "/nowhere"], "--model /nowhere cannot be opened"),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as error:
            show.main()
        assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_text_is_escaped_and_colours_are_shares():
    text = spans(["<b>", "\n", "&"], torch.tensor([2.0, -1.0, 0.0]), ["a", "b", "c"], True, "w")
    assert "&lt;b&gt;" in text and "&amp;" in text and "↵" in text and "<b>" not in text
    assert re.findall(r'class="(.)" style="--v:(\d\.\d\d)"', text) == [("p", "1.00"), ("n", "0.50"), ("p", "0.00")]
    scores = spans(["a", "b", "c"], torch.tensor([3.0, 1.0, 2.0]), ["a", "b", "c"], False, "w")
    assert re.findall(r"--v:(\d\.\d\d)", scores) == ["1.00", "0.00", "0.50"]
    assert "--v:0.00" in spans(["a"], torch.tensor([3.0]), ["a"], False, "w")  # one token, equal scores


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "tokens.html"
    args = show.TokenArgs(prompts=2, page=str(path), output="nowhere")
    path.write_text(show.token_page(args))
    return path


def test_the_page_stands_alone_and_shows_all_methods_on_the_same_response(page):
    text = page.read_text()
    assert text.startswith("<!doctype html>") and not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in text and text.count("A right response") == text.count("A wrong response") == 2
    for method in ("GRPO", "VEPO", "VGPO", "PRPO", "PEPO", "SaEI"):
        assert text.count(f"<b>{method}</b>") == 4
    for name in ("VEPO: noise", "PRPO: patches blackened", "PRPO: weak noise", "SaEI: attacked, 2/255"):
        assert name in text
    signals = json.loads(re.search(r"const SIGNALS = (\{.*?\});\n", text)[1])
    assert set(re.findall(r'data-t="([\w-]+)"', text)) == set(signals) and text.count("</script>") == 1
    for name in ("entropy", "JSD", "KL strong", "focus", "similarity"):
        assert name in next(iter(signals.values()))


def test_scores_are_those_of_the_method_files(toy):
    """GRPO's advantage on every token; VEPO's on the kept ones; the others' weights times it."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    import vepo

    model, processor = toy
    args = common.Args()
    data = common.Data("toy", "test", args, processor, model.model.get_rope_index)
    (group,) = common.rollout(model, processor.tokenizer, [data.prompt(0)], args, "show")
    group.advantages = torch.linspace(-1, 1, 8)
    run = SimpleNamespace(model=model, processor=processor, world=1, phase=lambda _: nullcontext())
    run.add = run.note = lambda *_: None
    methods, signals = show.judged(group, run)
    plain = group.advantages[:, None] * group.mask
    assert torch.equal(methods["GRPO"][1], plain)
    kept = vepo.select_top(methods["VEPO"][0], group.mask, 0.2)
    assert torch.equal(methods["VEPO"][1], plain * kept) and kept.sum() < group.mask.sum() / 3
    for name in ("VGPO", "PRPO", "PEPO"):
        assert (methods[name][1].sign() == plain.sign()).all() and not torch.equal(methods[name][1], plain)
    assert all((value[~group.mask] == 0).all() for value in signals.values())


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width, dark", [(1100, False), (1100, True), (390, False)])
def test_a_browser_shows_it(page, tmp_path, width, dark):
    """In light and dark, and as wide as a phone: drawn, in the scheme's colours, nothing wider than the window."""
    shot = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1400", f"--screenshot={shot}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    subprocess.run(["chromium", *flags, page.as_uri()], capture_output=True, timeout=120, check=True)
    drawn = Image.open(shot).convert("RGB")
    corner = drawn.getpixel((2, 2))
    assert (max(corner) < 60) if dark else (min(corner) > 240)
    assert len(drawn.resize((200, 200)).getcolors(40_000)) > 500  # text, pictures and colours


def test_a_run_ends_with_its_curves(monkeypatch, tmp_path):
    import grpo

    flags = ["--steps", "2", "--prompts_per_step", "2", "--group_size", "4", "--eval_rows", "5", "--show_every", "0"]
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--output", str(tmp_path / "run"), *flags])
    grpo.main()
    assert Image.open(tmp_path / "run" / "curves.png").width > 1000
    assert Path(tmp_path / "run" / "curves.svg").exists()
