"""common.py, rewards: the weighted sum, the format, and a reward of one's own."""

import textwrap

import pytest
import torch
from helpers import tiny_model, tiny_prompt

from common import Group, Reward, format_reward, stack_rewards
from plumbing.arguments import SharedArgs, UserError


def test_format():
    assert format_reward(r"<think>a</think> \boxed{1}") == 1.0
    assert format_reward("\n<think>\na\n</think>\n\nso \\boxed{\\frac{1}{2}}.") == 1.0
    for bad in (
        r"\boxed{1}",
        r"<think>a \boxed{1}</think>",
        r"<think>a</think> 1",
        r"ok <think>a</think> \boxed{1}",
        r"<think>a</think><think>b</think> \boxed{1}",
        r"<think>a</think> \boxed{1",
    ):
        assert format_reward(bad) == 0.0


def groups(*texts):
    model = tiny_model("qwen2_5_vl")
    made = []
    for answer, pair in texts:
        prompt = tiny_prompt(model, [])
        prompt.problem, prompt.answer = "Q", answer
        mask = torch.ones(len(pair), 2, dtype=torch.bool)
        made.append(Group(prompt, mask.long(), mask, torch.zeros(len(pair), dtype=torch.bool), list(pair)))
    return made


def test_rewards_are_the_weighted_sum():
    accuracy_only, format_only = r"\boxed{1}", r"<think></think>\boxed{2}"
    made = groups(("1", (r"<think>a</think>\boxed{1}", "1")), ("1", (accuracy_only, format_only)))
    rewards = stack_rewards(Reward(SharedArgs())(made), 2)
    assert torch.allclose(rewards, torch.tensor([[1.0, 0.0], [0.9, 0.1]]))
    assert made[1].accuracy.tolist() == [1, 0] and made[1].format.tolist() == [0, 1]
    made = Reward(SharedArgs(accuracy_weight=1.0, format_weight=0.0))(groups(("1", (format_only, accuracy_only))))
    assert stack_rewards(made, 2).tolist() == [[0.0, 1.0]] and stack_rewards([], 2).shape == (0, 2)


def test_a_reward_of_ones_own_is_a_module_like_any_other(tmp_path):
    """It imports what lies next to it, has dataclasses, and may use up what it is given."""
    (tmp_path / "beside_the_reward.py").write_text("HALF = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_the_reward import HALF\n"
        "@dataclass\nclass Score:\n    value: float\n"
        "def f(problems, responses, answers):\n    lengths = [len(text) for text in responses]\n"
        "    responses.clear()\n    return [Score(HALF * length).value for length in lengths]\n"
    )
    made = groups(("1", ("a", "bcd")), ("1", ("", "ef")))
    rewards = stack_rewards(Reward(SharedArgs(reward=f"{tmp_path}/mine.py:f"))(made), 2)
    assert rewards.tolist() == [[0.5, 1.5], [0, 1]]
    assert made[0].accuracy.tolist() == [0, 0]  # still measured


@pytest.mark.parametrize(
    "code, spec, sentence",
    [
        ("def f(problems, responses, answers):\n    return [1.0]", "f", "returned 1 values for 4 responses"),
        ("x = 1", "f", "mine.py has no function f"),
        ("x = 1", "x", "mine.py has no function x"),
        ("def f(*_):\n    return [0, float('nan'), 0, 0]", "f", "returned nan for the response 'b' to 'Q'"),
        ("def f(*_):\n    return [0, 0, 0, float('-inf')]", "f", "returned -inf for the response 'b' to 'Q'"),
        ("def f(*_):\n    return [0, 0, 1e38, 0]", "f", "returned 1e.38 for the response 'a' .* from -1e.06 to 1e.06"),
    ],
)
def test_a_reward_file_with_a_mistake(tmp_path, code, spec, sentence):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(code))
    with pytest.raises(UserError, match=sentence) as error:
        Reward(SharedArgs(reward=f"{file}:{spec}"))(groups(("1", ("a", "b")), ("1", ("a", "b"))))
    assert error.value.code == 2


@pytest.mark.parametrize("spec", ["nowhere.py:f", "nowhere.py", "f", "", ":f", "/tmp:f"])
def test_a_reward_file_that_is_not_there(spec):
    with pytest.raises(UserError, match="there is no file .*; write it as my_file.py:function"):
        Reward(SharedArgs(reward=spec or ":"))
