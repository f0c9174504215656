"""``sb-bestrq report``: draw a run's curves and sum it up; measure what its encoders are good for."""

import argparse
import json
from pathlib import Path

from speechbrain_bestrq.commands import Command

_CORPORA = ("librispeech", "voxceleb", "iemocap", "slurp")
_HOURS, _UNTRAINED = 0.5, 2


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folders",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="output folder of a pre-training run, or of a reproduction; with --evidence or --publish several",
    )
    parser.add_argument(
        "--publish",
        metavar="FOLDER",
        type=Path,
        help="of a reproduction, or of several by other seeds together: a copy without audio, weights and paths",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    evidence = parser.add_argument_group("what the hidden states are good for")
    evidence.add_argument("--evidence", action="store_true", help="probe the encoders along the pre-trainings")
    for corpus in _CORPORA:
        evidence.add_argument(f"--{corpus}", type=Path, metavar="FOLDER", help="the corpus, as its recipe takes it")
    evidence.add_argument(
        "--hours",
        type=float,
        help="of a training or test set, at most (0.5); few examples of intents are drawn of all",
    )
    evidence.add_argument("--untrained", type=int, metavar="COUNT", help="encoders without training (2)")
    evidence.add_argument("--output_folder", type=Path, metavar="FOLDER", help="(RUN/evidence, of the first)")


def _report(arguments: argparse.Namespace) -> None:
    from speechbrain_bestrq.errors import InputError
    from speechbrain_bestrq.report import summary_markdown, write_report
    from speechbrain_bestrq.reproduction.publishing import publish
    from speechbrain_bestrq.reproduction.report import write_reproduction
    from speechbrain_bestrq.reproduction.tables import PLAN_FILE

    if arguments.evidence:
        if arguments.publish is not None:
            raise InputError("--publish is for reproductions: give it without --evidence.")
        _evidence(arguments)
        return
    probing = (*_CORPORA, "hours", "untrained", "output_folder")
    if given := [option for option in probing if getattr(arguments, option) is not None]:
        raise InputError(f"--{given[0]} is for probing encoders: add --evidence, or leave it out.")
    if len(arguments.run_folders) > 1 and arguments.publish is None:
        raise InputError(
            "several folders are reported on one by one: give one, --evidence to compare encoders, or --publish to "
            "join reproductions of other seeds."
        )
    run_folder = arguments.run_folders[0]
    others = [folder for folder in arguments.run_folders if not (folder / PLAN_FILE).is_file()]
    if not others:
        if arguments.publish is not None:
            copied = [str(path) for path in publish(arguments.run_folders, arguments.publish)]
            print(json.dumps(copied, indent=2) if arguments.json else f"{len(copied)} files in {arguments.publish}")
            return
        files = {name: str(path) for name, path in write_reproduction(run_folder).items()}
        print(json.dumps(files, indent=2) if arguments.json else "\n".join(files.values()))
        return
    if arguments.publish is not None:
        raise InputError(f"{others[0]} is no reproduction: --publish is for those of sb-bestrq reproduce.")
    summary = write_report(run_folder)
    if arguments.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        print(summary_markdown(summary) + f"- curves: {summary['curves']}")


def _evidence(arguments: argparse.Namespace) -> None:
    import torch

    from speechbrain_bestrq.errors import InputError
    from speechbrain_bestrq.evidence.evidence import gather
    from speechbrain_bestrq.evidence.report import write_evidence
    from speechbrain_bestrq.evidence.sources import find_sources
    from speechbrain_bestrq.locking import sole_writer

    corpora = {corpus: path.resolve() for corpus in _CORPORA if (path := getattr(arguments, corpus)) is not None}
    if not corpora:
        raise InputError(f"there is nothing to probe on: give {', '.join(f'--{one}' for one in _CORPORA)}, or some.")
    for corpus, path in corpora.items():
        if not path.is_dir():
            raise InputError(f"--{corpus} {path} is no folder: give that of the corpus.")
    hours = _HOURS if arguments.hours is None else arguments.hours
    untrained = _UNTRAINED if arguments.untrained is None else arguments.untrained
    if not hours > 0 or untrained < 0:
        raise InputError(f"--hours is above 0 and --untrained not below, not {hours}, {untrained}.")
    sources = find_sources([path.resolve() for path in arguments.run_folders], untrained)
    folder = (arguments.output_folder or arguments.run_folders[0] / "evidence").resolve()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with sole_writer(folder, "--output_folder"):
        files = write_evidence(gather(sources, corpora, folder, hours, device), folder)
    if arguments.json:
        print(json.dumps({name: str(path) for name, path in files.items()}, indent=2))
    else:
        print(files["markdown"].read_text(encoding="utf-8"))
        print(f"Report: {files['markdown']}")


COMMAND = Command(
    "report",
    "draw a run's curves and sum it up; probe its encoders",
    """\
  sb-bestrq report results/bestrq/1000
  sb-bestrq report results/bestrq/1000 --json > summary.json
  sb-bestrq report --evidence results/bestrq/1000 results/wav2vec2/1000 --librispeech data/LibriSpeech
  sb-bestrq report reproduction/small --publish docs/results/small
  sb-bestrq report here/small there/small --publish docs/results/small_of_six_seeds

Writes RUN/report/curves.png and RUN/report/summary.md, also while the run goes on; of a reproduction
RUN/report.md, RUN/report.html and the tables as CSV. With --evidence, linear probes on each hidden state of each
encoder@<step> (encoder_at_steps of the YAML), of untrained encoders and of filter banks, in minutes, on a GPU where
there is one: RUN/evidence has tables, curves, CSV and JSON. What was measured is not measured again.""",
    _add_report_arguments,
    _report,
)
