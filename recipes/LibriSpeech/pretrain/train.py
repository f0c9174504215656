#!/usr/bin/env python3
"""Pre-train a speech encoder without labels, on LibriSpeech or on a folder of one's own audio.

    python train.py hparams/bestrq.yaml --data_folder /path/to/LibriSpeech
    torchrun --nproc_per_node=2 train.py hparams/bestrq.yaml --data_folder /path/to/LibriSpeech \
        --grad_accumulation_factor 4
    python train.py hparams/bestrq.yaml --data_folder /path/to/audio --corpus folder

A run that was stopped goes on when the same command is given again. What governs what:

    the method and the model    `model` of the YAML
    the data                    --data_folder, --corpus, --train_splits, --valid_splits, --extra_folders,
                                --min_seconds, --max_seconds, --resample, --max_unreadable
    decoding once or always     --cache memory, --cache_folder
    the size of an update       --max_batch_seconds x --grad_accumulation_factor x devices
    the length of the run       --optimizer_step_limit (updates)
    precision, compilation      --precision fp32|bf16|fp16, --compile
    what is kept                best and last two checkpoints in save/, the encoder of the best validation in encoder/,
                                those of --encoder_at_steps in encoder@<update>/
    validation                  every --valid_interval updates and at the end; where it is null, after each epoch
    checkpoints in between      --ckpt_interval_steps (updates), or 0 and --ckpt_interval_minutes
    the log                     --log_interval (updates): log.txt, train_log.jsonl, tensorboard/
"""

import logging
import os
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.utils.distributed import run_on_main

from speechbrain_bestrq.audio import AudioTable
from speechbrain_bestrq.batching import LadderBatchSampler, PaddedBatchSampler
from speechbrain_bestrq.corpora import prepare_corpus
from speechbrain_bestrq.corpora.manifest import corpus_name, read_manifest
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.machine import is_gpu
from speechbrain_bestrq.pcm_cache import cache_audio
from speechbrain_bestrq.pretraining import PretrainingBrain
from speechbrain_bestrq.pretraining_data import PREFETCH_FACTOR, WaveformDataset, make_loader
from speechbrain_bestrq.ranks import rank_and_size
from speechbrain_bestrq.recipe import command_line, given_keys, load_recipe, own_folder, run_recipe
from speechbrain_bestrq.resuming import check_resumable
from speechbrain_bestrq.run_options import OF_PRETRAINING, check_counts, check_run_options, take_given_interval
from speechbrain_bestrq.workers import warn_of_shared_memory

logger = logging.getLogger(__name__)

#: Share of the audio that may be left out, as too short, without a warning.
MOST_LEFT_OUT = 0.05


