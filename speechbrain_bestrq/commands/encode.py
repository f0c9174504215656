"""``sb-bestrq encode``: the hidden states of a folder of audio."""

import argparse
import json
from pathlib import Path

from speechbrain_bestrq.commands import Command


def _add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    given = {"default": argparse.SUPPRESS}
    sources = "encoder folder, output folder of a pre-training run, folder of transformers, or hub id"
    parser.add_argument("encoder", metavar="ENCODER", help=sources)
    parser.add_argument("audio_folder", metavar="AUDIO_FOLDER", help="any tree of audio files; only read")
    parser.add_argument("output_folder", metavar="OUTPUT_FOLDER", type=Path, help="where the same tree is made")
    parser.add_argument(
        "--layers", nargs="+", metavar="LAYER", help="numbers, 0 to the last or -1 for it, or all (-1)", **given
    )
    parser.add_argument(
        "--format", dest="file_format", choices=("npy", "safetensors"), help="of the files (npy)", **given
    )
    parser.add_argument(
        "--batch_seconds", type=float, metavar="SECONDS", help="audio in a batch, at least 60 (100)", **given
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:<number> (cpu)", **given)
    parser.add_argument(
        "--extensions", nargs="+", metavar="EXTENSION", help="files that are audio (wav flac ogg opus mp3)", **given
    )
    parser.add_argument(
        "--max_unreadable", type=int, metavar="COUNT", help="so many unreadable files are left out (0)", **given
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def _encode(arguments: argparse.Namespace) -> None:
    from speechbrain_bestrq.encode import encode_folder

    summary = encode_folder(
        **{key: value for key, value in vars(arguments).items() if key not in ("subcommand", "json")}
    )
    if arguments.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
        return
    print(
        f"{summary['output_folder']}: {summary['encoded']} files encoded ({summary['hours']:.2f} hours in "
        f"{summary['seconds']:.0f} s), {summary['skipped']} were there, {summary['unreadable']} unreadable"
    )


COMMAND = Command(
    "encode",
    "write the hidden states of a folder of audio",
    """\
  sb-bestrq encode results/bestrq/1000 /data/audio hidden_states
  sb-bestrq encode results/bestrq/1000/encoder /data/audio hidden_states --layers 0 6 -1 --format safetensors
  sb-bestrq encode results/bestrq/1000 /data/audio hidden_states --layers all --device cuda --batch_seconds 800

AUDIO_FOLDER/a/b.flac becomes OUTPUT_FOLDER/a/b.npy: float32, shape (layers, frames, d_model).
Layer 0 is the input of the encoder's first layer, -1 the last layer after the final norm. Audio
of any rate is resampled. Called again, it goes on with what is missing. Files over 60 s are
encoded in windows of 60 s, each frame with at least 5 s of context on both sides.""",
    _add_encode_arguments,
    _encode,
)
