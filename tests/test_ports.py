"""The methods in TRL against this project: token weights, gradients and attacked pixels, on the same responses.

Run as a script by torchrun, it writes the weights of each process to a folder.
"""

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import ROOT, save_internvl

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import pepo  # noqa: E402
import ports.trl  # noqa: E402
import prpo  # noqa: E402
import saei  # noqa: E402
import vepo  # noqa: E402
import vgpo  # noqa: E402
from common import Group, aggregate, forward, load_model, load_processor, policy_loss  # noqa: E402
from plumbing.arguments import INSTRUCTION, TOY  # noqa: E402
from plumbing.data import Prompt, load_rows  # noqa: E402
from show import run_of  # noqa: E402

PORTS = {name.lower(): getattr(ports.trl, f"{name}Trainer") for name in ("VEPO", "VGPO", "PRPO", "PEPO", "SaEI")}
OURS = {"vepo": vepo, "vgpo": vgpo, "prpo": prpo, "pepo": pepo}
IMAGES = {"one image": [1, 1], "several, one and none": [2, 0, 1], "none": [0, 0]}  # of each prompt


def data_rows(counts):
    """A prompt for each number of images, of different sizes."""
    toy = [row for row in load_rows("toy", "train").select(range(20)) if row["images"]]
    rows = []
    for i, count in enumerate(counts):
        images = [toy[i]["images"][0], toy[i + 4]["images"][0].resize((56, 84))][:count]
        text = toy[i]["problem"].replace("<image>", "") + " Please." * i + "\n" + INSTRUCTION
        rows.append({"prompt": [{"role": "user", "content": text}], "images": images})
    return rows


def rewards(completions, **_):
    return [i % 3 % 2 + 0.1 * (i % 5) for i in range(len(completions))]


def made(name, folder, rows, model=TOY / "model", **settings):
    """The port of a method, on a CPU."""
    settings = dict(per_device_train_batch_size=len(rows) * 4, num_generations=4, max_completion_length=40) | settings
    settings = dict(max_steps=3, learning_rate=1e-4, loss_type="dapo", beta=0.0, temperature=0.8) | settings
    settings |= dict(entropy_coef=1e-3 * (name == "vepo"), use_cpu=True, bf16=False, gradient_checkpointing=False)
    settings |= dict(report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", seed=3)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    return PORTS[name](
        model=plain,
        processing_class=load_processor(model),
        reward_funcs=rewards,
        args=trl.GRPOConfig(output_dir=str(folder), **settings),
        train_dataset=datasets.Dataset.from_list(rows),
    )


def sampled(trainer, rows, monkeypatch):
    """The port's batch for G responses to each prompt, with TRL's advantages (B,) and the port's weights (B, T)."""
    kept, weigh = {}, trainer.weights
    plain = trl.GRPOTrainer._generate_and_score_completions

    def generate(self, inputs):
        batch = plain(self, inputs)
        kept["plain"] = batch["advantages"].clone()
        return batch

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", generate)
    monkeypatch.setattr(trainer, "weights", lambda *x: kept.setdefault("weights", weigh(*x)))
    trainer.model.train()
    trainer.state.max_steps, trainer.state.global_step = 4, 1  # PEPO's lambda: 1 / 4
    return trainer._generate_and_score_completions([row for row in rows for _ in range(4)]), kept


def groups_of(batch, model):
    """The batch as groups of this project."""
    split, groups = ports.trl.split_pixel_values_by_grid(batch), []
    mask = batch["completion_mask"].bool()
    for i, start in enumerate(range(0, len(mask), 4)):
        ids = batch["prompt_ids"][start][batch["prompt_mask"][start].bool()]
        seen, pixels, grid = ids == model.config.image_token_id, None, None
        if seen.any():
            pixels, grid = split["pixel_values"][start], split["image_grid_thw"][start]
        positions = model.model.get_rope_index(ids[None], seen.long()[None], image_grid_thw=grid)[0][:, 0]
        prompt = Prompt(i, "", "", ids, positions, pixels, grid, seen)
        own = slice(start, start + 4)
        groups.append(Group(prompt, batch["completion_ids"][own], mask[own], torch.zeros(4).bool(), [""] * 4))
    return groups


