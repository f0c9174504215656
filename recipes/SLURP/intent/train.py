#!/usr/bin/env python3
"""Name the scenario, action or intent of a command with a pre-trained encoder, frozen or fine-tuned.

    python train.py hparams/bestrq.yaml --data_folder SLURP --encoder ../../LibriSpeech/pretrain/results/bestrq/1000
    torchrun --nproc_per_node=2 train.py hparams/bestrq.yaml --data_folder /path/to/SLURP --encoder ...
    python train.py hparams/bestrq.yaml --data_folder ... --encoder ... --test_only

A run that was stopped goes on where it was when the same command is given again; after a kill, from its last epoch.
What governs what:

    the encoder                 --encoder: an encoder folder, a pre-training run, a folder of transformers, a hub id,
                                random:<one of these>, fbank; frozen or not, which layers: `speech_encoder` of the YAML
    its hidden states on disk   --cache_features True, --cache_folder
    the data                    --data_folder, --microphones, --synthetic, --examples_per_class
    what is named               --target scenario, action or intent; --class_weights
    the head, the rates         `head`, `mix`, *_optimizer, *_annealing
    what comes out              results.json, errors_test.csv, classes_test.csv, confusion_test.csv and .png,
                                layer_weights.png, train_log.txt
"""

from pathlib import Path
from typing import Any

import speechbrain as sb
from speechbrain.utils.distributed import run_on_main

from speechbrain_bestrq.classification import (
    ClassificationBrain,
    check_options,
    check_rows,
    run_classification,
)
from speechbrain_bestrq.corpora import prepare_slurp
from speechbrain_bestrq.corpora.manifest import corpus_name, count_unreadable, read_manifest
from speechbrain_bestrq.corpora.slurp import TARGETS
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_cache import open_cache
from speechbrain_bestrq.recipe import load_recipe, own_folder, run_recipe
from speechbrain_bestrq.results import check_tested_corpus
from speechbrain_bestrq.task_data import refuse_too_short

#: What the preparation is told.
PREPARATION = ("data_folder", "microphones", "synthetic", "sample_rate", "resample", "max_unreadable")


def read_rows(hparams: dict, manifests: dict[str, Path]) -> tuple[dict[str, dict], list[str]]:
    """Read the manifests, and the labels: those of training."""
    sets = {name: read_manifest(manifests[name]) for name in ("train", "valid", "test")}
    labels = sorted({row[hparams["target"]] for row in sets["train"].values()})
    check_rows(sets, hparams["target"], labels)
    for rows in sets.values():
        refuse_too_short(rows, hparams["speech_encoder"], hparams["sample_rate"])
    return sets, labels


def main(arguments: list[str]) -> None:
    """Prepare, train, test."""
    hparams_file, run_opts, overrides, hparams = load_recipe(arguments)
    with own_folder(hparams["output_folder"]):
        run(hparams_file, run_opts, overrides, hparams)


def run(hparams_file: str, run_opts: Any, overrides: str, hparams: dict[str, Any]) -> None:
    """Prepare, train, test, with the output folder to ourselves."""
    check_options(hparams)
    ClassificationBrain.check_run(hparams["checkpointer"], hparams, run_opts)
    if hparams["target"] not in TARGETS:
        raise InputError(f"target is one of {', '.join(TARGETS)}, not {hparams['target']!r}.")
    output_folder = Path(hparams["output_folder"])
    corpus = corpus_name(hparams["data_folder"], "SLURP")
    if hparams["test_only"]:
        check_tested_corpus(output_folder, corpus)
    manifests = run_on_main(
        prepare_slurp,
        kwargs={"save_folder": output_folder / "manifests", **{name: hparams[name] for name in PREPARATION}},
    )
    sets, labels = read_rows(hparams, manifests)

    # from here on the run's folder is written to
    sb.create_experiment_directory(output_folder, hparams_file, overrides)
    run_classification(
        hparams,
        run_opts,
        sets,
        hparams["target"],
        labels,
        open_cache(hparams, sets, run_opts["device"]),
        task="intent classification",
        corpus=corpus,
        target=hparams["target"],
        microphones=sorted(hparams["microphones"]),
        unreadable=count_unreadable(manifests["test"], "test"),
    )


if __name__ == "__main__":
    run_recipe(main)
