"""Pre-trainings that were done elsewhere: a reproduction takes over their encoders and logs, and trains none anew."""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechbrain_bestrq.artefact import CONFIG_FILE, WEIGHTS_FILE, encoders_at_steps
from speechbrain_bestrq.digests import file_digest
from speechbrain_bestrq.errors import USER_ERROR, InputError
from speechbrain_bestrq.reproduction.stages import read_record
from speechbrain_bestrq.run_log import LOG_FILE, RUN_FILE, RunLog, read_run
from speechbrain_bestrq.safe_reading import read_json
from speechbrain_bestrq.writing import replacing, sync_tree, unfinished, write_text

#: The program of a stage that takes a run over.
PROGRAM = "speechbrain_bestrq.reproduction.elsewhere"


@dataclass(frozen=True)
class FinishedRun:
    """A pre-training that has been done."""

    folder: Path
    log: RunLog
    encoders: Mapping[int, Path]
    """Encoder folders by the updates that they have seen."""

    @property
    def model(self) -> str | None:
        """The model's class: "BestRQ"; None if the run does not tell."""
        return self.log.run.get("model")

    @property
    def seed(self) -> int | None:
        """Of the run."""
        return self.log.run.get("seed")

    def mark(self, updates: Sequence[int]) -> list[str]:
        """What the encoders of so many updates are recognised by, wherever they lie."""
        files = [(number, self.encoders[number] / name) for number in updates for name in (CONFIG_FILE, WEIGHTS_FILE)]
        return [f"{number} {path.name} {file_digest(path)}" for number, path in files]


def read_finished_run(folder: Path) -> FinishedRun:
    """Read what a pre-training has left.

    Arguments
    ---------
    folder : Path
        Its output folder.

    Returns
    -------
    FinishedRun
        With the encoders ``encoder@<step>``, and that of the best validation, ``encoder``, by its own step.

    Raises
    ------
    InputError
        If it is none of a pre-training, or has no encoder yet.
    """
    log, encoders = read_run(folder), _encoders_of(folder)
    if not encoders:
        raise InputError(f"{folder} has no encoder yet: let its pre-training go on.")
    return FinishedRun(folder, log, encoders)


def _encoders_of(folder: Path) -> dict[int, Path]:
    encoders = {}
    if _is_whole(folder / "encoder"):
        step = (read_json(folder / "encoder" / CONFIG_FILE).get("training") or {}).get("step")
        if isinstance(step, int):
            encoders[step] = folder / "encoder"
    return encoders | {step: path for step, path in encoders_at_steps(folder).items() if _is_whole(path)}


def _is_whole(encoder: Path) -> bool:
    return all((encoder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))


def _is_copy(folder: Path, run: Path) -> bool:
    """Whether a stage has taken a run over."""
    record = read_record(folder)
    return "made" in record and [PROGRAM, str(run)] == record.get("command", [])[2:4]


def assign_runs(
    words: Sequence[str],
    names: Mapping[str, tuple[str, int | None]],
    updates: Mapping[str, Sequence[int]],
    reproduction: Path,
) -> dict[str, FinishedRun]:
    """Tell which stages' place the runs of a command line take.

    Arguments
    ---------
    words : sequence of str
        "<method>=<folder>" each.
    names : mapping
        Of a preset's stages, method and seed (:func:`~speechbrain_bestrq.reproduction.plan.pretraining_names`); where
        the seed is None, a run of any takes the place.
    updates : mapping
        Of each method, after how many its encoders are compared.
    reproduction : Path
        Folder of the reproduction: what it has taken over of a run stays good when that run is gone.

    Returns
    -------
    dict
        By stage.

    Raises
    ------
    InputError
        If a run is of no use to the preset, or two take the same place.
    """
    found: dict[str, FinishedRun] = {}
    for word in words:
        method, equals, folder = word.partition("=")
        if not equals or method not in updates:
            known = " or ".join(f"{one}=RUN" for one in updates)
            raise InputError(f"--pretrained {word}: give {known}, with the output folder of a pre-training.")
        path = Path(folder).expanduser().absolute()
        copies = [name for name, (one, _) in names.items() if one == method and _is_copy(reproduction / name, path)]
        if copies and not path.exists():
            run = replace(read_finished_run(reproduction / copies[0]), folder=path)
        else:
            run = read_finished_run(path)
        places = [name for name, (one, seed) in names.items() if one == method and seed in (None, run.seed)]
        if not places:
            seeds = ", ".join(str(seed) for one, seed in names.values() if one == method)
            raise InputError(f"--pretrained {word}: it is of seed {run.seed}, and the preset has {seeds}.")
        if places[0] in found:
            raise InputError(f"--pretrained {word}: {found[places[0]].folder} is of that method and seed already.")
        if missing := set(updates[method]) - run.encoders.keys():
            has = ", ".join(map(str, sorted(run.encoders)))
            raise InputError(
                f"--pretrained {word}: it has no encoder of update {min(missing)} but of {has}: give another run, or a "
                "copy of the preset with other updates."
            )
        found[places[0]] = run
    return found


