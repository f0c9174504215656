"""The encoder folders of a pre-training, also when the disk does not take them at once."""

import copy
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from speechbrain.utils.distributed import ddp_broadcast
from torch import nn

from speechbrain_bestrq.artefact import check_place, save_encoder
from speechbrain_bestrq.checkpointing import SaveError
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.tables import TableModule

logger = logging.getLogger(__name__)


class EncoderFolders:
    """Writes encoders below a run's folder; what the disk does not take is owed, and comes before any checkpoint.

    A run that went on from a later checkpoint would never come to the updates of what is owed again.

    Arguments
    ---------
    folder : Path
        Of the run.

    Example
    -------
    >>> folders = EncoderFolders(getfixture("tmp_path"))
    >>> folders.owed
    []
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._owed: dict[str, Callable[[], Path]] = {}

    def check_places(self, names: Iterable[str]) -> None:
        """Refuse to train for days towards a folder whose place something else has.

        Arguments
        ---------
        names : iterable of str
            Of the folders that will be written.

        Raises
        ------
        InputError
            Naming one.
        """
        for name in names:
            check_place(self.folder / name)

    @property
    def owed(self) -> list[str]:
        """Names of the folders that are still to be written."""
        return list(self._owed)

    def write(self, name: str, speech_encoder: SpeechEncoder, card: str, facts: dict[str, Any]) -> None:
        """Write an encoder, or keep a copy of it to be written later; on the main process.

        Arguments
        ---------
        name : str
            Of its folder.
        speech_encoder : SpeechEncoder
            The encoder.
        card : str
            Its model card.
        facts : dict
            Of its training, for the config.
        """
        write = partial(save_encoder, folder=self.folder / name, card=card, **facts)
        self._owed.pop(name, None)  # an older one of the name
        if not self._is_written(name, partial(write, speech_encoder)):
            self._owed[name] = partial(write, _copy_on_cpu(speech_encoder))

    def write_owed(self) -> None:
        """Try again; a collective of all ranks.

        Raises
        ------
        SaveError
            If one is still not written.
        """
        for name, write in list(self._owed.items()):
            if self._is_written(name, write):
                del self._owed[name]
        missing = ddp_broadcast(next(iter(self._owed), ""), src=0)
        if missing:
            raise SaveError(f"no checkpoint is saved before {self.folder / missing} is: make room or mend the disk.")

    def forget(self) -> None:
        """Give up what is owed: its updates come again."""
        self._owed.clear()

    def _is_written(self, name: str, write: Callable[[], Path]) -> bool:
        try:
            write()
        except OSError as error:
            logger.error("%s cannot be written (%s): make room.", self.folder / name, error)
            return False
        return True


def _copy_on_cpu(speech_encoder: SpeechEncoder) -> SpeechEncoder:
    """A copy whose tensors went to the CPU one by one: a copy of all at once would take room on the device."""
    on_cpu = {
        id(one): nn.Parameter(one.detach().cpu().clone(), one.requires_grad) for one in speech_encoder.parameters()
    }
    on_cpu |= {id(one): one.cpu().clone() for one in speech_encoder.buffers()}
    tabulated = [module for module in speech_encoder.modules() if isinstance(module, TableModule)]
    tables = [getattr(module, name) for module in tabulated for name in module.tables]
    on_cpu |= {id(one): one.cpu().clone() for one in tables}
    return copy.deepcopy(speech_encoder, on_cpu)
