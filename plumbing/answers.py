"""Is an answer right: read from a response, brought to a plain form, compared as letters, words, numbers or LaTeX.

The one checker of training and evaluation. Not here: what a right answer is worth (`Reward` in common.py), a reward of
one's own (rewards.py), and the verdicts of the benchmarks (eval.py).
"""

import inspect
import json
import re
import select
import subprocess
import sys
import unicodedata

from plumbing.commandline import UserError


def extract_answer(response):
    """The content of the last balanced \\boxed{}, else of the last <answer></answer>, else None.

    >>> extract_answer(r"so \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    opened, start, end = [], -1, -1
    for brace in re.finditer(r"\\boxed\s*\{|[{}]", response):  # in one pass, whatever a model repeats
        if brace[0] != "}":
            opened.append(-1 if brace[0] == "{" else brace.end())
        elif opened and (box := opened.pop()) > start:
            start, end = box, brace.start()
    if start >= 0:
        return response[start:end].strip() or None
    _, tag, answer = response.rpartition("</answer>")[0].rpartition("<answer>")
    return (answer.partition("</answer>")[0].strip() or None) if tag else None


LONGEST = 1000  # characters: no right answer needs more, and sympy's time grows much faster than what it reads
SIGNS = {"−": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "~": " "}
SIGNS |= {"±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "≈": "=", "º": "°"}
SIGNS |= {"²": "^2", "³": "^3", "½": r"\frac{1}{2}", "∠": r"\angle ", "△": r"\triangle ", "。": ".", "{,}": ","}
SIGNS |= {r"\approx": "=", r"\%": "%", r"\$": "¤", r"\dfrac": r"\frac", r"\tfrac": r"\frac", "bmatrix": "pmatrix"}
UNITS = """mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre; in inch inches;
    ft foot feet; yd yard; mi mile; g gram; kg kilogram; lb pound; oz ounce; ml milliliter millilitre; L l liter litre;
    s sec second; min minute; h hr hour; day; week; month; year; km/h kmh kph; mi/h mph; N newton; J joule; W watt;
    V volt; A amp ampere; hz hertz; pa pascal; ° deg; °c °celsius; °f °fahrenheit; rad radian; % percent percentage;
    am a.m; pm p.m; ¤ dollar; € euro; cent; unit; 2 square squared sq; 3 cubic cubed; / per"""
UNITS = {name: names.split()[0] for names in UNITS.split(";") for name in names.split()}  # the first of them
UNITS |= {name + "s": first for name, first in UNITS.items() if len(name) > 1}
UNIT = [name for name in sorted(UNITS, key=len, reverse=True) if UNITS[name] not in "23/"]
UNIT = "|".join(f"(?i:{re.escape(name)})" if len(name) > 1 else name for name in UNIT)  # M is not m, but CM is cm
UNIT = rf"(?:(?i:square|sq\.?|cubic) )?(?:{UNIT})(?: ?\^ ?\{{? ?[23] ?\}}?| (?:squared|cubed))?"
UNIT = rf"{UNIT}(?:(?: ?(?:/|\*|\\cdot) ?| (?:per )?){UNIT}){{0,3}}$"
LETTER = r"[A-Za-z]\b(?! ?/)"  # a unit of one letter may be a variable: `2g` and `2x g` have none, `2 g` has one
UNIT = rf"(?:(?<=[\d)}}])(?!{LETTER})|(?<=\S) ){UNIT}"


def plain(answer):
    """An answer on one line, in the signs of LaTeX, without markup; "" where it is too long for a right one."""
    answer = " ".join(answer.split())  # before any pattern can meet a long row of blanks
    answer = answer if len(answer) <= LONGEST else ""
    for sign, command in SIGNS.items():
        answer = answer.replace(sign, command)
    answer = unicodedata.normalize("NFKC", answer)  # a full-width A is an A
    answer = re.sub(r"\\(?:text[a-z]*|math(?:rm|bf|it)|mbox) ?\{([^{}]*)\}", r" \1", answer)
    answer = re.sub(r"(?<!\\)\\(?:(?:left|right|displaystyle)(?![A-Za-z])|[,;:! ])", " ", answer)
    answer = re.sub(r"(?<!\\)\\[()\[\]]|\$([^$]*)\$", r"\1", answer).replace("$", "¤")  # a $ of its own is money
    answer = re.sub(r"(?:(?:\^|(?<=\d)) ?\{? ?\\circ ?\}?|\\degree|°|\b[Dd]egrees?\b) ?", "°", answer)
    answer = re.sub(r"(?<![A-Za-z\\])(pi|sqrt)(?![A-Za-z])", r"\\\1 ", answer)
    answer = re.sub(r"\\sqrt ?(?:(\d+(?:\.\d+)?)|\(([^()]*)\))", r"\\sqrt{\1\2}", answer)  # not a root of the 1 of 12
    answer = re.sub(r"(?i)^ ?(?:the )?(?:final |correct )?(?:answer|option)(?: is)? ?:? (?=\S)", "", answer)
    return " ".join(answer.split()).rstrip(" .,;\\")


def letters(answer, in_order=False):
    """The options that an answer names, sorted, or None: A for "A. 30", AC for "C, A"; CA where `in_order` is set."""
    answer = plain(answer)
    label = re.match(r"\(?([A-J])(?:[.:]|\)[.:]?)(?: [A-J](?= |$))?", answer)  # "A. C": option A, whose text is C
    if label and not re.search(r"(?<![^\s,;&(/])[A-J](?![^\s,;&).:/])", answer[label.end() :]):
        return label[1]
    named = re.sub(r"[\s,;()&.]|\band\b", "", answer)
    if not re.fullmatch(r"[A-J]{1,10}", named):
        return None
    return named if in_order else "".join(sorted(set(named)))


def without_name(text):
    """(name, value) of `x = 5`; of `x = 1, y = 2` the names and a pair, of `x = 1 or x = 2` the name and a list."""
    pieces = [piece.split("=") for piece in re.split(r"[,;]| (?:and|or) ", text)]
    if any(len(piece) == 1 for piece in pieces):  # `x = 3, 5`, or no = at all
        pieces = [text.split("=", 1)]
    names, values = zip(*sorted((re.sub(r"[\s{}]", "", piece[0]), piece[-1].strip()) for piece in pieces))
    name, number = r"([A-Za-z\\'|]|_\d*|\([A-Za-z,]*\))*", r"([^A-Za-z\\]|\\frac|\\sqrt|\\pi|\\times|\\cdot)*"
    if "=" not in text or not all(re.fullmatch(f"{name}|{number}", part) for part in names):
        return "", text
    if len(set(names)) > 1:
        return f"({','.join(names)})", f"({', '.join(values)})"
    return "" if re.fullmatch(number, names[0]) else names[0], ", ".join(values)


def parts(answer):
    """(name, value, unit) of an answer, in the same words however it is spelt.

    >>> parts("x = 1,500 square metres"), parts("y = 2 and x = 1"), parts("2g"), parts("2x = 5")
    (('x', '1500', 'm2'), ('(x,y)', '(1, 2)', ''), ('', '2g', ''), ('', '2x = 5', ''))
    """
    text = re.sub(r"(?<![\d.,(\[])\d{1,3}([, ]\d{3})+(?!\d|,\d)", lambda at: re.sub("[, ]", "", at[0]), plain(answer))
    name, text = without_name(text)
    unit = "".join(re.findall("[¤€£¥]", text)[:1])
    text = re.sub("[¤€£¥]", "", text).strip()
    if match := re.search(UNIT, text):
        value, symbols = text[: match.start()], re.sub(r"\\cdot|[*^{}]", " ", match[0]).replace("/", " / ").split()
        variables = re.sub(r"\\[A-Za-z]+| (and|or) ", " ", value)
        if not re.search("[A-Za-z]" if re.match(f" {LETTER}", match[0]) else "[A-Za-z]{2}", variables):
            symbols = [UNITS.get(symbol, UNITS.get(symbol.casefold().strip("."), symbol)) for symbol in symbols]
            powers = ["".join(sorted(part.split(), reverse=True)) for part in " ".join(symbols).split("/")]
            text, unit = value, "" if "unit" in symbols else "/".join(powers)
    text = " ".join(re.sub("[°%]", " ", text).split())
    text = re.sub(r"^(-?\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    times = r"(?<=\d) ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?\{? ?([+-]?\d{1,2}) ?\}?$"
    return name, re.sub(rf"^([+-]?[\d.]+){times}", r"\1e\2", text), unit


def normalise(answer):
    """The value of an answer: its markup, its unit and a leading `x =` taken off."""
    return parts(answer)[1]


def words(text):
    """What sympy multiplies, adds, drops or confuses: words, ABC, R (with r), `30 15`, the base of 101_2."""
    text = text.replace("_{", "_")
    return set(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{4,}|(?<![\\A-Za-z])[A-Z]+|(?<![_^])\d \d+|(?<=\d)_\w+", text))


def maths_worker():
    """Reads [gold, answer] lines, prints 1 or 0: sympy at work, in a process of its own that may be killed."""
    import json
    import signal
    import sys

    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    rules = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")  # units are taken off by now
    latex = LatexExtractionConfig(normalization_config=rules, boxed_match_priority=-1)
    modes = dict(fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(int(float(sys.argv[1])) + 2)  # and that dies by itself where the run that asked was killed
        try:
            gold, answer = (parse(f"${text}$", (latex,), **modes) for text in json.loads(line))
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
        """True if the answer in `response` equals `gold`. A name (`x =`) or a unit counts where both have one."""
        answer = extract_answer(response)
        return answer is not None and self.equal(answer, gold)

    def equal(self, answer, gold):
        boxed = extract_answer(gold)  # some data sets keep the whole solution as the answer
        gold = boxed if boxed is not None else gold
        if (right := letters(gold)) is not None:
            a_name = re.fullmatch("[A-J]{2,}", plain(gold))  # of a triangle, say: no list, and in order
            return letters(answer, in_order=True) == plain(gold) if a_name else letters(answer) == right
        (name, answer, unit), (gold_name, gold, gold_unit) = parts(answer), parts(gold)
        if not answer or not gold or (name and gold_name and name != gold_name):
            return False
        if gold_unit and unit != gold_unit and (unit or gold_unit in ("am", "pm")):  # 12:30 alone is half an answer
            return False
        fold = str if re.search(r"[\\\d^]", gold) else str.casefold  # r is not R in a formula
        if fold(answer) == fold(gold) or answer + unit == gold + gold_unit:  # `2g` for `2 g`
            return True
        if re.fullmatch(r"[A-Za-z ]+", gold):
            return False  # words are equal or they are not
        number = r"[+-]?\d{1,15}(\.\d{1,15})?([eE][+-]?\d{1,2})?"
        if re.fullmatch(number, answer) and re.fullmatch(number, gold):
            return float(answer) == float(gold)
        clock = r"\d{1,2}( ?: ?\d\d){1,2}"
        if re.fullmatch(clock, answer) or re.fullmatch(clock, gold):  # sympy would divide
            return re.sub(r"\b0(?=\d)| ", "", answer) == re.sub(r"\b0(?=\d)| ", "", gold)
        if ("=" in answer) != ("=" in gold) or words(answer) != words(gold):
            return False
        for sign, meant in ((r"(?<=\d)[eE]([+-]?\d+)$", r"\\times 10^{\1}"), (r"(?<!_\d)(?<=[\d)]) ?\(", r"\\cdot (")):
            answer, gold = re.sub(sign, meant, answer), re.sub(sign, meant, gold)  # sympy adds 2(3)
        return self.verdicts[answer, gold] if (answer, gold) in self.verdicts else self.maths(answer, gold)

    def maths(self, answer, gold):
        """Sympy's verdict; wrong, and asked again the next time, where it takes too long."""
        if self.worker is None or self.worker.poll() is not None:
            code = inspect.getsource(maths_worker) + "\nmaths_worker()"
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            command = [sys.executable, "-c", code, str(self.seconds)]
            self.worker = subprocess.Popen(command, start_new_session=True, **pipes)  # Ctrl-C is for the run
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
