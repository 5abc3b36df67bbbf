"""Is an answer right: read from a response, brought to a plain form, compared as letters, words, numbers or LaTeX.

The one checker of training and evaluation, and the loader of a reward of one's own. Not here: what a right answer is
worth (`Reward` in common.py) and the verdicts of the benchmarks (eval.py).
"""

import importlib.util
import inspect
import json
import re
import select
import subprocess
import sys
from pathlib import Path

from plumbing.commandline import UserError


def extract_answer(response):
    """The content of the last balanced \\boxed{}, else of the last <answer></answer>, else None.

    >>> extract_answer(r"so \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", response)]):
        depth = 1
        for i in range(start, len(response)):
            depth += {"{": 1, "}": -1}.get(response[i], 0)
            if depth == 0:
                return response[start:i].strip() or None
    tagged = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    return (tagged[-1].strip() or None) if tagged else None


UNITS = (
    r"(?:degrees?|deg|radians?|percent|mm|cm|dm|km|m|inches|inch|in|feet|foot|ft|yards?|yd|miles?|mi|meters?|metres?|"
    r"centimeters?|kilometers?|grams?|kg|g|pounds?|lbs?|liters?|litres?|ml|l|seconds?|sec|s|minutes?|min|hours?|hr|h|"
    r"units?|square units?|dollars?)"
)


def normalise(answer):
    """Text, spacing, units, degree and percent signs, and a leading `x =` taken off an answer."""
    answer = answer.strip().strip("$").strip().rstrip(".")
    answer = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", answer)
    answer = re.sub(r"\\(?:left|right|,|;|!| )|~", " ", answer)
    answer = re.sub(r"\^?\s*\{?\\circ\}?|°|\\?%|\\\$", " ", answer)
    answer = re.sub(r"^\s*\\?[A-Za-z]+\s*(?:=|\\approx)\s*", "", answer)
    answer = re.sub(rf"(?<=[\d}})\s])\s*{UNITS}\s*(?:\^\s*\{{?[23]\}}?|²|³)?\s*$", "", answer)
    answer = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer)
    return re.sub(r"\s+", " ", answer.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")).strip()


def letters(answer):
    """The options that an answer names, sorted, or None: A for "(A)" and "A. 30", AC for "C, A" and "AC"."""
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", answer).strip().strip("$").strip()
    if label := re.match(r"\(?([A-J])(?:[.:)]|\)\s*[.:]?)\s*\S*(?<![,;])(?!.*\b[A-J]\b)", answer):
        return label[1]
    named = re.sub(r"[\s,;()&.]|\band\b", "", answer)
    return "".join(sorted(set(named))) if re.fullmatch(r"[A-J]{1,10}", named) else None


def maths_worker():
    """Reads [gold, answer] lines, prints 1 or 0: sympy at work, in a process of its own that may be killed."""
    import json
    import signal
    import sys

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(int(float(sys.argv[1])) + 2)  # and that dies by itself where the run that asked was killed
        try:
            options = dict(
                extraction_config=(LatexExtractionConfig(), ExprExtractionConfig()),
                fallback_mode="no_fallback",
                extraction_mode="first_match",
                parsing_timeout=None,
            )
            gold, answer = (parse(f"${text}$", **options) for text in json.loads(line))
            print(int(bool(gold and answer) and verify(gold, answer, timeout_seconds=None)), flush=True)
        except Exception:  # whatever sympy makes of a model's answer: not a right one
            print(0, flush=True)
        signal.alarm(0)


class Checker:
    """Decides whether an answer is right. What takes sympy longer than `seconds` is wrong and costs just that."""

    def __init__(self, seconds=3.0):
        self.seconds, self.worker, self.timeouts = seconds, None, 0
        self.verdicts = {}  # of sympy: the responses of a group often agree

    def __call__(self, response, gold):
        """True if the answer in `response` equals `gold`: letters, numbers, LaTeX, units, degrees, percent, words."""
        answer = extract_answer(response)
        return answer is not None and self.equal(answer, gold)

    def equal(self, answer, gold):
        boxed = extract_answer(gold)  # some data sets keep the whole solution as the answer
        gold = boxed if boxed is not None else gold
        if (options := letters(gold)) is not None:
            return letters(answer) == options
        answer, gold = normalise(answer), normalise(gold)
        if not answer or not gold:
            return False
        if answer.casefold() == gold.casefold():
            return True
        if re.fullmatch(r"[A-Za-z ]+", gold):
            return False  # words are equal or they are not
        number = r"[+-]?\d{1,15}(\.\d{1,15})?"
        if re.fullmatch(number, answer) and re.fullmatch(number, gold):
            return float(answer) == float(gold)
        if (verdict := self.verdicts.get((answer, gold))) is None:
            verdict = self.maths(answer, gold)
        return verdict

    def maths(self, answer, gold):
        """Sympy's verdict; wrong, and asked again the next time, where it takes too long."""
        if self.worker is None or self.worker.poll() is not None:
            code = inspect.getsource(maths_worker) + "\nmaths_worker()"
            self.worker = subprocess.Popen(
                [sys.executable, "-c", code, str(self.seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run
            )
            if self.worker.stdout.readline() != "ready\n":
                raise UserError("the maths checker does not start: pip install -r requirements.txt brings math-verify.")
        self.worker.stdin.write(json.dumps([gold, answer]) + "\n")
        self.worker.stdin.flush()
        if select.select([self.worker.stdout], [], [], self.seconds)[0]:
            self.verdicts[answer, gold] = self.worker.stdout.readline() == "1\n"
            return self.verdicts[answer, gold]
        self.timeouts += 1
        self.close()
        return False

    def close(self):
        if self.worker is not None:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None


def load_reward(spec):
    """The function named by `my_file.py:function`: problems, responses, answers -> a list of as many floats.

    Raises UserError, now and whenever it is called, for a mistake in the user's file.
    """
    file, _, name = spec.rpartition(":")
    try:
        module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:  # whatever the user's file raises while it is imported
        raise UserError(
            f"--reward {spec} cannot be imported ({type(error).__name__}: {error}): write it as my_file.py:function."
        ) from None

    def rewards(problems, responses, answers):
        try:
            values = [float(value) for value in function(problems, responses, answers)]
        except Exception as error:  # whatever the user's function raises
            raise UserError(f"--reward {spec} failed ({type(error).__name__}: {error}).") from None
        if len(values) != len(responses):
            raise UserError(
                f"--reward {spec} returned {len(values)} values for {len(responses)} responses: return one for each."
            )
        return values

    return rewards
