"""``sb-bestrq synthesize``: make a corpus of synthetic speech."""

import argparse
import json

from speechbrain_bestrq.commands import Command


def _add_synthesize_arguments(parser: argparse.ArgumentParser) -> None:
    given = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "--layout",
        required=True,
        choices=("librispeech", "voxceleb", "iemocap", "slurp"),
        help="the corpus in whose layout it is to be",
    )
    parser.add_argument("--output_folder", required=True, metavar="FOLDER", help="where it goes: new or empty")
    parser.add_argument("--hours", type=float, help="to train on; held-out parts come on top (1.5)", **given)
    parser.add_argument("--speakers", type=int, metavar="COUNT", help="to train on (40; iemocap always 10)", **given)
    parser.add_argument("--seed", type=int, help="another one gives other speakers, texts and rooms (0)", **given)
    parser.add_argument("--workers", type=int, metavar="COUNT", help="threads (one for each core)", **given)
    parser.add_argument("--json", action="store_true", help="print what was made as one JSON object")


def _synthesize(arguments: argparse.Namespace) -> None:
    from speechbrain_bestrq.corpora.synthetic import make_synthetic

    options = {key: value for key, value in vars(arguments).items() if key not in ("subcommand", "json")}
    made = make_synthetic(**options)
    if arguments.json:
        print(json.dumps(made, indent=2))
    else:
        for name, value in made.items():
            print(f"{name}: {value}")


COMMAND = Command(
    "synthesize",
    "make a corpus of synthetic speech",
    """\
  sb-bestrq synthesize --layout librispeech --output_folder data/LibriSpeech
  sb-bestrq synthesize --layout voxceleb --output_folder data/VoxCeleb --hours 5 --speakers 200

Needs espeak-ng: pip install espeakng-loader. Called again, it goes on or finds it done.""",
    _add_synthesize_arguments,
    _synthesize,
)
