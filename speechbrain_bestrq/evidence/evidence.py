"""Measure encoders along pre-trainings, and keep what was measured."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from speechbrain_bestrq.evidence.measures import CORPORA, SAMPLE_RATE, Corpus
from speechbrain_bestrq.evidence.sources import Source
from speechbrain_bestrq.machine import commit, device_name, package_versions
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.writing import write_text

logger = logging.getLogger(__name__)


def gather(
    sources: Sequence[Source], folders: Mapping[str, Path], output_folder: Path, hours: float, device: torch.device
) -> dict[str, Any]:
    """Measure what is not measured yet.

    Arguments
    ---------
    sources : sequence of Source
    folders : mapping
        Of "librispeech", "voxceleb", "iemocap", "slurp": those that are there.
    output_folder : Path
        Keeps manifests, the alignment, and a file for each source and corpus. A source whose
        weights changed is measured anew, and so is all on a corpus that changed.
    hours : float
        Of each corpus' sets, at most.
    device : torch.device

    Returns
    -------
    dict
        "corpora": their true names; "chances": of measures; "sources": of each its facts and
        "measures", a list of [valid, test] for each hidden state; "hours", "version" (of what measures
        mean) and "provenance".
    """
    corpora = {
        name: CORPORA[name](folder, output_folder / "data" / name, hours, device) for name, folder in folders.items()
    }
    records = []
    for number, source in enumerate(sources):
        measures: dict[str, list[list[float]]] = {}
        encoder = None
        for name, corpus in corpora.items():
            path = output_folder / "measured" / f"{source.mark[:24]}-{name}.json"
            mark = [corpus.version, source.mark, corpus.mark]
            known = _read(path, mark)
            if known is None:
                encoder = _load(source, device) if encoder is None else encoder
                logger.info("%d of %d: %s on %s", number + 1, len(sources), source.name, corpus.name)
                known = _measure(encoder, corpus, device)
                write_text(path, json.dumps({"mark": mark, "measures": known}) + "\n")
            measures |= known
        facts = {key: value for key, value in asdict(source).items() if key != "name"}  # a folder of this machine
        records.append({**facts, "measures": measures})
    return {
        "corpora": {name: corpus.name for name, corpus in corpora.items()},
        "chances": {key: value for corpus in corpora.values() for key, value in corpus.chances().items()},
        "hours": hours,
        "version": max(corpus.version for corpus in CORPORA.values()),
        "sources": records,
        "provenance": {"device": device_name(device), "commit": commit(), "versions": package_versions()},
    }


def _load(source: Source, device: torch.device) -> TaskEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0 if source.seed is None else source.seed)
        return TaskEncoder(source.name, sample_rate=SAMPLE_RATE).eval().to(device)


def _measure(encoder: TaskEncoder, corpus: Corpus, device: torch.device) -> dict[str, list[list[float]]]:
    started = time.monotonic()
    found = corpus.measure(encoder, device)
    logger.info("    %.0f s", time.monotonic() - started)
    return {name: [list(score) for score in scores] for name, scores in found.items()}


def _read(path: Path, mark: list[Any]) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record["measures"] if record.get("mark") == json.loads(json.dumps(mark)) else None
