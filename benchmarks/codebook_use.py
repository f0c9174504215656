"""How evenly a random-projection codebook is used, for each normalisation and whitening.

    python benchmarks/codebook_use.py RUN/manifests/train.csv RUN/manifests/valid.csv

Statistics and whitening are measured on utterances of the first manifest, labels counted on those and on utterances
of the second. Prints a table: perplexity of the codes and the commonest code's share.
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from speechbrain_bestrq.accounting import code_statistics
from speechbrain_bestrq.audio import AudioTable, read_segment
from speechbrain_bestrq.corpora import read_manifest
from speechbrain_bestrq.frontend import LogMel
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer

SAMPLE_RATE = 16000
COMPONENTS = (None, 16, 24, 32, 64, 320)


def read_utterances(manifest: str, count: int) -> list[tuple[Tensor, None]]:
    """Read so many utterances of a manifest, chosen by a fixed seed."""
    table = AudioTable.from_manifest(read_manifest(manifest), SAMPLE_RATE, 0.5, 30.0)
    chosen = np.random.default_rng(0).permutation(len(table))[:count]
    waves = (read_segment(table.path(int(i)), 0, int(table.lengths[i]), SAMPLE_RATE) for i in chosen)
    return [(torch.from_numpy(wave)[None], None) for wave in waves]


def describe(quantizer: RandomProjectionQuantizer, frames: list[Tensor]) -> str:
    """Perplexity and commonest share of the labels of some frames."""
    labels = quantizer(torch.cat(frames)).flatten()
    counts = torch.bincount(labels, minlength=quantizer.codebook_size)[None].float()
    statistics = {name: float(value) for name, value in code_statistics(counts).items()}
    return f"{statistics['code_perplexity']:.0f} ({100 * statistics['commonest_share']:.1f} %)"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="manifest to measure on")
    parser.add_argument("valid", help="manifest to compare with")
    parser.add_argument("--utterances", type=int, default=1000, help="of the first; 0.4 of it of the second")
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    train = read_utterances(options.train, options.utterances)
    valid = read_utterances(options.valid, round(0.4 * options.utterances))
    print("| normalisation | whiten | train | valid |\n|---|---|---|---|")
    for normalize in ("global", "utterance"):
        frontend = LogMel(normalize=normalize)
        if normalize == "global":
            frontend.measure(train)
        frames = [
            [frontend(*wave)[0].unflatten(1, (-1, frontend.stack)).flatten(2)[0] for wave in waves]
            for waves in (train, valid)
        ]
        for whiten in COMPONENTS:
            quantizer = RandomProjectionQuantizer(320, codebook_size=options.codes, seed=options.seed, whiten=whiten)
            if whiten is not None:
                quantizer.fit_whitening(frames[0])
            uses = " | ".join(describe(quantizer, some) for some in frames)
            print(f"| {normalize} | {whiten or 'none'} | {uses} |", flush=True)


if __name__ == "__main__":
    main()
