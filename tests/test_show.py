"""show.py: a page of tokens that a browser can read, by the methods' own functions."""

import base64
import dataclasses
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_group, tiny_model, tiny_prompt
from PIL import Image

import grpo
import pepo
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
        (["signals", "--model", "/nowhere"], "--model /nowhere cannot be opened"),
        (["signals", "--prompts", "0"], "--prompts 0 must be above 0"),
        (["signals", "--output", tmp_path / "no"], "no must be a folder that exists"),
        (["signals", "--output", tmp_path / "file"], "file must be a folder that exists"),
    ):
        with pytest.raises(SystemExit) as error:
            run_main(monkeypatch, *argv)
        assert error.value.code == 2 and sentence in capsys.readouterr().err, argv


def test_help(monkeypatch, capsys):
    run_main(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert "show.py curves runs/*" in text and "show.py tokens --model" in text
    for command, (own, _) in show.COMMANDS.items():
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, command, "--help")
        text = capsys.readouterr().out
        assert not end.value.code and f"show.py {command}" in text and "(data:" not in text
        assert set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) == {f.name for f in dataclasses.fields(own)}


def test_its_flags_are_those_that_it_reads():
    """Of training's flags the page has those that it makes use of, and no others."""
    read = set()

    class Args(show.TokenArgs):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    class Signals(show.SignalArgs):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    args = Args(data=str(TOY / "test.parquet"), prompts=1)
    read.clear()
    show.token_page(args)
    flags = {f.name for f in dataclasses.fields(show.TokenArgs)}
    assert flags - read == {"page"}
    args = Signals(data=str(TOY / "test.parquet"), prompts=1, group_size=2)
    read.clear()
    show.measure_signals(args)
    assert {f.name for f in dataclasses.fields(show.SignalArgs)} - read == {"output"}
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
    assert re.search(r"entropy \S+ nats; noise on the image moves this token's distribution by JSD \S+ nats;", said)
    for words in ("blackened patches by KL", "weak noise by KL", "visual focus", "similarity to the image"):
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


def images_of(text):
    """{caption: [pixels (3, H, W)]} of the first prompt of a page."""
    found = {}
    for figure, caption in re.findall(r"<figure>(.*?>)([^<>]+)</figure>", text.split("<h2>")[1]):
        for code in re.findall(r"base64,(.*?)\"", figure):
            image = Image.open(io.BytesIO(base64.b64decode(code)))
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
            found.setdefault(caption, []).append(pixels.permute(2, 0, 1))
    return found


def test_the_images_are_those_that_were_scored(toy, monkeypatch):
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
    drawn = images_of(show.token_page(show.TokenArgs(prompts=1, seed=3)))
    for caption, module in (("VEPO: noise", "vepo"), ("PRPO: patches blackened", "prpo"), ("PRPO: weak noise", "prpo")):
        (image,) = drawn[caption]
        assert not torch.equal(image, drawn["the image"][0])
        assert any(torch.equal(image, other) for other in fed[module]), caption
    assert torch.equal(drawn["the image"][0], fed["vepo"][1])  # first the noised pass, then the clean one
    clean, attacked = (drawn[caption][0].int() for caption in ("the image", "SaEI: attacked, 2/255"))
    moved = attacked - clean
    assert set(moved.unique().tolist()) <= {-2, 0, 2} and moved.any()
    (caption,) = [caption for caption in drawn if "60 times" in caption]
    assert torch.equal(drawn[caption][0].int(), (127.5 + 60 * moved).round().int())


def group_of(toy, images=1, responses=slice(None)):
    """Responses to the first prompt of the toy with so many images, the first of them right."""
    model, processor = toy
    data = Data("toy", "test", SharedArgs(), processor, model)
    prompt = data.prompt(next(i for i in data.indices if len(data.fields(i)[1]) == images))
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


@pytest.mark.parametrize("images", [0, 1, 2])
def test_any_number_of_images_and_responses_of_one_token(toy, images):
    group, run = group_of(toy, images)
    text, about = show.section(0, group, run, SharedArgs())
    assert text.count("<img") == 6 * images and ("No image" in text) == (images == 0)
    assert all(("nats" in said) and ("visual focus" in said) == (images > 0) for said in about.values())
    (lines,) = prompts_of(text)
    assert len(lines) == (22 if images else 14)  # without an image only VEPO has a score
    short = dataclasses.replace(group, responses=group.responses[:, :1], mask=group.mask[:, :1])
    text, about = show.section(0, short, run, SharedArgs())
    (lines,) = prompts_of(text)
    assert len(about) == 2 and all(len(line) == 1 for line in lines.values())
    assert "(kept" in lines["right", "VEPO", "advantage"][0][2]


