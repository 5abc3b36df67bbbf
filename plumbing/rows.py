"""Where rows come from: hub data sets, and local parquet, json and jsonl files or folders, read by `datasets`.

Not here: which columns matter and what a row becomes (data.py).
"""

import glob
import re
import zlib
from collections import defaultdict
from pathlib import Path

import datasets

from plumbing.arguments import EMBEDDED
from plumbing.commandline import UserError, cannot_open

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
SPLITS = {"test": "test", "eval": "test", "holdout": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def local_splits(name):
    """{split: files} of a local file or folder, {} where there is none: "test-00001.parquet" is of the split test.

    A file is one split, train; so are files of a folder whose names say nothing. What is hidden is no data.
    """
    path, splits = Path(name), defaultdict(list)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in KINDS)
    for file in files:
        below = file.relative_to(path)
        if not hidden(below):
            words = re.split(r"[\W\d_]+", str(below).lower())
            splits[next((SPLITS[word] for word in words if word in SPLITS), "train")].append(file)
    return dict(splits)


def local_files(name, split, option="--data"):
    """The files of a split of a local file or folder: of its only one, or of the one asked for, also as "val".

    [] where there is no such file or folder. `option` is the flag that a UserError, for another split, names.
    """
    if name in EMBEDDED:
        return [EMBEDDED[name] / f"{split}.parquet"]
    splits, wanted = local_splits(name), SPLITS.get(split, split)
    if len(splits) > 1 and wanted not in splits:
        raise UserError(
            f"{option} {name} has no split {split}; it has {', '.join(splits)}: name one with --data_split or "
            f"--eval_split of training, or give the file itself."
        )
    return splits.get(wanted) or next(iter(splits.values()), [])


def picture_folders(name, split):
    """Where relative paths of pictures begin: the files' own folder, if it is one, and then the one that was given."""
    folders = {file.parent for file in local_files(name, split)}
    given = Path(name) if Path(name).is_dir() else Path(name).parent
    return [*folders, given] if len(folders) == 1 else [given]


def refuse_output_among(output, *names):
    """Raises UserError where --output lies in a local folder of these data sets, whose files are all read as rows."""
    for name in names:
        if name and name not in EMBEDDED and Path(name).is_dir():
            inside, folder = Path(output).resolve(), Path(name).resolve()
            if inside.is_relative_to(folder) and not hidden(inside.relative_to(folder)):
                raise UserError(f"--output {output} lies in {name}, all of which is data: name another one.")


def hidden(path):
    return any(part.startswith(".") for part in path.parts)


def version(files):
    """Eight digits that are others as soon as one of the files is written anew, whatever its time says.

    They name the folder of the cache that rows are read into: by itself `datasets` goes by path and time alone.
    """
    facts = [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in (file.stat() for file in files)]
    return f"{zlib.crc32(repr(facts).encode()):08x}"


def load_rows(name, split, revision="main", option="--data"):
    """Rows of a hub data set (`id` or `id:config`), or of a local file or folder: its only split, or the one asked for.

    `option` is the flag that a UserError names.
    """
    files = local_files(name, split, option)
    try:
        if name not in EMBEDDED and not Path(name).exists():
            if Path(name).suffix in KINDS or name.startswith(("/", "./", "../", "~")):
                raise FileNotFoundError("there is no such file or folder")
            identifier, _, config = name.partition(":")
            return datasets.load_dataset(identifier, config or None, split=split, revision=revision)
        datasets.disable_progress_bars()  # of every file that it converts; downloads show theirs
        kinds = {KINDS.get(file.suffix) for file in files}
        if len(kinds) != 1 or None in kinds:
            raise UserError(f"{option} {name} must be a parquet, json or jsonl file, or a folder of files of one kind.")
        for file in files:
            with file.open("rb") as opened:
                begin = opened.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if KINDS[file.suffix] == "json" and begin not in b"{[":  # pyarrow dies of a file that says null
                raise UserError(f"{option} {file} must hold rows: one object a line, or a list of objects.")
        paths = [glob.escape(str(file)) for file in files]  # names, not patterns
        return datasets.load_dataset(kinds.pop(), name=version(files), data_files=paths, split="train")
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, StopIteration) or "no data" in str(error):
            raise UserError(f"{option} {name} has no rows: give a file with some.") from None
        raise UserError(cannot_open(option, name, error.__cause__ or error)) from None
