"""Where float32 has to stay float32, and where bfloat16 is faster."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch

from speechbrain_bestrq.machine import is_gpu, processor_vendor

_device: ContextVar[str | None] = ContextVar("device", default=None)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Switch autocast and reduced-precision float32 products and convolutions (TF32, bf16) off.

    The front end and the quantizer run under it: labels have to be a function of
    the audio, not of the precision that the encoder happens to train in. (In bf16
    about 1 % of BEST-RQ's labels change.)

    Arguments
    ---------
    device_type : str
        "cpu", "cuda"...: whose autocast to switch off.

    Example
    -------
    >>> product = torch.eye(2) @ torch.eye(2)
    >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision("cpu"):
    ...     (torch.eye(2) @ torch.eye(2)).dtype
    torch.float32
    """
    cudnn = torch.backends.cudnn
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, cudnn.conv, cudnn.rnn)
    previous = [backend.fp32_precision for backend in backends]
    # PyTorch keeps the same settings under older names too, and some kernels raise where the two disagree
    old_names = (
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (lambda: cudnn.allow_tf32, lambda value: setattr(cudnn, "allow_tf32", value), False),
    )
    restore = []
    for read, write, full in old_names:
        with suppress(RuntimeError):  # they disagreed before
            restore.append((write, read()))
        write(full)
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"  # the older name left it to what stands above them
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for write, value in restore:
            write(value)
        for backend, precision in zip(backends, previous, strict=True):
            backend.fp32_precision = precision


@contextmanager
def loading_for(device: str | None) -> Iterator[None]:
    """Let YAMLs that are loaded here ask of the device that they will train on.

    Arguments
    ---------
    device : str or None
        "cpu", "cuda:0"...: on a machine with a GPU, ``--device cpu`` makes a difference. None: a GPU, if there is one.

    Example
    -------
    >>> with loading_for("cpu"):
    ...     native_precision() in ("bf16", "fp32")
    True
    """
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def native_precision() -> str:
    """Say in which precision this machine trains fast: in bfloat16, if it multiplies in that faster than in float32.

    GPUs do since Ampere, CPUs that have AMX, and AMD's that have AVX512_BF16. Intel's that have it without AMX (or
    whose AMX a virtual machine hides) are slower in it, by a third for the small BEST-RQ; on others bfloat16 is
    emulated, and slower still (docs/LOG.md). For YAMLs of models that are trained on either (``precision:
    !apply:...``). The GPU is asked where there is one, unless the recipe was told to train on the CPU
    (:func:`loading_for`).

    Returns
    -------
    str
        "bf16" or "fp32".

    Example
    -------
    >>> native_precision() in ("bf16", "fp32")
    True
    """
    if torch.cuda.is_available() and is_gpu(_device.get()):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # before PyTorch 2.11 the public way to ask is not there
        native = torch.cpu._is_amx_tile_supported() or (
            torch.cpu._is_avx512_bf16_supported() and processor_vendor() != "GenuineIntel"
        )
    return "bf16" if native else "fp32"