def test_equal_responses(toy):
    """Scores that are all equal, and advantages that are all 0, have the lowest colour."""
    group, run = group_of(toy, responses=slice(2))
    equal, mask = group.responses[:, :1].expand(2, 3), torch.tensor([[True, False, False]] * 2)
    group = dataclasses.replace(group, responses=equal, mask=mask, advantages=torch.zeros(2))
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
    assert len(drawn.resize((200, 200)).getcolors(40_000)) > 500  # text, images and colours


# ---- signals --------------------------------------------------------------------------------------------------------

CERTAIN, OF_TWO, OF_FOUR, LIKE_THE_PICTURE = 20, 21, 22, 23  # what follows each of these tokens; and one more


def blind_model():
    """Layers that add nothing: what follows a token depends on it alone. The image's state is e_3."""
    model = tiny_model("qwen2_5_vl")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings, unit = model.get_input_embeddings().weight, torch.eye(32)
        embeddings[:] = unit[0]
        for token, kind in ((OF_TWO, 1), (OF_FOUR, 2), (LIKE_THE_PICTURE, 3)):
            embeddings[token] = unit[kind]
        model.model.visual.merger.mlp[2].weight.zero_()
        model.model.visual.merger.mlp[2].bias[:] = unit[3]
        logits = torch.full((96, 32), -1000.0)
        for kind, followers in ((0, 1), (1, 2), (2, 4), (3, 1)):
            logits[20 : 20 + followers, kind] = 0
        model.lm_head.weight[:] = logits / 32**0.5  # a final state is the root of 32 long
    return model


def seen_by_the_blind(monkeypatch, lengths=(6,)):
    """A group [OF_TWO, OF_FOUR, LIKE_THE_PICTURE, CERTAIN ...] of that model, whose views change two of its tokens."""
    model = blind_model()
    group = tiny_group(tiny_prompt(model, [(4, 6)]), list(lengths))
    group.responses[:] = CERTAIN
    for i, token in enumerate((OF_TWO, OF_FOUR, LIKE_THE_PICTURE)):
        group.responses[:, i] = token
    group.accuracy, group.format = torch.zeros(len(lengths)), torch.ones(len(lengths))
    state = {kind: 32**0.5 * torch.eye(32)[kind] for kind in range(3)}

    def view(row, changes):
        hidden, start = forward(model, row)[2].clone(), len(row.prompt.input_ids)
        for token, kind in changes.items() if row.mask.sum() >= 6 else ():
            hidden[start + token - 1] = state[kind]  # of the first response
        return hidden

    monkeypatch.setattr(vepo, "noised_hidden", lambda row, *_: view(row, {1: 0, 4: 1}))
    monkeypatch.setattr(prpo, "perturbed_hidden", lambda row, *_: (view(row, {1: 2, 4: 1}), view(row, {1: 2})))

    attacked = dataclasses.replace(group.prompt, pixel_values=group.prompt.pixel_values + 1)
    shaken = group.prompt.pixel_values + 2
    monkeypatch.setattr(saei, "attack", lambda group, run, args: attacked)
    monkeypatch.setattr(show, "random_step", lambda *_: shaken)
    plain = show.forward

    def forward_of(model, row, temperature):
        """Under the attacked image token 5 is one of four, under the other one token 3 is one of two."""
        logps, entropy, hidden = plain(model, row, temperature)
        for pixels, token, kind in ((attacked.pixel_values, 5, 2), (shaken, 3, 1)):
            if row.prompt.pixel_values is pixels and row.mask.sum() >= 6:
                hidden, entropy = hidden.clone(), entropy.clone()
                hidden[len(row.prompt.input_ids) + token - 1] = state[kind]
                entropy[0, token] = kind * math.log(2)
        return logps, entropy, hidden

    monkeypatch.setattr(show, "forward", forward_of)
    tokenizer = SimpleNamespace(decode=lambda ids: {OF_TWO: " see", OF_FOUR: " two", CERTAIN: " So"}.get(ids[0], "."))
    return group, show.run_of(model, SimpleNamespace(tokenizer=tokenizer))


