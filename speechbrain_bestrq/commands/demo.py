"""``sb-bestrq demo``: the whole way on a laptop."""

import argparse
import json
from pathlib import Path

from speechbrain_bestrq.commands import Command


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    given = {"default": argparse.SUPPRESS}
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything goes (demo)")
    parser.add_argument("--hours", type=float, help="synthetic speech to train on (1.5)", **given)
    parser.add_argument("--updates", type=int, help="length of the pre-training (400)", **given)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def _demo(arguments: argparse.Namespace) -> None:
    from speechbrain_bestrq.demo import demo_text, run_demo

    options = {key: value for key, value in vars(arguments).items() if key in ("folder", "hours", "updates")}
    summary = run_demo(**options)
    print(json.dumps(summary, indent=2, allow_nan=False) if arguments.json else demo_text(summary))


COMMAND = Command(
    "demo",
    "make a corpus, pre-train on it, report",
    """\
  sb-bestrq demo
  sb-bestrq demo --folder /tmp/demo --hours 0.5 --updates 100

Ten minutes on two CPU cores; no data are needed. Called again, it goes on or says that it is done.""",
    _add_demo_arguments,
    _demo,
)
