"""How well mean-pooled hidden states tell speakers apart without any training: the EER of each layer.

    python benchmarks/pooled_verification.py --data_folder /path/to/VoxCeleb1 RUN random:RUN fbank

Each utterance that the trials name is encoded once; the mean of its frames is its embedding, the cosine of two is
the score of a trial. Nothing is learned, no layer is chosen. Prints a row for each source and a column for each hidden
state (0: the input of the first layer), with 95 % intervals by resampling speakers, and how much lower each
state's EER is than that of the last source with as many states.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from speechbrain_bestrq.corpora import prepare_voxceleb, read_manifest, read_trials
from speechbrain_bestrq.corpora.manifest import corpus_name
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.heads import mean_pool, statistics_pool
from speechbrain_bestrq.metrics import Interval
from speechbrain_bestrq.task_data import Rows, TaskBatchSampler, make_dataset, make_task_loader
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.verification import SpeakerEmbeddings
from speechbrain_bestrq.verification_errors import verification_rates

POOLINGS = {"mean": mean_pool, "statistics": statistics_pool}
SAMPLE_RATE = 16000


@torch.inference_mode()
def pool(source: str, rows: Rows, pooling: str, device: torch.device, seed: int = 0) -> list[SpeakerEmbeddings]:
    """Embed utterances by each hidden state of a source."""
    dataset = make_dataset(rows, SAMPLE_RATE)
    sampler = TaskBatchSampler([row["duration"] for row in rows.values()], 60.0, training=False)
    loader = make_task_loader(dataset, sampler)
    torch.manual_seed(seed)  # of the weights of random:
    encoder = TaskEncoder(source).eval().to(device)
    names, vectors = [], []
    for batch in loader:
        wavs, wav_lens = batch.sig
        hidden, lengths = encoder(wavs.to(device), wav_lens.to(device))
        names += batch.id
        vectors.append(torch.stack([POOLINGS[pooling](state, lengths) for state in hidden]))
    return [SpeakerEmbeddings(names, state) for state in torch.cat(vectors, dim=1)]


def cell(rate: Interval) -> str:
    """An EER and its interval, in per cent."""
    return f"{100 * rate.value:.1f} ({100 * rate.low:.1f}-{100 * rate.high:.1f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="encoders, random:<encoder>, fbank; baselines last")
    parser.add_argument("--data_folder", required=True, help="VoxCeleb1, or what has its layout")
    parser.add_argument("--trials", default="veri_test.txt", help="a list of trials")
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="statistics: mean and deviation")
    parser.add_argument("--seed", type=int, default=0, help="of untrained weights")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with tempfile.TemporaryDirectory() as folder:
            manifests = prepare_voxceleb(options.data_folder, folder, [options.trials], sample_rate=SAMPLE_RATE)
            rows, lists = read_manifest(manifests["test"]), read_trials(manifests["trials"])
        (trials,) = lists.values()
        rates: dict[str, list[Interval]] = {}
        for source in dict.fromkeys(options.sources):
            states = pool(source, rows, options.pooling, device, options.seed)
            rates[source] = [verification_rates(state.score(trials), trials).eer for state in states]
    except InputError as error:
        parser.error(str(error))

    corpus = corpus_name(options.data_folder, "VoxCeleb")
    speakers = len({row["spk_id"] for row in rows.values()})
    print(
        f"{corpus}, {Path(options.trials).stem}: {len(trials)} trials, {len(rows)} utterances, {speakers} speakers. "
        f"EER, %, of {options.pooling}-pooled hidden states:\n"
    )
    most = max(map(len, rates.values()))
    print("| source | " + " | ".join(map(str, range(most))) + " |")
    print("|---" * (most + 1) + "|")
    for source, found in rates.items():
        print(f"| {source} | " + " | ".join([cell(rate) for rate in found] + [""] * (most - len(found))) + " |")
    print()
    for source, found in rates.items():
        baseline = [other for other in rates if other != source and len(rates[other]) == len(found)]
        if baseline and list(rates).index(baseline[-1]) > list(rates).index(source):
            lower = [1 - one.value / other.value for one, other in zip(found, rates[baseline[-1]], strict=True)]
            print(f"{source} below {baseline[-1]}: " + ", ".join(f"{100 * share:.0f} %" for share in lower))


if __name__ == "__main__":
    main()
