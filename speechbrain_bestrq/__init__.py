"""Self-supervised speech pre-training with BEST-RQ, as a plug-in of SpeechBrain.

The public names can be had from the package itself; they are imported on first use,
so that ``sb-bestrq --help`` need not wait for PyTorch.

Example
-------
>>> import speechbrain_bestrq
>>> speechbrain_bestrq.BestRQ.__module__
'speechbrain_bestrq.bestrq'
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "BestRQ": "bestrq",
    "ConformerEncoder": "encoder",
    "ConvSubsampling": "frontend",
    "LogMel": "frontend",
    "PretrainingBrain": "pretraining",
    "RandomProjectionQuantizer": "quantizer",
    "SpanMasking": "masking",
    "SpeechEncoder": "encoder",
    "load_encoder": "pretrained",
    "save_encoder": "pretrained",
    "span_mask": "masking",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name's module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
