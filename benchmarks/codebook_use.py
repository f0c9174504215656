"""How evenly a random-projection codebook is used, for each normalisation and whitening.

    python benchmarks/codebook_use.py RUN/manifests/train.csv RUN/manifests/valid.csv

Statistics and whitening are measured on utterances of the first manifest, labels counted on those and on utterances
of the second, silence and all. Prints a table: perplexity of the codes and the commonest code's share. Of one YAML,
sb-bestrq check-codebook says more.
"""

import argparse

from torch import Tensor

from speechbrain_bestrq.audio import AudioTable
from speechbrain_bestrq.codebook_use import choose_audio, count_codes, use_statistics
from speechbrain_bestrq.corpora import read_manifest
from speechbrain_bestrq.frontend import LogMel
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer

SAMPLE_RATE = 16000
COMPONENTS = (None, 16, 24, 32, 64, 320)


def read_utterances(manifest: str, minutes: float) -> list[tuple[Tensor, None]]:
    """Read so many minutes of a manifest."""
    return choose_audio(AudioTable.from_manifest(read_manifest(manifest), SAMPLE_RATE, 0.5, 30.0), minutes)


def describe(frontend: LogMel, quantizer: RandomProjectionQuantizer, audio: list[tuple[Tensor, None]]) -> str:
    """Perplexity and commonest share of the labels of some audio."""
    statistics = use_statistics(count_codes(frontend, quantizer, audio).everything[0])
    return f"{statistics['perplexity']:.0f} ({statistics['commonest_share']:.1%})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="manifest to measure on")
    parser.add_argument("valid", help="manifest to compare with")
    parser.add_argument("--minutes", type=float, default=50.0, help="of the first; 0.4 of it of the second")
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    train = read_utterances(options.train, options.minutes)
    valid = read_utterances(options.valid, 0.4 * options.minutes)
    print("| normalisation | whiten | train | valid |\n|---|---|---|---|")
    for normalize in ("global", "utterance"):
        frontend = LogMel(normalize=normalize)
        if normalize == "global":
            frontend.measure(train)
        for whiten in COMPONENTS:
            quantizer = RandomProjectionQuantizer(320, codebook_size=options.codes, seed=options.seed, whiten=whiten)
            if whiten is not None:
                features = (frontend(*wave)[0] for wave in train)
                quantizer.fit(some.unflatten(1, (-1, frontend.stack)).flatten(2) for some in features)
            uses = " | ".join(describe(frontend, quantizer, audio) for audio in (train, valid))
            print(f"| {normalize} | {whiten or 'none'} | {uses} |", flush=True)


if __name__ == "__main__":
    main()
