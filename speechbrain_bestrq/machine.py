"""What a figure was measured on."""

import os
import platform
import resource
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from speechbrain_bestrq.errors import InputError

#: Where Linux has the devices.
DEVICES = Path("/dev")


def device_name(device: str | torch.device = "cpu") -> str:
    """Name the GPU, or the processor and its cores.

    Arguments
    ---------
    device : str or torch.device
        ``cuda``, ``cuda:1``..., else the processor.

    Returns
    -------
    str

    Example
    -------
    >>> device_name("cpu").endswith(" cores)")
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_of_processor('model name') or platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def usable_cores() -> int:
    """Count the cores that this process may use, which a scheduler may have made fewer than there are.

    Example
    -------
    >>> 1 <= usable_cores() <= os.cpu_count()
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_gpus_usable(option: str = "--device cpu") -> None:
    """Refuse to leave a GPU idle because PyTorch was built for a newer driver, of which it says no more than a warning.

    GPUs that ``CUDA_VISIBLE_DEVICES`` hides, or that this process may not open, are not meant.

    Arguments
    ---------
    option : str
        By which one goes without, for the message.

    Raises
    ------
    InputError
        If there is an NVIDIA GPU that PyTorch cannot use.

    Example
    -------
    >>> if torch.cuda.is_available():
    ...     check_gpus_usable()
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    hidden = not (first.isdigit() or first.startswith(("GPU-", "MIG-")))  # as SLURM's NoDevFiles
    if hidden or torch.cuda.is_available() or not any(map(_can_be_opened, DEVICES.glob("nvidia[0-9]*"))):
        return
    raise InputError(
        f"there is an NVIDIA GPU here, but torch {torch.__version__} cannot use it, mostly since it was built for a "
        "newer driver than nvidia-smi tells: install torch and torchaudio for this one (docs/dependencies.md), or give "
        f"{option}."
    )


def is_gpu(device: torch.device | str | None) -> bool:
    """Tell whether a device is one of NVIDIA's GPUs.

    Arguments
    ---------
    device : torch.device or str or None
        None is the one that SpeechBrain takes where none is named: a GPU, if there is one.

    Returns
    -------
    bool

    Example
    -------
    >>> is_gpu("cuda:1"), is_gpu("cpu")
    (True, False)
    """
    return torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"


def _can_be_opened(device: Path) -> bool:
    """Whether a device is this process's to use: a scheduler may show all of them and allow some."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError:
        return False
    return True


def processor_vendor() -> str:
    """Name who made the processor, as it does itself.

    Returns
    -------
    str
        "GenuineIntel", "AuthenticAMD"...; empty where the system does not tell.

    Example
    -------
    >>> isinstance(processor_vendor(), str)
    True
    """
    return _of_processor("vendor_id")


def _of_processor(key: str) -> str:
    """What Linux says of the first processor; empty where it says nothing."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def peak_memory_gb(device: str | torch.device = "cpu") -> float:
    """Tell the most memory that has been held.

    Arguments
    ---------
    device : str or torch.device
        Of a GPU, what tensors have held there; else what this process has.

    Returns
    -------
    float
        GB.

    Example
    -------
    >>> 0.01 < peak_memory_gb() < 1000
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def package_versions() -> dict[str, str]:
    """Versions that a figure depends on, by package; PyTorch's with what it was built for.

    Example
    -------
    >>> sorted(package_versions())
    ['speechbrain', 'speechbrain_bestrq', 'torch']
    """
    packages = ("speechbrain", "speechbrain_bestrq")
    return {"torch": torch.__version__, **{name: version(name) for name in packages}}


def commit() -> str | None:
    """The commit of this checkout, "-dirty" behind it where tracked files have changed; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def describe_machine(device: str | torch.device = "cpu") -> str:
    """Say in a line what stands beside a measured figure: device, threads, version of PyTorch.

    Arguments
    ---------
    device : str or torch.device
        As for :func:`device_name`.

    Returns
    -------
    str
    """
    return f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