def check_model(name: str, run: FinishedRun, path: Path) -> None:
    """Refuse a run of another kind of model than a YAML makes.

    Arguments
    ---------
    name : str
        Of the method.
    run : FinishedRun
    path : Path
        The recipe's YAML.

    Raises
    ------
    InputError
        If it is one.
    """
    made = re.search(r"^model: !new:\S*?(\w+)\s*$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if made is not None and run.model not in (None, made[1]):
        raise InputError(f"--pretrained {name}={run.folder}: that is a {run.model}, and {name} is a {made[1]}.")


def command_of(run: FinishedRun, folder: Path, updates: Sequence[int]) -> tuple[str, ...]:
    """The command that takes a run's encoders over.

    Arguments
    ---------
    run : FinishedRun
    folder : Path
        Where to.
    updates : sequence of int
        Those of which there have to be encoders.

    Returns
    -------
    tuple of str
    """
    words = ("--output_folder", str(folder), "--updates", *map(str, updates))
    return (sys.executable, "-m", PROGRAM, str(run.folder), *words)


def encoder_of(command: Sequence[str]) -> Path | None:
    """The encoder of the most updates that a stage's command takes over; None of a stage that does something else.

    Example
    -------
    >>> encoder_of(["python", "train.py"])
    """
    if PROGRAM not in command:
        return None
    given = _parser().parse_args(command[command.index(PROGRAM) + 1 :])
    known = _encoders_of(given.run) | _encoders_of(given.output_folder)  # what was taken over outlives the run
    return known[max(given.updates)]


def take_over(run: FinishedRun, folder: Path, updates: Sequence[int]) -> None:
    """Copy encoders of a run, and its log up to the last of them: what came after, they have not cost.

    Arguments
    ---------
    run : FinishedRun
    folder : Path
        Where to: ``encoder@<step>`` each, whole or not at all, ``run.json`` and ``train_log.jsonl``.
    updates : sequence of int
        Those whose encoders are copied.

    Raises
    ------
    OSError
        If the disk does not take them.
    """
    with replacing(folder / RUN_FILE) as beside:
        shutil.copyfile(run.folder / RUN_FILE, beside)
    rows = sorted((*run.log.train, *run.log.valid), key=lambda row: row["step"])
    seen = [row for row in rows if row["step"] <= max(updates)] or rows[:1]
    write_text(folder / LOG_FILE, "".join(json.dumps(row) + "\n" for row in seen))
    if missing := [number for number in updates if number not in run.encoders]:
        raise InputError(f"{run.folder} has no encoder of update {missing[0]} any more: give the command again.")
    for number in updates:
        target = folder / f"encoder@{number}"
        beside = unfinished(target)
        for leftover in (beside, target):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(run.encoders[number], beside)
        sync_tree(beside)
        beside.rename(target)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description="Take over a pre-training's encoders.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--output_folder", type=Path, required=True)
    parser.add_argument("--updates", type=int, nargs="+", required=True)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Copy what a stage's command says; the exit status."""
    given: Any = _parser().parse_args(words)
    try:
        take_over(read_finished_run(given.run), given.output_folder, given.updates)
    except InputError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