def our_weights(name, group, run):
    args, step = OURS[name].Args(temperature=0.8, group_size=4), 1
    if name == "vgpo":
        group.scores = vgpo.row_focus(forward(run.model, group, 0.8)[2], group, args)
        vgpo.set_weights([group], run, args)
    else:
        OURS[name].scoring_forward(group, run, args, *[step][: name != "pepo"])
    return 0.75 + 0.25 * group.weights if name == "pepo" else group.weights.float()


@pytest.fixture
def one_draw(monkeypatch):
    """The number of a prompt decides its noise, in the ports and here."""
    monkeypatch.setattr(ports.trl, "seeded", lambda seed, step, part, prompt: torch.Generator().manual_seed(prompt))
    for module in (vepo, prpo):
        monkeypatch.setattr(module, "seeded", lambda *key: torch.Generator().manual_seed(key[2]))
    for plain in (prpo.blacken, prpo.add_pixel_noise):  # here one after the other from one generator

        def again(pixels, generator, *more, plain=plain, **options):
            return plain(pixels, generator.manual_seed(generator.initial_seed()), *more, **options)

        monkeypatch.setattr(prpo, plain.__name__, again)


def test_lines_of_a_method():
    """As GUIDE.md counts them: without those that are empty."""
    table = (ROOT / "GUIDE.md").read_text().split("| TRL, lines |")[1]
    rows = dict(re.findall(r"^\| (\w+) \| (\d+)", table, re.MULTILINE))
    for name, port in PORTS.items():
        lines = sum(bool(line.strip()) for line in inspect.getsource(port).splitlines())
        assert 5 <= lines <= 12 and int(rows[port.__name__.removesuffix("Trainer")]) == lines, name


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", OURS)
def test_weights_and_gradient_in_trl(name, images, one_draw, monkeypatch, tmp_path):
    """Of three micro-batches scored one by one (two: the prompts are as many), in fp32."""
    rows = data_rows(IMAGES[images])
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": len(rows)}
    trainer = made(name, tmp_path, rows, **parts)
    batch, kept = sampled(trainer, rows, monkeypatch)
    model = load_model(TOY / "model").train()
    run = run_of(model, load_processor(TOY / "model"))
    groups = groups_of(batch, model)
    mask = batch["completion_mask"].bool()
    want = torch.cat([our_weights(name, group, run) for group in groups])
    share = mask.sum() / (want * mask).sum() if name == "vepo" else 1
    difference = (kept["weights"] - share * want)[mask].abs().max().item()
    assert difference < 1e-3 and (name == "pepo" or images == "none" or kept["weights"][mask].std() > 0.1)

    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    trainer._compute_loss(trainer.model, batch).backward()
    advantages = kept["plain"].view(-1, 4)
    for group, A, weights in zip(groups, advantages, want.split(4)):
        logps, entropy, _ = forward(model, group, 0.8)
        weights = weights[:, : logps.shape[1]]
        counted, factor = (weights.bool(), 1) if name == "vepo" else (group.mask, weights)
        count = (want * mask).sum() if name == "vepo" else mask.sum()
        loss, _ = policy_loss(logps, logps.detach(), A[:, None] * factor, counted & group.mask, denominator=count)
        if name == "vepo":
            loss = loss - 1e-3 * aggregate(entropy, group.mask, "token", mask.sum())
        loss.backward()
    theirs = {key: p.grad for key, p in trainer.model.named_parameters() if p.grad is not None}
    ours = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    off = torch.stack([(ours[key] - theirs[key]).norm() for key in ours]).norm()
    relative = (off / torch.stack([x.norm() for x in ours.values()]).norm()).item()
    print(f"{name}, {images}: weights {difference:.1e}, gradient {relative:.1e}")
    assert ours.keys() <= theirs.keys() and relative < 1e-4


