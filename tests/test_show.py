"""show.py: its commands, the page of tokens by the methods' own functions, and the signals by hand."""

import base64
import dataclasses
import html
import io
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import times_agree, tiny_group, tiny_model, tiny_prompt
from PIL import Image

import common
import grpo
import pepo
import prpo
import saei
import show
import vepo
import vgpo
import vppo
from common import forward, rollout
from plumbing.arguments import TOY, SharedArgs
from plumbing.data import Data
from plumbing.families import unpatchify


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["show.py", *map(str, argv)])
    show.main()


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("curves", "--runs"),
        ("tokens --prompts 0", "--prompts 0 must be above 0"),
        ("tokens --steps 3", "unrecognized arguments: --steps 3"),
        ("signals --model /nowhere", "--model /nowhere cannot be opened"),
        ("signals --data text.jsonl", "has no prompt with an image"),
        ("tables", "show.py tokens --model"),
    ],
)
def test_mistakes_get_a_sentence(argv, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n")
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, *argv.split())
    said = capsys.readouterr()
    assert error.value.code == 2 and sentence in said.err + said.out


COMMANDS = {"curves": show.CurveArgs, "tokens": show.TokenArgs, "signals": show.SignalArgs}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, monkeypatch, capsys):
    for argv in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, *argv)
        text = capsys.readouterr().out
        assert not end.value.code and f"show.py {command}" in text
    flags = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    assert flags == {f.name for f in dataclasses.fields(COMMANDS[command])}


@pytest.mark.parametrize(
    "command, function, unread", [("tokens", show.token_page, "page"), ("signals", show.measure_signals, "output")]
)
def test_its_flags_are_those_that_it_reads(command, function, unread):
    """Of training's flags each command has those that it reads, and no others."""
    read = set()

    class Args(COMMANDS[command]):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    args = Args(data=str(TOY / "test.parquet"), prompts=1)
    read.clear()
    function(args)
    flags = {f.name for f in dataclasses.fields(Args)}
    assert flags - read == {unread}
    fixed = {"reshard_while_sampling", "cuda_graphs", "rollout_prompts", "tokens_per_row"}
    assert (read & SharedArgs.__dataclass_fields__.keys()) - flags == fixed


