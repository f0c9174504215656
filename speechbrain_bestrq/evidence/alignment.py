"""Which character is spoken when: the most likely path of a small CTC model through each transcript."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torchaudio
from torch import Tensor
from torch.nn.functional import ctc_loss

from speechbrain_bestrq.heads import RecurrentCTC
from speechbrain_bestrq.task_data import Rows, TaskBatchSampler, encode_rows
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.text import CharacterTokenizer, frames_needed
from speechbrain_bestrq.writing import replacing

logger = logging.getLogger(__name__)

#: The model: cells of each direction, and how it is trained.
HIDDEN_SIZE, EPOCHS, LEARNING_RATE, BATCH_SECONDS = 128, 12, 4e-3, 60.0
#: A frame has the character nearest to it, if that is no farther than so many seconds: CTC marks single frames.
REACH = 0.08
#: What an alignment is a function of, beside the audio: raise the first when the code gives another.
ALIGNER_SETTINGS = (1, HIDDEN_SIZE, EPOCHS, LEARNING_RATE, BATCH_SECONDS, REACH)

Times = dict[str, tuple[Tensor, Tensor]]


class Aligner:
    """A BiLSTM with CTC on filter banks, trained on transcripts of characters.

    Arguments
    ---------
    rows : mapping
        To train on: with "wav", "duration" and "wrd".
    sample_rate : int
        Hz.
    device : torch.device
    seed : int
        Of the weights and the order of the batches.
    """

    def __init__(self, rows: Rows, sample_rate: int, device: torch.device, seed: int = 0):
        self.sample_rate, self.device = sample_rate, device
        self.tokenizer = CharacterTokenizer()
        self.encoder = TaskEncoder("fbank").eval().to(device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = RecurrentCTC(self.encoder.output_dim, self.tokenizer.size, HIDDEN_SIZE, num_layers=1, dropout=0.0)
        self.head = head.to(device)
        self._train(self._alignable(rows), seed)

    def _units(self, row: Mapping) -> Tensor:
        return torch.tensor(self.tokenizer.encode(row["wrd"]), dtype=torch.long)

    def _frames(self, row: Mapping) -> int:
        return int(self.encoder.num_frames(round(float(row["duration"]) * self.sample_rate)))

    def _alignable(self, rows: Rows) -> dict[str, Mapping]:
        """Those that have a transcript, and frames enough for it."""
        kept = {}
        for name, row in rows.items():
            units = self.tokenizer.encode(row["wrd"])
            if units and frames_needed(units) <= self._frames(row):
                kept[name] = row
        return kept

    @torch.inference_mode()
    def _features(self, rows: Rows) -> dict[str, Tensor]:
        """Of each utterance, mean 0 and variance 1 in each channel: computed once."""
        features = {}
        batches = encode_rows(self.encoder, rows, self.sample_rate, BATCH_SECONDS, self.device)
        for names, hidden, lengths in batches:
            for name, one, length in zip(names, hidden[0], lengths.tolist(), strict=True):
                own = one[:length]
                features[name] = ((own - own.mean(0)) / (own.std(0, correction=0) + 1e-4)).cpu()
        return features

    def _train(self, rows: Rows, seed: int) -> None:
        features, names = self._features(rows), list(rows)
        units = {name: self._units(row) for name, row in rows.items()}
        seconds = [float(row["duration"]) for row in rows.values()]
        sampler = TaskBatchSampler(seconds, BATCH_SECONDS, training=True, seed=seed)
        optimizer = torch.optim.Adam(self.head.parameters(), lr=LEARNING_RATE)
        total, done = EPOCHS * len(sampler), 0
        self.head.train()
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            losses = []
            for places in sampler:
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * done / total))
                done += 1
                batch = [names[place] for place in places]
                lengths = torch.tensor([len(features[name]) for name in batch])
                padded = torch.nn.utils.rnn.pad_sequence([features[name].clone() for name in batch], batch_first=True)
                log_probs = self.head(padded.to(self.device), lengths.to(self.device)).log_softmax(-1)
                targets = [units[name] for name in batch]
                loss = ctc_loss(
                    log_probs.transpose(0, 1).float(),
                    torch.cat(targets),
                    tuple(lengths.tolist()),
                    tuple(map(len, targets)),
                    reduction="sum",
                    zero_infinity=True,
                ) / sum(map(len, targets))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.head.parameters(), 5.0)
                optimizer.step()
                losses.append(loss.detach())
            logger.info(
                "aligner: epoch %d of %d, CTC loss %.3f a character", epoch + 1, EPOCHS, torch.stack(losses).mean()
            )
        self.head.eval()

    @torch.inference_mode()
    def align(self, rows: Rows) -> Times:
        """Find when the characters of transcripts are spoken.

        Arguments
        ---------
        rows : mapping
            As for training; those without a transcript, or with too few frames for it, are left out.

        Returns
        -------
        dict
            Of each utterance, the centres of its labelled frames in seconds, and their characters' units,
            1 and above.
        """
        rows = self._alignable(rows)
        found: Times = {}
        for name, features in self._features(rows).items():
            length = torch.tensor([len(features)], device=self.device)
            log_probs = self.head(features[None].to(self.device), length).log_softmax(-1).float().cpu()
            path = torchaudio.functional.forced_align(log_probs, self._units(rows[name])[None].int(), blank=0)[0][0]
            seconds = float(rows[name]["duration"])
            found[name] = spread(path.long(), seconds / len(features))
        return found


def spread(path: Tensor, seconds_a_frame: float, reach: float = REACH) -> tuple[Tensor, Tensor]:
    """Give frames of blank the character nearest to them.

    Arguments
    ---------
    path : Tensor
        The unit of each frame, 0 for blank, shape (T,).
    seconds_a_frame : float
    reach : float
        Frames farther from any character than so many seconds have none.

    Returns
    -------
    times : Tensor
        Centres of the frames that have one, seconds.
    units : Tensor

    Example
    -------
    >>> times, units = spread(torch.tensor([0, 0, 0, 5, 0, 7, 0]), 0.04)
    >>> units.tolist(), [round(one, 2) for one in times.tolist()]
    ([5, 5, 5, 5, 7, 7], [0.06, 0.1, 0.14, 0.18, 0.22, 0.26])
    """
    marks = path.nonzero()[:, 0]
    distances = (torch.arange(len(path))[:, None] - marks).abs()
    nearest, which = distances.min(1)
    kept = nearest * seconds_a_frame <= reach + 1e-6
    return (torch.arange(len(path))[kept] + 0.5) * seconds_a_frame, path[marks[which[kept]]]


def cached_alignment(
    path: Path, train: Rows, others: Mapping[str, Rows], sample_rate: int, device: torch.device
) -> dict[str, Times]:
    """Align sets by a model trained on one, or read what was aligned before.

    Arguments
    ---------
    path : Path
        The file that keeps it.
    train : mapping
        To train on.
    others : mapping
        Sets to align, by name.
    sample_rate : int
        Hz.
    device : torch.device

    Returns
    -------
    dict
        Of each set, what :meth:`Aligner.align` gives.
    """
    if path.is_file():
        return torch.load(path, weights_only=True)
    aligner = Aligner(train, sample_rate, device)
    found = {name: aligner.align(rows) for name, rows in others.items()}
    with replacing(path) as beside:
        torch.save(found, beside)
    return found
