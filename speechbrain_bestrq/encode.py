"""Hidden states of a whole folder of audio, one file for each.

Memory is bounded by a batch, however long the files are: :mod:`speechbrain_bestrq.windows`
cuts long ones, and :mod:`speechbrain_bestrq.hidden_states` writes what is encoded at once.
"""

import datetime
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from speechbrain_bestrq.allocator import give_back_now_and_then
from speechbrain_bestrq.artefact import WEIGHTS_FILE, encoder_config, load_encoder
from speechbrain_bestrq.audio import AudioTable, read_segment
from speechbrain_bestrq.corpora._audio_files import AudioTree, probe_files
from speechbrain_bestrq.corpora._options import (
    AUDIO_EXTENSIONS,
    absolute_path,
    make_save_folder,
    normalize_extensions,
    resolve_folder,
)
from speechbrain_bestrq.digests import file_digest
from speechbrain_bestrq.encoded_audio import EncodedAudio
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.hidden_states import FORMATS, HiddenStatesFile, file_header, is_whole
from speechbrain_bestrq.locking import is_empty, sole_writer
from speechbrain_bestrq.machine import usable_cores
from speechbrain_bestrq.sources import find_encoder
from speechbrain_bestrq.windows import WINDOW_SECONDS, Window, plan_batches, plan_windows, samples_per_frame
from speechbrain_bestrq.writing import write_text

logger = logging.getLogger(__name__)

#: In the output folder: what its files were made with.
SETTINGS_FILE = "encoding.json"

#: So many unreadable files are named.
MOST_NAMED = 10

#: Seconds between two lines about the progress, where there is no terminal to draw a bar on.
PROGRESS_INTERVAL = 30.0

#: What helps against a file that is damaged: another one in its place would be encoded under its name.
_REMEDY = "mend or remove it"

_READERS = min(8, usable_cores())


# ---------------------------------------------------------------- what was there


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder of other settings, or of other things."""
    path = folder / SETTINGS_FILE
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            names = [name for name in settings if earlier.get(name) != settings[name]]
        except (ValueError, AttributeError) as error:
            raise InputError(f"'{path}' is damaged: give another output_folder, or delete this one.") from error
        if names:
            differences = ", ".join(f"{name}: {earlier.get(name)} there, {settings[name]} here" for name in names)
            raise InputError(
                f"'{folder}' holds hidden states of other settings ({differences}): give another output_folder, or "
                "delete this one."
            )
    elif folder.is_dir() and not is_empty(folder):
        raise InputError(f"output_folder '{folder}' holds other things: give a new folder, or an empty one.")


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")


# ---------------------------------------------------------------- the whole


def chosen_layers(layers: Sequence[int | str], count: int) -> list[int]:
    """Resolve a choice of layers.

    Arguments
    ---------
    layers : sequence of int or str
        Numbers, negative ones counted from the end; or "all".
    count : int
        Hidden states there are: the input of the first layer and each layer's output.

    Returns
    -------
    list of int
        In the order given.

    Raises
    ------
    InputError
        If there is no such layer, one is named twice, or none.

    Example
    -------
    >>> chosen_layers([0, -1], 13), chosen_layers(["all"], 3)
    ([0, 12], [0, 1, 2])
    """
    if list(layers) == ["all"]:
        return list(range(count))
    try:
        numbers = [int(layer) for layer in layers]
    except ValueError as error:
        raise InputError(f"--layers are numbers, or all: not {' '.join(map(str, layers))}.") from error
    for number in numbers:
        if not -count <= number < count:
            raise InputError(f"--layers: there is no layer {number}: 0 to {count - 1}, or -1 for the last, or all.")
    resolved = [number % count for number in numbers]
    if not resolved or len(set(resolved)) < len(resolved):
        raise InputError("--layers names a layer twice, or none: name each once.")
    return resolved


class _Files:
    """The audio files of a folder, with their outputs' names; those that cannot be used are counted and named."""

    def __init__(self, root: Path, suffixes: tuple[str, ...], speech_encoder: SpeechEncoder, most_unreadable: int):
        self.root, self.most_unreadable = root, most_unreadable
        self.unreadable: list[str] = []
        self.left_out: list[str] = []
        tree = AudioTree(root, suffixes)
        total = sum(1 for _ in tree.files())
        if not total:
            raise InputError(f"audio_folder '{root}' holds no {' or '.join(suffixes)} file: give the folder of audio.")
        rate = speech_encoder.frontend.sample_rate
        names, paths, seconds, stems = [], [], [], {}
        for relative, path, probe in probe_files(tree.files(), total, _READERS, "looking at the audio"):
            problem = probe.problem
            if not problem and not speech_encoder.num_frames(round(probe.duration * rate)):
                problem = f"{probe.duration:.3f} s are too short for a frame of the encoder"
            if problem:
                self._note(relative, problem)
                continue
            other = stems.setdefault(os.path.splitext(relative)[0], relative)
            if other != relative:
                raise InputError(
                    f"'{other}' and '{relative}' in '{root}' would have one output: move one away, or choose by "
                    "--extensions."
                )
            names.append(relative)
            paths.append(path)
            seconds.append(probe.duration)
        self._check()
        if not names:
            raise InputError(f"none of the {total} audio files in '{root}' can be read: replace them.")
        self.table = AudioTable(names, paths, seconds, rate)

    def _note(self, relative: str, problem: str) -> None:
        self.left_out.append(relative)
        if len(self.unreadable) < MOST_NAMED:
            self.unreadable.append(f"{relative}: {problem}")
            logger.warning("left out: %s", self.unreadable[-1])

    def _check(self) -> None:
        count = len(self.left_out)
        if count > self.most_unreadable:
            raise InputError(
                f"{count} audio files in '{self.root}' cannot be read, first {self.unreadable[0]}: "
                f"mend or remove them, or give --max_unreadable {count} or more."
            )

    def found_unreadable(self, file: int, problem: str) -> None:
        """Count a file whose header was right, but whose audio cannot be read."""
        self._note(self.table.name(file), problem)
        self._check()