def test_signals_of_a_constructed_model_by_hand(monkeypatch):
    group, run = seen_by_the_blind(monkeypatch)
    found = show.group_signals(group, run, show.SignalArgs(), embedded=True)
    two = math.log(2)  # entropies are 0, ln 2, ln 4, 0, 0, 0; noise makes token 1 certain and token 4 one of two
    jsd = 0.25 * math.log(2 / 3) + 0.25 * two + 0.5 * math.log(4 / 3)
    expected = {
        "response_tokens": 6,
        "entropy": 3 * two / 6,
        "jsd": 2 * jsd / 6,
        "changed_by_noise": (0.5 + 0.5) / 6,
        "changed_by_attack": 0.75 / 6,  # token 5 was certain, and is one of four
        "changed_by_random": 0.5 / 6,  # token 3 was certain, and is one of two
        "missed_by_entropy_clearly": 0.5,
        "missed_by_entropy": 0.5,  # of tokens 1 and 4; by entropy the best two of six are 1 and 2
        "jsd_kept_by_jsd": 1,
        "jsd_kept_by_entropy": 0.5,
        "jsd_kept_by_vepo": 0.5,  # token 4 has entropy 0 and so a score of 0
        "focus": (5 * 0.5 + 1) / 6,  # cosine 0, but 1 for token 2
        "focus_and_position": -0.5 / math.sqrt(17.5 * 5 / 6),
        "kl_strong": 2 * two / 6,  # tokens 1: of two to of four, and 4: certain to of two
        "kl_weak": two / 6,  # token 1
        "rvd": 1 / 6,  # token 4
        "dependent_stable": 1 / 6,
        "dependent_brittle": 1 / 6,
        "similarity": 1 / 6,
        "entropy_lowest": 0,
        "entropy_middle": 0,
        "entropy_highest": 1.5 * two,
        "entropy_lowest_attacked": 0,  # tokens 0 and 3
        "entropy_lowest_random": two / 2,
        "entropy_middle_attacked": 2 * two / 2,  # tokens 4 and 5
        "entropy_middle_random": 0,
        "entropy_highest_attacked": 1.5 * two,
        "read_share": 1 / 6,  # " two", token 1
        "read_entropy": two,
        "read_jsd": jsd,
        "read_changed_by_noise": 0.5,
        "read_kept_by_entropy": 1,
        "read_kept_by_vepo": 1,
        "read_kl_weak": two,
        "words_share": 5 / 6,
        "words_changed_by_noise": 0.5 / 5,
        "derived_share": 0,
        "accuracy": 0,
        "format": 1,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name
    weights = pepo.token_weights(torch.eye(6)[2:3], torch.tensor([[0, two, 2 * two, 0, 0, 0]]), group.mask)
    assert found["weight_spread"] == pytest.approx(weights.std(correction=0).item(), abs=1e-5)
    assert math.isnan(found["derived_entropy"]) and math.isnan(found["focus_and_accuracy"])
    assert "read_share" not in show.group_signals(group, run, show.SignalArgs(), embedded=False)


def test_right_and_wrong_responses_by_hand(monkeypatch):
    """Two responses of 6 and 3 tokens; the second one is right. Also cut into rows, and with garbage on the padding."""
    group, run = seen_by_the_blind(monkeypatch, (6, 3))
    group.accuracy = torch.tensor([0.0, 1.0])
    found = show.group_signals(group, run, show.SignalArgs(), embedded=False)
    assert found["accuracy"] == 0.5 and found["response_tokens"] == 4.5
    assert found["missed_by_entropy"] == 0.5  # of the first one; in the second no JSD is above 0
    assert found["similarity_right_minus_wrong"] == pytest.approx(1 / 3 - 1 / 6, abs=1e-5)
    assert found["entropy_right_minus_wrong"] == pytest.approx(math.log(2) * (3 / 3 - 3 / 6), abs=1e-5)
    assert found["focus_and_accuracy"] == pytest.approx(1)  # 2/3 of the right one, 7/12 of the wrong one
    assert [found[f"focus_{b}_wrong"] for b in (0, 3)] == pytest.approx([0.5, 1.0], abs=1e-5)
    group.responses[~group.mask] = OF_FOUR
    cut = SimpleNamespace(**vars(show.SignalArgs()), tokens_per_row=1)
    cut.tokens_per_row = len(group.prompt.input_ids) + 6
    again = show.group_signals(group, run, cut, embedded=False)
    assert again == pytest.approx(found, abs=1e-5, nan_ok=True)


def test_shares_of_a_response_by_hand():
    """Of ten tokens: three have the highest JSD, two of which entropy misses; two are stable, one is brittle."""
    marks = {
        "kept_by_jsd": [0, 1, 2],
        "kept_by_entropy": [0, 8, 9],
        "kept_by_vepo": [0, 1, 9],
        "jsd": [0, 1, 2, 7],
        "dependency": [0, 1, 2],
        "instability": [2, 5],
    }
    tokens = {name: torch.zeros(10) for name in [*show.BY_KIND, "entropy_attacked", "entropy_random", *marks]}
    for name, places in marks.items():
        tokens[name][places] = 1.0
    tokens["jsd"][7] = 5.0
    tokens["jsd"][2] = 0.0005  # not clearly above 0
    found = show.response_signals(tokens, ["read"] * 2 + ["words"] * 8)
    assert found["missed_by_entropy"] == pytest.approx(2 / 3)
    assert found["missed_by_entropy_clearly"] == pytest.approx(1 / 2)
    assert found["jsd_kept_by_jsd"] == pytest.approx(2 / 7, abs=1e-3)
    assert found["jsd_kept_by_entropy"] == pytest.approx(1 / 7, abs=1e-3)
    assert found["jsd_kept_by_vepo"] == pytest.approx(2 / 7, abs=1e-3)
    assert found["dependent_stable"] == pytest.approx(0.2) and found["dependent_brittle"] == pytest.approx(0.1)
    assert found["read_share"] == pytest.approx(0.2) and found["read_kept_by_entropy"] == pytest.approx(0.5)


def test_a_random_step_is_as_large_as_the_attack(toy):
    """Each pixel moves by 2/255, up as often as down, and stays in [0, 1]."""
    model, processor = toy
    args = SharedArgs()
    data = Data("toy", "test", args, processor, model)
    prompt = data.prompt(5)  # of two images
    run, image_processor = show.run_of(model, processor), processor.image_processor
    moved = show.random_step(prompt, run, 0)
    assert torch.equal(moved, show.random_step(prompt, run, 0)) and moved.shape == prompt.pixel_values.shape
    sizes = prompt.image_grid_thw.prod(1).tolist()
    for before, after, grid in zip(prompt.pixel_values.split(sizes), moved.split(sizes), prompt.image_grid_thw):
        before, after = (saei.unpatchify(pixels, grid, image_processor) for pixels in (before, after))
        change = (after - before)[(before > 0.01) & (before < 0.99)]
        assert change.abs().sub(2 / 255).abs().max() < 1e-3 and change.sign().mean().abs() < 0.1


def test_intervals_by_hand():
    assert show.interval([1.0, 3.0, math.nan]) == {
        "mean": 2.0,
        "low": pytest.approx(2 - 12.7062, abs=1e-3),
        "high": pytest.approx(2 + 12.7062, abs=1e-3),
        "prompts": 2,
    }
    assert show.interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "prompts": 1}
    assert show.interval([]) == {"mean": None, "low": None, "high": None, "prompts": 0}


