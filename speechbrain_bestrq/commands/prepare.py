"""``sb-bestrq prepare``: look through a corpus and write its manifests."""

import argparse
import json
from collections.abc import Sequence
from functools import partial

from speechbrain_bestrq.commands import Command
from speechbrain_bestrq.errors import InputError

# Options of some corpora only. An option that is not given is not handed on: its default stands in one place.
_ONLY_FOR = {
    "librispeech": ("train_splits", "valid_splits", "test_splits", "transcripts", "extra_folders"),
    "folder": ("extensions", "valid_share", "max_valid_hours", "seed", "extra_folders"),
    "voxceleb": ("trials", "valid_share", "valid_trials", "seed", "extra_folders"),
    "iemocap": ("classes", "folds", "kinds"),
    "slurp": ("microphones", "synthetic"),
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
        help="librispeech, voxceleb, iemocap, slurp: the official layouts; folder: any tree of audio files, without "
        "transcripts",
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
    parser.add_argument("--json", action="store_true", help="print the manifests' paths as one JSON object")
    several = parser.add_argument_group("only with some corpora")
    several.add_argument(
        "--extra_folders",
        nargs="+",
        metavar="FOLDER",
        help="librispeech, folder: further untranscribed audio to train on; voxceleb: further folders in its layout, "
        "such as VoxCeleb 2 (none)",
        **given,
    )
    several.add_argument(
        "--valid_share",
        type=float,
        metavar="SHARE",
        help="folder: share of the sub-folders for validation (0.02); voxceleb: of the speakers (0.05)",
        **given,
    )
    several.add_argument(
        "--seed", type=int, help="folder, voxceleb: another one draws another validation set (0)", **given
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
        "--max_valid_hours", type=float, metavar="HOURS", help="most hours for validation (1.0)", **given
    )
    voxceleb = parser.add_argument_group("only with --corpus voxceleb")
    voxceleb.add_argument(
        "--trials", nargs="+", metavar="LIST", help="trial lists: paths, or names in meta/ (veri_test.txt)", **given
    )
    voxceleb.add_argument("--valid_trials", type=int, metavar="COUNT", help="most validation trials (2000)", **given)
    iemocap = parser.add_argument_group("only with --corpus iemocap")
    iemocap.add_argument(
        "--classes",
        nargs="+",
        metavar="LABEL=CLASS",
        help="which labels become which classes (ang=ang exc=hap hap=hap neu=neu sad=sad)",
        **given,
    )
    iemocap.add_argument(
        "--folds", choices=("speaker", "session"), help="test on each speaker, or on each session (speaker)", **given
    )
    iemocap.add_argument(
        "--kinds", nargs="+", choices=("impro", "script"), help="kinds of dialogs (impro script)", **given
    )
    slurp = parser.add_argument_group("only with --corpus slurp")
    slurp.add_argument(
        "--microphones", nargs="+", choices=("headset", "distant"), help="recordings by (headset distant)", **given
    )
    slurp.add_argument("--synthetic", action="store_true", help="train on slurp_synth too (no)", **given)


def _prepare(arguments: argparse.Namespace) -> None:
    options = {key: value for key, value in vars(arguments).items() if key not in ("subcommand", "corpus", "json")}
    for name in options:
        owners = [corpus for corpus, names in _ONLY_FOR.items() if name in names]
        if owners and arguments.corpus not in owners:
            raise InputError(
                f"--{name} is for --corpus {' or '.join(owners)}: leave it out with --corpus {arguments.corpus}."
            )
    if "classes" in options:
        options["classes"] = _parse_classes(options["classes"])
    from speechbrain_bestrq import corpora

    prepare = {
        "librispeech": partial(corpora.prepare_librispeech, **_LIBRISPEECH_DEFAULTS),
        "folder": corpora.prepare_folder,
        "voxceleb": corpora.prepare_voxceleb,
        "iemocap": corpora.prepare_iemocap,
        "slurp": corpora.prepare_slurp,
    }
    manifests = prepare[arguments.corpus](**options)
    if arguments.json:
        print(json.dumps({name: str(path) for name, path in manifests.items()}, indent=2))
        return
    for name, path in manifests.items():
        print(f"{name}: {path}")


def _parse_classes(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if not all(pair.partition("=")):
            raise InputError(f"--classes: {pair!r} is not LABEL=CLASS, such as exc=hap.")
    return dict(pair.split("=", 1) for pair in pairs)


COMMAND = Command(
    "prepare",
    "look through a corpus and write its manifests",
    """\
  sb-bestrq prepare --corpus librispeech --data_folder /data/LibriSpeech --save_folder manifests
  sb-bestrq prepare --corpus librispeech --data_folder /data/LibriSpeech --save_folder manifests \\
      --train_splits train-clean-100 --valid_splits dev-clean dev-other --extra_folders /data/podcasts
  sb-bestrq prepare --corpus folder --data_folder /data/my_audio --save_folder manifests --max_unreadable 10
  sb-bestrq prepare --corpus voxceleb --data_folder /data/VoxCeleb1 --save_folder manifests --trials veri_test2.txt
  sb-bestrq prepare --corpus iemocap --data_folder /data/IEMOCAP_full_release --save_folder manifests --folds session
  sb-bestrq prepare --corpus slurp --data_folder /data/slurp --save_folder manifests --microphones headset

Called again with nothing changed, it does nothing. train.py prepares by itself, into manifests/
of its output folder, and leaves what was prepared there with the same options (of a folder, the seed too).""",
    _add_prepare_arguments,
    _prepare,
)
