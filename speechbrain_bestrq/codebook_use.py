"""Whether a random codebook is used evenly enough to be learnt from: on real audio, before training.

Labels that nearly all fall on a few codes teach little: the commonest guess is right most of
the time. BEST-RQ's authors found the use of the codebook to go with the quality of the
encoder (arXiv 2202.01855, section 5). How it is used hangs on the front end, its
normalisation, the quantizer and the audio alone, so that minutes of audio tell it.

Silence is left out of what is judged: an encoder frame is silent if its level is more than
:data:`SILENCE_DB` below the loud level of its utterance (the level that 5 % of the frames
exceed), or below :data:`SILENCE_FLOOR_DB` of full scale. The level of a frame is the variance
of the samples it covers, so that a constant offset does not count.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from speechbrain_bestrq.accounting import code_statistics
from speechbrain_bestrq.audio import AudioTable, as_float, check_damaged
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import LogMel, valid_frames
from speechbrain_bestrq.quantizer import FrameQuantizer, RandomProjectionQuantizer

logger = logging.getLogger(__name__)

#: The check fails if the perplexity is under this share of the codes...
LEAST_PERPLEXITY = 0.01

#: ...or if one code labels more than this share of the speech; ...
MOST_OF_ONE_CODE = 0.20

#: ...and it warns if the perplexity is under this share.
WANTED_PERPLEXITY = 0.05

#: Fewer frames of speech are not judged: no perplexity is above the number of frames, and ten times the wanted one
#: keep the estimate from being bounded by them.
LEAST_FRAMES, LEAST_FRAMES_PER_CODE = 1000, 10 * WANTED_PERPLEXITY

#: A frame is silent if it is so many decibels below the loud level of its utterance, or below this level.
SILENCE_DB, SILENCE_FLOOR_DB = 30.0, -80.0

#: Share of an utterance's frames that its loud level is not below.
LOUD_QUANTILE = 0.95

#: Normalised features have a mean near zero in each bin; one further away (nats or deviations) is not normalised.
LARGEST_OFFSET = 0.5

PASSED, WARNED, FAILED = "passed", "warned", "failed"


# ---------------------------------------------------------------- counting


@torch.no_grad()
def loud_frames(wavs: Tensor, frame_lengths: Tensor, frames: int, frame_samples: int, hop: int) -> Tensor:
    """Tell speech from silence by the level, as the head of this file defines it.

    Arguments
    ---------
    wavs : Tensor
        Waveforms, shape (B, N); zeros in padding.
    frame_lengths : Tensor
        Encoder frames of each utterance, int64, shape (B,).
    frames : int
        Encoder frames T of the padded batch.
    frame_samples, hop : int
        Samples of an encoder frame, and of a feature frame: the first is centred on
        sample 0.

    Returns
    -------
    Tensor
        Boolean, shape (B, T): True for frames that are neither silent nor padding.

    Example
    -------
    >>> wave = torch.randn(1, 6400) * torch.tensor([1.0, 0.01]).repeat_interleave(3200)
    >>> loud_frames(wave, torch.tensor([10]), 10, 640, 160)[0].int().tolist()
    [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    """
    padded = nn.functional.pad(wavs.float(), (hop // 2, frame_samples))
    energies = padded.unfold(1, frame_samples, frame_samples)[:, :frames].var(-1, correction=0)
    levels = 10.0 * energies.clamp(min=1e-12).log10()
    valid = valid_frames(frame_lengths, frames)
    loud = levels.masked_fill(~valid, torch.nan).nanquantile(LOUD_QUANTILE, dim=1, keepdim=True)
    return valid & (levels >= loud - SILENCE_DB) & (levels >= SILENCE_FLOOR_DB)


@dataclass(frozen=True)
class CodebookUse:
    """How often each code was the label."""

    speech: Tensor
    """Counts over the frames that are not silent, float64, shape (num_codebooks, codebook_size)."""
    everything: Tensor
    """Counts over all frames, in the same shape."""
    offset: float
    """Mean over the feature bins of the magnitude of their mean: near zero for normalised features."""

    @property
    def frames(self) -> int:
        """Frames of speech."""
        return int(self.speech[0].sum())

    @property
    def silent_share(self) -> float:
        """Share of all frames that are silent."""
        return 1.0 - self.frames / max(float(self.everything[0].sum()), 1.0)

    @property
    def frames_needed(self) -> int:
        """Frames of speech that a judgement needs."""
        return max(LEAST_FRAMES, round(LEAST_FRAMES_PER_CODE * self.speech.shape[1]))


@torch.no_grad()
def count_codes(
    frontend: LogMel, quantizer: FrameQuantizer, batches: Iterable[tuple[Tensor, Tensor | None]]
) -> CodebookUse:
    """Label audio and count the labels; nothing random is drawn.

    Arguments
    ---------
    frontend : LogMel
        With its statistics.
    quantizer : FrameQuantizer
        With its whitening, if it has one.
    batches : iterable of (wavs, wav_lens)
        As the front end takes them.

    Returns
    -------
    CodebookUse
        Counts on the CPU.

    Example
    -------
    >>> frontend, quantizer = LogMel(normalize="utterance"), RandomProjectionQuantizer(320)
    >>> use = count_codes(frontend, quantizer, [(torch.randn(2, 16000), None)])
    >>> use.frames, use.everything.shape
    (50, torch.Size([1, 8192]))
    """
    device = next(quantizer.buffers()).device
    speech = torch.zeros(quantizer.num_codebooks, quantizer.codebook_size, dtype=torch.float64, device=device)
    everything = torch.zeros_like(speech)
    sums = torch.zeros(frontend.num_mels, dtype=torch.float64, device=device)
    count = 0
    for wavs, wav_lens in batches:
        wavs = wavs.to(device)
        features, lengths = frontend(wavs, wav_lens)
        stacked = features.unflatten(1, (-1, frontend.stack)).flatten(2)
        utterances, frames, _ = stacked.shape
        if lengths is None:
            lengths = torch.full((utterances,), features.shape[1], device=device)
        frame_lengths = lengths // frontend.stack
        # whole utterances are labelled, silence and all: labels that are normalised over time hang on it
        labels = quantizer(stacked, frame_lengths).flatten(0, 1).t()
        loud = loud_frames(wavs, frame_lengths, frames, frontend.hop * frontend.stack, frontend.hop)
        for counts, counted in ((speech, loud), (everything, valid_frames(frame_lengths, frames))):
            counts.scatter_add_(1, labels, counted.flatten().to(counts.dtype).expand(labels.shape))
        sums += features.sum((0, 1))  # zero in the padding
        count += int(lengths.sum())
    return CodebookUse(speech.cpu(), everything.cpu(), float((sums / max(count, 1)).abs().mean()))


def choose_audio(
    table: AudioTable, minutes: float, seed: int = 0, max_unreadable: int = 0
) -> list[tuple[Tensor, None]]:
    """Read utterances from all over a corpus, whole, a random choice of so many minutes.

    Memory: 4 MB a minute.

    Arguments
    ---------
    table : AudioTable
        The corpus.
    minutes : float
        Audio wanted; all of it if there is less.
    seed : int
        Another one makes another choice.
    max_unreadable : int
        So many files that turn out to be damaged are passed over.

    Returns
    -------
    list of (Tensor, None)
        Waveforms of shape (1, N), as the models' ``measure`` takes them.

    Raises
    ------
    InputError
        As :func:`speechbrain_bestrq.audio.read_segment`, of one file too many.
    """
    waves: list[tuple[Tensor, None]] = []
    damaged: set[str] = set()
    left = 60.0 * minutes * table.sample_rate
    for utterance in map(int, np.random.default_rng(seed).permutation(len(table))):
        if waves and left <= 0:
            break
        path = table.path(utterance)
        if path in damaged:  # another part of a long recording
            continue
        try:
            wave = as_float(table.read(utterance, 0, int(table.lengths[utterance])))
        except InputError as error:
            damaged.add(path)
            check_damaged(len(damaged), max_unreadable, error)
            logger.warning("%s Another utterance is taken instead.", error)
            continue
        waves.append((torch.from_numpy(wave)[None], None))
        left -= len(wave)
    return waves


# ---------------------------------------------------------------- judging


@dataclass(frozen=True)
class Verdict:
    """What the figures mean."""

    status: str
    """PASSED, WARNED or FAILED."""
    reasons: tuple[str, ...] = ()
    """What is wrong, each without a full stop."""
    remedy: str = ""
    """What to do; empty if nothing is wrong."""

    def __str__(self) -> str:
        """Reasons and remedy in one line."""
        return f"{'; '.join(self.reasons)}: {self.remedy}." if self.reasons else self.status


def use_statistics(counts: Tensor) -> dict[str, float]:
    """Summarise the use of one codebook.

    Arguments
    ---------
    counts : Tensor
        How often each code was the label, shape (codebook_size,).

    Returns
    -------
    dict
        "frames", "codes_used", "perplexity", "perplexity_share" (of the codes),
        "commonest_share" (of the frames), "entropy" (nats).

    Example
    -------
    >>> use_statistics(torch.tensor([5.0, 5.0, 0.0, 0.0]))["perplexity_share"]
    0.5
    """
    values = {name: float(value) for name, value in code_statistics(counts[None]).items()}
    return {
        "frames": int(counts.sum()),
        "codes_used": int(values["codes_used"]),
        "perplexity": values["code_perplexity"],
        "perplexity_share": values["code_perplexity"] / len(counts),
        "commonest_share": values["commonest_share"],
        "entropy": values["unigram_entropy"],
    }


def judge(use: CodebookUse, quantizer: FrameQuantizer) -> Verdict | None:
    """Hold the use of each codebook against the thresholds.

    Arguments
    ---------
    use : CodebookUse
        The counts; those of speech are judged.
    quantizer : FrameQuantizer
        What made the labels, for the remedy.

    Returns
    -------
    Verdict or None
        Of the worst codebook; None if there are too few frames to say.

    Example
    -------
    >>> even, one = torch.ones(1, 1024), 1024.0 * torch.nn.functional.one_hot(torch.tensor([3]), 1024)
    >>> quantizer = RandomProjectionQuantizer(320, codebook_size=1024, whiten=16)
    >>> judge(CodebookUse(even, even, 0.0), quantizer).status, judge(CodebookUse(one, one, 0.0), quantizer).status
    ('passed', 'failed')
    """
    if use.frames < use.frames_needed:
        return None
    failures, warnings = [], []
    for book, counts in enumerate(use.speech, start=1):
        values, codes = use_statistics(counts), len(counts)
        name = "the codebook's" if len(use.speech) == 1 else f"codebook {book}'s"
        perplexity = f"{name} perplexity is {values['perplexity']:.0f} of {codes} ({values['perplexity_share']:.1%}"
        if values["perplexity_share"] < LEAST_PERPLEXITY:
            failures.append(f"{perplexity}, under {LEAST_PERPLEXITY:.0%})")
        elif values["perplexity_share"] < WANTED_PERPLEXITY:
            warnings.append(f"{perplexity}, under {WANTED_PERPLEXITY:.0%})")
        if values["commonest_share"] > MOST_OF_ONE_CODE:
            share = f"{values['commonest_share']:.1%} of the speech (over {MOST_OF_ONE_CODE:.0%})"
            failures.append(f"{name} commonest code labels {share}")
    if failures:
        return Verdict(FAILED, tuple(failures + warnings), _remedy(use, quantizer))
    if warnings:
        return Verdict(WARNED, tuple(warnings), _remedy(use, quantizer))
    return Verdict(PASSED)


def _remedy(use: CodebookUse, quantizer: FrameQuantizer) -> str:
    """What most likely helps."""
    if use.offset > LARGEST_OFFSET:
        return (
            f"the features are not normalised (their bins' means are {use.offset:.1f} from 0 on average): give the "
            "front end normalize: global and let it measure this audio, or normalize: utterance"
        )
    if not isinstance(quantizer, RandomProjectionQuantizer):
        return "listen to the audio: a tone, noise or one clip many times over leaves nothing to tell apart"
    if quantizer.normalize == "time":
        return f"set whiten: {quantizer.codebook_dim} in place of normalize: time in the YAML's quantizer"
    if quantizer.whiten is None:
        return f"set whiten: {quantizer.codebook_dim} in the YAML's quantizer"
    more = "" if quantizer.whiten == quantizer.input_dim else f"set whiten above {quantizer.whiten} in the YAML, and "
    return f"{more}listen to the audio: a tone, noise or one clip many times over leaves nothing to tell apart"


def log_codebook_use(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Tell the log how a model's codebooks are used on some audio, with a warning if they are hardly.

    Never stops a run. A model without a quantizer of frames has nothing to check.

    Arguments
    ---------
    model : nn.Module
        A pre-training model that has been measured.
    batches : sequence of (wavs, wav_lens)
        Training audio.
    """
    quantizer = getattr(model, "quantizer", None)
    if not isinstance(quantizer, FrameQuantizer):
        return
    use = count_codes(model.speech_encoder.frontend, quantizer, batches)
    for book, counts in enumerate(use.speech, start=1):
        values = use_statistics(counts)
        logger.info(
            "Codebook %d of %d: %d of %d codes used, perplexity %.0f, commonest code %.1f %%, on %d frames of speech "
            "(%.0f %% silence left out).",
            book,
            len(use.speech),
            values["codes_used"],
            len(counts),
            values["perplexity"],
            100.0 * values["commonest_share"],
            use.frames,
            100.0 * use.silent_share,
        )
    verdict = judge(use, quantizer)
    if verdict is None:
        logger.info("These are too few frames to judge the codebook by: %d are needed.", use.frames_needed)
    elif verdict.status != PASSED:
        logger.warning("Little to learn from these labels: %s", verdict)