@pytest.mark.parametrize("world", ["toy", "toy-faint"])
def test_signals_as_a_command(world, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, "signals", "--model", world, "--prompts", 3, "--group_size", 4, "--output", tmp_path)
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "signals.json").read_text())
    assert found["model"] == found["data"] == world and found["signals"]["format"]["prompts"] == 3
    assert show.TITLES.keys() <= found["signals"].keys() and "read_changed_by_noise" in found["signals"]
    assert all(title in out for title in show.TITLES.values()) and "0.41 (VEPO, Qwen2.5-VL-7B)" in out
    assert Image.open(tmp_path / "signals.png").width > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"signals.json", "signals.png"}


def test_what_cannot_be_written_is_on_the_console(tmp_path, monkeypatch, capsys):
    """A disk that is full at the end: one sentence, the table all the same, an old file whole."""
    (tmp_path / "signals.json").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(show, "write_text", full)
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, "signals", "--prompts", 2, "--group_size", 2, "--output", tmp_path)
    shown = capsys.readouterr()
    assert error.value.code == 2 and "make room on the disk; the table above is whole" in shown.err
    assert show.TITLES["rvd"] in shown.out and (tmp_path / "signals.json").read_text() == "old"


def test_signals_of_data_without_grammar_or_images(tmp_path, monkeypatch, image_file, capsys):
    run_main(monkeypatch, "signals", "--model", "toy", "--data", image_file, "--group_size", 2, "--output", tmp_path)
    found = json.loads((tmp_path / "signals.json").read_text())["signals"]
    assert found["accuracy"]["prompts"] == 2 and "read_share" not in found  # the third row has no image
    shown = capsys.readouterr()
    assert "by kind of token" not in shown.out
    assert "no more than 2 prompts with an image, of --prompts 128" in shown.err
    (tmp_path / "text.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n")
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, "signals", "--data", tmp_path / "text.jsonl", "--output", tmp_path)
    assert error.value.code == 2 and "has no prompt with an image" in capsys.readouterr().err


def test_the_committed_signals_of_the_faint_world():
    """The premises that it was built for, as `python show.py signals --model toy-faint` measured them."""
    found = json.loads((TOY / "faint" / "signals.json").read_text())
    mean = {name: value["mean"] for name, value in found["signals"].items()}
    assert mean["missed_by_entropy"] >= 0.35 and mean["read_changed_by_noise"] >= 0.10
    assert mean["format"] >= 0.995 and 0.30 <= mean["accuracy"] <= 0.50
