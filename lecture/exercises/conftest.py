"""For pytest: exercises.py holds the answers, not tests; `--doctest-modules` must not import it a second time."""

collect_ignore = ["exercises.py"]
