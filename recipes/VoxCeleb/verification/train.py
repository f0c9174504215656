#!/usr/bin/env python3
"""Verify speakers with a pre-trained encoder, frozen or fine-tuned: embeddings trained by AAM-softmax, cosine scores.

    python train.py hparams/bestrq.yaml --data_folder VOXCELEB1 --encoder ../../LibriSpeech/pretrain/results/bestrq/1000
    torchrun --nproc_per_node=2 train.py hparams/bestrq.yaml --data_folder /path/to/VoxCeleb1 --encoder ...
    python train.py hparams/bestrq.yaml --data_folder ... --encoder ... --test_only

A run that was stopped goes on where it was when the same command is given again; after a kill, from its last epoch.
What governs what:

    the encoder                 --encoder: an encoder folder, a pre-training run, a folder of transformers, a hub id,
                                random:<one of these>, fbank; frozen or not, which layers: `speech_encoder` of the YAML
    its hidden states on disk   --cache_features True (with --chunk_seconds null), --cache_folder
    the data                    --data_folder, --extra_folders, --trials; validation: --valid_share, --valid_trials;
                                few labels: --train_speakers
    what training hears         --chunk_seconds; null: whole utterances
    the embeddings, the rates   `embedder`, `classifier`, `mix`, *_optimizer, *_annealing
    score normalisation         --cohort_utterances, --cohort_top
    what comes out              results.json, scores_<list>.csv, errors_<list>.csv, scores_<list>.png,
                                layer_weights.png, train_log.txt
"""

import json
import logging
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process, run_on_main

from speechbrain_bestrq.corpora import prepare_voxceleb, read_trials
from speechbrain_bestrq.corpora.manifest import corpus_name, read_manifest
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_cache import FeatureCache, open_cache
from speechbrain_bestrq.metrics import equal_error_rate, minimum_detection_cost
from speechbrain_bestrq.recipe import load_recipe, own_folder, run_recipe
from speechbrain_bestrq.results import (
    check_tested_corpus,
    describe_data,
    interval,
    with_earlier_sets,
    write_errors,
    write_results,
)
from speechbrain_bestrq.task_brain import TaskBrain
from speechbrain_bestrq.task_data import make_task_loaders, repeat_for_chunks, take_classes, take_examples, too_short
from speechbrain_bestrq.verification import SpeakerEmbeddings, normalize_scores, speaker_means, write_scores
from speechbrain_bestrq.verification_errors import (
    cosine_embedding_loss,
    draw_scores,
    trial_errors,
    verification_rates,
)

logger = logging.getLogger(__name__)

#: What the preparation is told.
PREPARATION = (
    "data_folder",
    "extra_folders",
    "trials",
    "valid_share",
    "valid_trials",
    "sample_rate",
    "resample",
    "max_unreadable",
)
#: In the save folder: whom a run is trained on, in the order of the classes.
SPEAKERS_FILE = "speakers.json"
#: What is behind the metrics of each kind of scores.
ENDINGS = {"cosine": "", "snorm": "_snorm"}


