"""show.py: a page of tokens that a browser can read, by the methods' own functions."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import show
from common import rollout
from plumbing.arguments import SharedArgs
from plumbing.data import Data
from show import spans


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

    import vepo

    model, processor = toy
    args = SharedArgs()
    data = Data("toy", "test", args, processor, model.model.get_rope_index)
    (group,) = rollout(model, processor.tokenizer, [data.prompt(0)], args, "show")
    group.advantages = torch.linspace(-1, 1, 8)
    run = show.run_of(model, processor)
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
