"""The two embedded worlds: images, puzzles about them, and what a response to one says.

Images are grids of coloured shapes, one cell an image token. Puzzles ask for counts of what is in them. A response
reads the image first (counts: tokens that depend on it), and reasons about what it read next (tokens that do not):

    toy        bold colours on white, few words; every read is uncertain, and little else:
               <think>I count 2 red shapes and 3 blue circles. So 2 + 3 = 5.</think> \\boxed{5}
    toy-faint  the same scenes, faint on grainy grey, in words that vary; three or four reads, the last ones late:
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


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """A grid of `rows` x `columns` cells; `cells`: None, or (colour, shape, x, y, size, fill), row by row."""

    rows: int
    columns: int
    background: int
    cells: list

    @property
    def things(self):
        """(colour, shape) of all that is in it."""
        return [cell[:2] for cell in self.cells if cell]


def draw_scene(rng, sparse=0.4, dense=0.95):
    """A scene of random size and density: the share of cells that hold something."""
    rows, columns = rng.choice(GRIDS)
    background, density, cells = rng.randint(235, 255), rng.uniform(sparse, dense), []
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


BLOCK = 4  # pixels of equal colour in x and y: a faint image takes a kilobyte
HUES = {"red": (1.2, -0.8, -0.8), "green": (-0.9, 1.2, -0.8), "blue": (-0.8, -0.7, 1.3), "yellow": (1.0, 0.8, -1.2)}
CONTRAST = (12, 60)  # of a thing against its background, of 255
GRAIN = (1, 6)  # standard deviation of the blocks' own noise, of 255
LEAN = 0.35  # how far a colour may lean to another one


def paint_faint(scene, rng, easy=0.0):
    """The scene faint on a grey that changes from place to place, with grain; `easy`: more contrast, of 255."""
    noise = numpy.random.RandomState(rng.getrandbits(32))  # whose stream is frozen
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


# ---------------------------------------------------------------------------------------------------------------------
# Puzzles: a question about what is in the image, and a response that reads first and reasons next
# ---------------------------------------------------------------------------------------------------------------------


def description(rng):
    """What to count: its words, and the test that a (colour, shape) must pass."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    kind = rng.choice(["colour", "colour", "shape", "both"])
    if kind == "colour":
        return f"{colour} shapes", lambda thing: thing[0] == colour
    if kind == "shape":
        return f"{shape}s", lambda thing: thing[1] == shape
    return f"{colour} {shape}s", lambda thing: thing == (colour, shape)


def descriptions(rng, count):
    """So many different ones."""
    found = {}
    while len(found) < count:
        words, test = description(rng)
        found.setdefault(words, test)
    return list(found.items())


