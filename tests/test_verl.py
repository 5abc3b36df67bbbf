"""ports/verl.py: verl's engines find the weights and the gradients of this project, for the same responses.

VERL_PYTHON names the interpreter of an environment with verl, which the lines in the header of ports/verl.py make.
"""

import dataclasses
import os
import subprocess

import pytest
import torch
from helpers import ROOT

import pepo
import prpo
import vepo
import vgpo
from common import forward, group_advantages, pack_rows, policy_loss, rollout
from plumbing.data import Data
from show import run_of

METHODS = {"pepo": pepo, "vgpo": vgpo, "vepo": vepo, "prpo": prpo}
PYTHON = os.environ.get("VERL_PYTHON")


def expected(name, groups, advantages, run, args):
    """(token weights (T,) of each response, gradients by parameter) on packed rows, by the method's own functions."""
    settings = METHODS[name].Args(temperature=args.temperature, seed=args.seed)
    rows, weights = pack_rows(groups, advantages, args), []
    run.model.zero_grad()
    for row in rows:
        row.weights = None
        logps, _, hidden = forward(run.model, row, args.temperature)
        if name == "vgpo":
            row.scores = vgpo.row_focus(hidden, row, settings)
            vgpo.set_weights([row], run, settings)
        else:
            METHODS[name].scoring_forward(row, run, settings, *([] if name == "pepo" else [0]))
        if name == "vepo":  # verl divides by the tokens of all responses
            row.weights = row.weights * (row.mask.sum(1) / row.weights.sum(1))[:, None]
        weighted, total = row.advantages[:, None] * row.weights, sum(row.mask.sum() for row in rows)
        policy_loss(logps, logps.detach(), weighted, row.mask, denominator=total)[0].backward()
        weights += [values[:n] for values, n in zip(row.weights, row.lengths)]
    return weights, {name: p.grad.clone() for name, p in run.model.named_parameters()}


def verl_row(prompt, response, advantage, valid=1):
    """One response as verl has it."""
    n, L = len(response), len(prompt.input_ids) + len(response)
    after = (prompt.position_ids.max() + 1 + torch.arange(n)).expand(3, -1)
    positions = torch.cat([torch.arange(L)[None], torch.cat([prompt.position_ids, after], 1)])  # (4, L)
    row = {"input_ids": torch.cat([prompt.input_ids, response]), "position_ids": positions}
    row |= {"prompts": prompt.input_ids, "responses": response, "advantages": torch.full((n,), float(advantage))}
    return row | {name: torch.full((n,), valid) for name in ("response_mask", "loss_mask")}


@pytest.mark.skipif(not PYTHON, reason="VERL_PYTHON is not set")
def test_engines_find_the_weights_and_gradients_of_packed_rows(tmp_path, toy, args, image_file):
    model, processor = toy
    args.data, args.max_response_tokens, args.temperature = str(image_file), 24, 0.8
    data = Data(args.data, "train", args, processor, model)
    prompts = [dataclasses.replace(data.prompt(i), prompt_id=i) for i in range(3)]  # one image, two images, none
    groups = rollout(model, processor.tokenizer, prompts, args, 0)
    for group in groups:
        group.mask[0, 1:] = False  # a response of one token
        group.__post_init__()
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
    rows, images, uid = [], [], {name: [] for name in METHODS}
    for group, values in zip(groups, advantages):
        prompt = group.prompt
        rows += [verl_row(prompt, ids[:n], a) for ids, n, a in zip(group.responses, group.lengths, values)]
        fields = {name: getattr(prompt, name) for name in ("pixel_values", "image_grid_thw")}
        images += [fields if prompt.pixel_values is not None else {}] * 4
        for name, keys in uid.items():  # a uid is the key of the noise: here that of this project
            word = "views" if name == "prpo" else "noise"
            keys += [f"{args.seed} 0 {prompt.index} {prompt.prompt_id} {word}"] * 4
    rows.append(verl_row(prompts[2], torch.tensor([2]), 0, valid=0))  # verl fills a batch with such rows
    jagged = {name: [row[name] for row in rows] for name in rows[0]}
    uid = {name: [*values, "padding"] for name, values in uid.items()}
    given = {"jagged": jagged, "images": [*images, {}], "uid": uid, "temperature": args.temperature}
    torch.save({**given, "model": str(ROOT / "toy/model")}, tmp_path / "given.pt")
    command = [PYTHON, ROOT / "tests/verl_engine.py", tmp_path / "given.pt", tmp_path / "found.pt"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, (weights, gradients) in torch.load(tmp_path / "found.pt", weights_only=True).items():
        want, want_gradients = expected(name, groups, advantages, run_of(model, processor), args)
        assert not weights.pop().any()
        assert len(weights) == 12 and any(values.std() > 0.01 for values in want if len(values) > 1)
        far = max((a - b).abs().max().item() for a, b in zip(weights, want))
        for a, b in zip(weights, want, strict=True):
            torch.testing.assert_close(a, b, atol=3e-4, rtol=0)
        assert gradients.keys() == want_gradients.keys()
        norm = torch.stack([x.norm() for x in want_gradients.values()]).norm()
        off = torch.stack([(gradients[n] - x).norm() for n, x in want_gradients.items()]).norm()
        print(f"{name}: weights {far:.1e}, gradient {off / norm:.1e}")
        assert norm > 0 and off < 1e-4 * norm, name
