"""``sb-bestrq export``: encoders from other toolkits' formats, and to them."""

import argparse
import json
from pathlib import Path

from speechbrain_bestrq.commands import Command


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="origin", choices=("speechbrain",), help="SOURCE is a checkpoint of this")
    direction.add_argument("--to", dest="target", choices=("speechbrain",), help="OUT is for this")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="--from: a CKPT+... folder, or the newest in a run's folder; --to: an encoder folder, or a run's folder",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make, new or empty")
    parser.add_argument("--hparams", type=Path, help="--from: the run's hyperparams.yaml, if it is not in its folder")
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON object")


def _export(arguments: argparse.Namespace) -> None:
    from speechbrain_bestrq.errors import InputError
    from speechbrain_bestrq.export import from_speechbrain, to_speechbrain

    if arguments.target:
        if arguments.hparams:
            raise InputError("--hparams belongs to --from: leave it out.")
        done = to_speechbrain(arguments.source, arguments.out)
    else:
        done = from_speechbrain(arguments.source, arguments.out, arguments.hparams)
    if arguments.json:
        print(json.dumps(done, indent=2, allow_nan=False))
    else:
        for key, value in done.items():
            if key != "config":
                print(f"{key}: {value}")


COMMAND = Command(
    "export",
    "convert encoders from and to SpeechBrain",
    """\
  sb-bestrq export --from speechbrain results/best_rq/1000/save/CKPT+2024-05-01+12-00-00+00 my_encoder
  sb-bestrq export --from speechbrain results/best_rq/1000 my_encoder --hparams hparams/BEST-RQ.yaml
  sb-bestrq export --to speechbrain results/bestrq/1000 for_speechbrain

--from: a checkpoint of SpeechBrain's own BEST-RQ recipe becomes an encoder folder, with equal outputs.
--to: an encoder becomes a folder for speechbrain.inference.encoders.WaveformEncoder.from_hparams.""",
    _add_export_arguments,
    _export,
)
