"""toy/compare.py: its tables against hand counts, and what it runs again; toy/credit.py by hand."""

import dataclasses
import json
import math
import subprocess
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
from common import forward, load_model, load_processor, policy_loss, rollout  # noqa: E402
from plumbing.arguments import SharedArgs, model_source  # noqa: E402
from plumbing.data import Data  # noqa: E402


def record(arm, seed, accuracies, world="toy-faint", **more):
    """Of a run of two steps and an evaluation after each."""
    lines = [{"step": 0, "eval_accuracy": 0.4}]
    known = {"reward": 0.5, "perception": 0.75, "reasoning": 1.0, "entropy": 0.1, **more}
    lines += [{"step": s, "accuracy": a, **known} for s, a in zip((1, 2), accuracies)]
    lines.append({"step": 2, "eval_accuracy": accuracies[-1]})
    return {"world": world, "arm": arm, "seed": seed, **compare.compact(lines)}


def test_the_tables_by_hand(tmp_path, monkeypatch, capsys):
    found = [record("GRPO", 0, (0.5, 0.7)), record("GRPO", 1, (0.6, 0.8))]
    found += [record("PEPO", 1, (0.9, 1.0)), record("PEPO", 0, (0.5, 0.6))]
    found += [record("PEPO", 2, (0.1, 0.1)), record("VEPO", 0, (0.6, 0.7)), record("VEPO", 1, (0.8, 0.8))]
    old = {"world": "toy", "arm": "GRPO", "seed": 0, "reward": [0.55, 0.1], "seconds": [1.0, 1.0]}
    found += [old | {"evaluations": [[0, 0.4], [2, 0.5]]}]  # of before accuracy was recorded: 0.5 and 0
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "TOY", tmp_path)
    compare.RESULTS.write_text("".join(json.dumps(line) + "\n" for line in found))
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
    assert rows["VEPO"][2:4] == [f"+7.5 ± {t * 3.5355:.1f}", "0.41"]  # t = 3: p = 1 - 2 atan(3) / pi, of two arms
    assert rows["PEPO"][3] == "0.63"  # t = 2/3
    assert "toy | seeds" in plain and "| GRPO | 1 | 25.0 | - | - | 50.0 | - | - | - |" in plain
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.jsonl", "comparison.png"}


def test_the_half_that_saw_the_clean_image_counts():
    assert record("SaEI, 6 + 6", 0, (0.5, 0.5), accuracy_clean=0.25)["accuracy"] == [0.25, 0.25]