class _Outputs:
    """The files to write: their paths and sizes, and which are not there yet."""

    def __init__(
        self, folder: Path, file_format: str, sizes: tuple[int, int], table: AudioTable, speech_encoder: SpeechEncoder
    ):
        self.folder, self.file_format, self.table = folder, file_format, table
        self.layers, self.d_model = sizes
        self.frames = speech_encoder.num_frames(torch.from_numpy(table.lengths)).numpy()
        counts, places = np.unique(self.frames, return_inverse=True)
        headers = [len(file_header(file_format, (self.layers, int(count), self.d_model))) for count in counts]
        self.sizes = 4 * self.layers * self.d_model * self.frames + np.array(headers)[places]
        # before any is read: of audio that is changed later, the states are those of before
        self.identities = np.array([_identity(table.path(file)) for file in range(len(table))])
        self.encoded = EncodedAudio(folder)
        self.names = [self._output_of(table.name(file)) for file in range(len(table))]
        self._check_names(os.pathconf(folder, "PC_NAME_MAX"))
        self.there = np.array(
            [is_whole(folder / name, size) for name, size in zip(self.names, self.sizes, strict=True)]
        )
        self.pending = ~np.array([self.there[file] and self._is_of_its_audio(file) for file in range(len(table))])

    def _output_of(self, relative: str) -> str:
        return f"{os.path.splitext(relative)[0]}.{self.file_format}"

    def _check_names(self, longest: int) -> None:
        """Refuse an output whose name, with another ending than the audio's, the disk would not take."""
        for file, name in enumerate(self.names):
            if 0 < longest < len(os.fsencode(os.path.basename(name))):
                raise InputError(
                    f"the output of '{self.table.name(file)}' would have a name of more than the {longest} bytes that "
                    f"'{self.folder}' takes: give the audio a shorter one."
                )

    def withdraw(self, root: Path, left_out: Iterable[str]) -> None:
        """Remove the states of audio whose place was taken by files that cannot be read."""
        for relative in left_out:
            name = self._output_of(relative)
            if self.encoded.has(name) and not self._is_of_audio_there(name, root / relative):
                logger.warning("removed, for it is of audio that is not there any more: %s", self.folder / name)
                self.encoded.begin(name)
                (self.folder / name).unlink(missing_ok=True)

    def _is_of_audio_there(self, name: str, path: Path) -> bool:
        """Whether an output is of the file at a path, as it is, or of one beside it with another ending."""
        folder = os.path.dirname(name)
        return any(
            self.encoded.is_of(name, os.path.join(folder, beside.name), _identity(os.fspath(beside)))
            for beside in path.parent.iterdir()
            if beside.stem == path.stem
        )

    def _is_of_its_audio(self, file: int) -> bool:
        size, changed = self.identities[file].tolist()
        return self.encoded.is_of(self.names[file], self.table.name(file), (size, changed))

    def open(self, file: int) -> HiddenStatesFile:
        """Begin an output."""
        name = self.names[file]
        self.encoded.begin(name)
        shape = (self.layers, int(self.frames[file]), self.d_model)
        return HiddenStatesFile(self.folder / name, self.file_format, shape)

    def note(self, file: int) -> None:
        """An output is whole."""
        self.encoded.add(self.names[file], self.table.name(file), tuple(self.identities[file].tolist()))

    def check_space(self) -> int:
        """Refuse a disk without room for what is to come; return its bytes."""
        needed, free = int(self.sizes[self.pending].sum()), shutil.disk_usage(self.folder).free
        # those that are written again take the place of what is there, one by one
        if int(self.sizes[self.pending & ~self.there].sum()) > free:
            raise InputError(
                f"'{self.folder}' needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: choose fewer "
                "layers, or another disk."
            )
        return needed