class VerificationBrain(TaskBrain):
    """Speaker embeddings, trained to classify the speakers of training and judged by trials between others.

    The modules "embedder" and "classifier" are its head; ``trials`` gives those of VALID and TEST.
    """

    metric = "eer"
    # extra_folders are places, as data_folder: whom and what a run is trained on is compared by itself
    free_settings = TaskBrain.free_settings | {
        *("trials", "extra_folders", "cohort_utterances", "cohort_top", "cohort_seed")
    }

    def __init__(self, *arguments: Any, trials: dict[sb.Stage, list], **options: Any):
        super().__init__(*arguments, **options)
        self.trials = trials

    def compute_forward(self, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """Give embeddings (B, E)."""
        features, lengths, _ = self.listen(batch, stage)
        return self.modules.embedder(features, lengths)

    def compute_objectives(self, embeddings: torch.Tensor, batch: Any, stage: sb.Stage) -> torch.Tensor:
        """AAM-softmax in training; else collect the embeddings, of speakers that the classifier does not know."""
        if stage != sb.Stage.TRAIN:
            self._names += batch.id
            self._vectors.append(embeddings.float())
            return embeddings.new_zeros(())
        loss, _ = self.modules.classifier(embeddings, batch.label.to(self.device, non_blocking=True))
        return loss

    def start_metrics(self, stage: sb.Stage) -> None:
        """Start collecting."""
        self._names: list[str] = []
        self._vectors: list[torch.Tensor] = []

    def stage_metrics(self, stage: sb.Stage) -> dict[str, float]:
        """EER, minDCF and the cosine embedding loss of the stage's trials."""
        self.embeddings = SpeakerEmbeddings(self._names, torch.cat(self._vectors))
        trials = self.trials[stage]
        scores, targets = self.embeddings.score(trials), [label for label, _, _ in trials]
        return {
            "loss": cosine_embedding_loss(scores, trials),
            "eer": equal_error_rate(scores, targets),
            "mindcf": minimum_detection_cost(scores, targets),
        }


def read_rows(hparams: dict, manifests: dict[str, Path]) -> dict[str, dict]:
    """Read the manifests of training and validation, and of the test together with the cohort."""
    rows = {name: read_manifest(manifests[name]) for name in ("train", "valid", "test")}
    encoder, rate = hparams["speech_encoder"], hparams["sample_rate"]
    for name, part in rows.items():
        short = too_short(part, encoder, rate)
        if short and name != "train":
            raise InputError(
                f"{len(short)} utterances that trials name are shorter than a frame of the encoder, such as "
                f"{short[0]}: give trials without them."
            )
        if short:
            logger.warning(
                "%d of %d training utterances are shorter than a frame of the encoder, and are left out, such as %s",
                len(short),
                len(part),
                short[0],
            )
        for one in short:
            del part[one]
    rows["train"] = take_classes(rows["train"], "spk_id", hparams["train_speakers"], hparams["label_seed"])
    cohort = {}
    if hparams["cohort_utterances"] is not None:
        cohort = take_examples(rows["train"], "spk_id", hparams["cohort_utterances"], hparams["cohort_seed"])
    return {**rows, "test": {**rows["test"], **cohort}}


def check_settings(hparams: dict) -> None:
    """Refuse chunks and cohorts that cannot be, before any audio is read."""
    if hparams["cohort_utterances"] is not None:
        top = hparams["cohort_top"]
        if not isinstance(top, int) or top < 2:
            raise InputError(
                f"cohort_top: of {top} scores there is no deviation: give a number of at least 2, or leave score "
                "normalisation out, --cohort_utterances null."
            )
    seconds, rate = hparams["chunk_seconds"], hparams["sample_rate"]
    if seconds is None:
        return
    if hparams.get("cache_features"):
        raise InputError(
            "cache_features: True keeps the states of whole utterances, of which a chunk's are no part: give "
            "--chunk_seconds null too, or leave it out."
        )
    if seconds <= 0 or hparams["speech_encoder"].num_frames(round(seconds * rate)) < 1:
        raise InputError(f"chunk_seconds: {seconds} is less than a frame of the encoder: give more, or null.")


def dataio_prepare(
    hparams: dict, rows: dict[str, dict], cache: FeatureCache | None, device: str | None
) -> dict[str, Any]:
    """Make the loaders of training, validation and test."""
    speakers = {name: place for place, name in enumerate(speakers_of(rows["train"]))}

    @sb.utils.data_pipeline.takes("spk_id")
    @sb.utils.data_pipeline.provides("label")
    def label(spk_id):
        return speakers.get(spk_id, -1)  # who is in no training set has no class

    if hparams["chunk_seconds"] is not None:
        rows = {**rows, "train": repeat_for_chunks(rows["train"], hparams["chunk_seconds"])}
    return make_task_loaders(hparams, rows, [label], ["label"], cache, device)


def speakers_of(rows: dict[str, dict]) -> list[str]:
    """Name the speakers, in order."""
    return sorted({row["spk_id"] for row in rows.values()})


def keep_speakers(hparams: dict, speakers: list[str]) -> None:
    """Note whom a new run is trained on; refuse to go on with others, who may be on trial now."""
    path = Path(hparams["save_folder"]) / SPEAKERS_FILE
    if hparams["checkpointer"].find_checkpoint() is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(speakers), encoding="utf-8")
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    if known != speakers:
        raise InputError(
            f"{hparams['output_folder']} was trained on {len(known)} speakers, and these data and trials leave "
            f"{len(speakers)}, not the same: give those that it was trained with, or another output_folder."
        )


