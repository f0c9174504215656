"""The command ``sb-bestrq``: what one does around a training, beside the recipes' ``train.py``."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from . import __version__
from .errors import InputError

PROGRAM = "sb-bestrq"
USER_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for every other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


class Command(NamedTuple):
    """One subcommand. What it needs is imported when it runs, so that ``--help`` is quick."""

    name: str
    """What is typed."""
    summary: str
    """One line, for the list of subcommands."""
    examples: str
    """Command lines for the end of the subcommand's help."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Declares the options."""
    run: Callable[[argparse.Namespace], None]
    """Does the work; raises InputError for what the user has to mend."""


# Options of one corpus only. An option that is not given is not handed on: its default stands in one place.
_ONLY_FOR = {
    "librispeech": ("train_splits", "valid_splits", "test_splits", "transcripts"),
    "folder": ("extensions", "valid_share", "max_valid_hours", "seed"),
}
_LIBRISPEECH_DEFAULTS = {
    "train_splits": ["train-clean-100", "train-clean-360", "train-other-500"],
    "valid_splits": ["dev-clean"],
}


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    given = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "--corpus",
        required=True,
        choices=sorted(_ONLY_FOR),
        help="librispeech: the official layout; folder: any tree of audio files, without transcripts",
    )
    parser.add_argument("--data_folder", required=True, metavar="FOLDER", help="where the audio is; only read")
    parser.add_argument("--save_folder", required=True, metavar="FOLDER", help="where the CSV manifests go")
    parser.add_argument("--sample_rate", type=int, metavar="HZ", help="rate that training wants (16000)", **given)
    parser.add_argument(
        "--resample",
        action=argparse.BooleanOptionalAction,
        help="accept other rates, which are resampled when they are read (yes)",
        **given,
    )
    parser.add_argument(
        "--max_unreadable", type=int, metavar="COUNT", help="so many unreadable files are skipped (0)", **given
    )
    parser.add_argument("--workers", type=int, metavar="COUNT", help="threads (one for each core, at most 16)", **given)
    parser.add_argument(
        "--extra_folders", nargs="+", metavar="FOLDER", help="further untranscribed audio to train on (none)", **given
    )
    librispeech = parser.add_argument_group("only with --corpus librispeech")
    for name, default in (*_LIBRISPEECH_DEFAULTS.items(), ("test_splits", ["none"])):
        librispeech.add_argument(
            f"--{name}", nargs="+", metavar="SPLIT", help=f"names of splits ({' '.join(default)})", **given
        )
    librispeech.add_argument(
        "--transcripts", action="store_true", help="a chapter without transcripts is an error (no)", **given
    )
    folder = parser.add_argument_group("only with --corpus folder")
    folder.add_argument(
        "--extensions", nargs="+", metavar="EXTENSION", help="files that are audio (wav flac ogg opus mp3)", **given
    )
    folder.add_argument(
        "--valid_share", type=float, metavar="SHARE", help="share of the sub-folders for validation (0.02)", **given
    )
    folder.add_argument(
        "--max_valid_hours", type=float, metavar="HOURS", help="most hours for validation (1.0)", **given
    )
    folder.add_argument("--seed", type=int, help="another one draws another validation set (0)", **given)


def _prepare(arguments: argparse.Namespace) -> None:
    options = {key: value for key, value in vars(arguments).items() if key not in ("subcommand", "corpus")}
    for corpus, names in _ONLY_FOR.items():
        for name in names:
            if corpus != arguments.corpus and name in options:
                raise InputError(f"--{name} is for --corpus {corpus}: leave it out with --corpus {arguments.corpus}.")
    from .corpora import prepare_folder, prepare_librispeech

    if arguments.corpus == "librispeech":
        manifests = prepare_librispeech(**{**_LIBRISPEECH_DEFAULTS, **options})
    else:
        manifests = prepare_folder(**options)
    for name, path in manifests.items():
        print(f"{name}: {path}")


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of a pre-training run")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def _report(arguments: argparse.Namespace) -> None:
    from .report import summary_markdown, write_report

    summary = write_report(arguments.run_folder)
    if arguments.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        print(summary_markdown(summary) + f"- curves: {summary['curves']}")


COMMANDS = (
    Command(
        "prepare",
        "look through a corpus and write its manifests",
        """\
  sb-bestrq prepare --corpus librispeech --data_folder /data/LibriSpeech --save_folder manifests
  sb-bestrq prepare --corpus librispeech --data_folder /data/LibriSpeech --save_folder manifests \\
      --train_splits train-clean-100 --valid_splits dev-clean dev-other --extra_folders /data/podcasts
  sb-bestrq prepare --corpus folder --data_folder /data/my_audio --save_folder manifests --max_unreadable 10

Called again with nothing changed, it does nothing. train.py prepares by itself; doing it
before saves the time of the device.""",
        _add_prepare_arguments,
        _prepare,
    ),
    Command(
        "report",
        "draw a run's curves and sum it up",
        """\
  sb-bestrq report results/bestrq/1000
  sb-bestrq report results/bestrq/1000 --json > summary.json

Writes RUN/report/curves.png and RUN/report/summary.md, also while the run goes on.""",
        _add_report_arguments,
        _report,
    ),
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
    >>> arguments.subcommand, str(arguments.run_folder), arguments.json
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
        Exit status: 0; 2 for what the user has to mend, said in one line; 130 if interrupted.

    Example
    -------
    >>> main(["report", "/nowhere"])
    2
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    run = next(command.run for command in COMMANDS if command.name == arguments.subcommand)
    try:
        run(arguments)
    except InputError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