def test_curves(tmp_path, monkeypatch, capsys):
    for name in ("pepo", "vgpo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 0, "eval_accuracy": 0.25}\n')
    run_main(monkeypatch, "curves", tmp_path / "pepo", tmp_path / "vgpo", "--output", tmp_path / "both")
    assert re.search("pepo.*25.0%\n.*vgpo", capsys.readouterr().out) and (tmp_path / "both.png").exists()


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
    notes = ['score "2"', "-1", "0"]
    text = show.spans(["<b>", "\n", "&"], notes, torch.tensor([1.0, 0.5, 0.0]), "pnz")
    assert "&lt;b&gt;" in text and "&amp;" in text and "↵" in text and "<b>" not in text and "&quot;2&quot;" in text
    assert re.findall(r'class="(.)" style="--v:(\d\.\d\d)"', text) == [("p", "1.00"), ("n", "0.50"), ("z", "0.00")]


def test_the_note_of_a_token():
    left_out = "VEPO: score 3e-06, advantage 0 (not among the best 20 %: left out of the policy loss)"
    assert show.note("VEPO", 0.9, 1.0, -0.8) == "VEPO: score 0.9, advantage -0.8 (kept)"
    assert show.note("VEPO", 3e-6, 0.0, -0.8) == left_out
    assert show.note("PRPO", 0.25, 1.5, 0.8) == "PRPO: score 0.25, advantage +1.2 (the response's +0.8 x 1.50)"
    assert show.note("GRPO", None, True, 0.8) == "GRPO: advantage +0.8 (the response's +0.8 x 1.00)"


@pytest.fixture(scope="module")
def page():
    return show.token_page(show.TokenArgs(prompts=2))


def prompts_of(text):
    """For each prompt of a page {(right or wrong, method, score or advantage): [(kind, share, note) of each token]}."""
    for part in text.split("<h2>")[1:]:
        found = {}
        for response in part.split("<h3>A ")[1:]:
            for method, lines in re.findall(r'<div class="method"><b>(\w+)</b>(.*?)</div></div>', response, re.DOTALL):
                for what, line in re.findall(r'<i>(\w+)</i><div class="tokens">(.*?)(?=</div|$)', lines, re.DOTALL):
                    spans = re.findall(r'class="(.)" style="--v:(.*?)" data-w="(.*?)"', line, re.DOTALL)
                    found[response[:5], method, what] = [(kind, float(v), html.unescape(w)) for kind, v, w in spans]
        yield found


def number(name, note):
    return float(re.search(rf"\b{name} ([-+.e\d]+)", note)[1])


def test_the_page_stands_alone_and_shows_all_methods_on_the_same_response(page):
    assert page.startswith("<!doctype html>") and not re.search(r"(src|href)=\"(?!data:)", page)
    assert "http" not in page and page.count("A right response") == page.count("A wrong response") == 2
    signals = r"“.+”: " + "; ".join(re.escape(text).replace(r"\{\}", r"[-+.e\d]+") for text in show.SIGNALS.values())
    notes = [note for lines in prompts_of(page) for line in lines.values() for _, _, note in line]
    assert all(re.match(signals + r"\n\w+: ", note, re.DOTALL) for note in notes)
    words = page.split("<h2>")[0]
    for method, advantage in show.ADVANTAGES.items():
        assert f'<b>{method}</b><i>score</i><div class="words">{show.SCORES[method]}</div>' in words
        assert f'<i>advantage</i><div class="words">{advantage}</div>' in words
    assert "the best 20 % of a response's tokens" in words and vepo.Args.keep_ratio == 0.2
    assert "1 + 2 x score" in words and prpo.Args.strength == 2
    assert "attacked, 2/255" in page and saei.Args.step == 2 / 255


def test_one_scale_for_all_advantages_of_a_prompt_and_for_the_scores_of_a_method(page):
    for lines in prompts_of(page):
        assert len(lines) == 2 * (7 + 6)  # of both responses; GRPO has no score
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
            for line in (lines["right", method, "score"], lines["wrong", method, "score"]):
                if max(number("score", note) for _, _, note in line) < high:  # the other response has the highest
                    assert max(share for _, share, _ in line) < 1


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
    """What the forward passes of each module's own functions were given, pixel by pixel."""
    fed, processor = {"vepo": [], "prpo": [], "show": []}, toy[1].image_processor

    def spied(module):
        def forward_spied(model, row, *rest):
            prompt = row.prompt
            (shown,) = unpatchify(saei.to_pixels(prompt.pixel_values, processor)[0], prompt.image_grid_thw, processor)
            fed[module.__name__].append((255 * shown.clamp(0, 1)).round().byte())
            return forward(model, row, *rest)

        monkeypatch.setattr(module, "forward", forward_spied)

    for module in (vepo, prpo, show):
        spied(module)
    drawn = images_of(show.token_page(show.TokenArgs(prompts=1, seed=3)))
    captions = ["VEPO: noise", "PRPO: patches blackened", "PRPO: weak noise", "the image"]
    for caption, image in zip(captions, [*fed["vepo"], *fed["prpo"], *fed["show"]], strict=True):
        assert torch.equal(drawn[caption][0], image), caption
        assert caption == "the image" or not torch.equal(image, drawn["the image"][0])
    clean, attacked = (drawn[caption][0].int() for caption in ("the image", "SaEI: attacked, 2/255"))
    moved = attacked - clean
    assert set(moved.unique().tolist()) <= {-2, 0, 2} and moved.any()
    (caption,) = [caption for caption in drawn if "60 times" in caption]
    assert torch.equal(drawn[caption][0].int(), (127.5 + 60 * moved).round().int())


@pytest.fixture(scope="module")
def of_two_images(toy):
    """Responses to the first prompt of the toy with two images, the first of them right; and a trainer's parts."""
    model, processor = toy
    data = Data("toy", "test", SharedArgs(), processor, model)
    prompt = data.prompt(next(i for i in data.indices if len(data.fields(i)[1]) == 2))
    (group,) = rollout(model, processor.tokenizer, [prompt], SharedArgs(), "show")
    group.accuracy, group.advantages = (torch.arange(8) == 0).float(), torch.linspace(1, -1, 8)
    return group, show.run_of(model, processor)


def test_scores_are_those_of_the_method_files(of_two_images):
    """Bit-identical to what the scripts' own functions set on a row."""
    group, trainer = of_two_images
    methods, signals, _ = show.score_tokens(group, trainer, SharedArgs())
    rows = {name: dataclasses.replace(group, loss_mask=group.mask) for name in methods}
    vepo.scoring_forward(rows["VEPO"], trainer, vepo.Args(), 0)
    prpo.scoring_forward(rows["PRPO"], trainer, prpo.Args(), 0)
    pepo.scoring_forward(rows["PEPO"], trainer, pepo.Args())
    _, entropy, hidden = forward(trainer.model, group)
    rows["VGPO"].scores = vgpo.row_focus(hidden, group, vgpo.Args())
    vgpo.set_weights([rows["VGPO"]], trainer, vgpo.Args())
    with torch.no_grad():
        rows["VPPO"].old_logps = forward(trainer.model, group)[0]
    vppo.set_scores([rows["VPPO"]], trainer, vppo.Args(), 0)
    vppo.set_weights([rows["VPPO"]], trainer, vppo.Args())
    torch.testing.assert_close(methods["VPPO"], (rows["VPPO"].scores, rows["VPPO"].weights), atol=1e-6, rtol=1e-4)
    for name in ("VEPO", "VGPO", "PRPO", "PEPO"):
        scores, weights = methods[name]
        assert torch.equal(scores, rows[name].scores) and torch.equal(weights, rows[name].weights.float())
        assert weights.unique().numel() > 1
    focus = rows["VGPO"].scores
    _, psi, compensated = vgpo.group_factors(focus, group.mask)
    expected = {"focus": focus, "psi": psi, "compensated": compensated, "entropy": entropy}
    expected |= {"late_gate": vgpo.late_gate(focus, group.mask).float(), "probability": rows["VPPO"].old_logps.exp()}
    assert all(torch.equal(signals[name], values) for name, values in expected.items())
    noised = vepo.noised_hidden(group, trainer, vepo.Args(), 0)
    with torch.no_grad():
        _, _, noised_entropy = common.compare_logits(vepo.divergences, trainer.model, group, hidden, noised)
    torch.testing.assert_close(signals["entropy_gap"], (noised_entropy - entropy).abs(), atol=1e-6, rtol=0)
    assert torch.equal(methods["GRPO"][1], group.mask) and torch.equal(methods["SaEI"][1], group.mask)
    assert torch.equal(methods["SaEI"][0], saei.middle_third(entropy, group.mask).float())


def test_responses_of_one_token_and_equal_ones(of_two_images):
    """Scores that are all equal, and advantages that are all 0, have the lowest colour."""
    group, trainer = of_two_images
    short = dataclasses.replace(group, responses=group.responses[:, :1], mask=group.mask[:, :1])
    text = show.section(short, trainer, SharedArgs())
    (lines,) = prompts_of(text)
    assert text.count("<img") == 6 * 2 and len(lines) == 26
    assert all(len(line) == 1 for line in lines.values())
    assert lines["right", "VEPO", "advantage"][0][2].endswith("(kept)")
    equal, mask = group.responses[:2, :1].expand(2, 3), torch.tensor([[True, False, False]] * 2)
    group = dataclasses.replace(group[:2], responses=equal, mask=mask, advantages=torch.zeros(2))
    text = show.section(group, trainer, SharedArgs())
    assert set(re.findall(r"--v:(\S+?)\"", text)) == {"0.00"} and " nan" not in text


# ---- signals --------------------------------------------------------------------------------------------------------

CERTAIN, OF_TWO, OF_FOUR, LIKE_THE_IMAGE = 20, 21, 22, 23  # what follows each of these tokens; and one more


def blind_model():
    """Layers that add nothing: what follows a token depends on it alone. The image's state is e_3."""
    model = tiny_model("qwen2_5_vl")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings, unit = model.get_input_embeddings().weight, torch.eye(32)
        embeddings[:] = unit[0]
        for token, kind in ((OF_TWO, 1), (OF_FOUR, 2), (LIKE_THE_IMAGE, 3)):
            embeddings[token] = unit[kind]
        model.model.visual.merger.mlp[2].weight.zero_()
        model.model.visual.merger.mlp[2].bias[:] = unit[3]
        logits = torch.full((96, 32), -1000.0)
        for kind, followers in ((0, 1), (1, 2), (2, 4), (3, 1)):
            logits[20 : 20 + followers, kind] = 0
        model.lm_head.weight[:] = logits / 32**0.5  # a final state is the root of 32 long
    return model


def seen_by_the_blind(monkeypatch, lengths=(6,)):
    """A group [OF_TWO, OF_FOUR, LIKE_THE_IMAGE, CERTAIN ...] of that model, whose views change two of its tokens."""
    model = blind_model()
    group = tiny_group(tiny_prompt(model, [(4, 6)]), list(lengths))
    group.responses[:] = CERTAIN
    for i, token in enumerate((OF_TWO, OF_FOUR, LIKE_THE_IMAGE)):
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
    monkeypatch.setattr(saei, "attack", lambda *_: attacked)
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
    group, trainer = seen_by_the_blind(monkeypatch)
    found = show.group_signals(group, trainer, show.SignalArgs(), embedded=True)
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
    tokens, _, _ = show.image_signals(group, trainer, show.SignalArgs())
    assert tokens["dependent_stable"].tolist() == [[0, 0, 0, 0, 1, 0]]
    assert tokens["dependent_brittle"].tolist() == [[0, 1, 0, 0, 0, 0]]
    weights = pepo.token_weights(torch.eye(6)[2:3], torch.tensor([[0, two, 2 * two, 0, 0, 0]]), group.mask)
    assert found["weight_spread"] == pytest.approx(weights.std(correction=0).item(), abs=1e-5)
    assert math.isnan(found["derived_entropy"]) and math.isnan(found["focus_and_accuracy"])
    assert "read_share" not in show.group_signals(group, trainer, show.SignalArgs(), embedded=False)


def test_right_and_wrong_responses_by_hand(monkeypatch):
    """Two responses of 6 and 3 tokens; the second one is right. Also cut into rows, and with garbage on the padding."""
    group, trainer = seen_by_the_blind(monkeypatch, (6, 3))
    group.accuracy = torch.tensor([0.0, 1.0])
    found = show.group_signals(group, trainer, show.SignalArgs(), embedded=False)
    assert found["accuracy"] == 0.5 and found["response_tokens"] == 4.5
    assert found["missed_by_entropy"] == 0.5  # of the first one; in the second no JSD is above 0
    assert found["similarity_right_minus_wrong"] == pytest.approx(1 / 3 - 1 / 6, abs=1e-5)
    assert found["entropy_right_minus_wrong"] == pytest.approx(math.log(2) * (3 / 3 - 3 / 6), abs=1e-5)
    assert found["focus_and_accuracy"] == pytest.approx(1)  # 2/3 of the right one, 7/12 of the wrong one
    assert [found[f"focus_{b}_wrong"] for b in (0, 3)] == pytest.approx([0.5, 1.0], abs=1e-5)
    group.responses[~group.mask] = OF_FOUR
    cut = show.SignalArgs()
    cut.tokens_per_row = len(group.prompt.input_ids) + 6
    again = show.group_signals(group, trainer, cut, embedded=False)
    assert again == pytest.approx(found, abs=1e-5, nan_ok=True)


def test_shares_of_a_response_by_hand():
    """Of ten tokens: three have the highest JSD, two of which entropy misses; two are stable, one is brittle."""
    marks = {
        "kept_by_jsd": [0, 1, 2],
        "kept_by_entropy": [0, 8, 9],
        "kept_by_vepo": [0, 1, 9],
        "jsd": [0, 1, 2, 7],
        "dependent_stable": [0, 1],
        "dependent_brittle": [2],
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


def test_a_random_step_is_as_large_as_the_attack(of_two_images):
    """Each pixel moves by 2/255, up as often as down, and stays in [0, 1]."""
    group, run = of_two_images
    prompt, image_processor = group.prompt, run.processor.image_processor
    moved = show.random_step(prompt, run, 0)
    assert torch.equal(moved, show.random_step(prompt, run, 0)) and moved.shape == prompt.pixel_values.shape
    assert times_agree(moved)
    before, after = (saei.to_pixels(values, image_processor)[0] for values in (prompt.pixel_values, moved))
    for own in torch.arange(len(before)).split(prompt.image_grid_thw.prod(1).tolist()):  # of each image
        change = (after[own] - before[own])[(before[own] > 0.01) & (before[own] < 0.99)]
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


def test_signals_as_a_command(tmp_path, monkeypatch, capsys):
    output = tmp_path / "a new folder"
    run_main(monkeypatch, "signals", "--model", "toy-faint", "--prompts", 2, "--group_size", 4, "--output", output)
    out = capsys.readouterr().out
    found = json.loads((output / "signals.json").read_text())
    assert found["model"] == found["data"] == "toy-faint" and found["signals"]["format"]["prompts"] == 2
    assert show.TITLES.keys() <= found["signals"].keys() and "read_changed_by_noise" in found["signals"]
    assert all(title in out for title in show.TITLES.values()) and "0.41 (VEPO, Qwen2.5-VL-7B)" in out
    assert Image.open(output / "signals.png").width > 1000


def test_signals_of_other_data(tmp_path, monkeypatch, image_file, capsys):
    """Of another data set than the toy's no kinds of token are known, and prompts without an image are left out."""
    run_main(monkeypatch, "signals", "--model", "toy", "--data", image_file, "--group_size", 2, "--output", tmp_path)
    found = json.loads((tmp_path / "signals.json").read_text())["signals"]
    assert found["accuracy"]["prompts"] == 2 and "read_share" not in found  # the third row has no image
    out = capsys.readouterr().out
    assert "by kind of token" not in out and "mean over 2 prompts" in out


def test_the_committed_signals_of_the_faint_toy():
    """The assumptions that it is built for, as `python show.py signals --model toy-faint` measured them."""
    found = json.loads((TOY / "faint" / "signals.json").read_text())
    mean = {name: value["mean"] for name, value in found["signals"].items()}
    assert mean["missed_by_entropy"] >= 0.35 and mean["read_changed_by_noise"] >= 0.10
    assert mean["format"] >= 0.995 and 0.30 <= mean["accuracy"] <= 0.50
