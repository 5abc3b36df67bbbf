"""show.py: a page of tokens that a browser can read, by the methods' own functions."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import grpo
import prpo
import saei
import show
import vepo
from common import forward, rollout
from plumbing.arguments import TOY, SharedArgs
from plumbing.data import Data
from show import notes, spans


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["show.py", *map(str, argv)])
    show.main()


def test_mistakes_get_a_sentence(tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b.svg"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    run = str(tmp_path)
    for argv, sentence in (
        ([], "say what to show"),
        (["tables"], "say what to show"),
        (["curves"], "--runs"),
        (["curves", run, "--window", "0"], "--window 0 must be above 0"),
        (["curves", run, "--output", tmp_path / "no/x"], "cannot be written"),
        (["curves", run, "--output", tmp_path / "a"], "a.png cannot be written: name a file"),
        (["curves", run, "--output", tmp_path / "b"], "b.svg cannot be written: name a file"),
        (["tokens", "--page", tmp_path / "no/x.html"], "cannot be written"),
        (["tokens", "--page", tmp_path / "file/x.html"], "cannot be written"),
        (["tokens", "--page", tmp_path], "cannot be written: name a file"),
        (["tokens", "--prompts", "0"], "--prompts 0 must be above 0"),
        (["tokens", "--group_size", "1"], "--group_size 1 leaves no group"),
        (["tokens", "--steps", "3"], "unrecognized arguments: --steps 3"),
        (["tokens", "--model", "/nowhere"], "--model /nowhere cannot be opened"),
    ):
        with pytest.raises(SystemExit) as error:
            run_main(monkeypatch, *argv)
        assert error.value.code == 2 and sentence in capsys.readouterr().err, argv


def test_help(monkeypatch, capsys):
    run_main(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert "show.py curves runs/*" in text and "show.py tokens --model" in text
    for command, own in (("tokens", show.TokenArgs), ("curves", show.CurveArgs)):
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, command, "--help")
        text = capsys.readouterr().out
        assert not end.value.code and f"show.py {command}" in text
        assert set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) == {f.name for f in dataclasses.fields(own)}


def test_its_flags_are_those_that_it_reads():
    """Of training's flags the page has those that it makes use of, and no others."""
    read = set()

    class Args(show.TokenArgs):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    args = Args(data=str(TOY / "test.parquet"), prompts=1)
    read.clear()
    show.token_page(args)
    flags = {f.name for f in dataclasses.fields(show.TokenArgs)}
    assert flags - read == {"page"}
    fixed = {"reshard_while_sampling", "cuda_graphs", "rollout_prompts", "tokens_per_row"}
    assert (read & SharedArgs.__dataclass_fields__.keys()) - flags == fixed


