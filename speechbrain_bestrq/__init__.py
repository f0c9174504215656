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
    "LayerMix": "downstream",
    "LogMel": "frontend",
    "PretrainedEncoder": "pretrained",
    "PretrainingBrain": "pretraining",
    "RandomProjectionQuantizer": "quantizer",
    "SpanMasking": "masking",
    "SpeechEncoder": "encoder",
    "TransformerEncoder": "transformer",
    "Wav2Vec2": "wav2vec2",
    "WeightedEncoder": "downstream",
    "from_transformers": "convert_transformers",
    "load_encoder": "artefact",
    "save_encoder": "artefact",
    "span_mask": "masking",
    "to_transformers": "convert_transformers",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name's module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
