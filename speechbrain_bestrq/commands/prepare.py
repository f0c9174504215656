"""``sb-bestrq prepare``: look through a corpus and write its manifests."""

import argparse

from speechbrain_bestrq.commands import Command
from speechbrain_bestrq.errors import InputError

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
    from speechbrain_bestrq.corpora import prepare_folder, prepare_librispeech

    if arguments.corpus == "librispeech":
        manifests = prepare_librispeech(**{**_LIBRISPEECH_DEFAULTS, **options})
    else:
        manifests = prepare_folder(**options)
    for name, path in manifests.items():
        print(f"{name}: {path}")


COMMAND = Command(
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
)
