"""Where a run tells how it goes: as text, in train_log.jsonl, in TensorBoard, by a progress bar."""

import logging
import os
from pathlib import Path
from typing import Any

from speechbrain.utils.distributed import if_main_process
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from speechbrain_bestrq.accounting import JsonLines, format_line

logger = logging.getLogger(__name__)

#: Of an entry, what the bar shows.
SHOWN = ("loss", "accuracy", "gain", "information")


class ProgressLog:
    """Tells the entries of a run, on the main process alone.

    A disk that is full delays the lines of ``train_log.jsonl``, and loses none: they come with the next. TensorBoard's
    file may lack some then. When half of the codes that were in use are not any more, a warning says so.

    Arguments
    ---------
    folder : str or Path
        Of the run.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> log = ProgressLog(folder)
    >>> log.open(update=0, updates=10, show_bar=False)
    >>> log.write({"event": "train", "step": 1, "loss": 2.5})
    >>> log.close()
    >>> (folder / "train_log.jsonl").read_text()
    '{"event": "train", "step": 1, "loss": 2.5}\\n'
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.lines = JsonLines(self.folder / "train_log.jsonl")
        self.unwritten: list[dict[str, Any]] = []
        self.best_perplexity = 0.0
        self._tensorboard: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._bar: tqdm | None = None

    def open(self, update: int, updates: int | None, show_bar: bool, validation_comes: bool = False) -> None:
        """Begin, or go on after an update; what was told of later ones is forgotten.

        Arguments
        ---------
        update : int
            The last one that is part of the run.
        updates : int or None
            Of the whole run, if that is known.
        show_bar : bool
            Whether to show a progress bar.
        validation_comes : bool
            Whether that update is still to be validated: ``train_log.jsonl`` forgets that of before.
        """
        if not if_main_process():
            return
        self.close()
        self.unwritten.clear()
        self.lines.truncate(update, validation_comes)
        self._purge_step = update + 1
        if show_bar:
            self._bar = tqdm(total=updates, initial=update, unit="update", dynamic_ncols=True)

    def advance(self) -> None:
        """Move the bar on by an update."""
        if self._bar is not None:
            self._bar.update()

    def write(self, entry: dict[str, Any]) -> None:
        """Tell an entry.

        Arguments
        ---------
        entry : dict
            With "event" and "step"; plain JSON values.
        """
        if not if_main_process():
            return
        if entry["event"] == "train":
            self._warn_of_falling_codebook_use(entry.get("code_perplexity", 0.0))
            self._show(entry)
        logger.info(format_line(entry))
        self.unwritten.append(entry)
        try:
            self.flush()
        except OSError as error:
            logger.error("The log in %s cannot be written (%s): make room.", self.folder, error)
        try:
            self._draw(entry)
        except OSError as error:
            logger.error("TensorBoard's file in %s cannot be written (%s): make room.", self.folder, error)
            self._close_tensorboard()

    def _draw(self, entry: dict[str, Any]) -> None:
        """Give an entry to TensorBoard, whose writer is made with the first and anew after it has failed."""
        if self._tensorboard is None:
            self._tensorboard = SummaryWriter(self.folder / "tensorboard", purge_step=self._purge_step)
            self._purge_step = None
        for name, value in entry.items():
            if isinstance(value, (int, float)) and name != "step":
                self._tensorboard.add_scalar(f"{entry['event']}/{name}", value, entry["step"])

    def flush(self) -> None:
        """Write the lines that are still to be written.

        Raises
        ------
        OSError
            If the disk does not take them.
        """
        while self.unwritten:
            self.lines.append(self.unwritten[0])
            self.unwritten.pop(0)

    def close(self) -> None:
        """End the bar and TensorBoard's file."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
        self._close_tensorboard()

    def _close_tensorboard(self) -> None:
        """End its file; a writer whose thread has failed once fails for ever, and here too."""
        writer, self._tensorboard = self._tensorboard, None
        if writer is None:
            return
        try:
            writer.close()
        except OSError as error:
            logger.warning("TensorBoard's file in %s lacks its last lines (%s).", self.folder, error)

    def _show(self, entry: dict[str, Any]) -> None:
        if self._bar is None:
            return
        shown = {name: f"{entry[name]:.3f}" for name in SHOWN if name in entry}
        self._bar.set_postfix(shown, audio=f"{entry['audio_seconds_per_second']:.0f} s/s", refresh=False)

    def _warn_of_falling_codebook_use(self, perplexity: float) -> None:
        if perplexity < self.best_perplexity / 2:
            logger.warning(
                "The perplexity of the codes in use fell from %.1f to %.1f: see codes_used and commonest_share.",
                self.best_perplexity,
                perplexity,
            )
            self.best_perplexity = perplexity  # warn again when it halves again
        self.best_perplexity = max(self.best_perplexity, perplexity)
