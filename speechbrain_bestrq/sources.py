"""Where an encoder comes from: a folder, a run's output folder, or the Hugging Face hub."""

import os
import re
from pathlib import Path

import huggingface_hub

from speechbrain_bestrq.artefact import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.run_log import RUN_FILE

#: A wav2vec 2.0 of transformers says in one of these whether its waveforms are normalised.
INPUT_FILES = ["preprocessor_config.json", "processor_config.json"]
#: In a run's output folder, the encoder of its best validation.
RUN_SUBFOLDER = "encoder"
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


def find_encoder(source: str | os.PathLike, save_path: str | os.PathLike | None = None) -> Path:
    """Find an encoder folder; what is on the hub is downloaded first.

    Arguments
    ---------
    source : str or Path
        An encoder folder; the output folder of a pre-training run; or a hub id
        "user/name", or "user/name@revision" (a branch, tag or commit). A folder of that name goes before the hub.
    save_path : str or Path, optional
        Where downloads are kept; the hub's own cache if left out.

    Returns
    -------
    Path
        A folder for :func:`speechbrain_bestrq.artefact.load_encoder`.

    Raises
    ------
    InputError
        If there is no such folder here and no such encoder on the hub, or the run has not
        validated yet.

    Example
    -------
    >>> run = getfixture("tmp_path") / "run"
    >>> (run / "encoder").mkdir(parents=True)
    >>> _ = (run / "encoder" / "config.json").write_text("{}")
    >>> find_encoder(run).name
    'encoder'
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / CONFIG_FILE).exists():
            return path
        if (path / RUN_SUBFOLDER).is_dir():
            return path / RUN_SUBFOLDER
        if (path / RUN_FILE).exists():
            raise InputError(_not_validated(path))
        return path
    if path.exists():
        raise InputError(f"{source} is a file: give the encoder folder, with {CONFIG_FILE} and {WEIGHTS_FILE} in it.")
    named = _HUB_ID.fullmatch(os.fspath(source))
    of_a_run = re.fullmatch(rf".*/{RUN_SUBFOLDER}@\d+", os.fspath(source))  # and mistyped: no hub is asked for it
    if not named or of_a_run:
        raise InputError(f"{source} is no folder: give an encoder folder, a run's output folder or a hub id.")
    try:
        snapshot = huggingface_hub.snapshot_download(
            named[1],
            revision=named[2],
            cache_dir=os.fspath(save_path) if save_path else None,
            allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, *INPUT_FILES],
        )
    except Exception as error:  # what it raises without network depends on its release and on its HTTP library
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{source} is neither a folder here nor an encoder that the hub gave: check the path or the id, and the "
            f"network ({reason})."
        ) from error
    folder = Path(snapshot)
    if not (folder / WEIGHTS_FILE).exists():  # the id's other files are not downloaded
        raise InputError(
            f"{source} on the hub has no {WEIGHTS_FILE}, and other formats are not read (a pickle can run code): load "
            "it with transformers, save it with save_pretrained, and give that folder."
        )
    return folder


def _not_validated(run: Path) -> str:
    """Say what to do about a run whose encoder is not written yet."""
    kept = sorted(run.glob(f"{RUN_SUBFOLDER}@*"), key=lambda path: (len(path.name), path.name))
    other = f", or give {kept[-1]}" if kept else ""
    return (
        f"{run} has no {RUN_SUBFOLDER} folder, for this run has not validated yet: wait until it has (each "
        f"valid_interval updates and at its end, or after each epoch){other}."
    )