def dataio_prepare(hparams: dict, manifests: dict[str, Path], rank: int, world_size: int, device: str | None = None):
    """Make the loaders of training and validation, the audio to measure statistics on, and what to tell of the data."""
    rate = hparams["sample_rate"]
    limits = {"min_seconds": hparams["min_seconds"], "max_seconds": hparams["max_seconds"]}
    train_table = AudioTable.from_manifest(read_manifest(manifests["train"]), rate, **limits)
    valid_table = AudioTable.from_manifest(read_manifest(manifests["valid"]), rate, **limits)
    model = hparams["model"]
    caches = [None, None]
    if hparams["cache"] == "memory":
        folder, most = hparams["cache_folder"], hparams["max_unreadable"]
        # nothing stands in for what validation hears
        caches = [cache_audio(train_table, folder, max_unreadable=most), cache_audio(valid_table, folder)]
    elif hparams["cache"] is not None:
        raise InputError(f"cache is memory, or null, not {hparams['cache']}.")
    batch_samples = round(hparams["max_batch_seconds"] * rate)
    ranks = {"rank": rank, "world_size": world_size}

    train_sampler = LadderBatchSampler(
        train_table.lengths, batch_samples, seed=hparams["seed"], sample_rate=rate, **ranks
    )
    valid_sampler = PaddedBatchSampler(valid_table.lengths, batch_samples, sample_rate=rate, **ranks)

    def training_waveforms(rank: int) -> WaveformDataset:
        place = {"seed": hparams["seed"], "rank": rank}
        more = {"cache": caches[0], "max_unreadable": hparams["max_unreadable"]}
        return WaveformDataset(train_table, model.masking, model.speech_encoder.num_frames, **place, **more)

    loader = {"num_workers": hparams["num_workers"], "pin_memory": is_gpu(device)}
    # what is pinned waits elsewhere
    waiting = loader["num_workers"] * (1 if loader["pin_memory"] else PREFETCH_FACTOR)
    sample_bytes = 4 if caches[0] is None else 2
    warn_of_shared_memory(waiting * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * batch_samples * sample_bytes)
    train_loader = make_loader(training_waveforms(rank), train_sampler, **loader)
    # validation masks do not depend on the seed, nor on the number of ranks
    valid_waveforms = WaveformDataset(valid_table, model.masking, model.speech_encoder.num_frames, cache=caches[1])
    valid_loader = make_loader(valid_waveforms, valid_sampler, **loader)

    def statistics_audio() -> list[tuple[torch.Tensor, None]]:
        if not hparams["statistics_hours"]:
            return []
        sampler = LadderBatchSampler(train_table.lengths, batch_samples, seed=hparams["seed"], sample_rate=rate)
        batches, hours = [], 0.0
        for batch in make_loader(training_waveforms(0), sampler):
            batch = batch.to("cpu")
            batches.append((batch.wavs, batch.wav_lens))
            hours += batch.seconds / 3600
            if hours >= hparams["statistics_hours"]:
                break
        logger.info("Measuring the statistics of %.2f hours of training audio.", hours)
        return batches

    usual_name = "LibriSpeech" if hparams["corpus"] == "librispeech" else Path(hparams["data_folder"]).absolute().name
    names = [corpus_name(hparams["data_folder"], usual_name)]
    names += [corpus_name(folder, Path(folder).absolute().name) for folder in hparams["extra_folders"]]
    micro_batches = hparams.get("grad_accumulation_factor", 1) * world_size
    facts = {
        "corpus": " + ".join(names),
        "train_hours": train_table.hours,
        "train_utterances": len(train_table),
        "too_short": train_table.too_short,
        "recordings_cut": train_table.recordings_cut,
        "train_hours_left_out": train_table.hours_left_out,
        "batches": train_sampler.describe(),
        "update_seconds_at_most": hparams["max_batch_seconds"] * micro_batches,
        "valid_hours": valid_table.hours,
        "valid_hours_left_out": valid_table.hours_left_out,
        "command": command_line(),
    }
    return train_loader, valid_loader, statistics_audio, facts


def tell_of_limits(facts: dict[str, Any], min_seconds: float, max_seconds: float) -> None:
    """Say that long recordings are cut, and warn when a good part of a set is left out as too short."""
    if facts["recordings_cut"]:
        logger.info(
            "%d training recordings are longer than max_seconds = %g: each is cut into parts of equal length.",
            facts["recordings_cut"],
            max_seconds,
        )
    for name, title in (("train", "training"), ("valid", "validation")):
        hours = facts[f"{name}_hours_left_out"]
        share = hours / (facts[f"{name}_hours"] + hours)
        if share > MOST_LEFT_OUT:
            logger.warning(
                "%.2f hours of the %s audio, %.0f %% of it, are left out, as shorter than min_seconds = %g: lower it, "
                "or join what belongs together.",
                hours,
                title,
                100 * share,
                min_seconds,
            )


def main(arguments: list[str]) -> None:
    """Prepare, train."""
    hparams_file, run_opts, overrides, hparams = load_recipe(arguments)
    with own_folder(hparams["output_folder"]):
        run(hparams_file, run_opts, overrides, hparams)


def run(hparams_file: str, run_opts: Any, overrides: str, hparams: dict[str, Any]) -> None:
    """Prepare and train, with the output folder to ourselves."""
    check_run_options(run_opts, OF_PRETRAINING)
    check_counts(hparams)
    overrides = take_given_interval(hparams, run_opts, overrides)
    if hparams["corpus"] == "folder" and (splits := given_keys(overrides) & {"train_splits", "valid_splits"}):
        raise InputError(f"--{min(splits)} is of LibriSpeech: a folder has no such parts; leave it out.")
    manifests = run_on_main(prepare_corpus, args=[hparams])
    device = run_opts["device"]
    train_loader, valid_loader, statistics_audio, facts = dataio_prepare(hparams, manifests, *rank_and_size(), device)

    check_resumable(hparams["checkpointer"], hparams["model"], train_loader.batch_sampler)

    # from here on the run's folder is written to
    sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
    for name, value in facts.items():
        logger.info("%s: %s", name, value)
    run_on_main(tell_of_limits, args=[facts, hparams["min_seconds"], hparams["max_seconds"]])
    brain = PretrainingBrain(
        modules={"model": hparams["model"]},
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
        run_facts=facts,
    )
    brain.measure(statistics_audio)
    brain.fit(hparams["epoch_counter"], train_loader, valid_loader)


if __name__ == "__main__":
    run_recipe(main)