def conclude(family, numbers):
    """What a puzzle's answer is, given what was read: right counts or wrong ones.

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
    """A question, what is to be read off its images, and how a response to it goes."""

    family: str
    problem: str
    scenes: list
    counts: list  # the true numbers, in the order in which a response reads them
    thought: str  # {0}, {1} ...: numbers; {answer}, {truth}, {name}: what follows; [a|b|c]: one of these words
    names: list = field(default_factory=list)  # of what a choice is between
    images: list = field(default_factory=list)

    def response(self, numbers, rng, words):
        """A response that reads these numbers, right or wrong, and reasons on from there; in words, or in digits."""
        answer, say = conclude(self.family, numbers), in_words if words else str
        follows = {"truth": "true" if answer == "yes" else "false"}
        if "{answer}" in self.thought:
            follows["answer"] = say(int(answer))
        follows["name"] = self.names["ABC".index(answer)] if self.names else ""
        thought = re.sub(r"\[(.*?)\]", lambda slot: one_of(rng, slot[1].split("|")), self.thought)
        return f"<think>{thought.format(*map(say, numbers), **follows)}</think> \\boxed{{{answer}}}"


def in_words(number):
    return NUMBERS[number] if number >= 0 else f"minus {NUMBERS[-number]}"


def one_of(rng, words):
    """One of some words, each half as likely as the one before."""
    return rng.choices(words, [0.5**i for i in range(len(words))])[0]


def plain_puzzle(rng, family):
    """A puzzle of the toy, of any of its families."""
    scenes = [draw_scene(rng) for _ in range(2 if family == "pictures" else 1)]
    (one, is_one), (two, is_two) = descriptions(rng, 2)
    counts, names = [sum(map(is_one, scenes[0].things)), sum(map(is_two, scenes[0].things))], []
    if family == "difference" and counts[0] < counts[1]:
        one, two, counts = two, one, counts[::-1]
    seen = f"I count {{0}} {one} and {{1}} {two}. "

    if family == "count":
        problem, counts, thought = f"<image>How many {one} are there?", counts[:1], f"I count {{0}} {one}."
    elif family == "sum":
        problem = f"<image>How many {one} and {two} are there together, each kind counted by itself?"
        thought = seen + "So {0} + {1} = {answer}."
    elif family == "difference":
        problem, thought = f"<image>How many more {one} than {two} are there?", seen + "So {0} - {1} = {answer}."
    elif family == "compare":
        problem, thought = f"<image>Are there more {one} than {two}?", seen + "So {0} > {1} is {truth}."
    elif family == "choice":
        names = rng.sample(list(COLOURS), 3)
        counts = [sum(colour == name for colour, _ in scenes[0].things) for name in names]
        if sorted(counts)[-1] == sorted(counts)[-2]:  # a tie for the most common colour: draw another image
            return plain_puzzle(rng, family)
        problem = "<image>Which colour is the most common? (A) {} (B) {} (C) {}".format(*names)
        thought = "I count {{0}} {}, {{1}} {}, {{2}} {}. So the most common is {{name}}.".format(*names)
    elif family == "pictures":
        problem = f"<image><image>How many {one} are there in the two pictures together?"
        counts = [sum(map(is_one, scene.things)) for scene in scenes]
        thought = "I count {0} in the first and {1} in the second. So {0} + {1} = {answer}."
    else:
        scenes, counts = [], [rng.randint(0, 9), rng.randint(0, 9)]
        problem = f"A box holds {counts[0]} {one} and {counts[1]} {two}. How many things does it hold?"
        thought = f"The box holds {{0}} {one} and {{1}} {two}. So {{0}} + {{1}} = {{answer}}."
    return Puzzle(family, problem, scenes, counts, thought, names)


LOOK = "[Okay|Well|Right], [I|we] [see|count|find] "  # slots of words that no image decides
FILL = ["", "", "It [seems|looks|is] [clear|fine|good]. "]
AGAIN, SO, MAKES = "[Then|Next|Again] ", "[So|Thus] ", " [makes|is] "


def faint_puzzle(rng, family):
    """A puzzle of the toy-faint, of any of its families: three reads, four of two images.

    Most answers list what was read: where an error may be made up for by another one, as in a sum, or by luck, as
    between yes and no, reinforcement learning need not teach to see.
    """
    of_two = family == "list of two"
    scenes = [draw_scene(rng, 0.65, 1.0) for _ in range(2 if of_two else 1)]
    kinds = descriptions(rng, 2 if of_two else 3)
    asked, said = [words for words, _ in kinds], [words.removesuffix(" shapes") for words, _ in kinds]
    counts = [sum(map(test, scene.things)) for scene in scenes for _, test in kinds]
    late, end = f"{{2}} {said[-1]}. ", "{0} and {1} and {2}."

    if family == "list":
        problem = "<image>How many {}, {} and {} are there? Give three digits."
    elif of_two:
        problem = "<image><image>How many {} and {} are there in each of the two pictures? Give four digits."
        late, end = f"{{2}} {said[0]} and {{3}} {said[1]}. ", "{0} and {1} and {2} and {3}."
    elif family == "difference":
        problem = "<image>How many more {} and {} together than {} are there?"
        end = "{0} and {1} less {2}" + MAKES + "{answer}."
    elif family == "compare":
        problem, end = "<image>Are there more {} and {} together than {}?", "{0} and {1} over {2} is {truth}."
    else:
        scenes, counts = [], [rng.randint(0, 4) for _ in kinds]
        asked = [f"{n} {words}" for n, words in zip(counts, asked)]
        problem = "A box holds {}, {} and {}. How many things does it hold?"
        end = "{0} and {1} and {2}" + MAKES + "{answer}."
    negative = family == "difference" and counts[0] + counts[1] < counts[2]
    many_yes = family == "compare" and conclude(family, counts) == "yes" and rng.random() < 0.5
    if negative or many_yes or sum(counts) > 9:  # draw another one
        return faint_puzzle(rng, family)
    first = f"{{0}} {said[0]} and {{1}} {said[1]}. "
    thought = LOOK + first + rng.choice(FILL) + AGAIN + late + rng.choice(FILL) + SO + end
    return Puzzle(family, problem.format(*asked), scenes, counts, thought)


@dataclass
class World:
    """One of the embedded worlds: its families of puzzles, how one is drawn, and how many there are."""

    families: list
    puzzle: Callable  # of a random generator and a family
    paint: Callable  # an image, of a scene and a random generator
    words: bool  # responses say numbers in words
    train: int
    test: int = 504

    def puzzles(self, seed, count):
        """So many puzzles of all families in turn, from a seed of any kind."""
        rng = random.Random(seed)
        for i in range(count):
            made = self.puzzle(rng, self.families[i % len(self.families)])
            made.images = [self.paint(scene, rng) for scene in made.scenes]
            yield made


WORLDS = {
    "toy": World(
        ["count", "sum", "difference", "compare", "choice", "pictures", "text"], plain_puzzle, paint_plain, False, 2002
    ),
    "toy-faint": World(
        ["list", "difference", "list", "compare", "list", "list of two", "text"], faint_puzzle, paint_faint, True, 2401
    ),
}
