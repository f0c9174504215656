"""``sb-bestrq report``: draw a run's curves and sum it up."""

import argparse
import json
from pathlib import Path

from speechbrain_bestrq.commands import Command


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", metavar="RUN", type=Path, help="output folder of a pre-training run, or of a reproduction"
    )
    parser.add_argument(
        "--publish", metavar="FOLDER", type=Path, help="of a reproduction: a copy without audio, weights and paths"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def _report(arguments: argparse.Namespace) -> None:
    from speechbrain_bestrq.errors import InputError
    from speechbrain_bestrq.report import summary_markdown, write_report
    from speechbrain_bestrq.reproduction.publishing import publish
    from speechbrain_bestrq.reproduction.report import write_reproduction
    from speechbrain_bestrq.reproduction.tables import PLAN_FILE

    if (arguments.run_folder / PLAN_FILE).is_file():
        if arguments.publish is not None:
            print(f"{len(publish(arguments.run_folder, arguments.publish))} files in {arguments.publish}")
            return
        files = {name: str(path) for name, path in write_reproduction(arguments.run_folder).items()}
        print(json.dumps(files, indent=2) if arguments.json else "\n".join(files.values()))
        return
    if arguments.publish is not None:
        raise InputError(f"{arguments.run_folder} is no reproduction: --publish is for those of sb-bestrq reproduce.")
    summary = write_report(arguments.run_folder)
    if arguments.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        print(summary_markdown(summary) + f"- curves: {summary['curves']}")


COMMAND = Command(
    "report",
    "draw a run's curves and sum it up",
    """\
  sb-bestrq report results/bestrq/1000
  sb-bestrq report results/bestrq/1000 --json > summary.json

Writes RUN/report/curves.png and RUN/report/summary.md, also while the run goes on; of a reproduction
RUN/report.md, RUN/report.html and the tables as CSV.""",
    _add_report_arguments,
    _report,
)
