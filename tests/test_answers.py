"""plumbing/answers.py: the checker on pairs of answers, and on answers that take sympy too long."""

import json
import time
from pathlib import Path

import pytest

from common import format_reward
from plumbing import answers
from plumbing.answers import LONGEST, Checker, extract_answer, extract_gold, letters, parts


@pytest.fixture(scope="module")
def checker():
    checker = Checker(seconds=3.0)
    yield checker
    checker.close()


TABLE = Path(__file__).with_name("answers.tsv").read_text(encoding="utf-8").split("\n")[1:-1]


@pytest.mark.parametrize("row", TABLE, ids=[f"row{number}" for number in range(2, len(TABLE) + 2)])
def test_table(checker, row):
    """answers.tsv: what a careful grader would decide, one pair in a row."""
    answer, gold, verdict, why = row.split("\t")
    assert checker(f"<think>so</think> \\boxed{{{answer}}}", gold) == {"right": True, "wrong": False}[verdict], why


def test_no_pair_is_twice_in_the_table():
    assert len({tuple(row.split("\t")[:2]) for row in TABLE}) == len(TABLE) > 200


def test_letters_are_a_set_where_a_benchmark_asks_for_all_right_options():
    assert letters("C, A") == letters("AC") == letters("CA") == letters("A and C") == "AC"
    assert letters("A. 30") == letters("(A)") == "A" and letters("(A) (C)") == letters("A.C") == "AC"
    assert letters("30") is letters("A or C") is letters("") is None


def test_a_gold_answer_of_several_boxes_is_a_list(checker):
    assert extract_gold(r"so $\boxed{1}$ and $\boxed{-2}$.") == "1, -2" and extract_gold("3") == "3"
    assert extract_gold(r"\boxed{5}, that is \boxed{5}") == "5"
    gold = r"x is \boxed{1} or \boxed{-2}"
    assert checker(r"\boxed{-2, 1}", gold) and checker(r"\boxed{x = 1 or x = -2}", gold)
    assert not checker(r"\boxed{1}", gold) and not checker(r"\boxed{-2}", gold)


def test_name_value_and_unit():
    assert parts(r"x = 1,500\text{ cm}^2") == ("x", "1500", "cm2") and parts("1,500 = x") == ("x", "1500", "")
    assert parts("$1500.") == ("", "1500", "¤") and parts("1 500 %") == ("", "1500", "%")
    assert parts("No, it is not.") == ("", "No, it is not", "")
    assert parts("y = 2 and x = 1") == ("x,y", "(1, 2)", "") and parts("2x = 5") == ("", "2x = 5", "")
    assert parts("x = 1 or x = 2") == ("x", "1, 2", "") and parts("p=7,q=2,r=5") == ("p,q,r", "(7, 2, 5)", "")


