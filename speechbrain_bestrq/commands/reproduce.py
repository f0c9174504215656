"""``sb-bestrq reproduce``: the paper in one command."""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from speechbrain_bestrq.commands import Command

if TYPE_CHECKING:
    from speechbrain_bestrq.reproduction.cost import Cost
    from speechbrain_bestrq.reproduction.stages import Stage

_CORPORA = ("librispeech", "voxceleb", "iemocap", "slurp")


def _add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    known = "demo, small, three_seeds, long_seeds, fine_tuned, paper, or a YAML file like them"
    parser.add_argument("--preset", required=True, help=known)
    parser.add_argument("--output_folder", type=Path, metavar="FOLDER", help="(reproduction/<preset>)")
    _add_arguments_of_a_run(parser)
    for corpus in _CORPORA:
        parser.add_argument(f"--{corpus}", type=Path, metavar="FOLDER", help="the corpus, as its recipe takes it")
    parser.add_argument(
        "--extra_folders",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="other audio to pre-train on as well",
    )
    parser.add_argument(
        "--pretrained",
        nargs="+",
        default=[],
        metavar="METHOD=RUN",
        help="done already, such as bestrq=results/bestrq/1000: in the place of the preset's pre-training",
    )
    parser.add_argument("--language_model", type=Path, metavar="FILE", help="of words, .arpa or .arpa.gz")
    parser.add_argument("--pretraining_devices", type=int, default=1, metavar="COUNT", help="under torchrun (1)")


def _add_arguments_of_a_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices",
        metavar="0,1,...",
        help="GPUs: so many stages at once, each on one; cpu,cpu: so many, which share the cores",
    )
    parser.add_argument("--json", action="store_true", help="print files and failures as one JSON object")
    parser.add_argument("--num_workers", type=int, metavar="COUNT", help="that load audio, of every run")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the stages, their commands and what they will cost, and train nothing",
    )


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_folder", type=Path, metavar="FOLDER", default=Path("demo"), help="(%(default)s)")
    _add_arguments_of_a_run(parser)


def _demo(arguments: argparse.Namespace) -> int:
    without = {**dict.fromkeys((*_CORPORA, "language_model")), "extra_folders": [], "pretrained": []}
    return _reproduce(argparse.Namespace(preset="demo", pretraining_devices=1, **without, **vars(arguments)))


def _reproduce(arguments: argparse.Namespace) -> int:
    from speechbrain_bestrq.corpora._options import absolute_path
    from speechbrain_bestrq.errors import InputError
    from speechbrain_bestrq.locking import sole_writer
    from speechbrain_bestrq.machine import check_gpus_usable
    from speechbrain_bestrq.reproduction.cost import cost_table, expected_seconds
    from speechbrain_bestrq.reproduction.plan import make_plan, read_preset
    from speechbrain_bestrq.reproduction.preflight import check_inputs
    from speechbrain_bestrq.reproduction.report import reproduction_text, write_reproduction
    from speechbrain_bestrq.reproduction.stages import LEFT_OUT, StageState, check_devices, parse_devices, run_stages
    from speechbrain_bestrq.reproduction.tables import write_plan

    preset = read_preset(arguments.preset)
    name = Path(arguments.preset).stem
    folder = (arguments.output_folder or Path("reproduction") / name).resolve()
    # links stay what they are: a corpus that moves keeps its name, and what was made of it counts
    given = {corpus: path for corpus in _CORPORA if (path := getattr(arguments, corpus)) is not None}
    corpora = {corpus: absolute_path(path) for corpus, path in given.items()}
    for corpus, path in corpora.items():
        if not path.is_dir():
            raise InputError(f"--{corpus} {path} is no folder: give that of the corpus.")
    for path in arguments.extra_folders:
        if not path.is_dir():
            raise InputError(f"--extra_folders {path} is no folder: give one with audio.")
    extra_folders = [absolute_path(path) for path in arguments.extra_folders]
    options = {} if arguments.num_workers is None else {"num_workers": arguments.num_workers}
    model = None if arguments.language_model is None else arguments.language_model.resolve()
    if model is not None and not model.is_file():
        raise InputError(f"--language_model {model} is no file: give an ARPA file.")
    stages = make_plan(
        preset, corpora, folder, model, arguments.pretraining_devices, options, extra_folders, arguments.pretrained
    )
    # what is only told of may be run on another machine
    if arguments.devices is None and not arguments.dry_run:
        check_gpus_usable("--devices cpu")  # each stage would refuse
    devices = parse_devices(arguments.devices, check=not arguments.dry_run)
    check_devices(stages, devices)
    state = StageState(stages, folder)
    state.check_begun()
    done = {stage.name for stage in stages if state.is_done(stage.name)}
    left = [stage for stage in stages if stage.name not in done]
    check_inputs(left, run_here=not arguments.dry_run)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if arguments.dry_run and arguments.json:
        raise InputError("--json is for what has been run: leave it out, or --dry_run.")
    if arguments.dry_run:
        for stage in stages:
            print(f"{stage.name}{' (done)' if stage.name in done else ''}\n    {shlex.join(stage.command)}")
        print(f"\n{cost_table(left, _estimate_apart(stages, done, devices, tell))}")
        print(f"{len(left)} of {len(stages)} stages to run in {folder}")
        return 0

    with sole_writer(folder, "--output_folder"):
        write_plan(
            folder,
            name,
            preset,
            sorted({*corpora, *preset.get("synthetic", ())}),
            shlex.join(["sb-bestrq", *sys.argv[1:]]),
            state.marks,
        )
        expected = {}
        if left:
            tell("trying how fast this machine is, to tell how long it will take")
            expected = expected_seconds(stages, _estimate_apart(stages, done, devices, tell))
        failed = run_stages(stages, folder, tell, devices, expected)
        files = write_reproduction(folder)
    if arguments.json:
        print(json.dumps({"files": {name: str(path) for name, path in files.items()}, "failed": failed}, indent=2))
    else:
        print(reproduction_text(folder, shutil.get_terminal_size((120, 40)).columns))
        print(f"Report: {files['html']}")
    broken = {name: why for name, why in failed.items() if not why.startswith(LEFT_OUT)}
    for why in broken.values():
        tell(f"not done: {why}")
    if failed:
        others = len(failed) - len(broken)
        also = f", and {others} that need {'it' if len(broken) == 1 else 'them'}" if others else ""
        tell(f"{len(broken)} of {len(stages)} stages failed{also}: mend what they say, and give the command again.")
    return 1 if failed else 0


