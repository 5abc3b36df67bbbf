"""The built-in toy tasks: images, puzzles about them, and responses to the puzzles.

Images are grids of coloured shapes, one cell for each image token. Puzzles ask for counts. A response first reads the
counts off the image (perception tokens), then reasons about what it read (tokens that do not depend on the image):

    toy        bold colours on white, fixed wording; only the counts are uncertain:
               <think>I count 2 red shapes and 3 blue circles. So 2 + 3 = 5.</think> \\boxed{5}
    toy-faint  the same scenes in faint colours on grainy grey, in words that vary; three or four counts, some late:
               <think>Well, we see two red and one squares. Then three green circles. So two and one and
               three.</think> \\boxed{213}
"""

import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toy.kinds import NUMBERS  # noqa: E402

CELL = 28  # pixels; patch 14, merged 2 x 2: one cell is one image token
COLOURS = {"red": (214, 48, 49), "green": (39, 174, 96), "blue": (41, 98, 255), "yellow": (241, 196, 15)}
SHAPES = ["circle", "square", "triangle"]
GRIDS = [(2, 2), (2, 3), (3, 2), (3, 3)]


# ---- Images ----------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A grid of `rows` x `columns` cells; `cells`: None or (colour, shape, x, y, size, fill), row by row."""

    rows: int
    columns: int
    background: int
    cells: list


def draw_scene(rng, min_density=0.4, max_density=0.95):
    """A scene of random size and density, the share of cells that are not empty."""
    rows, columns = rng.choice(GRIDS)
    background = rng.randint(235, 255)
    density = rng.uniform(min_density, max_density)
    cells = []
    for _ in range(rows * columns):
        if rng.random() > density:
            cells.append(None)
            continue
        colour, shape, size = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.randint(14, 22)
        x, y = rng.randint(2, CELL - size - 2), rng.randint(2, CELL - size - 2)
        fill = tuple(max(0, min(255, value + rng.randint(-20, 20))) for value in COLOURS[colour])
        cells.append((colour, shape, x, y, size, fill))
    return Scene(rows, columns, background, cells)


