"""Kinds of token in responses to the toy tasks, whose grammar is known: read off the image, derived, or filler.

Not here: the toy tasks (toy/puzzles.py), and what is measured by kind (show.py, toy/credit.py).
"""

import re

KINDS = ("read", "derived", "words")
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBERS += ["thirteen"]  # of a sum of 9 in which four reads are one too many
NUMBER = rf"\d+|\b(?:{'|'.join(NUMBERS)})\b"
VALUE = rf"{NUMBER}|\b(?:true|false|yes|no|[ABC]|red|green|blue|yellow|circles|squares|triangles)\b"
CONCLUSION = re.compile(r"\b(?:So|Thus) |</think>")


def conclusion(text):
    """Where a response begins to conclude; its length where it never does."""
    found = CONCLUSION.search(text)
    return found.start() if found else len(text)


def reads(text):
    """The numbers that a response read, in their order.

    >>> reads("<think>I count 2 red shapes and 1 circles. So 2 + 1 = 3.</think> \\\\boxed{3}")
    [2, 1]
    """
    found = re.findall(NUMBER, text[: conclusion(text)])
    return [NUMBERS.index(word) if word in NUMBERS else int(word) for word in found]


def kinds_of(tokens):
    """The kind of each token (strings) of a response: a number before its conclusion, a value in it, or a word.

    >>> kinds_of(["I", " see", " two", " red", ".", " So", " two", " makes", " two"])
    ['words', 'words', 'read', 'words', 'words', 'words', 'derived', 'words', 'derived']
    """
    text = "".join(tokens)
    end = conclusion(text)
    spans = {"read": re.finditer(NUMBER, text[:end]), "derived": re.compile(VALUE).finditer(text, end)}
    owner = {i: kind for kind, found in spans.items() for match in found for i in range(*match.span())}
    kinds, start = [], 0
    for token in tokens:
        places = range(start, start + len(token))
        kinds.append(next((owner[i] for i in places if i in owner), "words"))
        start += len(token)
    return kinds