def _identity(path: str) -> tuple[int, int]:
    """Size and time of the last change, which tell a file from one that took its place."""
    try:
        status = os.stat(path)
    except OSError:  # reading it will say so
        return 0, 0
    return status.st_size, status.st_mtime_ns


class _Progress:
    """A bar on a terminal, else a line now and then; both with the time left."""

    def __init__(self, seconds: float):
        self.total, self.done, self.started = seconds, 0.0, time.monotonic()
        self.said = self.started
        self.bar = tqdm(total=round(seconds), desc="encoding", unit="s", unit_scale=True, disable=None, leave=False)

    def add(self, seconds: float) -> None:
        """So much more audio is encoded."""
        self.done += seconds
        self.bar.update(seconds)
        now = time.monotonic()
        if self.bar.disable and now - self.said >= PROGRESS_INTERVAL:
            self.said = now
            speed = self.done / (now - self.started)
            left = datetime.timedelta(seconds=round(max(self.total - self.done, 0.0) / speed))
            done, total = self.done / 3600, self.total / 3600
            logger.info(
                "%.2f of %.2f hours encoded, %.0f times as fast as real time, %s left", done, total, speed, left
            )


def _read_ahead(batches: Iterable[list[Window]], table: AudioTable) -> Iterator[tuple[list[Window], list[Future]]]:
    """Give batches with the audio of their windows, while that of the next two is being read."""
    pool = ThreadPoolExecutor(_READERS)
    try:
        ahead: deque[tuple[list[Window], list[Future]]] = deque()
        for batch in batches:
            reads = [
                pool.submit(read_segment, table.path(one.file), one.start, one.samples, table.sample_rate, _REMEDY)
                for one in batch
            ]
            ahead.append((batch, reads))
            if len(ahead) > 2:
                yield ahead.popleft()
        yield from ahead
    finally:
        # also when the one who asked for the batches gave up
        pool.shutdown(cancel_futures=True)


