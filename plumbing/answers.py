"""Answers: found in a response, parsed in any usual notation, and compared; and a custom reward, a function of the
user's.

Not here: the reward of a run without a custom one (`Reward` in common.py).
"""

import importlib.util
import inspect
import json
import re
import select
import signal
import sys
import time
import unicodedata
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

from plumbing.arguments import UserError

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


def load_reward(spec):
    """The function named by `my_file.py:function`: problems, responses, answers -> a list of as many floats.

    It raises UserError for another number of rewards, and, with prompt and response, for one that is not finite or
    larger than 1e6.
    """
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"--reward {spec}: there is no file {file or spec}; write it as my_file.py:function.")
    sys.path.append(str(Path(file).resolve().parent))  # it may import what lies next to it
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reward {spec}: {file} has no function {name}.")

    def rewards(problems, responses, answers):
        values = [float(value) for value in function(list(problems), list(responses), list(answers))]
        if len(values) != len(responses):
            raise UserError(f"--reward {spec} returned {len(values)} values for {len(responses)} responses.")
        for value, problem, response in zip(values, problems, responses):
            if not abs(value) <= LARGEST:
                raise UserError(
                    f"--reward {spec} returned {value:g} for the response {response[:200]!r} to {problem[:200]!r}: "
                    f"return numbers from -{LARGEST:g} to {LARGEST:g}."
                )
        return values

    return rewards


LONGEST = 1000  # characters: no right answer needs more, and sympy's time grows much faster than what it reads
SIGNS = {"−": "-", "–": "-", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "~": " ", "²": "^2", "³": "^3", "º": "°"}
SIGNS |= {"½": r"\frac{1}{2}", ">=": r"\ge ", "<=": r"\le ", "∠": r"\angle ", "△": r"\triangle ", r"\approx": "≈"}
SIGNS |= {r"\%": "%", r"\$": "¤", r"\dfrac": r"\frac", "{,}": ",", "bmatrix": "pmatrix", "{array}": "{pmatrix}"}
UNITS = """mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre; in inch inches;
    ft foot feet; yd yard; mi mile; g gram; kg kilogram; lb pound; oz ounce; ml milliliter millilitre; L l liter litre;
    s sec second; min minute; h hr hour; day; week; month; year; km/h kmh kph; mi/h mph; N newton; J joule; W watt;
    V volt; A amp ampere; hz hertz; pa pascal; ° deg; °c °celsius; °f °fahrenheit; rad radian; % percent percentage;
    am a.m; pm p.m; ¤ dollar; € euro; £; ¥; cent; unit; 2 square squared sq; 3 cubic cubed; / per"""
UNITS = {name: names.split()[0] for names in UNITS.split(";") for name in names.split()}  # the first of them
UNITS |= {name + "s": first for name, first in UNITS.items() if len(name) > 1}
UNIT = [name for name in sorted(UNITS, key=len, reverse=True) if UNITS[name] not in "23/"]
UNIT = "|".join(f"(?i:{re.escape(name)})" if len(name) > 1 else name for name in UNIT)  # M is not m, but CM is cm
UNIT = rf"(?:(?i:square|sq\.?|cubic) )?(?:{UNIT})(?: ?\^ ?\{{? ?[23] ?\}}?| (?:squared|cubed))?"
UNIT = rf"{UNIT}(?:(?: ?(?:/|\*|\\cdot) ?| (?:per )?){UNIT}){{0,3}}$"
LETTER = r"[A-Za-z]\b(?! ?/)"  # a unit of one letter may be a variable: `2g` and `2x g` have none, `2 g` has one
UNIT = rf"(?:(?<=[\d)}}])(?!{LETTER})|(?<=\S) ){UNIT}"
NAME = r"(?:\\angle\d+|[A-Za-z\\'|]|_\d*|\([A-Za-z,]*\))+"  # x, x_1, AB, f(x), m\angle1; in linear time
VALUE = r"(?:[^A-Za-z\\]|\\frac|\\sqrt|\\pi|\\times|\\cdot)*"
NUMBER = r"[+-]?\d{1,15}(?:\.\d{1,15})?(?:[eE][+-]?\d{1,2})?"
# what sympy multiplies, divides, drops or confuses: words, ABC, R (with r), `30 15`, 12:30, 5-7, the base of 101_2
CONFUSED = r"(?<![\\A-Za-z])(?:[A-Za-z]{4,}|[A-Z]+)|(?<![_^])\d \d+|\d+ ?: ?\d\d|^[\d.]+ ?- ?[\d.]+$|(?<=\d)_\w+"
NO_THING = r"(?!and|or\b|not|less|more|minus|times|neg|doz|hal|squa|cub|\w*illion|\w*ths\b|thir|quart|tens\b|hund|thou)"
COUNTED = rf"(?<=\d)(?: {NO_THING}[a-z]{{3,}})? {NO_THING}(?:[a-z]{{2,}}s|people|children|men|women)$"  # 5 red apples


