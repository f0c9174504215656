"""Files of hidden states: .npy and .safetensors, written piece by piece."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np

FORMATS = ("npy", "safetensors")

#: Name of the tensor in a .safetensors file.
TENSOR_NAME = "hidden_states"


def file_header(file_format: str, shape: tuple[int, int, int]) -> bytes:
    """Make what stands in a file before the values, which are float32, little-endian, the last dimension fastest.

    Arguments
    ---------
    file_format : str
        One of FORMATS.
    shape : tuple of int
        (layers, T, D).

    Returns
    -------
    bytes

    Example
    -------
    >>> file_header("safetensors", (1, 2, 3))[8:].strip()
    b'{"hidden_states": {"dtype": "F32", "shape": [1, 2, 3], "data_offsets": [0, 24]}}'
    """
    if file_format == "npy":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return header.getvalue()
    size = 4 * shape[0] * shape[1] * shape[2]
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({TENSOR_NAME: entry}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class HiddenStatesFile:
    """A file of hidden states that is written piece by piece, and gets its name when it is whole.

    Arguments
    ---------
    path : Path
        The file; its folder is made.
    file_format : str
        One of FORMATS.
    shape : tuple of int
        (layers, T, D).

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.npy"
    >>> file = HiddenStatesFile(path, "npy", (2, 3, 4))
    >>> file.write(2, np.full((2, 1, 4), 7.0)); path.exists()
    False
    >>> file.write(0, np.zeros((2, 2, 4))); np.load(path)[:, :, 0].tolist()
    [[0.0, 0.0, 7.0], [0.0, 0.0, 7.0]]
    """

    def __init__(self, path: Path, file_format: str, shape: tuple[int, int, int]):
        self.path, self.shape, self.missing = path, shape, shape[1]
        # the file's own name may be as long as a name can be
        self.part = path.with_name(f".{hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        header = file_header(file_format, shape)
        self.offset = len(header)
        self.file = open(self.part, "wb")
        self.file.write(header)

    def write(self, first: int, values: np.ndarray) -> None:
        """Write some frames, each once; after the last of them the file is there.

        Arguments
        ---------
        first : int
            Place of the first.
        values : numpy.ndarray
            Shape (layers, frames, D).
        """
        _, frames, size = self.shape
        for layer, states in enumerate(values.astype("<f4", copy=False)):
            self.file.seek(self.offset + 4 * size * (layer * frames + first))
            self.file.write(states.tobytes())
        self.missing -= values.shape[1]
        if not self.missing:
            self.file.close()
            os.replace(self.part, self.path)

    def discard(self) -> None:
        """Give up."""
        try:
            self.file.close()
        except OSError:  # what is still to be written finds no room
            pass
        finally:
            self.part.unlink(missing_ok=True)


def is_whole(path: Path, size: int) -> bool:
    """Tell whether a file of an earlier call is there; one that a crash of the machine cut short has another size.

    Arguments
    ---------
    path : Path
        The file.
    size : int
        Its bytes, header and all.

    Returns
    -------
    bool
    """
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
