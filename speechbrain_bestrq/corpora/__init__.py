"""Preparation of corpora: audio on disk in, CSV manifests out. Nothing here knows of models."""

from speechbrain_bestrq.corpora._options import AUDIO_EXTENSIONS
from speechbrain_bestrq.corpora._trials import read_trials
from speechbrain_bestrq.corpora.folder import prepare_folder
from speechbrain_bestrq.corpora.iemocap import fold_manifests, iemocap_folds, prepare_iemocap
from speechbrain_bestrq.corpora.librispeech import prepare_librispeech
from speechbrain_bestrq.corpora.manifest import corpus_name, read_manifest, read_summary, write_manifest
from speechbrain_bestrq.corpora.prepare import prepare_corpus
from speechbrain_bestrq.corpora.slurp import prepare_slurp
from speechbrain_bestrq.corpora.voxceleb import prepare_voxceleb

__all__ = [
    "AUDIO_EXTENSIONS",
    "corpus_name",
    "fold_manifests",
    "iemocap_folds",
    "prepare_corpus",
    "prepare_folder",
    "prepare_iemocap",
    "prepare_librispeech",
    "prepare_slurp",
    "prepare_voxceleb",
    "read_manifest",
    "read_summary",
    "read_trials",
    "write_manifest",
]
