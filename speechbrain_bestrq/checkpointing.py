"""Checkpoints that are whole or not there."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process

#: Folders that are being written bear this prefix, which the Checkpointer does not look at.
UNFINISHED = "saving"


def sync_tree(folder: Path) -> None:
    """Make sure that a folder's files and names are on the disk, not only in its cache."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, whose folders get their name only when they are whole.

    The Checkpointer writes a checkpoint's meta file first and looks for nothing else
    when it lists them: a run killed while saving leaves a folder that seems valid, and
    the next start fails on it. Here a checkpoint is written under another name,
    synced, and renamed.

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
    ('CKPT+first', ['CKPT.yaml', 'model.ckpt'])
    """

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        if if_main_process() and self.checkpoints_dir.is_dir():
            for leftover in self.checkpoints_dir.glob(f"{UNFINISHED}+*"):
                shutil.rmtree(leftover)

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
        """
        checkpoint = super().save_checkpoint(meta or {}, end_of_epoch, name, verbosity=logging.DEBUG)
        ddp_barrier()  # some recoverables may have been saved by another rank
        if checkpoint is not None:
            checkpoint = self._publish(checkpoint)
            logging.getLogger(__name__).log(verbosity, "Saved a checkpoint in %s", checkpoint.path)
        ddp_barrier()
        return checkpoint

    def _new_checkpoint_dirpath(self) -> Path:
        return self._unfinished(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name: str) -> Path:
        return self._unfinished(super()._custom_checkpoint_dirpath(name))

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
        paramfiles = {name: whole / path.name for name, path in checkpoint.paramfiles.items()}
        return Checkpoint(whole, checkpoint.meta, paramfiles)
