"""Synthetic corpora: speech by espeak-ng in the layouts of four corpora, to start with where no data are."""

import json
import logging
import math
import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from speechbrain_bestrq.corpora._espeak import Espeak, find_library
from speechbrain_bestrq.corpora._layouts import LAYOUTS, Layout, Utterance, chance
from speechbrain_bestrq.corpora._options import absolute_path
from speechbrain_bestrq.corpora._rooms import SAMPLE_RATE, record
from speechbrain_bestrq.corpora._voices import make_request
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.locking import is_empty, sole_writer
from speechbrain_bestrq.machine import usable_cores
from speechbrain_bestrq.writing import replacing, write_text

logger = logging.getLogger(__name__)

# Raised when the same parameters give another corpus than before: then nothing old is taken for finished.
FORMAT = 1

_RECORD = "CORPUS.json"

# Identifiers count the utterances of a speaker, and have room for so many.
_MOST_HOURS_OF_A_SPEAKER = 10.0


def make_synthetic(
    output_folder: str | os.PathLike,
    layout: str = "librispeech",
    hours: float = 1.5,
    speakers: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> dict[str, Any]:
    """Make a corpus of synthetic speech, in the layout of a real one.

    The speech is espeak-ng's: a speaker is one of its voices with a rate, a pitch, a
    length of the vocal tract and a spectral tilt of its own; an emotion is a prosody;
    an intent is a template of sentences. The texts are made here. Each session has a
    room with an echo, a microphone and a noise.

    ============  =====================================================================
    layout        what is written
    ============  =====================================================================
    librispeech   ``train-clean-100``, ``dev-clean``, ``test-clean``, with transcripts
                  and ``SPEAKERS.TXT``
    voxceleb      ``wav/SPEAKER/VIDEO/``; trials of speakers of their own in
                  ``meta/veri_test.txt``
    iemocap       five sessions of a woman and a man, with labels and transcripts
    slurp         ``audio/slurp_real`` and ``dataset/slurp/{train,devel,test}.jsonl``
    ============  =====================================================================

    No speaker is in two parts, and ``CORPUS.json`` says what the recordings are. The
    files are the same, byte for byte, for any number of workers. Called again, it does
    nothing if the corpus is there, and goes on if it is unfinished.

    Arguments
    ---------
    output_folder : path
        Where the corpus goes: a new or empty folder, or one that this function wrote.
    layout : str
        ``librispeech``, ``voxceleb``, ``iemocap`` or ``slurp``.
    hours : float
        Length of the training part, within a tenth (``iemocap``: of all). Each
        held-out part has a tenth to a fifth of it on top. Every speaker says
        something, however short the time.
    speakers : int, optional
        Of the training part; the layout's usual number if left out.
    seed : int
        Another one gives other speakers, texts and rooms.
    workers : int, optional
        Threads, each with an espeak-ng of its own; one for each core if left out.

    Returns
    -------
    dict
        ``data_folder``, ``layout``, ``name`` (what the recordings are), ``utterances``,
        ``hours`` (as measured, all parts) and ``speakers`` (of all parts).

    Raises
    ------
    InputError
        If espeak-ng is not installed, an option is out of range, or the folder holds
        something else.

    Example
    -------
    >>> folder = getfixture("tmp_path") / "LibriSpeech"
    >>> made = make_synthetic(folder, "librispeech", hours=0.002, speakers=2)
    >>> made["layout"], made["speakers"]
    ('librispeech', 10)
    >>> sorted(path.name for path in folder.iterdir())
    ['CORPUS.json', 'SPEAKERS.TXT', 'dev-clean', 'test-clean', 'train-clean-100']
    """
    kind, count = _check_options(layout, hours, speakers, seed, workers)
    asked = {"layout": layout, "hours": float(hours), "speakers": count, "seed": seed, "format": FORMAT}
    folder = absolute_path(output_folder)
    try:
        return _make(folder, kind, count, asked, workers or usable_cores())
    except (OSError, soundfile.SoundFileError) as error:
        raise InputError(
            f"output_folder '{folder}' cannot be written to ({error}): mend that; the same command goes on from there."
        ) from error


def _make(folder: Path, kind: Layout, count: int, asked: dict[str, Any], workers: int) -> dict[str, Any]:
    layout, hours, seed = asked["layout"], asked["hours"], asked["seed"]
    with _owned(folder, asked) as finished:
        if finished is not None:
            logger.info("%s: synthetic speech is there already, %.2f h", folder, finished["hours"])
            return finished
        find_library()
        name = f"synthetic speech by espeak-ng in the layout of {kind.corpus}"
        _write_json(folder / _RECORD, {"name": name, "asked": asked})
        utterances = list(kind.plan(hours, count, seed))
        seconds = _make_audio(folder, utterances, seed, workers)
        for path, content in kind.texts(utterances, seconds):
            write_text(folder / path, content)
        made = {
            "data_folder": str(folder),
            "layout": layout,
            "name": name,
            "utterances": len(utterances),
            "hours": round(sum(seconds) / 3600.0, 4),
            "speakers": len({utterance.speaker for utterance in utterances}),
        }
        # last: it says that all is there
        _write_json(folder / _RECORD, {"name": name, "asked": asked, "made": made})
    logger.info("%s: %d utterances, %.2f h of synthetic speech", folder, made["utterances"], made["hours"])
    return made


def _check_options(
    layout: str, hours: float, speakers: int | None, seed: int, workers: int | None
) -> tuple[Layout, int]:
    """Refuse what is out of range; return the layout and the number of speakers."""
    if layout not in LAYOUTS:
        raise InputError(f"layout is one of {', '.join(LAYOUTS)}, not {layout!r}.")
    kind = LAYOUTS[layout]
    if not 0.0 < hours < math.inf:
        raise InputError(f"hours is the length of the training part, above 0, not {hours}.")
    if speakers is not None and not kind.any_speakers and speakers != kind.speakers:
        raise InputError(f"speakers: {kind.corpus} has {kind.speakers}, not {speakers}: leave it out.")
    if speakers is not None and speakers < 2:
        raise InputError(f"speakers is a count, at least 2, not {speakers}.")
    count = kind.speakers if speakers is None else speakers
    if hours / count > _MOST_HOURS_OF_A_SPEAKER:
        raise InputError(
            f"speakers: {count} would say {hours / count:.0f} hours each, and repeat themselves: give more, at least "
            f"{math.ceil(hours / _MOST_HOURS_OF_A_SPEAKER)}."
        )
    if seed < 0:
        raise InputError(f"seed is a whole number, at least 0, not {seed}.")
    if workers is not None and workers < 1:
        raise InputError(f"workers is a count of threads, at least 1, not {workers}: or leave it out.")
    return kind, count


@contextmanager
def _owned(folder: Path, asked: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Keep a folder for this call alone; yield what was made in it if it is finished, None if there is work to do."""
    with sole_writer(folder):
        yield _find_made(folder, asked)


def _find_made(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Read what was made in a folder; refuse a folder of something else."""
    path = folder / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        record = None
    if not isinstance(record, dict) or "asked" not in record:
        if not is_empty(folder):
            raise InputError(
                f"output_folder '{folder}' holds files that are not of a synthetic corpus: give a new or empty folder."
            )
        return None
    if record["asked"] != asked:
        other = [f"{key} {record['asked'].get(key)}" for key in asked if record["asked"].get(key) != asked[key]]
        raise InputError(
            f"output_folder '{folder}' holds a synthetic corpus of {', '.join(other)}: give another folder, or delete "
            "this one."
        )
    made = record.get("made")
    return {**made, "data_folder": str(folder)} if made else None


def _make_audio(folder: Path, utterances: Sequence[Utterance], seed: int, workers: int) -> list[float]:
    """Make the recordings that are not there yet; return the seconds of all."""
    # threads: the voices are processes of their own, and numpy and libsndfile run without the interpreter's lock
    with ExitStack() as stack:
        voices: queue.SimpleQueue[Espeak] = queue.SimpleQueue()
        for _ in range(min(workers, len(utterances))):
            voices.put(stack.enter_context(Espeak()))

        def make(utterance: Utterance) -> float:
            path = folder / utterance.path
            if path.is_file():
                return soundfile.info(path).duration
            voice = voices.get()
            try:
                return _make_recording(path, utterance, seed, voice)
            finally:
                voices.put(voice)

        pool = ThreadPoolExecutor(workers)
        try:
            done = pool.map(make, utterances)
            # disable=None: off when stderr is no terminal
            return list(tqdm(done, total=len(utterances), desc="synthetic speech", unit="utterance", disable=None))
        finally:
            # before the voices end, also when one utterance failed
            pool.shutdown(cancel_futures=True)


def _make_recording(path: Path, utterance: Utterance, seed: int, voice: Espeak) -> float:
    generator = chance(seed, "audio", utterance.path)
    request = make_request(utterance.text, utterance.speaker, utterance.delivery, int(generator.integers(2**31)))
    speech = voice.speak(request)
    samples = record(speech, utterance.speaker, utterance.delivery, utterance.room, generator)
    form = path.suffix[1:].upper()
    with replacing(path) as beside:
        soundfile.write(beside, samples, SAMPLE_RATE, "PCM_16", format=form)
    return len(samples) / SAMPLE_RATE


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