@torch.inference_mode()
def _encode(waves: Sequence[np.ndarray], speech_encoder: SpeechEncoder, layers: Tensor) -> np.ndarray:
    """Hidden states of the chosen layers, float32, shape (layers, B, T, D)."""
    lengths = np.array([len(wave) for wave in waves])
    longest = int(lengths.max())
    wavs = np.zeros((len(waves), longest), dtype=np.float32)
    for row, wave in zip(wavs, waves, strict=True):
        row[: len(wave)] = wave
    relative = None if (lengths == longest).all() else torch.from_numpy(lengths / longest).float().to(layers.device)
    hidden, _ = speech_encoder(torch.from_numpy(wavs).to(layers.device), relative)
    return hidden.index_select(0, layers).float().cpu().numpy()


def encode_folder(
    encoder: str | os.PathLike,
    audio_folder: str | os.PathLike,
    output_folder: str | os.PathLike,
    layers: Sequence[int | str] = (-1,),
    file_format: str = "npy",
    batch_seconds: float = 100.0,
    device: str = "cpu",
    extensions: Sequence[str] = AUDIO_EXTENSIONS,
    max_unreadable: int = 0,
) -> dict[str, Any]:
    """Write the hidden states of every audio file below a folder, in the same tree.

    ``a/b.flac`` becomes ``a/b.npy`` (or ``a/b.safetensors``, with the tensor
    "hidden_states"): float32, shape (layers, T, D). Other rates are resampled, channels
    averaged. Files of similar length share a batch; what a file becomes does not depend
    on the others. Called again, files that are whole are skipped.

    Arguments
    ---------
    encoder : path
        An encoder folder, or a pre-training run's output folder.
    audio_folder : path
        Any tree of audio files; only read.
    output_folder : path
        A new or empty folder, or that of an earlier call with the same settings.
    layers : sequence of int or str
        Numbers or "all": 0 is the input of the first layer, -1 the last layer after the
        final norm.
    file_format : str
        "npy" or "safetensors".
    batch_seconds : float
        Audio in a batch, padding included; at least WINDOW_SECONDS. Memory is about that of
        one forward pass over it.
    device : str
        "cpu", "cuda" or "cuda:<number>".
    extensions : sequence of str
        Which files are audio, in any case.
    max_unreadable : int
        So many unreadable files are left out, counted, and the first of them named.

    Returns
    -------
    dict
        Ready for JSON: "output_folder", "encoder", "layers", "format", "files" (usable
        ones), "encoded" and "skipped" of them, "hours" (of what was encoded),
        "unreadable" (a count), "unreadable_files" (the first with their problems), "seconds".

    Raises
    ------
    InputError
        If something given cannot be used; if two files would have one output; if more
        files are unreadable than allowed; if the disk or the memory does not do.
    """
    started = time.monotonic()
    if file_format not in FORMATS:
        raise InputError(f"--format is {' or '.join(FORMATS)}, not {file_format}.")
    if not WINDOW_SECONDS <= batch_seconds < math.inf:
        raise InputError(
            f"--batch_seconds is at least {WINDOW_SECONDS}, the length of a window; not {batch_seconds:g}."
        )
    if max_unreadable < 0:
        raise InputError(f"--max_unreadable is a count of files, at least 0, not {max_unreadable}.")
    target = _find_device(device)
    source = find_encoder(encoder)
    speech_encoder = load_encoder(source).to(target)
    numbers = chosen_layers(layers, len(speech_encoder.encoder.layers) + 1)
    root = resolve_folder(audio_folder, "audio_folder", "give the folder of your audio")
    suffixes = normalize_extensions(extensions)
    settings = {
        "audio_folder": str(root),
        "encoder": _fingerprint(source, speech_encoder),
        "layers": numbers,
        "format": file_format,
    }
    _check_settings(absolute_path(output_folder), settings)

    files = _Files(root, suffixes, speech_encoder, max_unreadable)
    folder = make_save_folder(output_folder)
    outputs = _Outputs(folder, file_format, (len(numbers), speech_encoder.encoder.d_model), files.table, speech_encoder)
    hours = float(files.table.lengths[outputs.pending].sum()) / files.table.sample_rate / 3600
    there = int((~outputs.pending).sum())
    logger.info(
        "%d files to encode, %.2f hours, %.2f GB; %d are there already",
        len(files.table) - there,
        hours,
        outputs.check_space() / 1e9,
        there,
    )
    try:
        with sole_writer(folder), outputs.encoded:
            if (folder / SETTINGS_FILE).exists():  # once more: another call may have come between
                _check_settings(folder, settings)
            _write_settings(folder, settings)
            outputs.withdraw(root, files.left_out)
            lost = _encode_pending(speech_encoder, torch.tensor(numbers, device=target), files, outputs, batch_seconds)
    except OSError as error:
        raise InputError(
            f"'{folder}' cannot be written to ({error.strerror}): mend that, and the same command goes on from there."
        ) from error
    except torch.OutOfMemoryError as error:
        raise InputError(f"the memory of {device} does not hold a batch: give a smaller --batch_seconds.") from error
    return {
        "output_folder": str(folder),
        "encoder": str(source),
        "layers": numbers,
        "format": file_format,
        "files": len(files.table) - len(lost),
        "encoded": len(files.table) - there - len(lost),
        "skipped": there,
        "hours": hours - float(files.table.lengths[lost].sum()) / files.table.sample_rate / 3600,
        "unreadable": len(files.left_out),
        "unreadable_files": files.unreadable,
        "seconds": time.monotonic() - started,
    }