def test_extraction(checker):
    assert extract_answer(r"\boxed{1} then \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert extract_answer(r"\boxed{\text{a {nested} one}}") == r"\text{a {nested} one}"
    assert extract_answer(r"<answer>1</answer> <answer> 2 </answer>") == "2"
    assert extract_answer(r"<answer>1</answer> \boxed{3}") == "3"
    assert extract_answer(r"\boxed{3} and an unbalanced \boxed{4") == "3"
    assert extract_answer(r"{} } \boxed  {1} {") == extract_answer(r"\boxed{2 \boxed{1}") == "1"
    assert extract_answer(r"\boxed{1} \boxed{}") is None  # the last one counts, and it is empty
    assert extract_answer("<answer>1</answer> </answer> <answer>2") == "1"
    assert extract_answer("<answer>1 <answer>2</answer>") == "2"
    for nothing in ("", "5", r"\boxed{}", r"\boxed{ }", r"\boxed{5", "<answer></answer>", "None"):
        assert extract_answer(nothing) is None
        assert not any(checker(nothing, gold) for gold in ("5", "None", "", "0"))


@pytest.fixture(scope="module")
def one_second():
    checker = Checker(seconds=1.0)
    yield checker
    checker.close()


def seconds_of(checker, answer, *golds):
    """Seconds until the checker gives up on an answer, without the start of its worker."""
    checker.verdicts.clear()
    assert checker.equal(r"\sqrt{8}", "3", r"2\sqrt{2}", r"\sqrt[4]{64}") == [1, 2]  # also by a restarted worker
    timeouts, start = checker.timeouts, time.perf_counter()
    assert not checker.equal(answer, *golds) and checker.timeouts == timeouts + 1
    return time.perf_counter() - start


@pytest.mark.parametrize("answer", ["9^{9^{9}}", "9999999!", "10^{10^{10}}"])
def test_an_answer_that_hangs_costs_its_time_limit(one_second, answer):
    assert seconds_of(one_second, answer, r"\sqrt{2}") < 2.0


def test_ten_options_take_no_longer_than_one(one_second):
    """Sympy does not finish any of them."""
    assert seconds_of(one_second, "9^{9^{9}}", *(rf"\sqrt{{{i}}}" for i in range(2, 12))) < 2.0


REPEATED = ["{", "}", "{}", "}{", r"\text{", r"\text", r"\boxed{", r"\boxed   ", r"\boxed{1}", r"\boxed", r"\frac{"]
REPEATED += ["$", " ", "\t\n", "a", "A", "A ", "1", "1,", "1,000", "1 000 ", "1.", ".", "x=", "x=1,", "x_1=2 and "]
REPEATED += ["_", "_a", "_{1}", "x_1 ", "'", "≈", "or ", "5 red apples ", "A. ", "(A) ", "(A),", "(", ")", "[", "|"]
REPEATED += ["1 m ", "m ", "m/", "mm^2 ", "cm per ", "square ", "sq. ", "\\", "\\ ", "^", r"^\circ ", "°", "%", "~"]
REPEATED += ["12:30 ", ":", "-", "−", "√", r"\sqrt(", "sqrt", "pi ", "e1", "10^", "ﷺ", "\u0301\u0323"]
REPEATED += ["<think>", "</think>", "<think></think>", "<answer>", "</answer>", "<answer>1</answer>", "the answer is "]
FRAMES = [("", ""), (r"\boxed{", "}"), (r"\boxed{1", "x}"), (r"\boxed{A. ", " B}"), (r"\boxed{x=", " cm}")]
FRAMES += [(r"\boxed{", " cm}"), (r"\boxed{", "=5?}"), (r"\boxed{1 \approx ", "}")]
FRAMES += [("<think>", r"</think> \boxed{1}"), (r"<think></think> \boxed{", "}"), ("<answer>", "</answer>")]


def seconds(function, *values):
    """CPU seconds of this process, without those of other processes."""
    begin = time.process_time()
    function(*values)
    return time.process_time() - begin


@pytest.mark.parametrize("piece", REPEATED)
def test_no_response_takes_long_outside_of_sympy(piece, monkeypatch):
    """The longest responses, and those just short enough to be compared by the patterns."""
    checker = Checker()
    monkeypatch.setattr(checker, "maths", lambda *_: False)
    for length in (100_000, LONGEST - 20):
        for start, end in FRAMES:
            response = start + (piece * length)[:length] + end
            answer = extract_answer(response) or response
            calls = [(extract_answer, response), (format_reward, response), (letters, answer), (parts, answer)]
            calls += [(checker, response, gold) for gold in ("5 cm", "A, C", "(1, 2)")]
            for function, *values in calls:
                assert any(seconds(function, *values) < 0.1 for _ in range(2)), (function, start, end, length)


def test_what_is_too_long_for_a_right_answer_is_wrong_and_sympy_is_not_asked(monkeypatch):
    checker = Checker()
    monkeypatch.setattr(checker, "maths", lambda *_: True)
    assert checker.equal("1" + "+0" * 100, r"\frac{2}{2}") and not checker.equal("1" + "+0" * LONGEST, r"\frac{2}{2}")
    assert checker.equal("1" + " " * 100_000, "1")  # blanks do not count


def test_a_worker_that_dies_is_replaced():
    checker = Checker()
    assert checker.equal("1/2", "2/4")
    checker.worker.kill()
    checker.worker.wait()
    assert checker.equal("1/3", "2/6")
    checker.close()


def test_sympy_is_asked_once_for_the_same_answer_and_again_where_it_took_too_long(monkeypatch):
    asked, checker, dumps = [], Checker(30.0), json.dumps
    monkeypatch.setattr(answers.json, "dumps", lambda pair: (asked.append(pair), dumps(pair))[1])
    assert [bool(checker.equal(answer, "2/4")) for answer in ("1/2", "3/4", "1/2", "3/4")] == [True, False] * 2
    assert asked == [("2/4", "1/2", 5e-7), ("2/4", "3/4", 5e-7)]
    with monkeypatch.context() as patch:
        patch.setattr(answers.select, "select", lambda *_: ([], [], []))  # as when the time is over
        assert not checker.equal("4/8", "2/4") and checker.timeouts == 1
    assert checker.equal("4/8", "2/4") and checker.timeouts == 1  # a timeout is not stored
    checker.close()