def plain(answer):
    """An answer on one line, in the signs of LaTeX, without markup; "" where it is too long for a right one."""
    answer = " ".join(answer.split())  # before any pattern can meet a long row of blanks
    answer = answer if len(answer) <= LONGEST else ""
    for sign, command in SIGNS.items():
        answer = answer.replace(sign, command)
    answer = unicodedata.normalize("NFKC", answer)  # a full-width A is an A
    answer = re.sub(r"\\(?:text[a-z]*|math(?:rm|bf|it)|mbox) ?\{([^{}]*)\}", r" \1", answer)
    answer = re.sub(r"(?<!\\)\\(?:(?:left|right|displaystyle|q?quad)(?![A-Za-z])|[,;: ])", " ", answer)
    answer = re.sub(r"(?<!\\)\\[()\[\]]|\$([^$]*)\$|^\*\*([^*]*)\*\*$", r"\1\2", answer)
    answer = re.sub(r"(?:(?:\^|(?<=\d)) ?\{? ?\\circ ?\}?|\\degree|°|\b[Dd]egrees?\b) ?", "°", answer)
    answer = re.sub(r"(\\(?:sin|cos|tan|cot|sec|csc)) ?[({]? ?([\d.]+)°[)}]?", r"\1(\\frac{\2\\pi}{180})", answer)
    answer = re.sub(r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1 ", answer)
    answer = re.sub(r"\\sqrt ?(?:(\d+(?:\.\d+)?)|\(([^()]*)\))", r"\\sqrt{\1\2}", answer)  # not a root of the 1 of 12
    answer = re.sub(r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"(\\begin\{pmatrix\}) ?\{[lcr| ]*\}", r"\1", answer)  # an array's columns
    answer = re.sub(r"_ ?\{(\w)\}", r"_\1", answer)
    answer = re.sub(r"\^ ?(-(?:\d+|[a-z]))", r"^{\1}", re.sub(r"(?<=\d)[eE]([+-]?\d+)$", r"\\times 10^{\1}", answer))
    answer = re.sub(r"(?i)^ ?(?:the )?(?:final |correct )?(?:answer|option)(?: is)? ?:? (?=\S)", "", answer)
    return " ".join(answer.replace("$", "¤").split()).rstrip(" .,;\\")  # a $ of its own is money


def letters(answer, last="J"):
    """The options that an answer names, sorted, or None: A for "A. 30", "(A)" and "a", AC for "C, A" and "(A) (C)"."""
    answer, label = plain(answer), rf"(?:\([A-{last}]\)|\[[A-{last}]\]|[A-{last}][.:)])"
    first = re.match(label, answer)
    if first and not re.search(rf"(?:^|[\s,;&/+]){label}|^ ?(?:[,;&/+]|or\b)|^[A-{last}]$", answer[first.end() :]):
        return first[0].strip("()[].:")  # whatever its text is, if it is not another label
    named = re.sub(r"[\s,;()\[\].&]|\band\b", "", answer)
    known = re.fullmatch(rf"[a-{last.lower()}]|(?:([A-{last}])(?!.*\1)){{1,10}}", named)  # III is not I
    return "".join(sorted(named.upper())) if known else None


def without_name(text):
    """(name, value) of `x = 5` and `5 = x`; of `x = 1, y = 2` the names and a pair; of `x = 1, x = 2` a list."""
    pieces = [piece.split("=") for piece in re.split(r"[,;]| (?:and|or) ", text)]
    if any(len(piece) == 1 for piece in pieces):  # `x = 3, 5`, or no = at all
        pieces = [text.split("=", 1)] if "=" in text else [("", "", text)]
    named = []
    for first, *_, value in pieces:
        name, last = (re.sub(r"[\s{}]", "", side) for side in (first, value))
        if re.fullmatch(NAME, last) and re.fullmatch(VALUE, name) and name:
            name, value = last, first
        if re.fullmatch(VALUE, name) and (re.fullmatch(VALUE, value) or not name):
            name = ""
        elif not re.fullmatch(NAME, name):
            return "", text
        named.append((name, value.strip()))
    names = sorted(name for name, _ in named)
    if names[0] == names[-1]:
        return names[0], ", ".join(value for _, value in named)
    return ",".join(names), f"({', '.join(value for _, value in sorted(named))})"


def parts(answer):
    """(name, value, unit) of an answer, however it is spelt: ("x", "1500", "m2") of `x = 1,500 square metres`."""
    text = re.sub(r"(?<![\d.,(\[])\d{1,3}([, ]\d{3})+(?!\d|,\d)", lambda at: re.sub("[, ]", "", at[0]), plain(answer))
    name, text = without_name(text)
    text, unit = re.sub(r"^([+-]?) ?([¤€£¥]) ?(.*)", r"\1\3 \2", text), ""  # $5 is 5 dollars
    if match := re.search(UNIT, text):
        value, symbols = text[: match.start()], re.sub(r"\\cdot|[*^{}]", " ", match[0]).replace("/", " / ").split()
        variables = re.sub(r"\\[A-Za-z]+| (and|or) ", " ", value)
        if not re.search("[A-Za-z]" if re.match(f" {LETTER}", match[0]) else "[A-Za-z]{2}", variables):
            symbols = [UNITS.get(symbol, UNITS.get(symbol.casefold().strip("."), symbol)) for symbol in symbols]
            powers = ["".join(sorted(part.split(), reverse=True)) for part in " ".join(symbols).split("/")]
            text, unit = value, "" if "unit" in symbols else "/".join(powers)
    text = " ".join(re.sub(r"[°%]|\b0(?=\d ?:)", " ", text).split())  # the first 0 of 09:05
    return name, re.sub(r"^(-?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text), unit


def maths_worker():
    """Reads [gold, answer] lines, prints 1 or 0: sympy at work, in a process of its own that may be killed."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, Float, I, simplify
    from sympy.logic.boolalg import Boolean

    rules = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")  # units are taken off by now
    latex = LatexExtractionConfig(normalization_config=rules, boxed_match_priority=-1)
    modes = dict(fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)

    def same(gold, answer, tolerance):
        gold, answer = (parse(f"${text}$", (latex,), **modes)[0] for text in (gold, answer))
        gold, answer = (x.subs({name: I for name in x.free_symbols if name.name == "i"}) for x in (gold, answer))
        numbers = all(getattr(x, "is_number", False) for x in (gold, answer))
        if numbers and (gold.has(Float) or answer.has(Float)):
            return abs(gold.evalf() - answer.evalf()) <= tolerance * min(1, abs(gold.evalf()))
        if not (isinstance(gold, Boolean) and isinstance(answer, Boolean)):  # two equations or inequalities
            return verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None)
        if gold.free_symbols != answer.free_symbols or not gold.free_symbols:  # 2 > 1 says nothing
            return False
        if not (gold.is_Relational and answer.is_Relational):  # 1 < x < 2
            return gold.as_set() == answer.as_set() and not gold.as_set().is_empty
        answer = answer if isinstance(answer, type(gold)) else answer.reversed
        ratio = simplify((gold.lhs - gold.rhs) / (answer.lhs - answer.rhs))
        same_sign = ratio.is_nonzero if isinstance(gold, Eq) else ratio.is_positive
        return type(gold) is type(answer) and ratio.is_number and same_sign

    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(int(float(sys.argv[1])) + 2)  # the end of this process where the run that asked was killed
        try:
            print(int(bool(same(*json.loads(line)))), flush=True)
        except Exception:  # whatever sympy makes of a model's answer: not a right one
            print(0, flush=True)
        signal.alarm(0)


class Checker:
    """Decides whether an answer is right. What takes sympy longer than `seconds` is wrong and costs just that."""

    def __init__(self, seconds=3.0):
        self.seconds, self.worker, self.timeouts = seconds, None, 0
        self.verdicts = {}  # sympy's: the responses of a group often agree

    def __call__(self, response, gold):
        """True if the answer in `response` equals `gold`. A name (`x =`) or a unit counts where both have one."""
        answer = extract_answer(response)
        return answer is not None and bool(self.equal(answer, gold))

    def equal(self, answer, *golds):
        """The indices of the golds that an answer equals; sympy's `seconds` are for all of them together."""
        self.left = self.seconds
        return [i for i, gold in enumerate(golds) if self.same(answer, extract_gold(gold))]

    def same(self, answer, gold):
        name = plain(gold)
        if re.fullmatch("[A-Z]{2,}", name):  # of a triangle, say: no list, and in order
            drawn = r"\\(?:overline|over(?:left)?rightarrow|triangle|angle)|[\s{},;()&.]|\band\b"
            return re.sub(drawn, "", plain(answer)).casefold() == name.casefold()
        if name != name.lower() and (right := letters(gold)) is not None:
            return letters(answer) == right
        solutions = [[parts(x) for x in re.split(";| or ", text)] for text in (plain(answer), name)]
        if "=" in name and len(solutions[0]) == len(solutions[1]) > 1:
            return self.matched(*solutions)
        sides = [x for x in plain(answer).split("≈") if x.strip() and not re.fullmatch(NAME, x.strip())] or [answer]
        if sides[1:] and plain(answer) != name and not self.maths(parts(sides[-1])[1], parts(sides[0])[1], 0.05):
            return False  # `\sqrt{12} ≈ 3.46` is right for either, if it is true
        return any(self.same_value(parts(x), parts(y)) for x in {sides[0], sides[-1]} for y in name.split("≈"))

    def matched(self, answers, golds):
        """Whether two lists of (name, value, unit) are the same in any order."""
        for gold in golds:
            for answer in [answer for answer in answers if self.same_value(answer, gold)][:1]:
                answers.remove(answer)
        return not answers

    def same_value(self, said, right):
        """Whether two (name, value, unit) are the same; a name and a unit count where both have one."""
        (name, answer, unit), (gold_name, gold, gold_unit) = said, right
        if not answer or not gold or (gold_unit != unit and gold_unit and (unit or gold_unit in ("am", "pm"))):
            return False  # a unit may be missing, but for 12:30 am
        if (name and gold_name and name != gold_name) or (name + gold_name and ("=" in answer) != ("=" in gold)):
            lines = [f"{n}={x}" if n else x for n, x, _ in (said, right) if not (n and re.fullmatch(VALUE, x))]
            return sum("=" in line for line in lines) == 2 and self.maths(*lines)  # y = 2x + 1, but not AB = 5
        outside = r" ?(?:[,;]| and | or |\\cup|∪) ?(?![^(\[{]*[)\]}])"  # of any brackets
        items = [[("", x, "") for x in re.split(outside, value)] for value in (answer, gold)]
        if min(map(len, items)) > 1 and (
            len(items[0]) == len(items[1]) or not re.search(r"\\cup|∪|\\pm", answer + gold)
        ):
            return len(items[0]) == len(items[1]) and self.matched(*items)
        fold = str if re.search(r"[\\\d^]", gold) else str.casefold  # r is not R in a formula
        one, two = (re.sub(r"(?<![A-Za-z\d]) | (?![A-Za-z\d])", "", fold(value)) for value in (answer, gold))
        if one == two or answer + unit == gold + gold_unit:  # `2g` for `2 g`
            return True
        answer = re.sub(COUNTED, "", answer) if re.fullmatch(NUMBER, gold) and not gold_unit else answer
        if re.fullmatch(NUMBER, gold) and re.fullmatch(NUMBER, answer):
            return float(answer) == float(gold)
        one, two = (set(re.findall(CONFUSED, value)) for value in (answer, gold))
        alike = one == two and ("=" in answer) == ("=" in gold) and not re.fullmatch(r"[A-Za-z ]+", gold)
        return alike and self.maths(answer, gold)

    def maths(self, answer, gold, tolerance=5e-7):
        """Sympy's verdict, of decimals within a tolerance; False, and asked again the next time, if it is too slow."""
        factor = r"(\\[a-z]+ ?(?:[_^] ?(?:\d|\{-?\d+\}) ?)?\()|(?<!_\d)(?<=[\d)]) ?\("  # sympy adds 2(3)
        pair = *(re.sub(factor, lambda at: at[1] or r"\cdot (", text) for text in (gold, answer)), tolerance
        if pair in self.verdicts or self.left <= 0:
            return self.verdicts.get(pair, False)
        if self.worker is None or self.worker.poll() is not None:
            code = f"import json, signal, sys\n{inspect.getsource(maths_worker)}\nmaths_worker()"
            pipes = dict(stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, start_new_session=True, bufsize=1)
            self.worker = Popen([sys.executable, "-c", code, str(self.seconds)], **pipes)
            if self.worker.stdout.readline() != "ready\n":
                raise UserError("the maths checker does not start: pip install -r requirements.txt brings math-verify.")
        begin = time.monotonic()
        self.worker.stdin.write(json.dumps(pair) + "\n")
        if select.select([self.worker.stdout], [], [], self.left)[0]:
            self.left -= time.monotonic() - begin
            self.verdicts[pair] = self.worker.stdout.readline() == "1\n"
            return self.verdicts[pair]
        self.left, self.timeouts = 0, self.timeouts + 1
        self.close()
        return False

    def close(self):
        if self.worker is not None:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None
