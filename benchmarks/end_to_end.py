"""Where the time of a pre-training run went: updates, waiting for audio, validations, saving, the rest.

    python train.py hparams/bestrq.yaml --data_folder ... --output_folder RUN      # in recipes/LibriSpeech/pretrain
    python benchmarks/end_to_end.py RUN

The run is an ordinary one; its log has all that is needed. The first line of the log and what came before it is
left out (the first batches, compilation), and so is what came after the last. "saving" is checkpoints and the
encoders that are saved beside them; "the rest" is the beginnings of epochs and log lines.
"""

import argparse
import json
import statistics
from pathlib import Path

from speechbrain_bestrq.accounting import JsonLines


def split(lines: list[dict], ranks: int) -> dict[str, float]:
    """Seconds of each part, and audio, between the first and the last log line of training.

    Arguments
    ---------
    lines : list of dict
        Of train_log.jsonl.
    ranks : int
        Devices of the run.

    Returns
    -------
    dict
        "all", "updates" (waiting in them included), "waiting", "validations", "saving" and
        "rest", seconds; "audio", seconds; "median", audio-seconds a second in the updates.
    """
    numbers = [number for number, line in enumerate(lines) if line["event"] == "train"]
    if len(numbers) < 2:
        raise SystemExit("there are fewer than two log lines of training: let the run go on, or lower log_interval.")
    between = lines[numbers[0] : numbers[-1] + 1]
    train = [line for line in between if line["event"] == "train"]
    hours = {"audio": "audio_hours", "all": "device_hours"}
    parts = {name: 3600 * (train[-1][key] - train[0][key]) for name, key in hours.items()}
    parts["all"] /= ranks
    windows = [
        3600 * (after["audio_hours"] - before["audio_hours"]) / after["audio_seconds_per_second"]
        for before, after in zip(train, train[1:], strict=False)
    ]
    parts["updates"] = sum(windows)
    parts["waiting"] = sum(line["data_wait_share"] * window for line, window in zip(train[1:], windows, strict=True))
    parts["validations"] = sum(line["seconds"] for line in between if line["event"] == "valid")
    parts["saving"] = sum(line["saving_seconds"] for line in train[1:])
    parts["rest"] = parts["all"] - parts["updates"] - parts["validations"] - parts["saving"]
    parts["median"] = statistics.median(line["audio_seconds_per_second"] for line in train[1:])
    return parts


def table(run: Path) -> str:
    """What a run's log says, as Markdown."""
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    parts = split(JsonLines(run / "train_log.jsonl").read(), facts["world_size"])
    lines = [
        f"{facts['model']}, {facts['parameters'] / 1e6:.1f} M parameters, {facts['precision']}; {facts['device']}, "
        f"ranks: {facts['world_size']}; {parts['audio'] / 3600:.2f} hours of audio in {parts['all']:.0f} s",
        "",
        "| part | seconds | share |",
        "|---|---|---|",
        *(
            f"| {name} | {parts[key]:.1f} | {parts[key] / parts['all']:.1%} |"
            for name, key in (
                ("updates", "updates"),
                ("- of them waiting for audio", "waiting"),
                ("validations", "validations"),
                ("saving", "saving"),
                ("the rest", "rest"),
            )
        ),
        "",
        f"End to end {parts['audio'] / parts['all']:.1f} audio-seconds a second; in the updates alone "
        f"{parts['audio'] / parts['updates']:.1f}, in their median log line {parts['median']:.1f}.",
    ]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the output folder of a pre-training")
    run = parser.parse_args(words).run
    for name in ("run.json", "train_log.jsonl"):
        if not (run / name).is_file():
            parser.error(f"{run} has no {name}: give the output folder of a pre-training run.")
    print(table(run))


if __name__ == "__main__":
    main()
