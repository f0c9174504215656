"""What the labels of a quantizer tell: what is being said, or who says it and where.

    python benchmarks/label_content.py /path/to/LibriSpeech

Frames of train-clean-100 are aligned with the characters of their transcripts, as by sb-bestrq report --evidence, and
labelled by one quantizer after another; no encoder is trained. Prints for each

- nats about characters: how much a frame's label tells of its character, on speakers of the other half (the mean
  log-probability of the character given the label, less that without it, both counted on the first half). A lower
  bound, and the lower the more codes there are to count: compare codebooks of one size;
- speaker, %: how often an utterance's labels, as a bag, name its speaker among all, by counts over half of each
  speaker's utterances (naive Bayes);
- the share of neighbouring frames with one label, and the perplexity of the codes.
"""

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speechbrain_bestrq.audio import read_segment
from speechbrain_bestrq.centroids import CentroidQuantizer
from speechbrain_bestrq.corpora import prepare_librispeech, read_manifest
from speechbrain_bestrq.evidence.alignment import Aligner
from speechbrain_bestrq.frontend import LogMel
from speechbrain_bestrq.quantizer import FrameQuantizer, RandomProjectionQuantizer
from speechbrain_bestrq.task_data import Rows

SAMPLE_RATE, SPLITS = 16000, ("train-clean-100", "dev-clean")
#: Pseudo-counts: of a character given a label, and of a label given a speaker.
CHARACTER_PRIOR, SPEAKER_PRIOR = 5.0, 200.0


@dataclass
class Speech:
    """Utterances with their features, characters and speakers."""

    features: list[Tensor]
    """Globally normalised, stacked, shape (T, 320) each."""
    frames: list[Tensor]
    """Which of them have a character."""
    characters: list[Tensor]
    speakers: Tensor
    """Number of the speaker of each utterance."""


def read_speech(rows: Rows) -> Speech:
    """Align utterances and compute their features."""
    times = Aligner(rows, SAMPLE_RATE, torch.device("cpu")).align(rows)
    names = list(times)
    waves = [torch.from_numpy(read_segment(rows[name]["wav"], 0, _samples(rows[name]), SAMPLE_RATE)) for name in names]
    frontend = LogMel(sample_rate=SAMPLE_RATE)
    frontend.measure((wave[None], None) for wave in waves)
    features = [frontend(wave[None])[0][0].unflatten(0, (-1, frontend.stack)).flatten(1) for wave in waves]
    # frames have an equal share of the utterance, as the aligner's have
    rates = [len(one) / float(rows[name]["duration"]) for name, one in zip(names, features, strict=True)]
    places = [
        (times[name][0] * rate).long().clamp(max=len(one) - 1)
        for name, one, rate in zip(names, features, rates, strict=True)
    ]
    every = sorted({rows[name]["spk_id"] for name in names})
    speakers = torch.tensor([every.index(rows[name]["spk_id"]) for name in names])
    return Speech(features, places, [times[name][1] for name in names], speakers)


def _samples(row: dict) -> int:
    return round(float(row["duration"]) * SAMPLE_RATE)


def counts_of(rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """Count pairs."""
    table = torch.zeros(shape)
    return table.index_put_((rows, columns), torch.ones(len(rows)), accumulate=True)


def character_nats(labels: Sequence[Tensor], speech: Speech, codes: int) -> float:
    """How much labels tell of characters, on the second half of the speakers."""
    chosen = [one[frames] for one, frames in zip(labels, speech.frames, strict=True)]
    halves = []
    for half in (0, 1):
        numbers = [number for number, speaker in enumerate(speech.speakers.tolist()) if speaker % 2 == half]
        halves.append((torch.cat([chosen[n] for n in numbers]), torch.cat([speech.characters[n] for n in numbers])))
    characters = 1 + max(int(one.max()) for one in speech.characters)
    counts = counts_of(*halves[0], (codes, characters))
    prior = (counts.sum(0) + 1e-6) / (counts.sum() + 1e-6 * characters)
    given = (counts + CHARACTER_PRIOR * prior) / (counts.sum(1, keepdim=True) + CHARACTER_PRIOR)
    label, character = halves[1]
    return float((given[label, character].log() - prior[character].log()).mean())


def speaker_accuracy(labels: Sequence[Tensor], speech: Speech, codes: int) -> float:
    """How often the labels of an utterance name its speaker, over the second half of each speaker's utterances."""
    bags = torch.stack([torch.bincount(one, minlength=codes).float() for one in labels])
    order = torch.arange(len(bags))
    number_within = torch.tensor([int((speech.speakers[:n] == speech.speakers[n]).sum()) for n in order.tolist()])
    size = torch.bincount(speech.speakers)[speech.speakers]
    first = number_within < size // 2
    counts = torch.zeros(int(speech.speakers.max()) + 1, codes).index_add_(0, speech.speakers[first], bags[first])
    prior = counts.sum(0) / counts.sum()
    given = (counts + SPEAKER_PRIOR * prior) / (counts.sum(1, keepdim=True) + SPEAKER_PRIOR)
    found = (bags[~first] @ given.clamp(min=1e-12).log().t()).argmax(1)
    return float((found == speech.speakers[~first]).float().mean())


def describe(quantizer: FrameQuantizer, speech: Speech) -> str:
    """A row of the table."""
    prepared = [quantizer.prepare(one[None])[0] for one in speech.features]
    if not quantizer.measured:
        quantizer.fit(prepared)
    labels = [quantizer.label(one)[:, 0] for one in prepared]
    codes = quantizer.codebook_size
    shares = torch.bincount(torch.cat(labels), minlength=codes).double()
    perplexity = float(torch.special.entr(shares / shares.sum()).sum().exp())
    alike = sum(int((one[1:] == one[:-1]).sum()) for one in labels) / sum(len(one) - 1 for one in labels)
    nats, speaker = character_nats(labels, speech, codes), speaker_accuracy(labels, speech, codes)
    return f"{nats:.3f} | {100 * speaker:.1f} | {alike:.2f} | {perplexity:.0f}"


def quantizers(seed: int) -> Iterable[tuple[str, FrameQuantizer]]:
    """Those that are compared, with their names."""
    for utterance_norm in (False, True):
        inputs = "utterance" if utterance_norm else "global"
        for components in (None, 16, 8, 6, 4):
            for codes in (8192, 1024, 256):
                kept = f"{components}, whitened" if components else "all"
                name = f"{inputs} | random projection | {kept} | {codes}"
                settings = {"codebook_size": codes, "seed": seed, "utterance_norm": utterance_norm}
                size = min(components or 16, 16)
                yield name, RandomProjectionQuantizer(320, size, whiten=components, **settings)
        for components in (8, 16, 80):
            for codes in (1024, 256, 64):
                name = f"{inputs} | k-means | {components} | {codes}"
                yield name, CentroidQuantizer(320, components, codes, seed=seed, utterance_norm=utterance_norm)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_folder", help=f"LibriSpeech, or what has its layout: {SPLITS[0]} is used")
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifests = prepare_librispeech(options.data_folder, Path(folder), *([one] for one in SPLITS), transcripts=True)
        speech = read_speech(read_manifest(manifests["train"]))
    print(f"{len(speech.features)} utterances of {int(speech.speakers.max()) + 1} speakers\n")
    print("| input | labels | components | codes | nats about characters | speaker, % | as neighbour | perplexity |")
    print("|---|---|---|---|---|---|---|---|")
    for name, quantizer in quantizers(options.seed):
        print(f"| {name} | {describe(quantizer, speech)} |", flush=True)


if __name__ == "__main__":
    main()