def draw_shape(pen, shape, x, y, size, fill):
    if shape == "circle":
        pen.ellipse([x, y, x + size, y + size], fill=fill)
    elif shape == "square":
        pen.rectangle([x, y, x + size, y + size], fill=fill)
    else:
        pen.polygon([(x + size // 2, y), (x, y + size), (x + size, y + size)], fill=fill)


def paint_plain(scene, rng=None):
    """The scene in bold colours on white."""
    image = Image.new("RGB", (scene.columns * CELL, scene.rows * CELL), (scene.background,) * 3)
    pen = ImageDraw.Draw(image)
    for i, cell in enumerate(scene.cells):
        if cell:
            _, shape, x, y, size, fill = cell
            draw_shape(pen, shape, i % scene.columns * CELL + x, i // scene.columns * CELL + y, size, fill)
    return image


BLOCK = 4  # pixels of equal colour in x and y, so that the file of a faint image is small
HUES = {"red": (1.2, -0.8, -0.8), "green": (-0.9, 1.2, -0.8), "blue": (-0.8, -0.7, 1.3), "yellow": (1.0, 0.8, -1.2)}
CONTRAST = (12, 60)  # of a shape against its background, of 255
GRAIN = (1, 6)  # standard deviation of the noise of each block, of 255
LEAN = 0.35  # how much of another colour may be mixed in


def paint_faint(scene, rng, easy=0.0):
    """The scene in faint colours on an uneven, noisy grey; `easy` is added to the contrast, of 255."""
    noise = numpy.random.RandomState(rng.getrandbits(32))  # numpy keeps its stream unchanged between versions
    height, width, side = scene.rows * CELL // BLOCK, scene.columns * CELL // BLOCK, CELL // BLOCK
    y, x = numpy.mgrid[0:height, 0:width] / (3 * side)
    grey = rng.uniform(105, 150) + rng.uniform(-15, 15) * y + rng.uniform(-15, 15) * x
    blocks = grey[..., None] + numpy.array([rng.uniform(-6, 6) for _ in range(3)])
    for i, cell in enumerate(scene.cells):
        if cell:
            colour, shape, *place, _ = cell
            stamp = Image.new("L", (CELL, CELL))
            draw_shape(ImageDraw.Draw(stamp), shape, *place, fill=255)
            covered = numpy.asarray(stamp).reshape(side, BLOCK, side, BLOCK).mean((1, 3)) / 255
            other, lean = rng.choice([name for name in HUES if name != colour]), rng.uniform(0, LEAN)
            hue = (1 - lean) * numpy.array(HUES[colour]) + lean * numpy.array(HUES[other])
            contrast = CONTRAST[0] * (CONTRAST[1] / CONTRAST[0]) ** rng.random() + easy
            top, left = i // scene.columns * side, i % scene.columns * side
            blocks[top : top + side, left : left + side] += covered[..., None] * contrast * hue
    blocks += noise.standard_normal(blocks.shape) * rng.uniform(*GRAIN)
    blocks = (4 * (blocks / 4).round()).clip(0, 255).astype(numpy.uint8)
    return Image.fromarray(blocks).resize((scene.columns * CELL, scene.rows * CELL), Image.Resampling.NEAREST)


# ---- Puzzles --------------------------------------------------------------------------------------------------------


def draw_queries(rng, count):
    """So many different things to count: [(words, (colour or None, shape or None))]."""
    queries = {}
    while len(queries) < count:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        kind = rng.choice(["colour", "colour", "shape", "both"])
        if kind == "colour":
            words, shape = f"{colour} shapes", None
        elif kind == "shape":
            words, colour = f"{shape}s", None
        else:
            words = f"{colour} {shape}s"
        queries[words] = (colour, shape)
    return list(queries.items())


def count_shapes(scene, colour, shape):
    """How many shapes of a scene have this colour and this shape; None: any."""
    return sum(colour in (None, cell[0]) and shape in (None, cell[1]) for cell in scene.cells if cell)


def conclude(family, numbers):
    """The answer that follows from the numbers a response read, right or wrong.

    >>> conclude("difference", [2, 3, 1]), conclude("compare", [2, 1]), conclude("list", [2, 0, 1])
    ('4', 'yes', '201')
    """
    *some, last = numbers
    if family == "difference":
        return str(sum(some) - last)
    if family == "compare":
        return "yes" if sum(some) > last else "no"
    if family == "choice":
        return "ABC"[numbers.index(max(numbers))]
    if family.startswith("list"):
        return "".join(map(str, numbers))
    return str(sum(numbers))


@dataclass
class Puzzle:
    """A question, the counts to read off its images, and a template of the response."""

    family: str
    problem: str
    scenes: list
    counts: list  # the true numbers, in the order in which a response reads them
    thought: str  # {0}, {1}: numbers; {answer}, {truth}, {name}: what follows from them; [a|b|c]: one of these words
    names: list = field(default_factory=list)  # the colours to choose between
    images: list = field(default_factory=list)

    def response(self, numbers, rng, words):
        """A response that reads these numbers, right or wrong, and concludes from them; `words`: numbers in words."""
        answer = conclude(self.family, numbers)
        write = in_words if words else str

        def pick(slot):  # each choice is half as likely as the one before
            choices = slot[1].split("|")
            return rng.choices(choices, [0.5**i for i in range(len(choices))])[0]

        thought = re.sub(r"\[(.*?)\]", pick, self.thought).format(
            *map(write, numbers),
            answer=write(int(answer)) if "{answer}" in self.thought else "",
            truth="true" if answer == "yes" else "false",
            name=self.names["ABC".index(answer)] if self.names else "",
        )
        return f"<think>{thought}</think> \\boxed{{{answer}}}"


def in_words(number):
    return NUMBERS[number] if number >= 0 else f"minus {NUMBERS[-number]}"


QUESTIONS = {  # of toy's families, about {one} and {two}, or about the names or counts {0}, {1}, {2}
    "count": "How many {one} are there?",
    "sum": "How many {one} and {two} are there together, each kind counted by itself?",
    "difference": "How many more {one} than {two} are there?",
    "compare": "Are there more {one} than {two}?",
    "choice": "Which colour is the most common? (A) {0} (B) {1} (C) {2}",
    "pictures": "How many {one} are there in the two pictures together?",
    "text": "A box holds {0} {one} and {1} {two}. How many things does it hold?",
}
THOUGHTS = {
    "count": "I count {{0}} {one}.",
    "sum": "I count {{0}} {one} and {{1}} {two}. So {{0}} + {{1}} = {{answer}}.",
    "difference": "I count {{0}} {one} and {{1}} {two}. So {{0}} - {{1}} = {{answer}}.",
    "compare": "I count {{0}} {one} and {{1}} {two}. So {{0}} > {{1}} is {{truth}}.",
    "choice": "I count {{0}} {0}, {{1}} {1}, {{2}} {2}. So the most common is {{name}}.",
    "pictures": "I count {{0}} in the first and {{1}} in the second. So {{0}} + {{1}} = {{answer}}.",
    "text": "The box holds {{0}} {one} and {{1}} {two}. So {{0}} + {{1}} = {{answer}}.",
}


def plain_puzzle(rng, family):
    """A puzzle of the toy task `toy`."""
    scenes = [draw_scene(rng) for _ in range(2 if family == "pictures" else 1)]
    (one, query), (two, other) = draw_queries(rng, 2)
    counts, names = [count_shapes(scenes[0], *query), count_shapes(scenes[0], *other)], []
    if family == "count":
        counts = counts[:1]
    elif family == "difference" and counts[0] < counts[1]:
        one, two, counts = two, one, counts[::-1]
    elif family == "choice":
        names = rng.sample(list(COLOURS), 3)
        counts = [count_shapes(scenes[0], name, None) for name in names]
        if counts.count(max(counts)) > 1:  # a tie: draw another image
            return plain_puzzle(rng, family)
    elif family == "pictures":
        counts = [count_shapes(scene, *query) for scene in scenes]
    elif family == "text":
        scenes, counts = [], [rng.randint(0, 9), rng.randint(0, 9)]
    question, thought = (text[family].format(*(names or counts), one=one, two=two) for text in (QUESTIONS, THOUGHTS))
    return Puzzle(family, "<image>" * len(scenes) + question, scenes, counts, thought, names)


LOOK = "[Okay|Well|Right], [I|we] [see|count|find] "  # filler words, which no image decides
FILL = ["", "", "It [seems|looks|is] [clear|fine|good]. "]
AGAIN = "[Then|Next|Again] "
SO = "[So|Thus] "
MAKES = " [makes|is] {answer}."
FAINT = {  # family: its question, about what is counted, and the end of its thought
    "list": ("How many {}, {} and {} are there? Give three digits.", "{0} and {1} and {2}."),
    "list of two": (
        "How many {} and {} are there in each of the two pictures? Give four digits.",
        "{0} and {1} and {2} and {3}.",
    ),
    "difference": ("How many more {} and {} together than {} are there?", "{0} and {1} less {2}" + MAKES),
    "compare": ("Are there more {} and {} together than {}?", "{0} and {1} over {2} is {truth}."),
    "text": ("A box holds {}, {} and {}. How many things does it hold?", "{0} and {1} and {2}" + MAKES),
}


def faint_puzzle(rng, family):
    """A puzzle of the toy task `toy-faint`: three counts, or four of two images.

    Most answers list all counts. In a sum two errors may cancel, and yes or no may be right by luck: then
    reinforcement learning does not need to teach perception.
    """
    of_two = family == "list of two"
    scenes = [draw_scene(rng, 0.65, 1.0) for _ in range(2 if of_two else 1)]
    queries = draw_queries(rng, 2 if of_two else 3)
    asked = [words for words, _ in queries]
    said = [words.removesuffix(" shapes") for words in asked]
    counts = [count_shapes(scene, *query) for scene in scenes for _, query in queries]
    if family == "text":
        scenes, counts = [], [rng.randint(0, 4) for _ in queries]
        asked = [f"{n} {words}" for n, words in zip(counts, asked)]
    negative = family == "difference" and counts[0] + counts[1] < counts[2]
    many_yes = family == "compare" and conclude(family, counts) == "yes" and rng.random() < 0.5
    if negative or many_yes or sum(counts) > 9:  # draw another one
        return faint_puzzle(rng, family)
    question, end = FAINT[family]
    first = f"{{0}} {said[0]} and {{1}} {said[1]}. "
    late = f"{{2}} {said[0]} and {{3}} {said[1]}. " if of_two else f"{{2}} {said[2]}. "
    thought = LOOK + first + rng.choice(FILL) + AGAIN + late + rng.choice(FILL) + SO + end
    return Puzzle(family, "<image>" * len(scenes) + question.format(*asked), scenes, counts, thought)


@dataclass
class ToyTask:
    """A built-in toy task: its families of puzzles, how a puzzle is drawn, and how many there are."""

    families: list
    puzzle: Callable  # of a random generator and a family
    paint: Callable  # an image, of a scene and a random generator
    words: bool  # responses write numbers in words
    train: int
    test: int = 504

    def puzzles(self, seed, count):
        """Yields so many puzzles, of all families in turn."""
        rng = random.Random(seed)
        for i in range(count):
            puzzle = self.puzzle(rng, self.families[i % len(self.families)])
            puzzle.images = [self.paint(scene, rng) for scene in puzzle.scenes]
            yield puzzle


TOY_TASKS = {
    "toy": ToyTask(
        ["count", "sum", "difference", "compare", "choice", "pictures", "text"], plain_puzzle, paint_plain, False, 2002
    ),
    "toy-faint": ToyTask(
        ["list", "difference", "list", "compare", "list", "list of two", "text"], faint_puzzle, paint_faint, True, 2401
    ),
}
