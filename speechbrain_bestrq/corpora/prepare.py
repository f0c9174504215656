"""Preparation of the corpus that a pre-training YAML names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechbrain_bestrq.corpora.folder import prepare_folder
from speechbrain_bestrq.corpora.librispeech import prepare_librispeech
from speechbrain_bestrq.errors import InputError


def prepare_corpus(hparams: Mapping[str, Any], save_folder: str | os.PathLike | None = None) -> dict[str, Path]:
    """Write the manifests of a pre-training YAML's corpus, or find them written.

    Arguments
    ---------
    hparams : mapping
        The keys ``corpus`` ("librispeech" or "folder"), ``data_folder``, ``sample_rate``,
        ``resample``, ``max_unreadable``, ``extra_folders``; for LibriSpeech ``train_splits``
        and ``valid_splits``, for a folder ``seed``; ``output_folder`` if ``save_folder`` is
        left out.
    save_folder : path, optional
        Where the manifests go; ``manifests`` in the output folder if left out.

    Returns
    -------
    dict
        Paths of the manifests, among them ``train`` and ``valid``.

    Raises
    ------
    InputError
        If the corpus is of no known kind, or as :func:`prepare_librispeech` and
        :func:`prepare_folder`.

    Example
    -------
    >>> keys = ("data_folder", "sample_rate", "resample", "max_unreadable", "extra_folders")
    >>> prepare_corpus({"corpus": "tedlium", **dict.fromkeys(keys)}, "manifests")
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: corpus is librispeech or folder, not 'tedlium'.
    """
    common = {
        "data_folder": hparams["data_folder"],
        "save_folder": Path(hparams["output_folder"]) / "manifests" if save_folder is None else save_folder,
        "sample_rate": hparams["sample_rate"],
        "resample": hparams["resample"],
        "max_unreadable": hparams["max_unreadable"],
        "extra_folders": hparams["extra_folders"],
    }
    if hparams["corpus"] == "librispeech":
        splits = {"train_splits": hparams["train_splits"], "valid_splits": hparams["valid_splits"]}
        return prepare_librispeech(**common, **splits)
    if hparams["corpus"] == "folder":
        return prepare_folder(**common, seed=hparams["seed"])
    raise InputError(f"corpus is librispeech or folder, not {hparams['corpus']!r}.")
