"""What all method files have in common: the lines of grpo.py, real runs, and the base when they are switched off."""

import ast
import difflib
import re
import subprocess

import pytest
import torch
from helpers import ROOT, assert_same_training, same
from safetensors.torch import load_file

FORWARD = ["logps, entropy, _ = forward(model, row, args.temperature)  # (B, T)"]
OLD = ["if args.updates_per_step > 1:", "row.old_logps, _, _ = forward(model, row, args.temperature)  # (B, T)"]
ADVANTAGES = ["token_advantages = row.advantages[:, None].expand_as(logps)  # (B, T): the same for every token"]
SAMPLING = "sampled = rollout(model, trainer.tokenizer, prompts, args, step)  # a group for each prompt"
SCORE = 'with trainer.phase("score"), torch.no_grad():'
SCORE += "  # a step with one update is on-policy: it needs no old log-probs"
LOSS = "logps, old_logps, token_advantages, mask, *clip, args.aggregation, denominator"
MAY_DIFFER = {  # lines of grpo.py that a method replaces
    "vepo": [OLD[1], *FORWARD, LOSS],
    "prpo": [OLD[1], *FORWARD, *ADVANTAGES],
    "pepo": [OLD[1], *FORWARD, *ADVANTAGES],
    "saei": [SAMPLING],
    "vgpo": [*OLD, *FORWARD, *ADVANTAGES],
    "vppo": [SCORE, "for row in trainer.with_gradient(rows):", *OLD, *ADVANTAGES],
}
OFF = {
    "vepo": ["--keep_ratio", 1, "--entropy_coef", 0],
    "prpo": ["--strength", 0],
    "pepo": ["--strength", 0],
    "vgpo": ["--no_intra", "--no_inter"],
    "vppo": ["--keep_ratio", 1, "--floor", 1, "--entropy_coef", 0],
}
RUNS = [["--steps", 2], ["--steps", 1, "--updates_per_step", 2, "--tokens_per_row", 130, "--kl_coef", 0.01]]


def code(name):
    """The lines of a file after its header."""
    source = (ROOT / f"{name}.py").read_text()
    return source.splitlines()[ast.parse(source).body[0].end_lineno :]


@pytest.mark.parametrize("name", MAY_DIFFER)
def test_what_is_not_the_method_is_grpo_word_for_word(name):
    diff = list(difflib.ndiff(code("grpo"), code(name)))
    removed = [line[2:].strip() for line in diff if line.startswith("- ")]
    assert sorted(removed) == sorted(['"""GRPO adds nothing to the shared arguments."""', *MAY_DIFFER[name]])


def documented(metric):
    """Whether the guide's table says what a metric means, by its name or that of the quantity it is a part of."""
    table = (ROOT / "GUIDE.md").read_text().partition("| name | meaning")[2].partition("\n\n")[0]
    stem = re.sub("_(p05|p50|p95|clean|attacked)$", "", metric)
    return re.search(rf"`{stem}(_p05|_clean)?`", table)


@pytest.mark.parametrize("name", MAY_DIFFER)
@pytest.mark.parametrize("flags", RUNS)
def test_a_run_changes_every_parameter(trained, name, flags):
    before = load_file(ROOT / "toy/model/model.safetensors")
    after, metrics = trained(name, *flags)
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert all(value is not None for line in metrics for value in line.values())
    assert not {metric for line in metrics for metric in line if not documented(metric)}
    if name == "vepo":
        assert 0.2 < metrics[0]["kept_tokens"] < 0.25  # 0.2, rounded up in every response
    elif name in ("vgpo", "prpo", "pepo"):
        assert metrics[0]["weight_p05"] <= 1 < metrics[0]["weight_p95"]


@pytest.mark.parametrize("name", OFF)
@pytest.mark.parametrize("flags", RUNS)
def test_switched_off_it_is_the_base_to_the_bit(trained, name, flags):
    base, _ = trained("grpo", *flags)
    off, _ = trained(name, *flags, *OFF[name])
    on, _ = trained(name, *flags)
    assert same(base, off) and not same(base, on)


TWO = ["--updates_per_step", 2]
STRONG = ["--weak_std", 1, "--blacken", 0.9]  # the toy's own divergences are near rounding, which min-max shows
CASES = [("vepo", []), ("vepo", ["--select", "random", *TWO]), ("vgpo", []), ("vgpo", TWO), ("saei", ["--step", 0.2])]
CASES += [("pepo", ["--weight_schedule", "constant"]), ("prpo", [*STRONG, *TWO]), ("prpo", ["--shuffle", *STRONG])]
CASES += [("vppo", []), ("vppo", TWO)]


@pytest.mark.parametrize("name, case", CASES)
def test_groups_cut_into_rows_are_weighted_as_a_whole(trained, name, case):
    """Also where a step has one update: a rollout factor needs the focus of all responses to its prompt."""
    whole, (line,) = trained(name, "--steps", 1, *case)
    cut, (cut_line,) = trained(name, "--steps", 1, *case, "--tokens_per_row", 130)
    assert_same_training(whole, cut)
    same = {key: value for key, value in line.items() if key.startswith(("rollout_", "gated", "loss", "kept"))}
    assert {key: cut_line[key] for key in same} == pytest.approx(same, abs=1e-3)


def test_pepo_begins_as_grpo(trained):
    """lambda is 0 at the first update."""
    grpo, pepo = (trained(name, "--steps", 1)[0] for name in ("grpo", "pepo"))
    assert same(grpo, pepo) and not same(grpo, trained("pepo", "--steps", 1, "--weight_schedule", "constant")[0])


def test_vgpo_sums_focus_in_two_ways(trained):
    raw, _ = trained("vgpo", "--steps", 1)
    for flags in (["--accumulate", "normalised"], ["--floor", 0], ["--no_inter"]):
        other, lines = trained("vgpo", "--steps", 1, *flags)
        assert not same(raw, other)
    assert lines[0]["rollout_factor"] == 1


@pytest.mark.parametrize("name", MAY_DIFFER)
def test_the_readme_counts_the_lines_of_the_diff(name):
    diff = subprocess.run(["diff", ROOT / "grpo.py", ROOT / f"{name}.py"], capture_output=True, text=True).stdout
    changed = sum(line[:1] in ("<", ">") for line in diff.splitlines())
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if f"]({name}.py)" in line)
    assert f"| {changed} lines |" in row
