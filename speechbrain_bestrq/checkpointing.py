"""Checkpoints that are whole, or not there: written beside and renamed, with the checksums of their files."""

import errno
import inspect
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speechbrain.utils.checkpoints import (
    DEFAULT_SAVE_HOOKS,
    METAFNAME,
    PARAMFILE_EXT,
    Checkpoint,
    Checkpointer,
    ckpt_recency,
    get_default_hook,
)
from speechbrain.utils.distributed import ddp_barrier, ddp_broadcast, if_main_process

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.writing import sync, sync_tree

logger = logging.getLogger(__name__)

UNFINISHED = "UNFINISHED"
"""Prefix of a checkpoint folder that is being written, or deleted."""
CHECKSUMS = "checksums.json"
"""Size and CRC-32 of each other file of a checkpoint."""

#: A full, failing or read-only disk, a quota, or a file server that is away: what may be over at the next attempt.
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG),
    *(
        errno.ENOENT,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
    ),
}
#: How torch.save puts it.
_TORCH_DISK_ERRORS = ("PytorchStreamWriter", "unexpected pos", "enforce fail at inline_container")


class SaveError(InputError):
    """A checkpoint could not be written; those before are whole."""


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, whose folders get their name only when they are whole.

    The Checkpointer writes a checkpoint's meta file first and looks for nothing else
    when it lists them: a run killed while saving leaves a folder that seems valid, and
    the next start fails on it. Here a checkpoint is written under another name, with
    size and checksum of each file, synced, and renamed; one that is deleted loses its name
    first. One whose files are no longer what was written is passed over, and named, when a
    checkpoint is looked for.

    The main process alone saves and deletes, so hooks must not talk to others. A disk that is full or
    read-only raises :class:`SaveError` on all processes alike. The checkpoints before stay as
    they are, and saving can be tried again.

    Arguments
    ---------
    **arguments
        As for :class:`speechbrain.utils.checkpoints.Checkpointer`.

    Example
    -------
    >>> import tempfile, torch
    >>> folder = tempfile.mkdtemp()
    >>> checkpointer = AtomicCheckpointer(checkpoints_dir=folder, recoverables={"model": torch.nn.Linear(1, 1)})
    >>> checkpoint = checkpointer.save_checkpoint(name="first")
    >>> checkpoint.path.name, sorted(path.name for path in checkpoint.path.iterdir())
    ('CKPT+first', ['CKPT.yaml', 'checksums.json', 'model.ckpt'])
    """

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self._device = os.stat(self.checkpoints_dir).st_dev
        self._faults: dict[Path, str] = {}

    # ---------------------------------------------------------------- saving

    def save_checkpoint(
        self,
        meta: dict[str, Any] | None = None,
        end_of_epoch: bool = True,
        name: str | None = None,
        verbosity: int = logging.INFO,
    ) -> Checkpoint | None:
        """Save as the Checkpointer does, then give the folder its name.

        Arguments
        ---------
        meta, end_of_epoch, name, verbosity
            As for :meth:`speechbrain.utils.checkpoints.Checkpointer.save_checkpoint`.

        Returns
        -------
        Checkpoint or None
            None on all processes but the main one.

        Raises
        ------
        SaveError
            On all processes, if the disk is full, read-only or fails.
        """
        checkpoint, failure = None, ""
        if if_main_process():
            folder = None
            try:
                self._make_folder()
                self._remove_leftovers()
                folder = self._unfinished(
                    super()._new_checkpoint_dirpath() if name is None else super()._custom_checkpoint_dirpath(name)
                )
                meta = self._clock() | (meta or {})
                checkpoint = self._publish(self._write(folder, meta, end_of_epoch))
            except (OSError, RuntimeError) as error:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                failure = self._disk_failure(error)
        failure, path = ddp_broadcast((failure, checkpoint and checkpoint.path), src=0)
        if failure:
            raise SaveError(failure)
        self._faults[path] = ""  # nobody needs to read it again
        if if_main_process():
            logger.log(verbosity, "Saved a checkpoint in %s", path)
        return checkpoint

    def _make_folder(self) -> None:
        """Make the folder anew if it was moved away, but not below the mount point of a disk that is away."""
        if not self.checkpoints_dir.exists():
            there = next(path for path in self.checkpoints_dir.absolute().parents if path.exists())
            if there.stat().st_dev != self._device:
                raise OSError(errno.ESTALE, "its disk is not mounted", str(there))
            self.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        self._device = self.checkpoints_dir.stat().st_dev  # a disk that was mounted again may have another number

    def _remove_leftovers(self) -> None:
        """Remove what a process that was killed has left; not before this one saves, for that one may still live."""
        for leftover in self.checkpoints_dir.glob(f"{UNFINISHED}+*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _clock(self) -> dict[str, float]:
        """The time, by which the newest is told from others: later than all before, whatever the clock says.

        A machine whose clock is behind that of the one before would delete what it has just saved.
        """
        checkpoints = self._construct_checkpoint_objects(self._whole(super()._list_checkpoint_dirs()))
        times = [checkpoint.meta["unixtime"] for checkpoint in checkpoints]
        newest = max(times, default=-math.inf)
        return {"unixtime": max(time.time(), newest + 1)}

    def _write(self, folder: Path, meta: dict[str, Any], end_of_epoch: bool) -> Checkpoint:
        """Write all files of a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        saved_meta = self._save_checkpoint_metafile(folder / METAFNAME, meta, end_of_epoch)
        paths = {key: folder / f"{key}{PARAMFILE_EXT}" for key in self.recoverables}
        for key, path in paths.items():
            self._saver(key)(self.recoverables[key], path)
        checksums = {file.name: _checksum(file) for file in sorted(folder.iterdir())}
        (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1), encoding="utf-8")
        return Checkpoint(folder, saved_meta, paths)

    def _saver(self, key: str) -> Callable[[Any, Path], None]:
        """The hook that saves a recoverable, without the broadcast that SpeechBrain puts around it."""
        hook = self.custom_save_hooks.get(key) or get_default_hook(self.recoverables[key], DEFAULT_SAVE_HOOKS)
        if hook is None:
            raise TypeError(f"there is no hook to save {key}, a {type(self.recoverables[key]).__name__}: give one.")
        return inspect.unwrap(hook)

    def _disk_failure(self, error: OSError | RuntimeError) -> str:
        """Say what is wrong with the disk; raise what is not the disk's fault."""
        gone = getattr(error, "errno", None) == errno.ENOENT  # of a folder of its own, not of what a hook reads
        foreign = gone and not str(error.filename).startswith(str(self.checkpoints_dir))
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS and not foreign:
            reason = error.strerror
        elif isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_DISK_ERRORS):
            reason = "the disk did not take all of it"
        else:
            raise error
        try:
            newest = self.find_checkpoint()
            needed = "" if newest is None else f" a checkpoint needs {_folder_bytes(newest.path) / 1e6:.1f} MB;"
        except (OSError, InputError):  # the folder cannot be listed either
            needed = ""
        return f"no checkpoint could be saved in {self.checkpoints_dir} ({reason}):{needed} make room or mend the disk."

    @staticmethod
    def _unfinished(path: Path) -> Path:
        return path.with_name(f"{UNFINISHED}+{path.name}")

    @staticmethod
    def _publish(checkpoint: Checkpoint) -> Checkpoint:
        whole = checkpoint.path.with_name(checkpoint.path.name.removeprefix(f"{UNFINISHED}+"))
        sync_tree(checkpoint.path)
        if whole.exists():  # a custom name used again
            shutil.rmtree(whole)
        os.rename(checkpoint.path, whole)
        sync(whole.parent)  # so is its name
        paramfiles = {name: whole / path.name for name, path in checkpoint.paramfiles.items()}
        return Checkpoint(whole, checkpoint.meta, paramfiles)

    # ---------------------------------------------------------------- looking for one

    def _list_checkpoint_dirs(self) -> list[Path]:
        """The folders that the Checkpointer looks into: those that are whole."""
        folders = super()._list_checkpoint_dirs()
        whole = self._whole(folders)
        if folders and not whole:
            raise InputError(
                f"none of the {len(folders)} checkpoints in {self.checkpoints_dir} is whole: delete them to start at "
                "the beginning."
            )
        return whole

    def _whole(self, folders: Sequence[Path]) -> list[Path]:
        return [folder for folder in folders if self._is_whole(folder)]

    def _is_whole(self, folder: Path) -> bool:
        """Whether the files are those that were written; looked at once."""
        if folder not in self._faults:
            self._faults[folder] = _fault(folder)
            if self._faults[folder]:
                logger.warning("%s is damaged and is not used: %s. Delete it.", folder, self._faults[folder])
        return not self._faults[folder]

    # ---------------------------------------------------------------- deleting

    def keep_newest_and_best(
        self, newest: int, min_key: str, comparable: Callable[[Checkpoint], bool] = lambda checkpoint: True
    ) -> None:
        """Delete all but the best checkpoint and the newest others, on the main process alone.

        Other processes may see an older state of a folder on a file server, and need not look. A folder that cannot be
        looked into is left as it is until the next time.

        Arguments
        ---------
        newest : int
            How many besides the best.
        min_key : str
            Of the meta; the best has the least.
        comparable : callable
            Tells of a checkpoint whether its ``min_key`` may be compared at all.
        """
        ddp_barrier()  # whoever looks for one has found it
        if if_main_process():
            try:
                best = self.find_checkpoint(min_key=min_key, ckpt_predicate=comparable)
                by_age = self.find_checkpoints(importance_key=ckpt_recency)
                others = [checkpoint.path for checkpoint in by_age if best is None or checkpoint.path != best.path]
                for path in others[newest:]:
                    self._delete(path, logging.INFO)
            except OSError as error:
                logger.warning("%s cannot be looked into (%s): nothing is deleted.", self.checkpoints_dir, error)
        ddp_barrier()

    def delete_checkpoints(
        self,
        *,
        num_to_keep: int = 1,
        min_keys: Sequence[str] | None = None,
        max_keys: Sequence[str] | None = None,
        importance_keys: Sequence[Callable[[Checkpoint], Any]] = (),
        ckpt_predicate: Callable[[Checkpoint], bool] | None = None,
        verbosity: int = logging.INFO,
    ) -> None:
        """Delete as the Checkpointer does, on the main process alone, each folder at once or not at all.

        Arguments
        ---------
        num_to_keep, min_keys, max_keys, importance_keys, ckpt_predicate, verbosity
            As for :meth:`speechbrain.utils.checkpoints.Checkpointer.delete_checkpoints`.
        """
        ddp_barrier()  # whoever looks for one has found it
        if if_main_process():
            keys = [{"min_key": key} for key in min_keys or ()] + [{"max_key": key} for key in max_keys or ()]
            # each once: save_and_keep_only adds "the most recent" to a default list of its own that it never empties
            keys += [{"importance_key": key} for key in dict.fromkeys(importance_keys)]
            found: dict[Path, bool] = {}
            for key in keys:
                ranked = self.find_checkpoints(ckpt_predicate=ckpt_predicate, **key)
                for place, checkpoint in enumerate(ranked):
                    found[checkpoint.path] = found.get(checkpoint.path, False) or place < num_to_keep
            for path in [path for path, kept in found.items() if not kept]:
                self._delete(path, verbosity)
        ddp_barrier()

    def _delete(self, path: Path, verbosity: int) -> None:
        nameless = self._unfinished(path)
        try:
            os.rename(path, nameless)
            shutil.rmtree(nameless)
        except OSError as error:
            logger.warning("%s cannot be deleted (%s): it takes room.", path, error)
        else:
            logger.log(verbosity, "Deleted checkpoint in %s", path)


def _fault(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, if anything."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {CHECKSUMS} cannot be read ({error})"
    for name, (size, checksum) in checksums.items():
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes instead of {size}"
        if _checksum(path) != [size, checksum]:
            return f"its {name} has other bytes than were written"
    return ""


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
