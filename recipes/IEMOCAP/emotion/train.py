#!/usr/bin/env python3
"""Recognise emotions with a pre-trained encoder, frozen or fine-tuned, in a cross-validation over speakers or sessions.

    python train.py hparams/bestrq.yaml --data_folder IEMOCAP --encoder ../../LibriSpeech/pretrain/results/bestrq/1000
    python train.py hparams/bestrq.yaml --data_folder ... --encoder ... --fold Ses01F
    torchrun --nproc_per_node=2 train.py hparams/bestrq.yaml --data_folder ... --encoder ...
    python train.py hparams/bestrq.yaml --data_folder ... --encoder ... --test_only

A run that was stopped goes on when the same command is given again: finished folds are passed over, the one that was
begun goes on where it was; after a kill, from its last epoch. What governs what:

    the encoder                 --encoder: an encoder folder, a pre-training run, a folder of transformers, a hub id,
                                random:<one of these>, fbank; frozen or not, which layers: `speech_encoder` of the YAML
    its hidden states on disk   --cache_features True, --cache_folder; once for all folds
    the data                    --data_folder, --classes "{sad: null}", --kinds, --examples_per_class; --class_weights
    the cross-validation        --folds speaker or session; --fold: all, or the name of its test speaker or session
    the head, the rates         `head`, `mix`, *_optimizer, *_annealing
    what comes out              for each fold in a folder of its name, for all of them together in all/:
                                results.json, errors_test.csv, classes_test.csv, confusion_test.csv and .png;
                                layer_weights.png, train_log.txt
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import speechbrain as sb
from speechbrain.utils.distributed import if_main_process, run_on_main

from speechbrain_bestrq.checkpointing import AtomicCheckpointer
from speechbrain_bestrq.classification import (
    TEST_SET,
    ClassificationBrain,
    check_options,
    check_rows,
    run_classification,
)
from speechbrain_bestrq.classification_scores import SCORES, Answers, over_folds
from speechbrain_bestrq.corpora import fold_manifests, prepare_iemocap
from speechbrain_bestrq.corpora.iemocap import FOLDS
from speechbrain_bestrq.corpora.manifest import corpus_name, count_unreadable, read_manifest, summary_path
from speechbrain_bestrq.digests import file_digest
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_cache import FeatureCache, open_cache
from speechbrain_bestrq.locking import next_writer
from speechbrain_bestrq.recipe import build_hparams, command_line, load_recipe, own_folder, run_recipe
from speechbrain_bestrq.results import RESULTS_FILE, check_tested_corpus, read_results, write_results
from speechbrain_bestrq.task_data import refuse_too_short

logger = logging.getLogger(__name__)

#: What the preparation is told.
PREPARATION = ("data_folder", "classes", "folds", "kinds", "sample_rate", "resample", "max_unreadable")

ALL = "all"


def choose_folds(hparams: dict) -> list[str]:
    """Name the folds to run."""
    names = list(FOLDS.get(str(hparams["folds"]), ()))  # other values are refused by the preparation
    if hparams["fold"] == ALL or not names:
        return names
    if hparams["fold"] not in names:
        raise InputError(f"fold {str(hparams['fold'])!r} does not exist: give one of {', '.join(names)}, or {ALL}.")
    return [hparams["fold"]]


def check_folds(output_folder: Path, folds: str) -> None:
    """Refuse a folder whose results are of other folds: those of all together would take their place."""
    for other in FOLDS.keys() - {folds}:
        # not what a start left that failed
        made = (RESULTS_FILE, "save/CKPT+*")
        there = [name for name in FOLDS[other] for what in made if any((output_folder / name).glob(what))]
        if there:
            raise InputError(
                f"{output_folder / there[0]} is a fold of --folds {other}: give those, or another --output_folder."
            )


def check_save_folder(hparams: dict) -> None:
    """Refuse another place for checkpoints: it would be one for all folds."""
    if hparams["fold"] != ALL:
        return
    for key, place in (
        ("fold_folder", Path(hparams["output_folder"]) / hparams["fold"]),
        ("save_folder", Path(hparams["fold_folder"]) / "save"),
    ):
        if Path(hparams[key]) != place:
            raise InputError(
                f"{key} '{hparams[key]}' would be that of all folds: leave it out, and give --output_folder."
            )


def checkpointers_of(hparams: dict, folds: list[str]) -> list[AtomicCheckpointer]:
    """The checkpointers of folds that were begun, or are to be tested; of none, that of the YAML."""
    if hparams["fold"] != ALL:
        return [hparams["checkpointer"]]
    places = [Path(hparams["output_folder"]) / fold / "save" for fold in folds]
    begun = [AtomicCheckpointer(checkpoints_dir=place) for place in places if place.is_dir() or hparams["test_only"]]
    return begun or [hparams["checkpointer"]]


def prepare(hparams: dict) -> dict[str, Path]:
    """Write the manifests, one job after another: those of single folds begin side by side."""
    folder = Path(hparams["output_folder"]) / "manifests"
    with next_writer(folder, "output_folder"):
        return prepare_iemocap(save_folder=folder, **{name: hparams[name] for name in PREPARATION})


def load_fold(hparams_file: str, overrides: str, run_opts: Any, fold: str) -> tuple[str, dict[str, Any]]:
    """Build all anew for one fold, so that nothing of one reaches the next; give the overrides and what was built."""
    kept = [line for line in overrides.splitlines() if not line.startswith("fold:")]
    overrides = "\n".join([*kept, f"fold: {fold}"])
    return overrides, build_hparams(Path(hparams_file).read_text(encoding="utf-8"), overrides, run_opts)


def mark_folds(hparams_file: str, overrides: str, hparams: dict, sides: dict[str, dict[str, Path]]) -> dict:
    """Digest for each fold what its results are a function of: options, encoder, manifests."""
    text = Path(hparams_file).read_text(encoding="utf-8")
    options = sorted(line for line in overrides.splitlines() if line and not line.startswith(("fold:", "test_only:")))
    marks = {}
    for fold, paths in sides.items():
        files = [file for path in paths.values() for file in (path, summary_path(path))]
        facts = [
            text,
            options,
            ClassificationBrain.composed_settings_of(hparams),
            hparams["speech_encoder"].identity(),
            [file_digest(file) for file in files],
        ]
        marks[fold] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return marks


def find_finished(output_folder: Path, marks: dict[str, str]) -> list[str]:
    """Name the folds that the same command has finished."""
    finished = []
    for fold, mark in marks.items():
        try:
            if read_results(output_folder / fold).get("mark") == mark:
                finished.append(fold)
        except InputError:  # not finished
            continue
    return finished


def run_fold(
    hparams: dict,
    run_opts: Any,
    rows: dict[str, dict],
    labels: list[str],
    cache: FeatureCache | None,
    **facts: Any,
) -> None:
    """Train, choose and test on the three sides of a fold."""
    logger.info("fold %s: %s", hparams["fold"], ", ".join(f"{name} {len(part)} turns" for name, part in rows.items()))
    run_classification(
        {**hparams, "output_folder": hparams["fold_folder"]},
        run_opts,
        rows,
        "emo",
        labels,
        cache,
        task="emotion recognition",
        corpus=corpus_name(hparams["data_folder"], "IEMOCAP"),
        folds=hparams["folds"],
        fold=hparams["fold"],
        **facts,
    )


def pool(output_folder: Path, folds: list[str]) -> None:
    """Put the folds together: mean and deviation of their scores, and the scores of all their answers."""
    each = {fold: read_results(output_folder / fold) for fold in folds}
    records = list(each.values())
    answers = Answers(records[0]["labels"])
    for fold in folds:
        answers.extend(Answers.read(output_folder / fold, TEST_SET, answers.labels))
    tested = {fold: results["sets"][TEST_SET] for fold, results in each.items()}
    spread = over_folds(tested)
    for score, value in answers.intervals.items():
        mean, deviation = (100 * spread[score][name] for name in ("mean", "deviation"))
        logger.info("%s: %.2f ± %.2f %% over %d folds; all turns: %s", score, mean, deviation, len(folds), value)
    answers.write(output_folder / ALL, TEST_SET)
    seconds, mixes, hours = (
        [results[key] for results in records] for key in ("seconds", "layer_weights", "label_hours")
    )
    evaluation = sum(one["evaluation_seconds"] for one in tested.values())
    write_results(
        output_folder / ALL,
        {
            "command": command_line(),  # if the folds have no common one
            **agreed(records),
            "fold": ALL,
            "encoder": agreed([results["encoder"] for results in records]),
            "label_hours": None if None in hours else float(np.mean(hours)),
            "layer_weights": None if None in mixes else np.mean(mixes, axis=0).tolist(),
            "seconds": {stage: sum(one[stage] for one in seconds) for stage in seconds[0]},
            "device_hours": sum(results["device_hours"] for results in records),
            "each_fold": {fold: {name: one[name]["value"] for name in SCORES} for fold, one in tested.items()},
            "sets": {TEST_SET: {**answers.describe(), "over_folds": spread, "evaluation_seconds": evaluation}},
        },
    )


def agreed(records: list[dict]) -> dict:
    """What all records have alike."""
    return {key: value for key, value in records[0].items() if all(one.get(key) == value for one in records)}


def main(arguments: list[str]) -> None:
    """Prepare; train and test on each fold; put them together."""
    hparams_file, run_opts, overrides, hparams = load_recipe(arguments)
    # single folds may run side by side
    with own_folder(hparams["output_folder"], None if hparams["fold"] == ALL else hparams["fold_folder"]):
        run(hparams_file, run_opts, overrides, hparams)


def run(hparams_file: str, run_opts: Any, overrides: str, hparams: dict[str, Any]) -> None:
    """Prepare; train and test on each fold; put them together, with the output folder to ourselves."""
    check_options(hparams)
    folds = choose_folds(hparams)
    output_folder = Path(hparams["output_folder"])
    check_folds(output_folder, str(hparams["folds"]))
    check_save_folder(hparams)
    for checkpointer in checkpointers_of(hparams, folds):
        ClassificationBrain.check_run(checkpointer, hparams, run_opts)
    if hparams["test_only"]:
        for fold in {*folds, hparams["fold"]}:
            check_tested_corpus(output_folder / fold, corpus_name(hparams["data_folder"], "IEMOCAP"))
    # an option is merged into the mapping of the YAML: null is how it takes a label out
    if not isinstance(hparams["classes"], dict):
        raise InputError(
            f"classes says what each label becomes, such as {{ang: ang, exc: hap}}, not {hparams['classes']}."
        )
    hparams["classes"] = {label: str(name) for label, name in hparams["classes"].items() if name is not None}
    labels = sorted(set(hparams["classes"].values()))
    check_rows({}, "emo", labels)
    manifests = run_on_main(prepare, args=[hparams])
    unreadable = count_unreadable(manifests[ALL], ALL)
    turns = read_manifest(manifests[ALL])
    refuse_too_short(turns, hparams["speech_encoder"], hparams["sample_rate"])
    check_rows({ALL: turns}, "emo", labels)
    sides = {fold: fold_manifests(manifests, fold) for fold in folds}

    # from here on the folders of the folds are written to
    cache = open_cache(hparams, {ALL: turns}, run_opts["device"])
    marks = mark_folds(hparams_file, overrides, hparams, sides)
    finished = run_on_main(find_finished, args=[output_folder, marks])
    for fold in folds:
        if fold in finished and not hparams["test_only"]:
            logger.info("fold %s: finished before, see %s", fold, output_folder / fold)
            continue
        fold_overrides, loaded = load_fold(hparams_file, overrides, run_opts, fold)
        sb.create_experiment_directory(loaded["fold_folder"], hparams_file, fold_overrides)
        rows = {name: read_manifest(path) for name, path in sides[fold].items()}
        # to test what is half trained does not finish it
        mark = None if hparams["test_only"] and fold not in finished else marks[fold]
        run_fold(loaded, run_opts, rows, labels, cache, mark=mark, unreadable=unreadable)
    if hparams["fold"] == ALL:
        sb.create_experiment_directory(output_folder / ALL, hparams_file, overrides)
        if if_main_process():
            pool(output_folder, folds)


if __name__ == "__main__":
    run_recipe(main)
