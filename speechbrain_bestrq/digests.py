"""Short names of contents: equal for what is equal to the bit."""

import hashlib
import os

import torch


def tensor_digest(state: dict[str, torch.Tensor]) -> str:
    """Digest tensors: equal for bit-identical ones only.

    Arguments
    ---------
    state : dict
        Of a module.

    Returns
    -------
    str
        16 hexadecimal digits.

    Example
    -------
    >>> zeros, ones = {"weight": torch.zeros(2)}, {"weight": torch.ones(2)}
    >>> tensor_digest(zeros) == tensor_digest(zeros) != tensor_digest(ones)
    True
    """
    hashed = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def text_digest(text: str) -> str:
    """Digest a text.

    Arguments
    ---------
    text : str
        Any.

    Returns
    -------
    str
        16 hexadecimal digits.

    Example
    -------
    >>> len(text_digest("seed: 1"))
    16
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: str | os.PathLike) -> str:
    """Digest a file.

    Arguments
    ---------
    path : str or Path

    Returns
    -------
    str
        32 hexadecimal digits.

    Example
    -------
    >>> path = getfixture("tmp_path") / "file"
    >>> _ = path.write_text("content")
    >>> len(file_digest(path))
    32
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
