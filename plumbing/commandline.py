"""The command line: how a flag is declared, checked and listed by --help, and the one sentence that a mistake gets.

Not here: the flags themselves (arguments.py and a method's file).
"""

import argparse
import dataclasses
import math
import re
import sys
from dataclasses import field
from pathlib import Path

from tqdm.auto import tqdm
from transformers import HfArgumentParser


class UserError(SystemExit):
    """A mistake of the user's: one sentence that says what to do, exit code 2, no traceback."""

    def __init__(self, sentence):
        super().__init__(2)
        self.args = (sentence,)
        tqdm.write(f"error: {sentence}", file=sys.stderr)  # not behind a bar
        sys.stderr.flush()


def cannot_open(option, name, error):
    """The sentence for a model or data that is not there, from the first line of the library's error."""
    first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"{option} {name} cannot be opened ({first}): give a hub id that exists and can be reached from here, "
        f"or the path of a local folder."
    )


def cannot_write(path, error):
    """The sentence for a file or folder that cannot be written, and what to do about it."""
    full = re.search(r"No space left|quota exceeded|File too large|os error (28|122|27)\b", str(error))
    return f"{path} could not be written ({error}): {'make room on the disk' if full else 'see that it may be written'}"


def flag(default, help, above=None, least=None, most=None, below=None, may_change=False, **options):
    """A flag of the command line.

    A number must lie above `above` or be at least `least`, and so on. A flag that `may_change` may differ when a run is
    resumed: it changes no result, or is there to be changed.
    """
    limits = {"above": above, "least": least, "most": most, "below": below}
    metadata = {"help": help, "limits": limits, "may_change": may_change, "options": options}
    return field(default=default, metadata=metadata)


def check_numbers(args):
    """Raises UserError for a number that is not finite, or outside of what its flag allows."""
    for f in dataclasses.fields(args):
        value, limits = getattr(args, f.name), f.metadata.get("limits", {})
        if not isinstance(value, int | float):
            continue
        names = {"above": "above", "least": "at least", "most": "at most", "below": "below"}
        said = " and ".join(f"{text} {limits[name]:,}" for name, text in names.items() if limits.get(name) is not None)
        low, high = limits.get("least"), limits.get("most")
        if low is not None and high is not None:
            said = f"between {low:,} and {high:,}"
        inside = (
            -math.inf < value < math.inf
            and (limits.get("above") is None or value > limits["above"])
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (limits.get("below") is None or value < limits["below"])
        )
        if not inside:
            raise UserError(f"--{f.name} {value} must be {said or 'a finite number'}.")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A flag by one name, with its choices; its default, unless that depends on the model: then the help says it."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        names = [name for name in action.option_strings if "-" not in name[2:]] or [action.metavar or action.dest]
        return " ".join([*names, "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""]).strip()


class Parser(HfArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists what there is.")


def parse_args(cls, argv=None):
    """`cls` filled from the command line; `--help` shows one group for each dataclass that `cls` inherits from."""
    groups, seen = [], set()
    for base in cls.__mro__[:-1]:  # a method may give a shared flag another default: its own class comes first
        own = [f for f in dataclasses.fields(cls) if f.name in base.__dict__.get("__annotations__", {})]
        own = [f for f in own if not (f.name in seen or seen.add(f.name))]
        title = Path(sys.argv[0]).stem if base is cls else base.__doc__
        told = [{"help": f.metadata["help"], **f.metadata["options"]} for f in own]  # what argparse knows of
        spec = [(f.name, f.type, field(default=f.default, metadata=metadata)) for f, metadata in zip(own, told)]
        if spec:
            groups.append(dataclasses.make_dataclass(base.__name__, spec, namespace={"_argument_group_name": title}))
    usage = "%(prog)s [flags]"
    parser = Parser(groups, allow_abbrev=False, formatter_class=Help, usage=usage)
    return cls(**vars(parser.parse_args(argv)))