@pytest.mark.parametrize("name", OURS)
def test_tokens_of_tools_have_no_weight(name, monkeypatch, tmp_path):
    """TRL's tool_mask is 0 on them: they are not chosen, and of the rest weights are as if they were not there."""
    rows = data_rows([1])
    trainer = made(name, tmp_path, rows)
    plain = trl.GRPOTrainer._generate_and_score_completions

    def generate(self, inputs):
        batch = plain(self, inputs)
        return batch | {"tool_mask": (torch.arange(batch["completion_ids"].shape[1]) >= 3).long().expand(4, -1)}

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", generate)
    batch, kept = sampled(trainer, rows, monkeypatch)
    mask = batch["completion_mask"].bool() & batch["tool_mask"].bool()
    assert name == "pepo" or not kept["weights"][:, :3].any()
    if name == "vepo":
        assert ((kept["weights"] > 0).sum(1) == vepo.kept_tokens(mask, 0.2)).all()
    elif name == "pepo":
        means = (kept["weights"] * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(means, torch.ones(4))


def test_the_guides_lines_of_pepo(monkeypatch, tmp_path):
    """In a loop without TRL: the weights of the port, which are those of pepo.py."""
    rows = data_rows([1, 2, 0])
    trainer = made("pepo", tmp_path, rows)
    batch, kept = sampled(trainer, rows, monkeypatch)
    (block,) = re.findall(r"```python\n(from pepo_functions.*?)```", (ROOT / "GUIDE.md").read_text(), re.DOTALL)
    inputs = {"input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)}
    inputs["attention_mask"] = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    inputs |= {name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
    names = {"torch": torch, "model": trainer.model, "inputs": inputs, "T": batch["completion_ids"].shape[1]}
    names |= {"temperature": 0.8, "mask": batch["completion_mask"].bool(), "updates_done": 1, "all_updates": 4}
    monkeypatch.setitem(sys.modules, "pepo_functions", pepo)
    names["advantages"] = kept["plain"]
    exec(block, names)
    torch.testing.assert_close(names["token_advantages"], batch["advantages"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [2, 4])
def test_micro_batches_without_an_image_next_to_others(size, monkeypatch, tmp_path):
    """Log-probs before the updates and of the reference model, by TRL's batch and row by row; then four updates."""
    rows = data_rows([0, 2, 0, 1])
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    trainer = made("pepo", tmp_path, rows, beta=0.1, num_iterations=2, max_steps=4, **parts)
    if size == 4:
        trainer.train()
        return
    trainer.args.per_device_train_batch_size = size
    batch, _ = sampled(trainer, rows, monkeypatch)
    model, mask = load_model(TOY / "model").train(), batch["completion_mask"].bool()
    want = [forward(model, group, 0.8)[0].detach() for group in groups_of(batch, model)]
    want = torch.cat([torch.nn.functional.pad(x, (0, mask.shape[1] - x.shape[1])) for x in want])[mask]
    for name in ("old", "ref"):
        torch.testing.assert_close(batch[f"{name}_per_token_logps"][mask], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("name", PORTS)
def test_three_steps_in_trl(name, iterations, monkeypatch, tmp_path):
    """The policy that sampled scores the rows of a sampled batch once, in as many parts as TRL trains on."""
    rows = data_rows([1, 2, 0, 1])
    trainer = made(name, tmp_path, rows, num_iterations=iterations, per_device_train_batch_size=8)
    before, scored = [p.clone() for p in trainer.model.parameters()], []
    if name != "saei":
        scores = trainer.scores
        monkeypatch.setattr(trainer, "scores", lambda part: scored.append(len(part["prompt_ids"])) or scores(part))
    trainer.train()
    assert name == "saei" or scored == [8] * (3 if iterations == 1 else 2)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters()))


@pytest.mark.parametrize("count", [1, 2])
def test_attacked_pixels_in_trl(count, monkeypatch, tmp_path):
    """Equal in each of their 8 bits, and seen by every second response alone; the data's images are not touched.

    vLLM, which samples G / 2 responses of each prompt, gets the same as images.
    """
    rows = data_rows([count, 0, 1])
    trainer, calls = made("saei", tmp_path, rows, temperature=3.0), []  # colder, the gradient is rounding alone
    plain = trl.GRPOTrainer._generate_single_turn

    def generate(self, *given):
        calls.append((*given, plain(self, *given)))
        return calls[-1][-1]

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", generate)
    trainer.model.train()
    originals = [image.tobytes() for row in rows for image in row["images"]]
    batch = trainer._generate_and_score_completions([row for row in rows for _ in range(4)])
    assert originals == [image.tobytes() for row in rows for image in row["images"]] and trainer.model.training
    (_, seen, _, G, clean), (_, images, fields, also_G, second) = calls
    mask = batch["completion_mask"].bool()
    texts = [ids[seen].tolist() for ids, seen in zip(batch["completion_ids"], mask)]
    assert texts[::2] == clean[0] and texts[1::2] == second[0] and G == also_G == 2

    model = load_model(TOY / "model").train()
    run, own = run_of(model, load_processor(TOY / "model")), trainer.processing_class.image_processor
    sizes = [[image.size for image in made or []] for made in images]
    assert sizes == [[image.size for image in given or []] for given in seen]
    values = iter(fields["pixel_values"].split([sum(w * h // 14**2 for w, h in made) for made in sizes]))
    for i, group in enumerate(groups_of(batch, model)):
        pair = next(values), next(values)  # of two responses to the prompt
        if not images[2 * i]:
            assert not sizes[2 * i] and not sizes[2 * i + 1]
            continue
        want = saei.attack(group[::2], run, saei.Args(temperature=3.0, measure_every=10**6)).pixel_values
        for pixels in (*pair, *(own(images[j], return_tensors="pt")["pixel_values"] for j in (2 * i, 2 * i + 1))):
            assert (pixels - want).abs().max() < 1e-6  # 1/255 is 0.015 here
            assert ((pixels - group.prompt.pixel_values).abs() > 0.02).float().mean() > 0.3
        trained = ports.trl.split_pixel_values_by_grid(batch)["pixel_values"][4 * i : 4 * i + 4]
        assert all(torch.equal(pixels, group.prompt.pixel_values) for pixels in trained)


@pytest.mark.parametrize("name", ["vepo", "vgpo", "pepo"])
def test_internvl_in_trl(name, monkeypatch, tmp_path):
    """A random one: its weights are those of rows one by one, without padding; and three steps."""
    folder = save_internvl(tmp_path)
    rows = data_rows([1, 2])
    trainer = made(name, tmp_path / "out", rows, folder)
    batch, kept = sampled(trainer, rows, monkeypatch)
    mask, network = batch["completion_mask"].bool(), trainer.model
    tiles = ports.trl.split_pixel_values_by_grid(batch)["pixel_values"]
    found = []
    for i, seen in enumerate(mask):
        prompt, T = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()], int(seen.sum())
        ids = torch.cat([prompt, batch["completion_ids"][i][seen]])[None]
        with torch.no_grad():
            out = network(input_ids=ids, pixel_values=tiles[i], output_hidden_states=True)
        image, states = ids[0] == network.config.image_token_id, out.hidden_states
        if name == "vgpo":
            found.append(vgpo.visual_focus(states[-1][:, -T:], states[-1][:, image]))
        elif name == "pepo":
            entropy = torch.distributions.Categorical(logits=out.logits[:, -T - 1 : -1] / 0.8).entropy()
            similarity = pepo.visual_similarity([x[:, -T:] for x in states], [x[:, image] for x in states])
            found.append(0.75 + 0.25 * pepo.token_weights(similarity, entropy, seen[None, :T]))
    if name == "vgpo":
        padded = torch.nn.utils.rnn.pad_sequence([x[0] for x in found], batch_first=True)
        groups = [vgpo.group_factors(*pair) for pair in zip(padded.split(4), mask.split(4))]
        want = torch.cat([alpha[:, None] * psi for alpha, psi, _ in groups])[mask]
    elif name == "pepo":
        want = torch.cat([x[0] for x in found])
    if name == "vepo":
        assert (kept["weights"] > 0).sum(1).tolist() == vepo.kept_tokens(mask, 0.2).tolist()
    else:
        assert (kept["weights"][mask] - want).abs().max() < 1e-3
    trainer.train()


def weights_of_two(folder):
    """Weights of 12 rows, three groups of 4, on one process or cut across two, and SaEI's pixels; given responses."""
    for name in PORTS:
        parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
        trainer = made(name, folder, data_rows([1, 2, 0]), temperature=3.0 if name == "saei" else 0.8, **parts)
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        rows = [row for row in data_rows([1, 2, 0]) for _ in range(4)]
        mine = slice(rank * 12 // world, (rank + 1) * 12 // world)

        calls = []

        def responses(self, ids, images, fields, G, *_, mine=mine, calls=calls):
            every = [torch.randint(20, 90, (5 + i,), generator=torch.Generator().manual_seed(i)) for i in range(12)]
            own = [x.tolist() for x in every[mine]]
            calls.append(fields["pixel_values"])
            return own if len(ids) == len(own) else own[len(calls) - 1 :: 2], None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trl.GRPOTrainer, "_generate_single_turn", responses)
            trainer.args.steps_per_generation = len(rows[mine]) // 2
            kept = {}
            plain = getattr(trainer, "weights", None)
            patch.setattr(trainer, "weights", lambda *x, plain=plain, kept=kept: kept.setdefault("w", plain(*x)), False)
            trainer.model.train()
            trainer.state.max_steps, trainer.state.global_step = 4, 1
            trainer._generate_and_score_completions(rows[mine])
        if name == "saei":
            kept["w"] = calls[1]
        found = [*kept["w"]] if name == "saei" else [row[:n] for row, n in zip(kept["w"], range(5, 17)[mine])]
        torch.save(found, folder / f"{name}-{rank}-{world}.pt")


def test_groups_that_are_cut_across_processes_in_trl(tmp_path):
    weights_of_two(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in PORTS:
        one = torch.load(tmp_path / f"{name}-0-1.pt", weights_only=True)
        two = [x for i in range(2) for x in torch.load(tmp_path / f"{name}-{i}-2.pt", weights_only=True)]
        assert len(one) == len(two) and (name == "saei" or len(one) == 12)
        for a, b in zip(one, two):
            torch.testing.assert_close(a, b, atol=1e-6 if name == "saei" else 1e-3, rtol=0)


def test_evaluation_samples_from_the_datas_images(monkeypatch, tmp_path):
    trainer, seen = made("saei", tmp_path, data_rows([1])), []
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", lambda self, *given: seen.append(given))
    trainer.model.eval()
    trainer._generate_single_turn(["a", "b", "c"], None, {}, 3)
    assert seen == [(["a", "b", "c"], None, {}, 3)]


@pytest.mark.parametrize(
    "name, setting, sentence",
    [
        ("pepo", {"importance_sampling_level": "sequence"}, "needs importance_sampling_level='token'"),
        ("vepo", {"importance_sampling_level": "sequence"}, "needs importance_sampling_level='token'"),
        ("vepo", {"loss_type": "grpo"}, "needs loss_type='dapo'"),
        ("vgpo", {"mask_truncated_completions": True}, "needs mask_truncated_completions=False"),
    ],
)
def test_settings_that_would_train_something_else_are_refused(name, setting, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        made(name, tmp_path, data_rows([1]), **setting)


def test_pepo_refuses_a_model_whose_states_lack_deep_features(monkeypatch, tmp_path):
    assert ports.trl.PEPOTrainer.not_for == ("qwen3_vl",)
    monkeypatch.setattr(ports.trl.PEPOTrainer, "not_for", ("qwen2_5_vl",))  # the toy
    with pytest.raises(ValueError, match="PEPOTrainer needs a model that is no .*qwen2_5_vl"):
        made("pepo", tmp_path, data_rows([1]))


def test_the_dropout_of_adapters_is_off_while_tokens_are_scored(monkeypatch, tmp_path):
    """Without an image both passes are equal, so PRPO's weights are 1."""
    rows = data_rows([0])
    trainer = made("prpo", tmp_path, rows)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    trainer.model = peft.get_peft_model(trainer.model, config)
    _, kept = sampled(trainer, rows, monkeypatch)
    assert kept["weights"].unique().tolist() in ([1.0], [0.0, 1.0]) and trainer.model.training

    trainer, modes = made("saei", tmp_path, data_rows([1])), []
    trainer.model.train()
    monkeypatch.setattr(trainer, "changed", lambda pixels, *_: modes.append(trainer.model.training) or pixels)
    trainer._generate_and_score_completions([row for row in data_rows([1]) for _ in range(4)])
    assert modes == [False] and trainer.model.training


def test_only_empty_tensors_are_dropped():
    inputs = {"pixel_values": torch.zeros(0, 1176), "scale": torch.tensor(2.0), "input_ids": torch.ones(1, 3), "T": 1}
    assert ports.trl_base.without_empty(None, ("x",), inputs)[0] == ("x",)
    assert list(ports.trl_base.without_empty(None, (), inputs)[1]) == ["scale", "input_ids", "T"]


def test_rows_whose_images_are_none(tmp_path):
    """As data sets have them, in all rows or in some: TRL knows an empty list alone."""
    rows = data_rows([0, 0]) + data_rows([1, 0])
    for row in rows:
        row["images"] = row["images"] or None
    single = [{"prompt": row["prompt"], "image": (row["images"] or [None])[0]} for row in rows]
    parts = [(rows[:2], 0), (rows[1:3], 4), (single[:2], 0), (single[1:3], 4)]  # images of the G = 4 rows of a prompt
    for name, some, images in [(name, *part) for name in ("pepo", "saei") for part in parts]:
        trainer = made(name, tmp_path, some, max_steps=1)
        trainer.train()
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] is not None and trainer.state.global_step == 1
        batch = trainer._generate_and_score_completions([row for row in some for _ in range(4)])
        assert len(batch.get("image_grid_thw", [])) == images


def test_what_cannot_be_halved_is_refused(monkeypatch, tmp_path):
    """Odd groups; and sampling that knows nothing of the halves, or weighs them by their log-probs."""
    odd = {"num_generations": 3, "per_device_train_batch_size": 9}
    for settings in (odd, {"rollout_func": len}, {"tools": [len]}, {"use_vllm": True}):
        with monkeypatch.context() as patch:
            plain = trl.GRPOTrainer.__init__

            def init(self, *args, plain=plain, settings=settings, **kwargs):
                plain(self, *args, **kwargs)
                vars(self).update(settings)

            patch.setattr(trl.GRPOTrainer, "__init__", init)
            with pytest.raises(ValueError, match="SaEI: even groups, batches"):
                made("saei", tmp_path, data_rows([1, 1, 1]), **(settings if settings == odd else {}))


class Server:
    """vLLM, as TRL asks its server: n responses to every n-th prompt. A response says which prompt and which image."""

    def __init__(self):
        self.images = []

    def generate(self, prompts, images, num_generations, profiler):
        found = []
        for ids, of_prompt in zip(prompts[::num_generations], images[::num_generations]):
            self.images += [of_prompt]
            made = [40 + len(ids) % 50, 40 + len(self.images)]
            found += [[*made, 60 + i] for i in range(num_generations)]
        return None, found, [[[-float(token)] for token in response] for response in found], None


def test_a_server_of_vllm_samples_the_halves(tmp_path):
    """Each response and its log-probs stay with their prompt; the second half of a group is of the attacked image."""
    rows = data_rows([1, 0, 2])
    trainer, server = made("saei", tmp_path, rows, vllm_importance_sampling_correction=False), Server()
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, server, 0
    trainer.model.train()
    prompts = [trl.data_utils.prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
    ids, responses, *_, logps, _, _, _ = trainer._generate([prompt for prompt in prompts for _ in range(4)])
    for i, response in enumerate(responses):
        half, prompt = i % 2, i // 4
        assert response == [40 + len(ids[i]) % 50, 41 + prompt + 3 * half, 60 + i % 4 // 2]
        assert logps[i] == [-float(token) for token in response]
    for clean, attacked, row in zip(server.images[:3], server.images[3:], rows):
        assert len(clean or []) == len(attacked or []) == len(row["images"])
        for before, after in zip(clean or [], attacked or []):
            assert before.tobytes() != after.tobytes()


if __name__ == "__main__":
    from pathlib import Path

    weights_of_two(Path(sys.argv[1]))
    for method in ("pepo", "saei"):  # and a step, of which one process has images and the other has none
        made(method, Path(sys.argv[1]) / "out", data_rows([1, 0]), max_steps=1, per_device_train_batch_size=4).train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
