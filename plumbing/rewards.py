"""What rewards read: the answer in a response; and a reward of the user's own, a function of a file of theirs.

Not here: the reward that a run has without it (`Reward` in common.py), and whether an answer is right (answers.py).
"""

import contextlib
import importlib.util
import re
import sys
from pathlib import Path

from plumbing.commandline import UserError

LARGEST = 1e6  # a group's standard deviation is computed in fp32: the squares of 1e38 are infinite


def boxes(text):
    """(start, end) of what each balanced \\boxed{} holds, in their order; of nested ones the inner."""
    opened, found = [], [(-1, -1)]
    for brace in re.finditer(r"\\boxed\s*\{|[{}]", text):  # in one pass, whatever a model repeats
        if brace[0] != "}":
            opened.append(-1 if brace[0] == "{" else brace.end())
        elif opened and (start := opened.pop()) > found[-1][0]:
            found.append((start, brace.start()))
    return found[1:]


def extract_answer(response):
    """The content of the last balanced \\boxed{}, else of the last <answer></answer>, else None.

    >>> extract_answer(r"so \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    if found := boxes(response):
        start, end = found[-1]
        return response[start:end].strip() or None
    _, tag, answer = response.rpartition("</answer>")[0].rpartition("<answer>")
    return (answer.partition("</answer>")[0].strip() or None) if tag else None


def extract_gold(answer):
    """A right answer as data sets have it: the value, or a text with \\boxed{} or <answer>; several boxes are a list.

    >>> extract_gold("3"), extract_gold("<answer> 3 </answer>"), extract_gold(r"\\boxed{1} and \\boxed{-2}")
    ('3', '3', '1, -2')
    """
    found = dict.fromkeys(answer[start:end].strip() for start, end in boxes(answer))
    return ", ".join(found) or extract_answer(answer) or answer


@contextlib.contextmanager
def told(sentence):
    """Whatever the user's file raises as a UserError; but not Ctrl-C, which run.py makes an exit with 130."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if getattr(error, "code", None) == 130:
            raise
        raise UserError(sentence.format(f"{type(error).__name__}: {error}")) from None


def load_reward(spec):
    """The function named by `my_file.py:function`: problems, responses, answers -> a list of as many floats.

    Raises UserError, now and whenever it is called, for a mistake in the user's file: for a reward that is not finite,
    or beyond 1e6, it names prompt and response.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(f"--reward {spec}: there is no file {file or spec}; write it as my_file.py:function.")
    with told(f"--reward {spec} cannot be imported ({{}}): mend it."):
        sys.path.append(str(Path(file).resolve().parent))  # what lies beside the file can be imported by it
        module_spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
        module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reward {spec}: {file} has no function {name}.")

    def rewards(problems, responses, answers):
        with told(f"--reward {spec} failed ({{}})."):
            values = function(list(problems), list(responses), list(answers))
            values = [float(value) for value in values]
        if len(values) != len(responses):
            raise UserError(
                f"--reward {spec} returned {len(values)} values for {len(responses)} responses: return one for each."
            )
        for value, problem, response in zip(values, problems, responses):
            if not abs(value) <= LARGEST:
                raise UserError(
                    f"--reward {spec} returned {value:g} for the response {response[:200]!r} to {problem[:200]!r}: "
                    f"return numbers from -{LARGEST:g} to {LARGEST:g}."
                )
        return values

    return rewards
