"""Checks of the options that the preparations of all corpora share."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.machine import usable_cores

AUDIO_EXTENSIONS = ("wav", "flac", "ogg", "opus", "mp3")


@dataclass(frozen=True)
class AudioRules:
    """What audio is accepted, and with how many threads it is looked at.

    Arguments
    ---------
    sample_rate : int
        The rate that training wants, in Hz.
    resample : bool
        Whether other rates are accepted, to be resampled when loaded.
    max_unreadable : int
        So many unreadable files are skipped in the whole corpus.
    workers : int, optional
        Threads; one for each core, at most 16, if left out.

    Raises
    ------
    InputError
        If one of them is out of range.
    """

    sample_rate: int
    resample: bool
    max_unreadable: int
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.sample_rate < 1:
            raise InputError(f"sample_rate is in Hz, 16000 for speech, not {self.sample_rate}.")
        if self.max_unreadable < 0:
            raise InputError(f"max_unreadable is a count of files, at least 0, not {self.max_unreadable}.")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers is a count of threads, at least 1, not {self.workers}: or leave it out.")

    @property
    def threads(self) -> int:
        """The number of threads that are used."""
        return self.workers or min(16, usable_cores())


def resolve_folder(folder: str | os.PathLike, key: str, remedy: str) -> Path:
    """Make the path of a folder absolute, and see that it exists and holds something.

    Arguments
    ---------
    folder : path
        As the user gave it.
    key : str
        Under which key.
    remedy : str
        What the user should do instead.

    Returns
    -------
    Path
        Links in it are kept.

    Raises
    ------
    InputError
        If there is no such folder, or nothing in it.
    """
    path = absolute_path(folder)
    if not path.exists():
        raise InputError(f"{key} '{path}' does not exist: {remedy}.")
    if not path.is_dir():
        raise InputError(f"{key} '{path}' is a file, not a folder: {remedy}.")
    try:
        if not any(path.iterdir()):
            raise InputError(f"{key} '{path}' is empty: {remedy}.")
    except PermissionError as error:
        raise InputError(f"{key} '{path}' cannot be listed (permission denied): {remedy}.") from error
    return path


def make_save_folder(save_folder: str | os.PathLike) -> Path:
    """Make the folder of the manifests, and see that it can be written to.

    Raises
    ------
    InputError
        If that is not possible.
    """
    path = absolute_path(save_folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"save_folder '{path}' cannot be made ({error.strerror}): give another.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"save_folder '{path}' cannot be written to (permission denied): give another.")
    return path


def absolute_path(folder: str | os.PathLike) -> Path:
    """Make a path absolute, without following links."""
    # not Path.resolve: links are kept, for the names of folders go into IDs
    return Path(os.path.abspath(os.path.expanduser(folder)))


def check_list(value: Sequence[Any], key: str) -> None:
    """Refuse what is no list where one is wanted: a text would be taken letter by letter.

    Raises
    ------
    InputError
        If it is a text, or nothing at all.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{key} is a list, such as [one, two], or [] for none; not {value}.")


def normalize_extensions(extensions: Sequence[str]) -> tuple[str, ...]:
    """Turn ``wav`` or ``.WAV`` into ``.wav``, sorted, each once.

    Raises
    ------
    InputError
        If there are none, or one that libsndfile could not read.
    """
    check_list(extensions, "extensions")
    suffixes = sorted({"." + extension.lower().lstrip(".") for extension in extensions})
    if not suffixes or "." in suffixes:
        raise InputError("extensions must name at least one, and none may be empty: for example [wav, flac].")
    if ".raw" in suffixes:
        raise InputError("extensions: 'raw' has no header that gives a sample rate: convert such files to wav.")
    return tuple(suffixes)


def check_apart(extra_folders: Sequence[Path], folders: Sequence[Path]) -> None:
    """Refuse extra folders that overlap with what is read anyway: their audio would be used twice.

    Arguments
    ---------
    extra_folders : sequence of Path
        Absolute paths.
    folders : sequence of Path
        The other folders that are read.

    Raises
    ------
    InputError
        Naming the first such pair.
    """
    others = list(folders)
    for extra in extra_folders:
        for other in others:
            one, two = extra.resolve(), other.resolve()
            if one == two or one in two.parents or two in one.parents:
                raise InputError(
                    f"extra_folders: '{extra}' and '{other}' overlap, so audio would be used twice: remove it from "
                    "extra_folders, or give only what is not in the other."
                )
        others.append(extra)