def evaluate(
    brain: VerificationBrain, hparams: dict, loader: Any, lists: dict[str, list], output_folder: Path
) -> dict[str, dict]:
    """Embed each utterance of the test and the cohort once by the best checkpoint, and score each list of trials."""
    seconds = brain.test(loader)["seconds"]
    if not if_main_process():
        return {}
    embeddings = brain.embeddings
    tested = {name for trials in lists.values() for _, *pair in trials for name in pair}
    strangers = [name for name in embeddings.names if name not in tested]
    cohort = speaker_means(embeddings, strangers) if strangers else None
    sets = {}
    for name, trials in lists.items():
        scores = {"cosine": embeddings.score(trials)}
        if cohort is not None:
            scores["snorm"] = normalize_scores(scores["cosine"], trials, embeddings, cohort, hparams["cohort_top"])
        sets[name] = {"trials": len(trials), "targets": sum(label for label, _, _ in trials)}
        for kind, values in scores.items():
            rates, ending = verification_rates(values, trials), ENDINGS[kind]
            sets[name]["resampled"] = "speakers" if rates.by_speaker else "trials"
            sets[name] |= {f"eer{ending}": interval(rates.eer), f"mindcf{ending}": interval(rates.mindcf)}
            logger.info("%s, %s: EER %s, minDCF %.3f", name, kind, rates.eer, rates.mindcf.value)
        sets[name]["evaluation_seconds"] = seconds
        write_scores(output_folder, name, trials, scores)
        errors = trial_errors({f"eer{ENDINGS[kind]}": values for kind, values in scores.items()}, trials)
        write_errors(output_folder, name, errors, list(errors[0]))
        draw_scores(scores["cosine"], trials, output_folder / f"scores_{name}.png", name)
    return sets


def main(arguments: list[str]) -> None:
    """Prepare, train, test."""
    hparams_file, run_opts, overrides, hparams = load_recipe(arguments)
    with own_folder(hparams["output_folder"]):
        run(hparams_file, run_opts, overrides, hparams)


def run(hparams_file: str, run_opts: Any, overrides: str, hparams: dict[str, Any]) -> None:
    """Prepare, train, test, with the output folder to ourselves."""
    check_settings(hparams)
    VerificationBrain.check_run(hparams["checkpointer"], hparams, run_opts)
    output_folder = Path(hparams["output_folder"])
    corpus = corpus_name(hparams["data_folder"], "VoxCeleb")
    if hparams["test_only"]:
        check_tested_corpus(output_folder, corpus)
    manifests = run_on_main(
        prepare_voxceleb,
        kwargs={
            "save_folder": output_folder / "manifests",
            "seed": hparams["valid_seed"],
            **{name: hparams[name] for name in PREPARATION},
        },
    )
    rows = read_rows(hparams, manifests)
    lists = read_trials(manifests["trials"])
    trials = {
        sb.Stage.VALID: read_trials(manifests["valid_trials"])["valid"],
        sb.Stage.TEST: next(iter(lists.values())),
    }

    # from here on the run's folder is written to
    sb.create_experiment_directory(output_folder, hparams_file, overrides)
    encoder = hparams["speech_encoder"]
    speakers = speakers_of(rows["train"])
    run_on_main(keep_speakers, args=[hparams, speakers])  # before an encoder runs for hours
    cache = open_cache(hparams, rows, run_opts["device"])
    loaders = dataio_prepare(hparams, rows, cache, run_opts["device"])
    modules = {
        "encoder": encoder,
        "mix": hparams["mix"],
        "embedder": hparams["embedder"],
        "classifier": hparams["classifier"](num_labels=len(speakers)),
    }
    brain = VerificationBrain(modules, hparams, run_opts, hparams["checkpointer"], trials=trials)
    brain.data = describe_data(corpus, rows["train"])
    if not hparams["test_only"]:
        brain.fit(hparams["epoch_counter"], loaders["train"], loaders["valid"])

    sets = evaluate(brain, hparams, loaders["test"], lists, output_folder)
    if if_main_process():
        results = {
            "task": "speaker verification",
            "corpus": corpus,
            "speakers": len(speakers),
            **brain.records(cache and cache.seconds),
            "sets": sets,
        }
        write_results(output_folder, with_earlier_sets(output_folder, results))


if __name__ == "__main__":
    run_recipe(main)
