"""The command ``sb-bestrq``: what one does around a training, beside the recipes' ``train.py``."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from speechbrain_bestrq import __version__
from speechbrain_bestrq.allocator import keep_freed_memory
from speechbrain_bestrq.commands import check_codebook, encode, export, prepare, report, reproduce, synthesize
from speechbrain_bestrq.errors import INTERRUPTED, USER_ERROR, InputError, explain_refusal

PROGRAM = "sb-bestrq"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for every other bad input; may keep what it does not know as ``overrides``."""

    takes_overrides = False

    def parse_known_args(self, args=None, namespace=None):
        namespace, others = super().parse_known_args(args, namespace)
        if self.takes_overrides:
            namespace.overrides, others = others, []
        return namespace, others

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


COMMANDS = (
    reproduce.DEMO,
    prepare.COMMAND,
    synthesize.COMMAND,
    check_codebook.COMMAND,
    reproduce.COMMAND,
    report.COMMAND,
    encode.COMMAND,
    export.COMMAND,
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all subcommands.

    Returns
    -------
    argparse.ArgumentParser
        Its result has the subcommand's name as ``subcommand``.

    Example
    -------
    >>> arguments = build_parser().parse_args(["report", "results/1000", "--json"])
    >>> arguments.subcommand, str(arguments.run_folders[0]), arguments.json
    ('report', 'results/1000', True)
    """
    # abbreviations would change their meaning when an option is added
    parser = _Parser(prog=PROGRAM, description="BEST-RQ pre-training with SpeechBrain.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"examples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.takes_overrides = command.takes_overrides
        command.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Results go to the standard output, the log and errors to the standard error.

    Arguments
    ---------
    argv : sequence of str, optional
        The words after the program's name; those of the command line if left out.

    Returns
    -------
    int
        Exit status: 0; 1 for a check that failed; 2 for what the user has to mend, said in one
        line; 130 if interrupted.

    Example
    -------
    >>> main(["report", "/nowhere"])
    2
    """
    if argv is None:  # the process is ours
        keep_freed_memory()
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    run = next(command.run for command in COMMANDS if command.name == arguments.subcommand)
    try:
        return run(arguments) or 0
    except InputError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if (refusal := explain_refusal(error)) is None:
            raise
        print(f"{PROGRAM}: error: {refusal}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
