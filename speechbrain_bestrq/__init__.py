"""Self-supervised speech pre-training with BEST-RQ, as a plug-in of SpeechBrain."""

__version__ = "0.1.0"