def test_p_values_and_their_correction():
    assert compare.p_value([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)  # t = 3.464 of 2 degrees
    assert compare.p_value([-1.0, -2.0, -3.0]) == pytest.approx(0.0742, abs=1e-4)
    assert compare.p_value([0.0, 2.0]) == pytest.approx(0.5, abs=1e-4)  # t = 1 of 1 degree: 1 - 2 atan(1) / pi
    t = math.sqrt(5) * 3 / math.sqrt(2.5)  # of 4 degrees: 1 - x (3 - x^2) / 2 with x = t / sqrt(t^2 + 4)
    x = t / math.sqrt(t**2 + 4)
    assert compare.p_value([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 - x * (3 - x**2) / 2, abs=1e-4)
    assert math.isnan(compare.p_value([1.0])) and compare.p_value([2.0, 2.0]) < 1e-6
    corrected = compare.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert compare.holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    corrected = compare.holm({"a": math.nan, "b": 0.2})
    assert math.isnan(corrected["a"]) and corrected["b"] == 0.2  # one that cannot be tested counts for nothing


def test_mistakes_get_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    for argv, text, sentence in (
        (["x", "--jobs", "0"], "", "--jobs 0 must be above 0"),
        (["x", "--seeds", "0"], "", "--seeds 0 must be above 0"),
    ):
        compare.RESULTS.write_text(text)
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as error:
            compare.main()
        assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_a_run_that_fails_says_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(compare, "ARMS", {"GRPO": ("nothing.py", "GRPO")})
    with pytest.raises(compare.UserError, match="GRPO, seed . ended with exit code 2: .*GRPO-..log says why"):
        compare.run("toy-faint", 1, 1)
    assert compare.records() == []


def test_after_a_failure_no_other_run_begins(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs")

    def one(world, arm, seed, core):
        ran.append(arm)
        raise compare.UserError("no")

    monkeypatch.setattr(compare, "one", one)
    with pytest.raises(SystemExit):
        compare.run("toy-faint", 3, 1)
    assert ran == ["GRPO"]


def test_one_comparison_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RUNS", tmp_path)
    lock = f"import filelock, sys; lock = filelock.FileLock({str(tmp_path / '.lock')!r}); lock.acquire()"
    command = [sys.executable, "-uc", f"{lock}; print(1); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(compare.UserError, match="another comparison writes to"):
            compare.run("toy-faint", 1, 1)
        holder.communicate()


def test_a_run_without_its_last_evaluation_is_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "RUNS", tmp_path)
    folder = tmp_path / "toy-GRPO-0"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "eval_accuracy": 0.5}\n{"step": 2, "reward": 0.5}\n')
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    with pytest.raises(compare.UserError, match="GRPO, seed 0 ended without its last evaluation: remove .*toy-GRPO-0"):
        compare.one("toy", "GRPO", 0, 0)
    assert folder.exists() and not compare.RESULTS.exists()


def test_a_line_that_lacks_its_end_is_not_glued(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "RUNS", tmp_path)
    folder = tmp_path / "toy-GRPO-1"
    folder.mkdir()
    known = {"reward": 0.5, "accuracy": 0.5, "perception": 0.75, "reasoning": 1.0, "entropy": 0.1}
    lines = [{"step": 1, **known}, {"step": 1, "eval_accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare.RESULTS.write_text(json.dumps(record("GRPO", 0, (0.5, 0.5))))
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    compare.one("toy", "GRPO", 1, 0)
    assert [found["seed"] for found in compare.records()] == [0, 1] and not folder.exists()


@pytest.mark.parametrize("text", ["x", "[]"])
def test_broken_measurements_get_a_sentence(text, tmp_path):
    (tmp_path / "credit.json").write_text(text)
    with pytest.raises(compare.UserError, match="credit.json is broken: remove it, and measure again"):
        compare.measured(tmp_path / "credit.json")
    assert compare.measured(tmp_path / "nothing.json") == {}


def test_what_is_recorded_is_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(compare, "ARMS", {"GRPO": ("grpo.py", "GRPO"), "PEPO": ("pepo.py", "GRPO")})

    def one(world, arm, seed, core):
        ran.append((arm, seed))
        with open(compare.RESULTS, "a") as file:
            file.write(json.dumps(record(arm, seed, (0.5, 0.5))) + "\n")
        return record(arm, seed, (0.5, 0.5))

    monkeypatch.setattr(compare, "one", one)
    compare.RESULTS.write_text(json.dumps(record("GRPO", 0, (0.5, 0.5))) + "\n")
    compare.run("toy-faint", 2, 2)
    assert sorted(ran) == [("GRPO", 1), ("PEPO", 0), ("PEPO", 1)] and len(compare.records()) == 4
    compare.run("toy-faint", 2, 2)
    assert len(ran) == 3


def test_arms_run_and_are_recorded(tmp_path, monkeypatch):
    """Real runs of two steps through toy/arm.py, in other processes: the oracle is not GRPO."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs")
    flags = "--steps 2 --prompts_per_step 2 --group_size 4 --eval_rows 8"
    monkeypatch.setattr(compare, "ARMS", {arm: (f"{arm} {flags}", arm) for arm in ("oracle", "grpo.py")})
    removed = []
    monkeypatch.setattr(compare.shutil, "rmtree", removed.append)
    compare.run("toy-faint", 1, 1)
    found = {record["arm"]: record for record in compare.records()}
    for record in found.values():
        assert (record["world"], record["seed"]) == ("toy-faint", 0)
        assert all(len(record[name]) == 2 for name in compare.COLUMNS)
        assert [step for step, _ in record["evaluations"]] == [0, 2]
    assert found["oracle"]["accuracy"][0] == found["grpo.py"]["accuracy"][0]  # sampled before the first update
    norms, scripts = set(), set()
    for folder in removed:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        norms.add(json.loads(lines[1])["grad_norm"])
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
    """Batches of e_0 and noise of their own: signal 1, noise 3. The reference's all point along 3 e_0 + 4 e_4."""
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
    """The whole of an arm's parts is the policy gradient that its script backpropagates, but for the denominator."""
    args = SharedArgs(model="toy-faint", group_size=8)
    processor, model = load_processor(model_source(args)), load_model(model_source(args))
    run = show.run_of(model, processor)
    data = Data("toy-faint", "train", args, processor, model)
    (group,) = rollout(model, processor.tokenizer, [data.prompt(0)], args, 0)
    advantages, kinds = torch.linspace(-1, 1, 8), credit.kind_masks(group, processor.tokenizer.decode)
    logps, entropy, hidden = forward(model, group)
    weights, parameters = credit.arm_weights(group, run, hidden.detach(), entropy.detach()), list(model.parameters())

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

    scripts = {
        "VEPO": lambda row: vepo.scoring_forward(row, run, vepo.Args(), 0)[0],
        "top entropy": lambda row: vepo.scoring_forward(row, run, vepo.Args(select="entropy"), 0)[0],
        "random 20 %": lambda row: vepo.scoring_forward(row, run, vepo.Args(select="random"), 0)[0],
        "PRPO": lambda row: prpo.scoring_forward(row, run, prpo.Args(), 0)[0],
        "PRPO shuffled": lambda row: prpo.scoring_forward(row, run, prpo.Args(shuffle=True), 0)[0],
        "PEPO": lambda row: pepo.scoring_forward(row, run, pepo.Args())[0],
        "VGPO": vgpo_forward,
    }
    seen = []
    for arm, scored in scripts.items():
        found = credit.Gradients(parameters, batch=1)
        found.add(logps, advantages, weights[arm], kinds)
        found.end_prompt()
        expected = trained(scored)
        torch.testing.assert_close(found.batches[0], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        seen.append(expected)
    assert all(not torch.allclose(a, b, rtol=1e-2) for i, a in enumerate(seen) for b in seen[:i])


def test_credit_as_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(credit, "BATCH", 2)
    argv = ["credit.py", "--world", "toy-faint", "--prompts", "6", "--output", str(tmp_path / "credit.json")]
    monkeypatch.setattr(sys, "argv", argv)
    credit.main()
    found = json.loads((tmp_path / "credit.json").read_text())["toy-faint"]
    assert found["prompts"] == 6 >= found["groups"] > 0
    own = {arm for arm in compare.ARMS if arm not in ("DAPO", "GRPO, LoRA rank 8")}  # they choose no tokens
    assert set(found["arms"]) == own
    for values in found["arms"].values():
        assert sum(values[f"share_{kind}"][0] for kind in credit.KINDS) == pytest.approx(1, abs=1e-4)
        assert all(math.isfinite(number) for pair in values.values() for number in pair)
    assert found["arms"]["oracle: reads alone"]["share_read"][0] == pytest.approx(1)
    assert "| VEPO |" in capsys.readouterr().out
    for flags, sentence in (
        (["--prompts", "5"], "--prompts 5 must be a multiple of 2"),
        (["--prompts", "4"], "--prompts 4 must be a multiple of 2, and three of them or more"),
        (["--prompts", "4000"], "--prompts 4000: toy-faint has "),
        (["--output", str(tmp_path / "no/x.json")], "cannot be written"),
    ):
        monkeypatch.setattr(sys, "argv", [*argv, *flags])
        with pytest.raises(SystemExit) as error:
            credit.main()
        assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_the_image_is_drawn_from_what_was_measured(tmp_path, monkeypatch, capsys):
    """Controls are printed, and the panels of premises and credit are filled."""
    found = [
        record(arm, seed, (0.5 + 0.1 * seed + 0.01 * i, 0.6)) for i, arm in enumerate(compare.ARMS) for seed in (0, 1)
    ]
    (tmp_path / "comparison.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    value = {"mean": 0.5, "low": 0.4, "high": 0.6, "prompts": 9}
    signals = dict.fromkeys(compare.PREMISES, value)
    signals["read_kept_by_vepo"] = value | {"low": None, "high": None}  # of one prompt
    (tmp_path / "signals.json").write_text(json.dumps({"signals": signals}))
    arms = {
        arm: {f"share_{kind}": [0.25 if kind == "read" else 0.375, 0.1] for kind in credit.KINDS}
        for arm in compare.ARMS
    }
    (tmp_path / "credit.json").write_text(json.dumps({"toy-faint": {"arms": arms}}))
    drawn = []
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "comparison.jsonl")
    monkeypatch.setattr(compare, "TOY", tmp_path)
    monkeypatch.setattr(compare, "EMBEDDED", {"toy": tmp_path / "no", "toy-faint": tmp_path})
    monkeypatch.setattr(compare.Figure, "savefig", lambda figure, path, **_: drawn.append((figure, path)))
    compare.report()
    out = capsys.readouterr().out
    assert "VEPO against top entropy: -" in out and "oracle: reads alone against VEPO: +" in out
    ((figure, path),) = drawn
    assert path == tmp_path / "comparison.png"
    _, top, _, middle, _, bottom = figure.axes
    assert [bar.get_height() for bar in top.patches] == [50.0] * (len(compare.PREMISES) - 1)
    assert sorted({bar.get_width() for bar in middle.patches}) == [25.0, 37.5]
    assert len(middle.patches) == 3 * len(compare.ARMS)
    assert len(bottom.containers) == len([arm for arm, (_, base) in compare.ARMS.items() if arm != base])
