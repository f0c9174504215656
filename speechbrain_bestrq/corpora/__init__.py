"""Preparation of corpora: audio on disk in, CSV manifests out. Nothing here knows of models."""

from speechbrain_bestrq.corpora.folder import prepare_folder
from speechbrain_bestrq.corpora.librispeech import prepare_librispeech
from speechbrain_bestrq.corpora.manifest import corpus_name, read_manifest, read_summary, write_manifest

__all__ = ["corpus_name", "prepare_folder", "prepare_librispeech", "read_manifest", "read_summary", "write_manifest"]
