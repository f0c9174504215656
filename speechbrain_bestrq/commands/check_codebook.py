"""``sb-bestrq check-codebook``: whether the labels are worth learning, before training."""

import argparse
import json

from speechbrain_bestrq.commands import Command


def _add_check_codebook_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hparams", metavar="HPARAMS", help="YAML of a BEST-RQ pre-training; stands first")
    parser.add_argument("--data_folder", metavar="FOLDER", help="the corpus, as train.py takes it")
    parser.add_argument("--manifest", metavar="FILE.csv", help="any manifest, in place of --data_folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="audio to look at, a random choice (10)")
    parser.add_argument(
        "--output_folder",
        metavar="FOLDER",
        default="codebook_check",
        help="where the plot and the manifests go (codebook_check)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _check_codebook(arguments: argparse.Namespace) -> int:
    from speechbrain_bestrq.codebook_check import check_codebook, check_text
    from speechbrain_bestrq.codebook_use import FAILED

    options = {key: value for key, value in vars(arguments).items() if key not in ("subcommand", "hparams", "json")}
    result = check_codebook(arguments.hparams, **options)
    print(json.dumps(result, indent=2, allow_nan=False) if arguments.json else check_text(result))
    return int(result["status"] == FAILED)


COMMAND = Command(
    "check-codebook",
    "see how evenly the labels use their codebook",
    """\
  sb-bestrq check-codebook hparams/bestrq.yaml --data_folder /data/LibriSpeech
  sb-bestrq check-codebook hparams/bestrq.yaml --data_folder /data/my_audio --corpus folder --whiten 32
  sb-bestrq check-codebook hparams/bestrq.yaml --manifest manifests/train.csv --minutes 30 --json

All other options are keys of the YAML, as train.py takes them. Silence is left out of what is
judged: frames 30 dB below the loud level of their utterance (its 95th percentile), or below
-80 dB of full scale. Exit status 1 if the perplexity of a codebook is under 1 % of its codes,
or one code labels over 20 % of the speech; a warning and status 0 if the perplexity is under
5 %; 2 for input that has to be mended, such as too little audio to judge.""",
    _add_check_codebook_arguments,
    _check_codebook,
    takes_overrides=True,
)