def test_curves(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        (tmp_path / f"pepo-{seed}").mkdir()
        line = {"step": 1, "reward": 0.5, "entropy": 0.1, "response_tokens": 30, "seconds": 1.0}
        lines = [{"step": 0, "eval_accuracy": 0.25}, line, {"step": 1, "eval_accuracy": 0.5}]
        (tmp_path / f"pepo-{seed}" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_main(monkeypatch, "curves", tmp_path / "pepo-0", tmp_path / "pepo-1", "--output", tmp_path / "both")
    assert "pepo" in capsys.readouterr().out and (tmp_path / "both.png").exists()


def test_a_checkpoint_brings_its_own_settings(monkeypatch):
    """A flag that is not given is as the checkpoint was trained; what is not stored there, as for the toy or not."""
    stored = {"model": "toy", "data": "toy", "eval_data": None, "instruction": "Answer.", "temperature": 0.7, "seed": 5}
    monkeypatch.setattr(show, "trained_with", lambda model: dict(stored) if model == "runs/vepo/last" else {})
    args = show.TokenArgs(model="runs/vepo/last", seed=0, group_size=4)
    assert (args.model, args.data, args.max_response_tokens, args.min_pixels) == ("runs/vepo/last", "toy", 64, None)
    assert (args.instruction, args.temperature, args.seed, args.group_size) == ("Answer.", 0.7, 0, 4)
    stored |= {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "data": "train.parquet", "eval_data": "test.parquet"}
    args = show.TokenArgs(model="runs/vepo/last")
    assert (args.data, args.max_response_tokens, args.max_pixels, args.seed) == ("test.parquet", 2048, 1_000_000, 5)
    assert show.TokenArgs(model="runs/vepo/last", data="mine.parquet").data == "mine.parquet"
    assert show.TokenArgs(model="Qwen/Qwen2.5-VL-7B-Instruct").data == "hiyouga/geometry3k"
    assert (show.TokenArgs().data, show.TokenArgs().max_response_tokens) == ("toy", 64)


def test_a_checkpoint_of_the_toy_shows_its_puzzles(monkeypatch, tmp_path):
    """A run's own checkpoint, with what it stores."""
    flags = f"--steps 1 --prompts_per_step 2 --group_size 4 --eval_rows 0 --show_every 0 --output {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", ["grpo.py", *flags.split()])
    grpo.main()
    run_main(monkeypatch, "tokens", "--model", tmp_path / "run/last", "--prompts", 1, "--page", tmp_path / "x.html")
    assert "A wrong response" in (tmp_path / "x.html").read_text()


def test_text_is_escaped_and_colours_are_shares():
    said = ['score "2"', "-1", "0"]
    text = spans(["<b>", "\n", "&"], ["a", "b", "c"], said, torch.tensor([1.0, 0.5, 0.0]), "pnz")
    assert "&lt;b&gt;" in text and "&amp;" in text and "↵" in text and "<b>" not in text and "&quot;2&quot;" in text
    assert re.findall(r'class="(.)" style="--v:(\d\.\d\d)"', text) == [("p", "1.00"), ("n", "0.50"), ("z", "0.00")]


def test_what_is_said_of_a_token():
    scores, kept = torch.tensor([0.9, 0.0, 3e-6, 0.0]), torch.tensor([True, True, False, False])
    said = list(notes("VEPO", scores, kept, -0.8))
    assert said[0] == "VEPO: score 0.9, advantage -0.8 (kept)"
    assert said[1].startswith("VEPO: score 0, advantage -0.8 (kept") and "20 % of 4 tokens, rounded up" in said[1]
    assert said[2] == "VEPO: score 3e-06, advantage 0 (not among the best 20 %: left out of the policy loss)"
    (said,) = notes("PRPO", torch.tensor([0.25]), torch.tensor([1.5]), 0.8)
    assert said == "PRPO: score 0.25, advantage +1.2 (the response's +0.8 x 1.50)"
    assert list(notes("GRPO", None, torch.tensor([True]), 0.8)) == ["GRPO: advantage +0.8 (the response's +0.8 x 1.00)"]
    assert "raise this token's entropy" in next(notes("SaEI", torch.ones(1), torch.ones(1), 0.8))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "tokens.html"
    path.write_text(show.token_page(show.TokenArgs(prompts=2)))
    return path


def prompts_of(text):
    """For each prompt of a page {(right or wrong, method, score or advantage): [(kind, share, note) of each token]}."""
    for part in text.split("<h2>")[1:]:
        found = {}
        for response in part.split("<h3>A ")[1:]:
            for method, lines in re.findall(r'<div class="method"><b>(\w+)</b>(.*?)</div></div>', response, re.DOTALL):
                for what, line in re.findall(r'<i>(\w+)</i><div class="tokens">(.*?)(?=</div|$)', lines, re.DOTALL):
                    spans = re.findall(r'class="(.)" style="--v:(.*?)" data-t=".*?" data-w="(.*?)"', line)
                    found[response[:5], method, what] = [(kind, float(v), html.unescape(w)) for kind, v, w in spans]
        yield found


def number(name, note):
    return float(re.search(rf"\b{name} ([-+.e\d]+)", note)[1])


def test_the_page_stands_alone_and_shows_all_methods_on_the_same_response(page):
    text = page.read_text()
    assert text.startswith("<!doctype html>") and not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in text and text.count("A right response") == text.count("A wrong response") == 2
    for name in ("VEPO: noise", "PRPO: patches blackened", "PRPO: weak noise", "SaEI: attacked, 2/255"):
        assert name in text
    signals = json.loads(re.search(r"const SIGNALS = (\{.*?\});\n", text)[1])
    assert set(re.findall(r'data-t="([\w-]+)"', text)) == set(signals) and text.count("</script>") == 1
    said = next(iter(signals.values()))
    assert re.search(r"entropy \S+ nats; noise on the picture moves this token's distribution by JSD \S+ nats;", said)
    for words in ("blackened patches by KL", "weak noise by KL", "visual focus", "similarity to the picture"):
        assert words in said


def test_the_page_says_what_each_method_does(page):
    """In words, before the first prompt, with the methods' own constants."""
    words = page.read_text().split("<h2>")[0]
    for method, (score, advantage) in show.METHODS.items():
        assert f'<b>{method}</b><i>score</i><div class="words">{score}</div>' in words
        assert f'<i>advantage</i><div class="words">{advantage}</div>' in words
    assert "the best 20 % of a response's tokens" in words and vepo.Args.keep_ratio == 0.2
    assert "rounded up" in words and "tokens with a score next to 0 are kept too" in words
    assert "1 + 2 x score" in words and prpo.Args.strength == 2
    assert "have one scale" in words


def test_one_scale_for_all_advantages_of_a_prompt_and_for_the_scores_of_a_method(page):
    for lines in prompts_of(page.read_text()):
        assert len(lines) == 2 * (6 + 5)  # of both responses; GRPO has no score
        spans = [span for (_, _, what), line in lines.items() if what == "advantage" for span in line]
        largest = max(abs(number("advantage", note)) for _, _, note in spans)
        for kind, share, note in spans:
            advantage = number("advantage", note)
            assert share == pytest.approx(abs(advantage) / largest, abs=0.011)
            assert kind == ("p" if advantage > 0 else "n" if advantage < 0 else "z")
        for method in ("VEPO", "VGPO", "PRPO", "PEPO", "SaEI"):
            spans = [span for response in ("right", "wrong") for span in lines[response, method, "score"]]
            low, high = (least([number("score", note) for _, _, note in spans]) for least in (min, max))
            for _, share, note in spans:  # two digits of a score are said
                assert share == pytest.approx((number("score", note) - low) / (high - low), abs=0.3)
            assert {0.0, 1.0} <= {share for _, share, _ in spans}


def pictures_of(text):
    """{caption: [pixels (3, H, W)]} of the first prompt of a page."""
    found = {}
    for figure, caption in re.findall(r"<figure>(.*?>)([^<>]+)</figure>", text.split("<h2>")[1]):
        for code in re.findall(r"base64,(.*?)\"", figure):
            image = Image.open(io.BytesIO(base64.b64decode(code)))
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
            found.setdefault(caption, []).append(pixels.permute(2, 0, 1))
    return found


def test_the_pictures_are_those_that_were_scored(toy, monkeypatch):
    """What the forward passes of VEPO's and PRPO's own functions were given, pixel by pixel."""
    fed, processor = {"vepo": [], "prpo": []}, toy[1].image_processor

    def spied(module):
        def forward_spied(model, row, *rest):
            prompt = row.prompt
            shown = saei.unpatchify(prompt.pixel_values, prompt.image_grid_thw[0], processor).clamp(0, 1)
            fed[module.__name__].append((255 * shown).round().byte())
            return forward(model, row, *rest)

        monkeypatch.setattr(module, "forward", forward_spied)

    spied(vepo)
    spied(prpo)
    drawn = pictures_of(show.token_page(show.TokenArgs(prompts=1, seed=3)))
    for caption, module in (("VEPO: noise", "vepo"), ("PRPO: patches blackened", "prpo"), ("PRPO: weak noise", "prpo")):
        (picture,) = drawn[caption]
        assert not torch.equal(picture, drawn["the picture"][0])
        assert any(torch.equal(picture, other) for other in fed[module]), caption
    assert torch.equal(drawn["the picture"][0], fed["vepo"][1])  # first the noised pass, then the clean one
    clean, attacked = (drawn[caption][0].int() for caption in ("the picture", "SaEI: attacked, 2/255"))
    moved = attacked - clean
    assert set(moved.unique().tolist()) <= {-2, 0, 2} and moved.any()
    (caption,) = [caption for caption in drawn if "60 times" in caption]
    assert torch.equal(drawn[caption][0].int(), (127.5 + 60 * moved).round().int())


def group_of(toy, pictures=1, responses=slice(None)):
    """Responses to the first prompt of the toy with so many pictures, the first of them right."""
    model, processor = toy
    data = Data("toy", "test", SharedArgs(), processor, model.model.get_rope_index)
    prompt = data.prompt(next(i for i in data.indices if len(data.fields(i)[1]) == pictures))
    (group,) = rollout(model, processor.tokenizer, [prompt], SharedArgs(), "show")
    group.accuracy, group.advantages = (torch.arange(8) == 0).float(), torch.linspace(1, -1, 8)
    return group[responses], show.run_of(model, processor)


def test_scores_are_those_of_the_method_files(toy):
    """GRPO's advantage on every token; VEPO's on the kept ones; the others' weights times it."""
    group, run = group_of(toy)
    methods, signals, _ = show.judged(group, run, SharedArgs())
    assert torch.equal(methods["GRPO"][1], group.mask) and torch.equal(methods["SaEI"][1], group.mask)
    kept = vepo.select_top(methods["VEPO"][0], group.mask, 0.2)
    assert torch.equal(methods["VEPO"][1], kept) and kept.sum() < group.mask.sum() / 3
    for name in ("VGPO", "PRPO", "PEPO"):
        weights = methods[name][1]
        assert (weights[group.mask] > 0).all() and not weights[~group.mask].any() and weights.unique().numel() > 2
    assert all((value[~group.mask] == 0).all() for value in signals.values())


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_any_number_of_pictures_and_responses_of_one_token(toy, pictures):
    group, run = group_of(toy, pictures)
    text, about = show.section(0, group, run, SharedArgs())
    assert text.count("<img") == 6 * pictures and ("No picture" in text) == (pictures == 0)
    assert all(("nats" in said) and ("visual focus" in said) == (pictures > 0) for said in about.values())
    (lines,) = prompts_of(text)
    assert len(lines) == (22 if pictures else 14)  # without a picture only VEPO has a score
    short = dataclasses.replace(group, responses=group.responses[:, :1], mask=group.mask[:, :1])
    text, about = show.section(0, short, run, SharedArgs())
    (lines,) = prompts_of(text)
    assert len(about) == 2 and all(len(line) == 1 for line in lines.values())
    assert "(kept" in lines["right", "VEPO", "advantage"][0][2]


def test_equal_responses(toy):
    """Scores that are all equal, and advantages that are all 0, have the lowest colour."""
    group, run = group_of(toy, responses=slice(2))
    group.responses = group.responses[:, :1].expand(2, 3).clone()
    group.mask, group.advantages = torch.tensor([[True, False, False]] * 2), torch.zeros(2)
    text, _ = show.section(0, group, run, SharedArgs())
    assert set(re.findall(r"--v:(\S+?)\"", text)) == {"0.00"} and " nan" not in text


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
