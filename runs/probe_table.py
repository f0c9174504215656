#!/usr/bin/env python3
"""Put the probes that probes.sh trained into a table for each test set, in Markdown.

    python runs/probe_table.py PROBES --score accuracy --against bestrq_small

A row for each encoder: the score with its 95 % interval for each seed, the mean over the seeds, and by how much the
errors of ``--against`` differ from its own on the same utterances or trials, with the interval of a paired bootstrap,
seed by seed.
"""

import argparse
import sys
from pathlib import Path

from speechbrain_bestrq.errors import USER_ERROR, InputError
from speechbrain_bestrq.results import RESULTS_FILE, compare_runs, read_results
from speechbrain_bestrq.verification_errors import compare_scores

#: The errors that runs are compared by, for scores that are no rates of errors themselves.
ERRORS = {"accuracy": "error"}


def find_runs(probes: Path) -> dict[str, dict[str, Path]]:
    """Find the finished runs, by encoder and seed; those of a cross-validation are its folds together."""
    runs: dict[str, dict[str, Path]] = {}
    for path in sorted([*probes.glob(f"*/*/{RESULTS_FILE}"), *probes.glob(f"*/*/all/{RESULTS_FILE}")]):
        encoder, seed = path.relative_to(probes).parts[:2]
        runs.setdefault(encoder, {})[seed] = path.parent
    if not runs:
        raise InputError(f"{probes} has no finished run, <encoder>/<seed>/{RESULTS_FILE}: train with probes.sh first.")
    return runs


def compare(run: Path, other: Path, name: str, score: str) -> str:
    """Say by how much the errors of a run differ from those of another, percent."""
    if score.startswith("eer"):
        kind = "cosine" if score == "eer" else score.removeprefix("eer_")
        difference, _ = compare_scores(run, other, name, kind)
    else:
        difference, _ = compare_runs(run, other, name, ERRORS.get(score, score))
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def tabulate(probes: Path, score: str, against: str) -> str:
    """Write the tables."""
    runs = find_runs(probes)
    if against not in runs:
        raise InputError(f"{probes} has no run of {against!r}: give one of {', '.join(runs)} as --against.")
    records = {encoder: {seed: read_results(run) for seed, run in seeds.items()} for encoder, seeds in runs.items()}
    seeds = sorted({seed for found in runs.values() for seed in found})
    lines = []
    for name, scores in next(iter(records[against].values()))["sets"].items():
        if score not in scores:
            raise InputError(f"there is no score {score!r} of {name}: give one of {', '.join(scores)} as --score.")
        heads = ["encoder", *(f"{score}, seed {seed}" for seed in seeds), "mean"]
        heads += [f"errors of {against} less its own, seed {seed}" for seed in seeds]
        lines += [f"{name}, percent", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for encoder, found in records.items():
            values = {seed: results["sets"][name][score] for seed, results in found.items()}
            told = {
                seed: f"{100 * one['value']:.1f} ({100 * one['low']:.1f} to {100 * one['high']:.1f})"
                for seed, one in values.items()
            }
            mean = 100 * sum(one["value"] for one in values.values()) / len(values)
            apart = {
                seed: compare(runs[against][seed], run, name, score)
                for seed, run in runs[encoder].items()
                if encoder != against and seed in runs[against]
            }
            cells = [encoder, *(told.get(seed, "") for seed in seeds), f"{mean:.1f}"]
            cells += [apart.get(seed, "") for seed in seeds]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("probes", type=Path, help="the folder that was given to probes.sh")
    parser.add_argument("--score", required=True, help="accuracy, eer, cer, wer...: of results.json")
    parser.add_argument("--against", required=True, help="the encoder that the others are compared with")
    options = parser.parse_args()
    try:
        print(tabulate(options.probes, options.score, options.against))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
