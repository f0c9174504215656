"""What several benchmarks share: lengths like LibriSpeech's, and what the machine reaches at best."""

import time

import numpy as np
import torch

RATE = 16000
#: Durations of LibriSpeech's training utterances at every tenth of them, seconds.
LIBRISPEECH_DECILES = (1.3, 4.9, 8.7, 11.6, 13.2, 14.0, 14.6, 15.1, 15.6, 16.0, 24.5)


def librispeech_lengths(utterances: int) -> np.ndarray:
    """Lengths in samples, shape (N,), distributed as LibriSpeech's; always the same."""
    draw = np.random.default_rng(0)
    seconds = np.interp(draw.random(utterances), np.linspace(0, 1, len(LIBRISPEECH_DECILES)), LIBRISPEECH_DECILES)
    return np.rint(seconds * RATE).astype(int)


def wait(device: str) -> None:
    """Wait for what a GPU still computes."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matrix_product_flops(device: str, precision: str) -> float:
    """FLOP/s of a large matrix product on this device, the best of five."""
    size = 8192 if device.startswith("cuda") else 1536
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])
