"""Hidden states of a frozen encoder, computed once and kept on disk."""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechbrain.utils.distributed import ddp_broadcast, run_on_main
from torch import Tensor

from speechbrain_bestrq.allocator import give_back_freed_memory
from speechbrain_bestrq.audio import stat_audio
from speechbrain_bestrq.digests import text_digest
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.locking import next_writer
from speechbrain_bestrq.task_data import Rows, encode_rows
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.writing import replacing, write_text

logger = logging.getLogger(__name__)

_INDEX = "index.json"
#: Names of files of hidden states, whole or not.
_STATES = re.compile(r"states-[0-9a-f]{16}\.f32(\.writing)?")
_BYTES = 4  # of a float32


class FeatureCache:
    """The hidden states of utterances, in one memory-mapped file; :func:`cache_features` makes it.

    The file stays as it was when it was opened, also when another run on this machine makes the cache of other weights
    or audio in the same folder. On another machine a network file system may take it away: give each encoder a folder.

    Arguments
    ---------
    folder : str or Path
        Holds ``index.json`` and the file that it names.
    index : mapping, optional
        The content of ``index.json``, where it was read already.
    """

    def __init__(self, folder: str | os.PathLike, index: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        if index is None:
            index = _read_index(self.folder)
        self.file: str = index["file"]
        self.seconds: float = index["seconds"]
        """What computing the states took, by whichever run did."""
        self._places: dict[str, list[int]] = index["places"]
        shape = (index["frames"], index["states"], index["channels"])
        self._values = np.memmap(self.folder / index["file"], np.float32, "r", shape=shape)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        """Give the hidden states of an utterance: float32, shape (T, S, D)."""
        start, frames = self._places[name]
        return torch.from_numpy(np.array(self._values[start : start + frames]))


def cache_features(
    folder: str | os.PathLike,
    encoder: TaskEncoder,
    rows: Rows,
    sample_rate: int = 16000,
    max_batch_seconds: float = 60.0,
    device: torch.device | str = "cpu",
) -> FeatureCache:
    """Compute the hidden states of all utterances in float32, unless they are there already.

    A cache that was made by another encoder or lacks some of the audio is made again; one that was
    interrupted too. Runs that share the folder wait for each other. To be called on the main process only.

    Arguments
    ---------
    folder : str or Path
        Of the cache.
    encoder : TaskEncoder
        A frozen one.
    rows : mapping
        Of all manifests together.
    sample_rate : int
        Samples per second that the encoder takes.
    max_batch_seconds : float
        Most audio in a batch, padding included.
    device : torch.device or str
        Where to compute.

    Returns
    -------
    FeatureCache

    Raises
    ------
    InputError
        If the encoder is to be trained, the folder is used for something else, or the disk is too full or fails.
    """
    if not encoder.freeze:
        raise InputError("cache_features: True is for a frozen encoder: leave it out when the encoder is trained.")
    folder = Path(folder)
    identity, audio = _identify(encoder, sample_rate), _audio(rows)
    cache = _find(folder, identity, audio)  # one that is made is only read: it may be another user's
    if cache is None:
        with next_writer(folder):
            cache = _find(folder, identity, audio)
            if cache is None:
                _check_own(folder / _INDEX)
                content = json.dumps([identity, audio], sort_keys=True)
                name = f"states-{hashlib.sha256(content.encode()).hexdigest()[:16]}.f32"
                started = time.perf_counter()
                index = _compute(folder / name, encoder, rows, sample_rate, max_batch_seconds, torch.device(device))
                give_back_freed_memory()  # an encoder takes much more of it than the head that is trained now
                index |= {"identity": identity, "audio": audio, "file": name, "seconds": time.perf_counter() - started}
                write_text(folder / _INDEX, json.dumps(index))
                for other in folder.iterdir():
                    if (
                        _STATES.fullmatch(other.name) and other.name != name
                    ):  # also what a killed run left; whoever reads one goes on reading it
                        other.unlink(missing_ok=True)
                return FeatureCache(folder)
    logger.info("The hidden states of %d utterances are in %s already.", len(rows), folder)
    return cache


def _compute(
    path: Path, encoder: TaskEncoder, rows: Rows, sample_rate: int, max_batch_seconds: float, device: torch.device
) -> dict[str, Any]:
    """Write the hidden states of utterances one after another; give what one must know to find them."""
    folder = path.parent
    seconds = {name: float(row["duration"]) for name, row in rows.items()}
    frames = {name: encoder.num_frames(round(length * sample_rate)) for name, length in seconds.items()}
    size = sum(frames.values()) * encoder.num_states * encoder.output_dim * _BYTES
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"cache_features: True needs {size / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free: make "
            "room, or leave it out."
        )
    logger.info(
        "Computing the hidden states of %d utterances, %.2f hours: %.2f GB in %s.",
        len(rows),
        sum(seconds.values()) / 3600,
        size / 1e9,
        folder,
    )
    places: dict[str, list[int]] = {}
    training = encoder.training
    encoder.eval().to(device)
    position = 0
    try:
        with replacing(path) as beside, open(beside, "wb") as file, torch.no_grad():
            for names, hidden, lengths in encode_rows(encoder, rows, sample_rate, max_batch_seconds, device):
                for name, states, length in zip(names, hidden.permute(1, 2, 0, 3), lengths.tolist(), strict=True):
                    states[:length].cpu().contiguous().numpy().tofile(file)
                    places[name] = [position, length]
                    position += length
    except OSError as error:
        raise InputError(
            f"cache_features: True: {path} cannot be written ({error.strerror or error}): make room, or leave it out."
        ) from error
    encoder.train(training)
    return {"places": places, "frames": position, "states": encoder.num_states, "channels": encoder.output_dim}


