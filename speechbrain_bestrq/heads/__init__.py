"""What is trained on top of an encoder's features: the heads of the downstream tasks. None knows of tasks or files.

A head takes features (B, T, D) and their lengths in frames (B,). No result depends on what
stands in the padding, none has a loop over utterances or frames, and none makes the host
wait for the device.
"""

from speechbrain_bestrq.heads.classification import MeanPoolClassifier, RecurrentClassifier
from speechbrain_bestrq.heads.ctc import FeedForwardCTC, RecurrentCTC
from speechbrain_bestrq.heads.pooling import mean_pool, statistics_pool
from speechbrain_bestrq.heads.recurrent import BidirectionalLSTM
from speechbrain_bestrq.heads.speaker import AAMSoftmax, ECAPAClassifier, ECAPAEmbedder, XVectorEmbedder

__all__ = [
    "AAMSoftmax",
    "BidirectionalLSTM",
    "ECAPAClassifier",
    "ECAPAEmbedder",
    "FeedForwardCTC",
    "MeanPoolClassifier",
    "RecurrentCTC",
    "RecurrentClassifier",
    "XVectorEmbedder",
    "mean_pool",
    "statistics_pool",
]
