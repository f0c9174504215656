"""Reading an encoder folder that nobody vouches for: JSON and safetensors, checked before anything is built.

Nothing here runs what it reads. A pickle and a YAML can; neither is opened.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from speechbrain_bestrq.errors import InputError

MAX_CONFIG_BYTES = 2**20
"""Of a config.json; ours have about 2 kB."""
MAX_HEADER_BYTES = 2**23
"""Of the header of a safetensors file; that of 24 large layers has about 60 kB."""
MAX_NUMBER = 2**17
"""Of any number in a config, but for these, from which constants are made before the weights are looked at."""
MAX_NUMBERS = {"sample_rate": 192_000, "window_ms": 200, "hop_ms": 200, "num_mels": 1024, "d_model": 8192}
MAX_LAYERS = 256
"""Of an encoder; the largest speech encoders have 48."""
MAX_CARD_BYTES = 2**20
"""Of a README.md; ours have about 4 kB."""
MAX_ITEMS = 64
"""Of a list in a config."""

_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_TRANSFORMERS_PICKLE = "pytorch_model.bin"
_YAMLS = {".yaml", ".yml"}
_FLOATS = {"F64", "F32", "F16", "BF16"}


def file_inside(folder: Path, name: str) -> Path:
    """Give the path of a folder's file, if it is there and does not leave the folder.

    Arguments
    ---------
    folder : Path
        The folder.
    name : str
        Of the file.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        If there is no such file, or it is a link to somewhere else. The links of the
        Hugging Face hub's cache, from a snapshot to its blobs, are followed.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "config.json").write_text("{}")
    >>> file_inside(folder, "config.json").name
    'config.json'
    """
    path = folder / name
    if not path.is_file():
        raise InputError(f"{folder} is no encoder folder: it has no {name}{_what_is_not_read(folder)}.")
    home, real = folder.resolve(), path.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(one) for one in homes):
        raise InputError(f"{path} is a link that leaves the folder, to {real}: put the file itself there.")
    return path


def _what_is_not_read(folder: Path) -> str:
    """Say which files of a folder someone may have expected to be read."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if _TRANSFORMERS_PICKLE in found:
        return (
            f", and {_TRANSFORMERS_PICKLE} is not read (a pickle can run code): load it with transformers, and save it "
            "with save_pretrained"
        )
    for suffixes, reason in ((_PICKLES, "a pickle can run code"), (_YAMLS, "a YAML can build anything")):
        names = [name for name in found if Path(name).suffix in suffixes]
        if names:
            return f", and {names[0]} is not read ({reason}): see sb-bestrq export --help"
    return ""


def read_json(path: Path) -> Any:
    """Read a small JSON file.

    Arguments
    ---------
    path : Path
        The file.

    Returns
    -------
    object

    Raises
    ------
    InputError
        If it is too large, or is not JSON.

    Example
    -------
    >>> path = getfixture("tmp_path") / "config.json"
    >>> _ = path.write_text("!!python/object/apply:os.system [ls]")
    >>> read_json(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: ...config.json is not JSON (Expecting value: line 1 column 1 (char 0)): ...
    """
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise InputError(f"{path} has {size} bytes, more than any config ({MAX_CONFIG_BYTES}): copy the folder again.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text are a ValueError too
        raise InputError(f"{path} is not JSON ({error}): copy the folder again.") from error


def read_card(path: Path) -> str:
    """Read a model card, which is only text.

    Arguments
    ---------
    path : Path
        The README.md.

    Returns
    -------
    str
        What is no UTF-8 is replaced.

    Raises
    ------
    InputError
        If it is too large.

    Example
    -------
    >>> path = getfixture("tmp_path") / "README.md"
    >>> _ = path.write_text("# Card")
    >>> read_card(path)
    '# Card'
    """
    size = path.stat().st_size
    if size > MAX_CARD_BYTES:
        raise InputError(f"{path} has {size} bytes, more than any model card ({MAX_CARD_BYTES}): make it shorter.")
    return path.read_text(encoding="utf-8", errors="replace")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from a safetensors file's header; its tensors are left alone.

    Arguments
    ---------
    path : Path
        The file.

    Returns
    -------
    dict
        Shape by name.

    Raises
    ------
    InputError
        If the file is none, if its header is larger than any encoder's, if the header's offsets
        overlap, leave holes or leave the file, or if a tensor does not hold floating-point numbers.

    Example
    -------
    >>> import torch
    >>> from safetensors.torch import save_file
    >>> path = getfixture("tmp_path") / "model.safetensors"
    >>> save_file({"weight": torch.zeros(2, 3)}, path)
    >>> read_shapes(path)
    {'weight': (2, 3)}
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise InputError(f"{path} is no safetensors file of an encoder: its header would have {size} bytes.")
    shapes = {}
    try:
        # the library checks the header against the file: offsets, holes, sizes
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():
                entry = tensors.get_slice(name)
                if entry.get_dtype() not in _FLOATS:
                    raise InputError(f"{path} does not hold weights: {name!r:.80} is of type {entry.get_dtype()}.")
                shapes[name] = tuple(entry.get_shape())
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no whole safetensors file ({reason}): copy the folder again.") from error
    return shapes


def check_sizes(config: Any, num_tensors: int) -> None:
    """Refuse a config that would take absurd time or memory to build.

    Arguments
    ---------
    config : object
        What :func:`read_json` gave; only numbers and the lengths of lists are looked at.
    num_tensors : int
        Tensors in the file of weights: no encoder has more layers, nor more than 256.

    Raises
    ------
    InputError
        If a number is negative, not finite or too large, or a list too long.

    Example
    -------
    >>> check_sizes({"encoder": {"d_model": 10**9}}, 100)
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: encoder config: encoder.d_model is 1000000000: give a number from 0 to 8192.
    """
    for section in ("frontend", "subsampling", "encoder"):
        part = config.get(section) if isinstance(config, dict) else None
        for name, value in _leaves(part, section):
            key = name.rpartition(".")[2]
            if isinstance(value, list):
                if len(value) > MAX_ITEMS:
                    raise InputError(f"encoder config: {name} has {len(value)} items: give {MAX_ITEMS} at most.")
                continue
            largest = MAX_NUMBERS.get(key, MAX_NUMBER)
            if key == "num_layers":
                largest = min(num_tensors, MAX_LAYERS)
            if not 0 <= value <= largest:  # NaN neither
                raise InputError(f"encoder config: {name} is {value!s:.40}: give a number from 0 to {largest}.")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Numbers and lists under a value, with their names; a key may be anything, so it is cut short."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{str(key)[:40]}")
    elif isinstance(value, list):
        yield name, value
        for inner in value[:MAX_ITEMS]:
            yield from _leaves(inner, name)
    elif isinstance(value, int | float):
        yield name, value