def _encode_pending(
    speech_encoder: SpeechEncoder, layers: Tensor, files: _Files, outputs: _Outputs, batch_seconds: float
) -> list[int]:
    """Encode what is not there; return the files that turned out to be unreadable."""
    table, rate, step = files.table, files.table.sample_rate, samples_per_frame(speech_encoder)
    # the longest first: if memory does not do, it shows at once
    order = [int(file) for file in np.argsort(-table.lengths, kind="stable") if outputs.pending[file]]
    windows = (
        window
        for file in order
        for window in plan_windows(file, int(table.lengths[file]), int(outputs.frames[file]), step, rate)
    )
    progress = _Progress(float(table.lengths[order].sum()) / rate)
    under_way: dict[int, HiddenStatesFile] = {}
    lost: set[int] = set()
    try:
        batches = _read_ahead(plan_batches(windows, round(batch_seconds * rate)), table)
        for number, (batch, reads) in enumerate(batches, start=1):
            give_back_now_and_then(number)
            readable = []
            for window, read in zip(batch, reads, strict=True):
                try:
                    readable.append((window, read.result()))
                except InputError as error:
                    if window.file not in lost:
                        lost.add(window.file)
                        files.found_unreadable(window.file, str(error))
                        outputs.withdraw(files.root, [table.name(window.file)])
            readable = [(window, wave) for window, wave in readable if window.file not in lost]
            for file in lost & under_way.keys():
                under_way.pop(file).discard()
            hidden = _encode([wave for _, wave in readable], speech_encoder, layers) if readable else None
            for row, (window, _) in enumerate(readable):
                file = under_way.pop(window.file, None) or outputs.open(window.file)
                under_way[window.file] = file
                file.write(window.first, hidden[:, row, window.skipped : window.skipped + window.frames])
                if not file.missing:
                    del under_way[window.file]
                    outputs.note(window.file)
            progress.add(sum(window.frames for window in batch) * step / rate)
    finally:
        progress.bar.close()
        for file in under_way.values():
            file.discard()
    return sorted(lost)


def _fingerprint(source: Path, speech_encoder: SpeechEncoder) -> str:
    """What tells one encoder from another, wherever its folder is."""
    architecture = json.dumps(encoder_config(speech_encoder), sort_keys=True)
    weights = file_digest(source / WEIGHTS_FILE)
    return hashlib.blake2b(f"{architecture}{weights}".encode(), digest_size=16).hexdigest()


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device is cpu, cuda or cuda:<number>, not {name}.") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is cpu, cuda or cuda:<number>, not {name}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} such devices: give another, or cpu.")
    return device
