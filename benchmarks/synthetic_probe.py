"""Whether the synthetic corpora can be learned from, and are not trivial: a linear probe on the mean log-mel spectrum.

    python benchmarks/synthetic_probe.py --folder /tmp/synthetic

Makes the corpora in the folder, unless they are there. Speaker (VoxCeleb's layout): trained on a speaker's first
videos, tested on the last. Emotion (IEMOCAP's): four classes, each session tested by a probe of the other four. Intent
(SLURP's): 18 scenarios, trained on the training part, tested on the two others. Prints a table: chance is one of the
classes, or always the commonest of training if that is better. The last column is of means relative to the speaker's
own (and the microphone's, for intents), which words stand out of.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch
import torchaudio
from torch import Tensor

from speechbrain_bestrq.corpora.synthetic import make_synthetic

# happy and excited are one class, as everyone does with IEMOCAP
EMOTIONS = {"ang": "ang", "hap": "hap", "exc": "hap", "neu": "neu", "sad": "sad"}

# files, labels, folds, and whose mean each may be taken relative to
Task = tuple[list[Path], list[str], list[int], list[str] | None]

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def speaker_task(folder: Path) -> Task:
    """Files, speakers, and 1 for what is tested: the last video of each speaker who has at least three."""
    speakers = (folder / "meta" / "vox1_meta.csv").read_text().splitlines()[1:]
    trained = [line.split("\t")[0] for line in speakers if line.endswith("\tdev")]
    files, labels, folds = [], [], []
    for speaker in trained:
        videos = sorted((folder / "wav" / speaker).iterdir())
        for number, video in enumerate(videos):
            found = sorted(video.glob("*.wav"))
            files += found
            labels += [speaker] * len(found)
            folds += [int(number == len(videos) - 1)] * len(found)
    return files, labels, folds, None


def emotion_task(folder: Path) -> Task:
    """Files, emotions, the session each is tested in, and the speakers."""
    files, labels, folds, speakers = [], [], [], []
    for path in sorted(folder.glob("Session*/dialog/EmoEvaluation/*.txt")):
        session = path.parts[-4]
        for line in path.read_text().splitlines():
            fields = line.split("\t")
            if line.startswith("[") and fields[2] in EMOTIONS:
                turn = fields[1]
                files.append(folder / session / "sentences" / "wav" / turn.rpartition("_")[0] / f"{turn}.wav")
                labels.append(EMOTIONS[fields[2]])
                folds.append(int(session[-1]))
                speakers.append(session + turn.rpartition("_")[2][0])
    return files, labels, folds, speakers


def intent_task(folder: Path) -> Task:
    """Files, scenarios, 1 for what is tested (the devel and the test part), and the speakers with their microphones."""
    metadata = json.loads((folder / "dataset" / "slurp" / "metadata.json").read_text())
    files, labels, folds, speakers = [], [], [], []
    for fold, part in ((0, "train"), (1, "devel"), (1, "test")):
        for line in (folder / "dataset" / "slurp" / f"{part}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            for file, recording in metadata[str(entry["slurp_id"])]["recordings"].items():
                files.append(folder / "audio" / "slurp_real" / file)
                labels.append(entry["scenario"])
                folds.append(fold)
                speakers.append(recording["usrid"] + ("-headset" if "-headset" in file else ""))
    return files, labels, folds, speakers


TASKS = {
    "speaker": ("voxceleb", speaker_task),
    "emotion": ("iemocap", emotion_task),
    "intent": ("slurp", intent_task),
}


def mean_spectra(files: Sequence[Path]) -> Tensor:
    """Mean log-mel spectrum of each file, (files, 80)."""
    spectrum = torchaudio.transforms.MelSpectrogram(16000, n_fft=512, win_length=400, hop_length=160, n_mels=80)
    means = []
    for path in files:
        samples, _ = soundfile.read(path, dtype="float32")
        means.append(spectrum(torch.from_numpy(samples)).clamp(min=1e-6).log().mean(1))
    return torch.stack(means)


def without_speaker(inputs: Tensor, speakers: Sequence[str]) -> Tensor:
    """Take each speaker's mean off; no label is needed for that."""
    names = sorted(set(speakers))
    members = torch.nn.functional.one_hot(torch.tensor([names.index(name) for name in speakers])).to(inputs.dtype)
    return inputs - members @ (members.T @ inputs / members.sum(0)[:, None])


def fit_linear(inputs: Tensor, targets: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights (features, classes) of a multinomial logistic regression with an L2 penalty."""
    weights = torch.zeros(inputs.shape[1], classes, dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weights, targets) + penalty * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def probe(inputs: Tensor, labels: Sequence[str], folds: Sequence[int]) -> tuple[float, float, int]:
    """Chance, accuracy and number of files tested, over folds: each but 0 is tested by a probe of all others.

    The penalty is chosen on a fifth of what is trained on.
    """
    classes = sorted(set(labels))
    targets = torch.tensor([classes.index(label) for label in labels])
    fold = torch.tensor(folds)
    right, commonest, tested = 0, 0, 0
    for number in sorted(set(folds) - {0}):
        test = fold == number
        train = (~test).nonzero().squeeze(1)
        mean, deviation = inputs[train].mean(0), inputs[train].std(0)
        scaled = torch.cat([(inputs - mean) / deviation, torch.ones(len(inputs), 1)], dim=1).double()
        chosen, rest = train[::5], train[torch.arange(len(train)) % 5 != 0]

        def accuracy(where: Tensor, weights: Tensor, scaled: Tensor = scaled) -> float:
            return ((scaled[where] @ weights).argmax(1) == targets[where]).double().mean().item()

        best = max(PENALTIES, key=lambda p: accuracy(chosen, fit_linear(scaled[rest], targets[rest], len(classes), p)))
        weights = fit_linear(scaled[train], targets[train], len(classes), best)
        right += accuracy(test.nonzero().squeeze(1), weights) * int(test.sum())
        commonest += int((targets[test] == targets[train].mode().values).sum())
        tested += int(test.sum())
    return max(commonest / tested, 1 / len(classes)), right / tested, tested


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the corpora are, or go")
    parser.add_argument("--hours", type=float, default=1.5, help="of each")
    parser.add_argument("--speakers", type=int, default=40, help="of each but IEMOCAP's layout, which has ten")
    options = parser.parse_args(argv)
    print(f"{options.hours:g} h of each layout, {options.speakers} speakers (emotion: 10)\n")
    print("| task | classes | tested | chance | linear probe | speaker's mean taken off |\n|---|---|---|---|---|---|")
    for task, (layout, read) in TASKS.items():
        folder = options.folder / layout
        make_synthetic(folder, layout, options.hours, None if layout == "iemocap" else options.speakers)
        files, labels, folds, speakers = read(folder)
        spectra = mean_spectra(files)
        chance, accuracy, tested = probe(spectra, labels, folds)
        row = f"| {task} | {len(set(labels))} | {tested} | {100 * chance:.1f} % | {100 * accuracy:.1f} % |"
        if speakers is None:
            print(f"{row} |", flush=True)
        else:
            relative = probe(without_speaker(spectra, speakers), labels, folds)[1]
            print(f"{row} {100 * relative:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
