#!/usr/bin/env python3
"""Recognise speech with a pre-trained encoder, frozen or fine-tuned, by CTC, with or without a language model.

    python train.py hparams/bestrq.yaml --data_folder /path/to/LibriSpeech --encoder ../pretrain/results/bestrq/1000
    torchrun --nproc_per_node=2 train.py hparams/bestrq.yaml --data_folder /path/to/LibriSpeech --encoder ...
    python train.py hparams/bestrq.yaml --data_folder ... --encoder ... --test_only --language_model lm.arpa

A run that was stopped goes on where it was when the same command is given again; after a kill, from its last epoch.
What governs what:

    the encoder                 --encoder: an encoder folder, a pre-training run, a folder of transformers, a hub id,
                                random:<one of these>, fbank; frozen or not, which layers: `speech_encoder` of the YAML
    its hidden states on disk   --cache_features True, --cache_folder
    the data                    --data_folder, --train_splits, --valid_splits, --test_splits, --label_hours
    the units                   `tokenizer`: characters, or SentencePiece trained on the transcripts
    the head, the rates         `head`, `mix`, *_optimizer, *_annealing
    decoding                    --language_model, --beam_search, --beam_size, --alphas, --betas, --decoding_workers
    what comes out              results.json, errors_<set>.csv, wer_<set>.txt, layer_weights.png, train_log.txt
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.utils.distributed import ddp_broadcast, if_main_process, run_on_main

from speechbrain_bestrq.corpora import prepare_librispeech
from speechbrain_bestrq.corpora.manifest import corpus_name, count_unreadable, read_manifest
from speechbrain_bestrq.ctc_decoding import (
    BeamDecoder,
    check_language_model,
    decode_on_all_ranks,
    greedy_decode,
    tune,
)
from speechbrain_bestrq.error_rates import ErrorRates
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_cache import FeatureCache, open_cache
from speechbrain_bestrq.recipe import load_recipe, own_folder, run_recipe
from speechbrain_bestrq.results import (
    check_tested_corpus,
    describe_data,
    interval,
    with_earlier_sets,
    write_errors,
    write_results,
)
from speechbrain_bestrq.task_brain import TaskBrain, check_metrics
from speechbrain_bestrq.task_data import make_task_loaders, refuse_too_short, take_hours
from speechbrain_bestrq.text import check_texts, find_unalignable, frames_needed

logger = logging.getLogger(__name__)

#: What the preparation is told.
PREPARATION = (
    "data_folder",
    "train_splits",
    "valid_splits",
    "test_splits",
    "sample_rate",
    "resample",
    "max_unreadable",
)

#: What can choose the checkpoint and drive the learning rates: the lower the better.
METRICS = ("wer", "cer", "loss")


class ASRBrain(TaskBrain):
    """CTC over the mixed hidden states."""

    free_settings = TaskBrain.free_settings | set(
        "test_splits beam_search language_model beam_size alphas betas tuning_utterances decoding_workers".split()
    )

    @property
    def metric(self) -> str:
        """The validation metric that chooses the checkpoint."""
        return self.hparams.valid_metric

    def compute_forward(self, batch: Any, stage: sb.Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """Give log-probabilities (B, T, V) of the units, and frames (B,), on the host."""
        features, lengths, host_lengths = self.listen(batch, stage)
        return self.modules.head(features, lengths).float().log_softmax(-1), host_lengths

    def compute_objectives(
        self, predictions: tuple[torch.Tensor, torch.Tensor], batch: Any, stage: sb.Stage
    ) -> torch.Tensor:
        """CTC loss, a mean over utterances of the loss of a unit; collect what was recognised."""
        log_probs, lengths = predictions
        units = [torch.as_tensor(one) for one in batch.units]
        counts = torch.tensor([len(one) for one in units])
        losses = torch.nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            torch.cat(units).to(self.device, non_blocking=True),
            lengths,
            counts,
            reduction="none",
            zero_infinity=True,
        ) / counts.clamp(min=1).to(self.device, non_blocking=True)
        if stage != sb.Stage.TRAIN:
            self._collect(log_probs, lengths, batch)
            possible = [frames_needed(one) <= frames for one, frames in zip(batch.units, lengths.tolist(), strict=True)]
            self._losses.append(losses[torch.tensor(possible, device=self.device)])
        return losses.mean()

    def _collect(self, log_probs: torch.Tensor, lengths: torch.Tensor, batch: Any) -> None:
        tokenizer = self.hparams.tokenizer
        texts = [tokenizer.decode(units) for units in greedy_decode(log_probs, lengths, tokenizer.blank)]
        references = [tokenizer.normalize(reference) for reference in batch.wrd]
        self.rates.append(batch.id, texts, references, batch.spk_id)
        if self.keep_log_probs:
            for one, frames in zip(log_probs.cpu(), lengths.tolist(), strict=True):
                self.log_probs.append(one[:frames].clone())
            self.heard.append((batch.id, references, batch.spk_id))

    #: Whether the log-probabilities are kept, for a beam search after the test.
    keep_log_probs = False

    def start_metrics(self, stage: sb.Stage) -> None:
        """Start collecting."""
        self.rates = ErrorRates()
        self._losses: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []
        self.heard: list[tuple[list[str], list[str], list[str]]] = []

    def stage_metrics(self, stage: sb.Stage) -> dict[str, float]:
        """Word and character error rate of the greedy decoding; the loss, of the utterances that CTC can align."""
        losses = torch.cat(self._losses).double()
        loss = float(losses.sum()) / max(len(losses), 1)
        return {"loss": loss, "wer": self.rates.rate("wer"), "cer": self.rates.rate("cer")}


def check_options(hparams: dict) -> None:
    """Refuse options that are out of range, before anything is prepared."""
    check_metrics(hparams, METRICS)
    for key, least, what in (("alphas", 0.0, "numbers, none below 0"), ("betas", -math.inf, "numbers")):
        weights = hparams[key]
        if not (isinstance(weights, list) and weights and all(isinstance(one, int | float) for one in weights)):
            raise InputError(f"{key} is a list of {what}, such as [0.5, 1.0], not {weights!r}.")
        if min(weights) < least:
            raise InputError(f"{key} has {min(weights)!r}: give {what}.")
    for key in ("beam_size", "decoding_workers", "tuning_utterances"):
        if not isinstance(hparams[key], int) or hparams[key] < 1:
            raise InputError(f"{key} is {hparams[key]!r}: give a whole number, 1 at least.")


def read_rows(hparams: dict, manifests: dict[str, Path]) -> dict[str, dict]:
    """Read the manifests of training, validation and each test set; check the transcripts."""
    rows = {name: read_manifest(manifests[name]) for name in ("train", "valid", *hparams["test_splits"])}
    for name, part in rows.items():
        silent = [one for one, row in part.items() if not row["wrd"]]
        if silent:
            raise InputError(
                f"{len(silent)} utterances of '{name}' have no transcript, such as {silent[0]}: complete their "
                "chapters' .trans.txt, or leave the split out."
            )
    rows["train"] = take_hours(rows["train"], hparams["label_hours"], hparams["label_seed"])
    return rows


def prepare_texts(hparams: dict, rows: dict[str, dict]) -> None:
    """Train the tokenizer; leave out of training what has fewer encoder frames than CTC needs for its transcript."""
    tokenizer, encoder, rate = hparams["tokenizer"], hparams["speech_encoder"], hparams["sample_rate"]
    tokenizer.fit({name: row["wrd"] for name, row in rows["train"].items()})
    check_texts(tokenizer, {name: row["wrd"] for part in rows.values() for name, row in part.items()})
    if hparams["language_model"]:
        check_language_model(hparams["language_model"], tokenizer)
    for name, part in rows.items():
        if name != "train":
            refuse_too_short(part, encoder, rate)
        fastest = max(hparams.get("speeds", [100])) / 100 if name == "train" else 1
        units = {one: tokenizer.encode(row["wrd"]) for one, row in part.items()}
        frames = {one: encoder.num_frames(round(row["duration"] * rate / fastest)) for one, row in part.items()}
        hopeless = find_unalignable(frames, units, "training" if name == "train" else f"'{name}'")
        if name in ("train", "valid") and len(hopeless) == len(part):
            raise InputError(
                f"no utterance of '{name}' has as many encoder frames as its transcript needs: check the audio."
            )
        if name == "train":
            for one in hopeless:
                del part[one]


def dataio_prepare(
    hparams: dict, rows: dict[str, dict], cache: FeatureCache | None, device: str | None
) -> dict[str, Any]:
    """Make the loaders of training, validation and each test set."""

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("units")
    def units(wrd):
        return hparams["tokenizer"].encode(wrd)

    return make_task_loaders(hparams, rows, [units], ["units", "wrd", "spk_id"], cache, device)


def make_decoder(hparams: dict) -> BeamDecoder | None:
    """Make the beam search, if one is asked for."""
    if not (hparams["language_model"] or hparams["beam_search"]):
        return None
    options = {"beam_size": hparams["beam_size"], "workers": hparams["decoding_workers"]}
    return BeamDecoder(hparams["tokenizer"], hparams["language_model"], **options)


def search(brain: ASRBrain, decoder: BeamDecoder) -> ErrorRates:
    """Decode what the last test kept."""
    rates, texts = ErrorRates(), iter(decode_on_all_ranks(decoder, brain.log_probs))
    for names, references, speakers in brain.heard:
        rates.append(names, [next(texts) for _ in names], references, speakers)
    return rates


def tuning_set(brain: ASRBrain, utterances: int) -> tuple[list[torch.Tensor], list[str]]:
    """Give the log-probabilities and transcripts of utterances spread evenly over what the last test kept."""
    references = [reference for _, references, _ in brain.heard for reference in references]
    step = max(len(references) / utterances, 1.0)
    places = [int(place * step) for place in range(min(utterances, len(references)))]
    return [brain.log_probs[place] for place in places], [references[place] for place in places]


def evaluate(brain: ASRBrain, hparams: dict, loaders: dict[str, Any], output_folder: Path) -> dict[str, dict]:
    """Test the best checkpoint on each set, greedily and by beam search, which is tuned on the validation set."""
    decoder = make_decoder(hparams)
    brain.keep_log_probs = decoder is not None
    tuned, suffix = {}, "beam"
    if hparams["language_model"]:
        brain.test(loaders["valid"])
        heard = tuning_set(brain, hparams["tuning_utterances"])
        tuning = tune(decoder, *heard, hparams["alphas"], hparams["betas"], decode_on_all_ranks)
        for point in tuning.table:
            logger.info("valid: alpha %(alpha)g, beta %(beta)g: WER %(wer).4f, CER %(cer).4f", point)
        # one answer for all ranks, which share the decoding
        alpha, beta = ddp_broadcast((tuning.alpha, tuning.beta), src=0)
        decoder = decoder.with_weights(alpha, beta)
        tuned, suffix = {"alpha": alpha, "beta": beta}, "lm"
    sets = {}
    for name in hparams["test_splits"]:
        metrics = brain.test(loaders[name])
        found = {"": brain.rates}
        resampled = "speakers" if brain.rates.by_speaker else "utterances"
        sets[name] = {
            "loss": metrics["loss"],
            "resampled": resampled,
            "evaluation_seconds": metrics["seconds"],
            **tuned,
        }
        if decoder is not None:
            started = time.perf_counter()
            found[f"_{suffix}"] = search(brain, decoder)
            sets[name]["decoding_seconds"] = time.perf_counter() - started
        rows = [{} for _ in range(len(brain.rates))]
        for ending, rates in found.items():
            sets[name] |= {f"wer{ending}": interval(rates.wer), f"cer{ending}": interval(rates.cer)}
            logger.info("%s%s: WER %s, CER %s", name, ending, rates.wer, rates.cer)
            for row, errors in zip(rows, rates.per_utterance(), strict=True):
                row |= {_column(key, ending): value for key, value in errors.items()}
            if if_main_process():
                rates.write(output_folder / f"wer_{name}{ending}.txt")
        if if_main_process():
            write_errors(output_folder, name, rows, list(rows[0]))
    return sets


def _column(key: str, ending: str) -> str:
    """ "wer_errors" of the search "_lm" is "wer_lm_errors"."""
    metric, _, kind = key.partition("_")
    return f"{metric}{ending}_{kind}" if kind else key


def main(arguments: list[str]) -> None:
    """Prepare, train, test."""
    hparams_file, run_opts, overrides, hparams = load_recipe(arguments)
    with own_folder(hparams["output_folder"]):
        run(hparams_file, run_opts, overrides, hparams)


def run(hparams_file: str, run_opts: Any, overrides: str, hparams: dict[str, Any]) -> None:
    """Prepare, train, test, with the output folder to ourselves."""
    check_options(hparams)
    output_folder = Path(hparams["output_folder"])
    ASRBrain.check_run(hparams["checkpointer"], hparams, run_opts)
    corpus = corpus_name(hparams["data_folder"], "LibriSpeech")
    if hparams["test_only"]:
        check_tested_corpus(output_folder, corpus)
    manifests = run_on_main(
        prepare_librispeech,
        kwargs={
            "save_folder": output_folder / "manifests",
            "transcripts": True,
            **{name: hparams[name] for name in PREPARATION},
        },
    )
    unreadable = {name: count_unreadable(manifests[name], name) for name in hparams["test_splits"]}
    rows = read_rows(hparams, manifests)
    prepare_texts(hparams, rows)

    # from here on the run's folder is written to
    sb.create_experiment_directory(output_folder, hparams_file, overrides)
    encoder = hparams["speech_encoder"]
    cache = open_cache(hparams, rows, run_opts["device"])
    loaders = dataio_prepare(hparams, rows, cache, run_opts["device"])
    modules = {"encoder": encoder, "head": hparams["head"](num_labels=hparams["tokenizer"].size)}
    if "mix" in hparams:
        modules["mix"] = hparams["mix"]
    brain = ASRBrain(modules, hparams, run_opts, hparams["checkpointer"])
    brain.data = describe_data(corpus, rows["train"])
    if not hparams["test_only"]:
        brain.fit(hparams["epoch_counter"], loaders["train"], loaders["valid"])

    sets = evaluate(brain, hparams, loaders, output_folder)
    for name, count in unreadable.items():
        sets[name]["unreadable"] = count
    if if_main_process():
        results = {
            "task": "speech recognition",
            "corpus": corpus,
            "units": hparams["tokenizer"].size,
            **brain.records(cache and cache.seconds),
            "sets": sets,
        }
        write_results(output_folder, with_earlier_sets(output_folder, results))


if __name__ == "__main__":
    run_recipe(main)
