"""Which encoders are measured: those along pre-trainings, the same untrained, and filter banks."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechbrain_bestrq.artefact import CONFIG_FILE, WEIGHTS_FILE, encoders_at_steps
from speechbrain_bestrq.digests import file_digest
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.reproduction.stages import MOVED_ASIDE
from speechbrain_bestrq.reproduction.tables import METHOD_NAMES, PLAN_FILE
from speechbrain_bestrq.safe_reading import read_json
from speechbrain_bestrq.task_encoders import FILTERBANK


@dataclass(frozen=True)
class Source:
    """An encoder that is measured."""

    name: str
    """Of the source, as train.py's ``--encoder`` takes it."""
    run: str
    """The pre-training that it belongs to; "fbank" of filter banks."""
    audio_hours: float = 0.0
    device_hours: float = 0.0
    updates: int = 0
    seed: int | None = None
    """Of untrained weights."""

    @property
    def mark(self) -> str:
        """A digest of what its hidden states are a function of, folders' names aside."""
        folder = Path(self.name.removeprefix("random:"))
        files = () if self.name == FILTERBANK else (CONFIG_FILE, WEIGHTS_FILE)[: 2 if self.seed is None else 1]
        known = [self.seed, *(file_digest(folder / name) for name in files)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def find_sources(folders: list[Path], seeds: int) -> list[Source]:
    """Find the encoders along pre-trainings.

    Arguments
    ---------
    folders : list of Path
        Output folders of pre-trainings, or of reproductions, whose pre-trainings count.
    seeds : int
        How many untrained encoders of each pre-training's architecture, of other weights for each pre-training.

    Returns
    -------
    list of Source
        Filter banks; then of each pre-training the untrained encoders and those of its
        ``encoder@<step>`` and ``encoder``, each update once, in their order.

    Raises
    ------
    InputError
        If a folder holds no encoder.
    """
    runs: list[Path] = []
    for folder in folders:
        inner = folder / "pretraining"
        if not (folder / PLAN_FILE).is_file():
            runs.append(folder)
            continue
        if not inner.is_dir():
            raise InputError(f"{folder} is a reproduction that has not pre-trained anything yet: let it go on.")
        own: list[Path] = []
        for run in sorted(path for path in inner.iterdir() if path.is_dir() and MOVED_ASIDE not in path.name):
            # of each seed, or of one
            several = sorted(path for path in run.iterdir() if path.is_dir() and path.name.isdecimal())
            own += several or [run]
        # what has not come to an encoder yet does not keep the others from being looked at
        runs += [run for run in own if any(run.glob("encoder*"))] or own
    if twice := [run for run, count in Counter(run.absolute() for run in runs).items() if count > 1]:
        raise InputError(f"{twice[0]} is named twice: give each pre-training once.")
    names = _names(runs)
    found = [Source(FILTERBANK, FILTERBANK)]
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        by_update: dict[int, Source] = {}
        for path in [*encoders_at_steps(run).values(), run / "encoder"]:
            if (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file():
                facts = read_json(path / CONFIG_FILE).get("training") or {}
                one = _source(path, name, facts)
                by_update[one.updates] = one
        if not by_update:
            raise InputError(f"{run} holds no encoder yet: give the output folder of a pre-training, or wait for one.")
        last = by_update[max(by_update)].name
        found += [
            Source(f"random:{last}", name, seed=seed) for seed in range(number * seeds + 1, (number + 1) * seeds + 1)
        ]
        found += [by_update[updates] for updates in sorted(by_update)]
    return found


def _source(path: Path, run: str, facts: dict[str, Any]) -> Source:
    return Source(
        str(path),
        run,
        float(facts.get("audio_hours") or 0.0),
        float(facts.get("device_hours") or 0.0),
        int(facts.get("step") or 0),
    )


def _names(runs: list[Path]) -> list[str]:
    """Names of runs, all different: of the method if the folder is called after it, else of the folder.

    Seeds of one method are told apart by their numbers, and what is called alike by the folders it is in.
    """
    runs = [run.absolute() for run in runs]
    folders = [run.parent if run.name.isdecimal() else run for run in runs]
    above = dict.fromkeys(folders, 0)
    while True:
        labels = {folder: _label(folder, count) for folder, count in above.items()}
        alike = [one for one in above if list(labels.values()).count(labels[one]) > 1 and above[one] < len(one.parts)]
        if not alike:
            break
        for folder in alike:
            above[folder] += 1
    names = [
        labels[folder] + (f" {run.name}" if run != folder else "") for run, folder in zip(runs, folders, strict=True)
    ]
    # bestrq and BEST-RQ in one folder, say
    return [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]


def _label(folder: Path, above: int) -> str:
    """The name of a method with so many of the folders that it is in."""
    parents = folder.parts[:-1]
    return "/".join([*parents[max(len(parents) - above, 0) :], METHOD_NAMES.get(folder.name, folder.name)])