def _estimate_apart(
    stages: "Sequence[Stage]", done: Collection[str], devices: Sequence[str | None], tell: Callable[[str], None]
) -> "dict[str, Cost]":
    """The costs, from a process that sees what a stage will see: this one will hold no GPU while the stages run."""
    from speechbrain_bestrq.reproduction.cost import estimate
    from speechbrain_bestrq.reproduction.stages import device_environment

    before = dict(os.environ)
    os.environ |= device_environment(devices[:1], len(devices))
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin_apart, (os.getpid(),)) as process:
            return process.submit(estimate, stages, done).result()
    except Exception as error:  # the stages themselves will say what is wrong, each for itself
        tell(f"what it will cost cannot be told: {' '.join(str(error).split())[:200]}")
        return {}
    finally:
        os.environ.clear()
        os.environ |= before


def _begin_apart(parent: int) -> None:
    """End with the parent, and print nothing: what went wrong is raised there."""
    from speechbrain_bestrq.reproduction.stages import end_with_parent

    end_with_parent(parent)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


DEMO = Command(
    "demo",
    "redo the paper in small, on synthetic speech",
    """\
  sb-bestrq demo
  sb-bestrq demo --dry_run

It is sb-bestrq reproduce --preset demo --output_folder demo: tables, curves and costs of the whole, in 15 to 25 minutes
on two cores, in demo/report.html. Called again, it goes on.""",
    _add_demo_arguments,
    _demo,
)

COMMAND = Command(
    "reproduce",
    "redo the paper and its tables",
    """\
  sb-bestrq reproduce --preset demo
  sb-bestrq reproduce --preset small --librispeech data/LibriSpeech --slurp data/SLURP
  sb-bestrq reproduce --preset paper --librispeech data/LibriSpeech --voxceleb data/VoxCeleb --iemocap data/IEMOCAP \\
      --slurp data/SLURP --language_model 4-gram.arpa.gz --devices 0,1,2,3

  sb-bestrq reproduce --preset paper --librispeech data/LibriSpeech --pretrained bestrq=results/bestrq_paper/1000 \\
      wav2vec2=results/wav2vec2_paper/1000

Tasks whose corpus is not given are left out. Called again, it goes on; what is done is not done again. The report is
FOLDER/report.html, and sb-bestrq report FOLDER writes it anew.""",
    _add_reproduce_arguments,
    _reproduce,
)
