"""toy/compare.py: its tables against hand counts, and what it runs again; toy/credit.py by hand."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "toy"))
import compare  # noqa: E402
import credit  # noqa: E402

import pepo  # noqa: E402
import prpo  # noqa: E402
import show  # noqa: E402
import vepo  # noqa: E402
import vgpo  # noqa: E402
import vppo  # noqa: E402
from common import forward, load_model, load_processor, policy_loss, rollout  # noqa: E402
from plumbing.arguments import SharedArgs, model_source  # noqa: E402
from plumbing.data import Data  # noqa: E402

UNWEIGHTED = [
    "DAPO",
    "GRPO, LoRA rank 8",
    "VPPO without entropy penalty",
    "GRPO with entropy penalty",
]  # no weights of tokens, or VPPO's


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Nothing is written into toy/ or runs/."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(compare.Figure, "savefig", lambda *_, **__: None)
    (tmp_path / "runs").mkdir()


def write(records):
    compare.RESULTS.write_text("".join(json.dumps(record) + "\n" for record in records))


def record(variant, seed, accuracies, toy="toy-faint", **more):
    """Of a run of two steps and an evaluation after each."""
    lines = [{"step": 0, "eval_accuracy": 0.4}]
    known = {"reward": 0.5, "perception": 0.75, "reasoning": 1.0, "entropy": 0.1, **more}
    lines += [{"step": s, "accuracy": a, **known} for s, a in zip((1, 2), accuracies)]
    lines.append({"step": 2, "eval_accuracy": accuracies[-1]})
    return {"toy": toy, "variant": variant, "seed": seed, **compare.compact(lines)}


def test_the_tables_by_hand(monkeypatch, capsys):
    found = [record("GRPO", 0, (0.5, 0.7)), record("GRPO", 1, (0.6, 0.8))]
    found += [record("PEPO", 1, (0.9, 1.0)), record("PEPO", 0, (0.5, 0.6))]
    found += [record("PEPO", 2, (0.1, 0.1)), record("VEPO", 0, (0.6, 0.7)), record("VEPO", 1, (0.8, 0.8))]
    found.append(record("DAPO", 1, (0.6, 0.9)))
    old = {"toy": "toy", "variant": "GRPO", "seed": 0, "accuracy": [0.5, 0.0]}  # without perception and reasoning
    write([*found, old | {"evaluations": [[0, 0.4], [2, 0.5]]}])
    compare.report()
    plain, faint = capsys.readouterr().out.split("| toy-faint |")
    rows = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ")[1:] for line in faint.splitlines()}
    t = 12.7062 / 2**0.5  # of 1 degree, over the root of 2 seeds
    assert rows["GRPO"][:3] == ["2", f"65.0 ± {t * 7.0711:.1f}", "-"]
    assert rows["GRPO"][3:6] == ["-", f"75.0 ± {t * 7.0711:.1f}", "-"]
    assert rows["GRPO"][6:] == ["75.0 ± 0.0", "100.0 ± 0.0"]
    assert rows["PEPO"][0] == "2"  # GRPO has no third seed yet
    assert rows["PEPO"][2] == f"+10.0 ± {t * 21.2132:.1f}"  # gains of -5 and +25 points online
    assert rows["PEPO"][5] == f"+5.0 ± {t * 21.2132:.1f}"  # of -10 and +20 in the test
    assert rows["VEPO"][2:4] == [f"+7.5 ± {t * 3.5355:.1f}", "0.41"]  # t = 3: p = 1 - 2 atan(3) / pi, of two variants
    assert rows["PEPO"][3] == "0.63"  # t = 2/3
    assert rows["DAPO"][:4] == ["1", "75.0", "+5.0", "-"]  # only one of GRPO's seeds yet
    assert "toy | seeds" in plain and "| GRPO | 1 | 25.0 | - | - | 50.0 | - | - | - |" in plain


def test_the_half_that_saw_the_clean_image_counts():
    assert record("SaEI, 6 + 6", 0, (0.5, 0.5), accuracy_clean=0.25)["accuracy"] == [0.25, 0.25]


def test_holm_by_hand():
    corrected = compare.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert compare.holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0} and compare.holm({}) == {}


def test_a_run_without_its_last_evaluation_is_not_recorded(monkeypatch):
    folder = compare.RUNS / "toy-GRPO-0"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "eval_accuracy": 0.5}\n{"step": 2, "reward": 0.5}\n')
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: None)
    with pytest.raises(compare.UserError, match="GRPO, seed 0 ended without its last evaluation: remove .*toy-GRPO-0"):
        compare.train("toy", "GRPO", 0)
    assert folder.exists() and not compare.RESULTS.exists()


def test_recorded_runs_are_not_trained_again(monkeypatch):
    trained = []
    monkeypatch.setattr(compare, "VARIANTS", {"GRPO": ("grpo.py", "GRPO"), "PEPO": ("pepo.py", "GRPO")})

    def train(toy, variant, seed, rate):
        trained.append((variant, seed, rate))
        return record(variant, seed, (0.5, 0.5))

    monkeypatch.setattr(compare, "train", train)
    write([record("GRPO", 0, (0.5, 0.5)), record("PEPO", 1, (0.5, 0.5), toy="toy")])
    compare.train_missing([("toy-faint", name, seed, None) for seed in range(2) for name in compare.VARIANTS], 2)
    assert sorted(trained) == [("GRPO", 1, None), ("PEPO", 0, None), ("PEPO", 1, None)]
    compare.train_missing([("toy-faint", "GRPO", 0, 1e-3), ("toy-faint", "GRPO", 0, None)], 2)
    assert trained[3:] == [("GRPO", 0, 1e-3)]


def test_the_search_has_a_row_for_each_rate(capsys):
    rates = [(100, 1e-3, 0.5), (101, 1e-3, 0.5), (100, 3e-5, 0.25), (0, None, 0.75)]
    write([record("GRPO", seed, (x, x)) | {"rate": rate} for seed, rate, x in rates])
    compare.report()
    printed = capsys.readouterr().out
    assert "| GRPO | 3e-05 | 1 | 25.0 |" in printed and "| GRPO | 0.001 | 2 | 50.0 ± 0.0 |" in printed
    assert "| GRPO | 1 | 75.0 | - |" in printed  # the table of the default rate has its own seeds alone


def test_variants_run_and_are_recorded(monkeypatch):
    """Real runs of two steps through toy/variant.py, in other processes: the oracle is not GRPO."""
    flags = "--steps 2 --prompts_per_step 2 --group_size 4 --eval_rows 8"
    monkeypatch.setattr(compare, "VARIANTS", {name: (f"{name} {flags}", name) for name in ("oracle", "grpo.py")})
    removed = []
    monkeypatch.setattr(compare.shutil, "rmtree", removed.append)
    compare.train_missing([("toy-faint", name, 0, 3e-4) for name in compare.VARIANTS], 2)
    found = {record["variant"]: record for record in compare.read_records()}
    for record in found.values():
        assert (record["toy"], record["seed"], record["rate"]) == ("toy-faint", 0, 3e-4) and record["commit"]
        assert all(len(record[name]) == 2 for name in compare.COLUMNS)
        assert [step for step, _ in record["evaluations"]] == [0, 2]
    assert found["oracle"]["accuracy"][0] == found["grpo.py"]["accuracy"][0]  # sampled before the first update
    norms, scripts = set(), set()
    for folder in removed:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        norms.add(json.loads(lines[1])["grad_norm"])
        assert json.loads(lines[1])["learning_rate"] == 3e-4
        scripts.add(json.loads((folder / "last/trainer_state.json").read_text())["script"])
    assert len(norms) == 2 and min(norms) > 0 and scripts == {"oracle", "grpo"}


# ---- credit ---------------------------------------------------------------------------------------------------------


def test_gradients_by_kind_sum_to_the_whole():
    """Of two prompts a batch: parts by hand from a linear policy, whose gradients are known; one has equal rewards."""
    w, unused = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    found = credit.Gradients([w, unused], batch=2)
    kinds = {kind: torch.eye(3)[i][None] for i, kind in enumerate(credit.KINDS)}  # token i is of kind i
    logps, weights = w[None] * torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1, 1, 0]])
    for advantage in (1.0, 3.0, 2.0, None):
        if advantage:
            found.add(logps, torch.tensor([advantage]), weights, kinds)
        found.end_prompt()
    assert [whole.tolist() for whole in found.batches] == [[-4.0, -8.0, 0.0, 0.0, 0.0], [-2.0, -4.0, 0.0, 0.0, 0.0]]
    assert [parts.tolist() for parts in found.parts] == [[16.0, 64.0, 0.0], [4.0, 16.0, 0.0]]


def test_a_summary_by_hand():
    """Batches of e_0 and independent noise: signal 1, noise 3. Those of the reference point along 3 e_0 + 4 e_4."""
    own, reference = credit.Gradients([], batch=1), credit.Gradients([], batch=1)
    own.batches = [torch.eye(5)[0] + math.sqrt(3) * torch.eye(5)[i] for i in (1, 2, 3)]
    own.parts = [torch.tensor([1.0, 3.0, 0.0])] * 3
    reference.batches = [length * (3 * torch.eye(5)[0] + 4 * torch.eye(5)[4]) for length in (1.0, 2.0, 7.0)]
    found = credit.summary(own, reference)
    assert found["signal"] == [pytest.approx(1 / 3), pytest.approx(0, abs=1e-6)]
    assert found["share_read"][0] == 0.25 and found["share_derived"][0] == 0.75 and found["share_words"][0] == 0
    assert found["cosine"][0] == pytest.approx(3 / (2 * 5), abs=1e-5)  # of lengths 2 and 5
    own.batches[0] = 2 * reference.batches[0]  # a batch is not compared with itself: the others' sum points as it does
    assert credit.summary(own, reference)["cosine"][0] == pytest.approx((1 + 0.3 + 0.3) / 3, abs=1e-5)
    reference.batches[0] = -100 * reference.batches[0]  # nor does it count: for the other two all is turned round
    assert credit.summary(own, reference)["cosine"][0] == pytest.approx((1 - 0.3 - 0.3) / 3, abs=1e-5)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    mean, half = credit.jackknife(lambda kept: values[kept].mean().item(), 4)
    assert mean == 4.0 and half == pytest.approx(3.1824 * values.std().item() / 2, abs=1e-4)


def test_credit_is_the_gradient_of_each_methods_own_loss(monkeypatch):
    """The parts of a variant sum to the policy gradient that its script backpropagates, but for the denominator."""
    args = SharedArgs(model="toy-faint", group_size=8)
    processor, model = load_processor(model_source(args)), load_model(model_source(args))
    run = show.run_of(model, processor)
    data = Data("toy-faint", "train", args, processor, model)
    (group,) = rollout(model, processor.tokenizer, [data.prompt(0)], args, 0)
    advantages, kinds = torch.linspace(-1, 1, 8), credit.kind_masks(group, processor.tokenizer.decode)
    logps, _, hidden = forward(model, group)
    weights, parameters = credit.variant_weights(group, run, logps.detach(), hidden.detach()), list(model.parameters())

    def gradient(loss):
        slopes = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([slope.flatten() for slope in slopes])

    def trained(scored):
        """Of a row whose weights a script's own function has set."""
        row = dataclasses.replace(group)
        own = scored(row)
        factors = row.weights.float()
        loss, _ = policy_loss(own, own.detach(), advantages[:, None] * factors, group.mask, denominator=1)
        return gradient(loss)

    def vgpo_forward(row):
        own, _, states = forward(model, row)
        row.scores = vgpo.row_focus(states, row, vgpo.Args())
        vgpo.set_weights([row], run, vgpo.Args())
        return own

    def vppo_forward(row):
        own, _, _ = forward(model, row)
        row.old_logps, row.loss_mask = own.detach(), row.mask
        vppo.set_scores([row], run, vppo.Args(), 0)
        vppo.set_weights([row], run, vppo.Args())
        return own

    scripts = {
        "VEPO": lambda row: vepo.scoring_forward(row, run, vepo.Args(), 0)[0],
        "top entropy": lambda row: vepo.scoring_forward(row, run, vepo.Args(select="entropy"), 0)[0],
        "random 20 %": lambda row: vepo.scoring_forward(row, run, vepo.Args(select="random"), 0)[0],
        "PRPO": lambda row: prpo.scoring_forward(row, run, prpo.Args(), 0)[0],
        "PRPO shuffled": lambda row: prpo.scoring_forward(row, run, prpo.Args(shuffle=True), 0)[0],
        "PEPO": lambda row: pepo.scoring_forward(row, run, pepo.Args())[0],
        "VGPO": vgpo_forward,
        "VPPO": vppo_forward,
    }
    seen = []
    for variant, scored in scripts.items():
        found = credit.Gradients(parameters, batch=1)
        found.add(logps, advantages, weights[variant], kinds)
        found.end_prompt()
        expected = trained(scored)
        torch.testing.assert_close(found.batches[0], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        seen.append(expected)
    assert all(not torch.allclose(a, b, rtol=1e-2) for i, a in enumerate(seen) for b in seen[:i])


def test_credit_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(credit, "BATCH", 2)
    flags = ["--toy", "toy-faint", "--batches", "3", "--output", str(tmp_path / "credit.json")]
    monkeypatch.setattr(sys, "argv", ["credit.py", *flags])
    credit.main()
    found = json.loads((tmp_path / "credit.json").read_text())["toy-faint"]
    assert found["prompts"] == 6 >= found["groups"] > 0
    others = [name for name in compare.VARIANTS if name not in UNWEIGHTED]
    assert list(found["variants"]) == others
    for values in found["variants"].values():
        assert sum(values[f"share_{kind}"][0] for kind in credit.KINDS) == pytest.approx(1, abs=1e-4)
        assert all(math.isfinite(number) for pair in values.values() for number in pair)
    assert found["variants"][compare.ORACLE]["share_read"][0] == pytest.approx(1)
    assert "| VEPO |" in capsys.readouterr().out


def test_the_report_of_the_committed_results(monkeypatch, capsys):
    """RESULTS.md has these tables; the figure shows the committed measurements."""
    monkeypatch.setattr(compare, "RESULTS", compare.TOY / "comparison.jsonl")
    drawn = []
    monkeypatch.setattr(compare.Figure, "savefig", lambda figure, path, **_: drawn.append((figure, path)))
    compare.report()
    out = capsys.readouterr().out
    assert "| VEPO | 8 | 55.9 ± 0.1 | -0.6 ± 0.3 | 0.0069 | 60.3 ± 1.5 | +0.4 ± 1.4 | 47.1 ± 1.6 | 96.9 ± 1.0 |" in out
    assert "| GRPO | 5 | 71.0 ± 1.1 | - | - | 75.5 ± 1.5 | - | - | - |" in out
    assert "VEPO against random 20 %: +3.3 ± 0.5 online, p = 2e-05" in out
    (figure, path), (gains, second) = drawn
    assert (path, second) == (compare.TOY / "comparison.png", compare.TOY / "gains.png")
    _, top, _, middle, _, bottom = figure.axes
    signals = json.loads((compare.TOY / "faint" / "signals.json").read_text())["signals"]
    assert [bar.get_height() for bar in top.patches] == [100 * signals[name]["mean"] for name in compare.ASSUMPTIONS]
    variants = json.loads((compare.TOY / "credit.json").read_text())["toy-faint"]["variants"]
    assert len(middle.patches) == 3 * len(variants)
    assert middle.patches[0].get_width() == 100 * variants["GRPO"]["share_read"][0]
    points = dict(zip((tick.get_text() for tick in bottom.get_yticklabels()), bottom.lines[0].get_xdata()))
    assert len(points) == len(compare.VARIANTS) - 2  # all but the two baselines
    assert round(points["VEPO"], 1) == -0.6
    names = [tick.get_text() for tick in gains.axes[0].get_yticklabels()]
    assert sorted(names) == sorted(points) and [text.get_text() for text in gains.axes[0].texts] == [
        f"{value:+z.1f}" for value in sorted(points.values())
    ]