def open_cache(
    hparams: Mapping[str, Any], sets: Mapping[str, Rows], device: torch.device | str | None = None
) -> FeatureCache | None:
    """Make or find the cache of a recipe, if it asks for one: a collective of all ranks.

    Arguments
    ---------
    hparams : mapping
        With "cache_features", "cache_folder", "speech_encoder", "sample_rate",
        "max_eval_batch_seconds".
    sets : mapping
        The rows of each set.
    device : torch.device or str, optional
        Where the main process computes; the GPU, if there is one, when left out.

    Returns
    -------
    FeatureCache or None

    Raises
    ------
    InputError
        As :func:`cache_features`; or if the waveforms are augmented in training, two sets have other audio under
        one name, or another run has put its own into the folder meanwhile.
    """
    if not hparams.get("cache_features"):
        return None
    for name in ("speed_perturb", "drop_freq", "drop_chunk"):
        if name in hparams:
            raise InputError(f"cache_features: True hears each utterance once: leave it out, or {name}.")
    together = _together(sets)
    settings = [hparams["cache_folder"], hparams["speech_encoder"], together, hparams["sample_rate"]]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made: list[FeatureCache] = []  # kept here: what runs on the main process is sent to the others
    run_on_main(lambda: made.append(cache_features(*settings, hparams["max_eval_batch_seconds"], device)))
    file = ddp_broadcast(made[0].file if made else None, src=0)
    cache = made[0] if made else FeatureCache(hparams["cache_folder"])
    if cache.file != file:
        raise InputError(
            f"cache_folder '{hparams['cache_folder']}' was given to a run with another encoder or other audio at the "
            "same time: give each its own."
        )
    return cache


def _together(sets: Mapping[str, Rows]) -> Rows:
    """The utterances of all sets; an utterance may be in several."""
    together: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for own, rows in sets.items():
        for name, row in rows.items():
            known = together.setdefault(name, row)
            if (str(known["wav"]), float(known["duration"])) != (str(row["wav"]), float(row["duration"])):
                raise InputError(
                    f"'{owners[name]}' and '{own}' have different audio under one name, {name}, and a cache of hidden "
                    "states goes by the name: give --cache_features False."
                )
            owners.setdefault(name, own)
    return together


def _identify(encoder: TaskEncoder, sample_rate: int) -> dict[str, Any]:
    """What the cached values are a function of, besides the audio."""
    settings = text_digest(f"{encoder!r} {encoder.options}")
    return {**encoder.identity(), "settings": settings, "sample_rate": sample_rate}


def _audio(rows: Rows) -> dict[str, list[Any]]:
    """Which audio each utterance is, as far as it can be told without reading it."""
    audio = {}
    for name, row in rows.items():
        file = stat_audio(row["wav"])
        audio[name] = [str(row["wav"]), float(row["duration"]), file.st_size, file.st_mtime_ns]
    return audio


def _find(folder: Path, identity: dict[str, Any], audio: dict[str, list[Any]]) -> FeatureCache | None:
    """A cache that is whole, of this encoder, and has at least this audio."""
    try:
        index = _read_index(folder)
        whole = index["frames"] * index["states"] * index["channels"] * _BYTES
        there = index["audio"]
        same = index["identity"] == identity and all(there.get(name) == one for name, one in audio.items())
        if same and (folder / index["file"]).stat().st_size == whole:
            return FeatureCache(folder, index)
    except (OSError, ValueError, KeyError, TypeError):  # there is none
        pass
    return None


def _check_own(path: Path) -> None:
    """Refuse to write over an index that is not of hidden states."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        index = None
    if not (isinstance(index, dict) and index.keys() >= {"identity", "file"}):
        raise InputError(
            f"cache_folder '{path.parent}': its {path.name} is not that of hidden states: give another folder, or move "
            "that file away."
        )


def _read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _INDEX).read_text(encoding="utf-8"))
