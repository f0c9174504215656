"""The subcommands of ``sb-bestrq``, one in each file.

Each file has a ``COMMAND``; ``cli.py`` lists them. A file imports nothing slow at its
top: what a subcommand needs is imported when it runs, so that ``--help`` is quick.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Command(NamedTuple):
    """One subcommand."""

    name: str
    """What is typed."""
    summary: str
    """One line, for the list of subcommands."""
    examples: str
    """Command lines for the end of the subcommand's help."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Declares the options."""
    run: Callable[[argparse.Namespace], int | None]
    """Does the work; returns the exit status, None for 0; raises InputError for what the user has to mend."""
    takes_overrides: bool = False
    """Whether options that it does not declare are keys of a YAML, handed on as a list of words, ``overrides``."""
