"""Texts as sequences of units for CTC: characters, or subwords of SentencePiece."""

import hashlib
import io
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from speechbrain.utils.distributed import if_main_process, run_on_main

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.writing import replacing

logger = logging.getLogger(__name__)

#: What LibriSpeech's transcripts are made of.
LIBRISPEECH_CHARACTERS = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: The label of CTC's blank, for the beam search; no text contains it.
BLANK_LABEL = "<blank>"
#: With which SentencePiece begins a word.
WORD_START = "▁"
#: Utterances named in a message.
NAMED = 5


class Tokenizer(ABC):
    """What all tokenizers have in common.

    A tokenizer can be given to a SpeechBrain ``Checkpointer`` as a recoverable: a run that goes on with
    other units than it began with is refused.

    Attributes
    ----------
    blank : int
        CTC's blank, 0.
    labels : list of str
        The label of each unit, the blank's first: what a beam search spells with.
    size : int
        Units, with the blank.
    """

    blank = 0

    @property
    @abstractmethod
    def labels(self) -> list[str]:
        """The label of each unit."""

    @property
    def size(self) -> int:
        """Units, with the blank."""
        return len(self.labels)

    @abstractmethod
    def fit(self, texts: Mapping[str, str]) -> None:
        """Get ready for the texts of a training set."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Give the units of a text; spaces are single, and between words only."""

    def normalize(self, text: str) -> str:
        """Give a text as the units spell it: what was recognised is compared with that."""
        return " ".join(text.split())

    def decode(self, units: Sequence[int]) -> str:
        """Give the text of units without blanks; its spaces are single, and between words only."""
        text = "".join(self.labels[unit] for unit in units).replace(WORD_START, " ")
        return " ".join(text.split())

    @abstractmethod
    def _state(self) -> bytes | None:
        """What makes the tokenizer; None before it was trained."""

    @abstractmethod
    def _restore(self, state: bytes) -> None:
        """Become the tokenizer of that state."""

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer; with several processes the main one does.

        Arguments
        ---------
        path : str or Path
            The file: JSON of characters, or SentencePiece's own model.
        """
        if if_main_process():
            _write_bytes(Path(path), self._state() or b"")

    def load(self, path: str | os.PathLike) -> None:
        """Read a tokenizer of the same kind.

        Arguments
        ---------
        path : str or Path
            What :meth:`save` wrote.

        Raises
        ------
        InputError
            If the file cannot be read, or holds other units than this tokenizer already has.
        """
        path = Path(path)
        try:
            state = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): give a saved tokenizer.") from error
        if self._state() is None:
            try:
                self._restore(state)
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                raise InputError(f"{path} is no saved {type(self).__name__}: give the file that it saved.") from error
        elif state != self._state():
            raise InputError(
                f"{path} holds other units than the YAML's tokenizer: give the tokenizer that this run began with, or "
                "another output_folder."
            )


def _write_bytes(path: Path, content: bytes) -> None:
    """Write a file, all or nothing."""
    with replacing(path) as beside:
        beside.write_bytes(content)


@register_checkpoint_hooks
class CharacterTokenizer(Tokenizer):
    """Characters as units; 0 is CTC's blank.

    Arguments
    ---------
    characters : str
        All that may occur. Texts are upper-cased where the characters have no lower case.

    Raises
    ------
    InputError
        If a character is there twice, or cannot be a unit.

    Example
    -------
    >>> tokenizer = CharacterTokenizer()
    >>> tokenizer.encode("Hi"), tokenizer.decode([10, 11]), tokenizer.size
    ([10, 11], 'HI', 29)
    """

    def __init__(self, characters: str = LIBRISPEECH_CHARACTERS):
        if len(set(characters)) != len(characters):
            raise InputError(f"characters {characters!r} has one twice: give each once.")
        unfit = {character for character in characters if character.isspace()} - {" "} | set(characters) & {WORD_START}
        if unfit or not characters.strip():
            what = f"has {min(unfit)!r}, which cannot be a unit" if unfit else "has nothing to spell with"
            raise InputError(f"characters {characters!r} {what}: give those of the transcripts.")
        self.characters = characters
        self._labels = [BLANK_LABEL, *characters]
        self._unit = {character: number for number, character in enumerate(characters, start=1)}
        self._upper = not any(character.islower() for character in characters)

    @property
    def labels(self) -> list[str]:
        """The label of each unit."""
        return self._labels

    def normalize(self, text: str) -> str:
        """Give a text as the units spell it; in upper case where the characters have no lower case.

        Arguments
        ---------
        text : str
            Words.

        Returns
        -------
        str

        Example
        -------
        >>> CharacterTokenizer().normalize("hello  world")
        'HELLO WORLD'
        """
        text = super().normalize(text)
        return text.upper() if self._upper else text

    def fit(self, texts: Mapping[str, str]) -> None:
        """See whether all texts can be spelt; characters need no training.

        Arguments
        ---------
        texts : mapping of str to str
            Text by the utterance's name.

        Raises
        ------
        InputError
            If a text has another character: names it and its utterance.
        """
        check_texts(self, texts)

    def encode(self, text: str) -> list[int]:
        """Give the units of a text; spaces are single, and between words only.

        Arguments
        ---------
        text : str
            Words.

        Returns
        -------
        list of int

        Raises
        ------
        InputError
            If a character is none of the tokenizer's.
        """
        text = self.normalize(text)
        try:
            return [self._unit[character] for character in text]
        except KeyError as error:
            raise InputError(
                f"{text[:60]!r} has the character {error}, which is not among {self.characters!r}: add it to the "
                "tokenizer's characters, or mend the transcript."
            ) from error

    def _state(self) -> bytes:
        return json.dumps({"characters": self.characters}, ensure_ascii=False).encode()

    def _restore(self, state: bytes) -> None:
        self.__init__(json.loads(state)["characters"])

    @mark_as_saver
    def _save_checkpoint(self, path: str) -> None:
        self.save(path)

    @mark_as_loader
    def _load_checkpoint(self, path: str, end_of_epoch: bool) -> None:
        self.load(path)


@register_checkpoint_hooks
class SentencePieceTokenizer(Tokenizer):
    """Subwords as units, trained on the transcripts by SentencePiece; 0 is CTC's blank.

    Texts are taken as they are: nothing is normalised but spaces. The model is kept in the folder under
    a name that depends on the texts and the settings: the same ones find it again, others train another.

    Arguments
    ---------
    folder : str or Path
        Where the models are kept.
    vocabulary_size : int
        Units, with the blank.
    model_type : str
        "unigram" (arXiv 1804.10959) or "bpe".

    Raises
    ------
    InputError
        If an option is none.

    Example
    -------
    >>> tokenizer = SentencePieceTokenizer(getfixture("tmp_path"), vocabulary_size=6)
    >>> tokenizer.fit({"a": "NO ON NO", "b": "NOON"})
    >>> tokenizer.decode(tokenizer.encode("ON  NOON")), tokenizer.size
    ('ON NOON', 6)
    """

    def __init__(self, folder: str | os.PathLike, vocabulary_size: int = 1000, model_type: str = "unigram"):
        if model_type not in ("unigram", "bpe"):
            raise InputError(f"model_type is {model_type!r}: give unigram or bpe.")
        if isinstance(vocabulary_size, bool) or not isinstance(vocabulary_size, int) or vocabulary_size < 2:
            raise InputError(f"vocabulary_size is {vocabulary_size!r}: give a whole number of units, 2 at least.")
        self.folder = Path(folder)
        self.vocabulary_size, self.model_type = vocabulary_size, model_type
        self._processor: sentencepiece.SentencePieceProcessor | None = None
        self._labels: list[str] = []

    @property
    def labels(self) -> list[str]:
        """The label of each unit."""
        self._check_trained()
        return self._labels

    def fit(self, texts: Mapping[str, str]) -> None:
        """Train on texts, on the main process; or find what was trained on the same texts before.

        Arguments
        ---------
        texts : mapping of str to str
            Text by the utterance's name.

        Raises
        ------
        InputError
            If the texts do not allow for so many units, or so few; names the limit.
        """
        lines = [" ".join(text.split()) for text in texts.values()]
        if not any(lines):
            raise InputError("the tokenizer cannot be trained: all transcripts are empty.")
        settings = [self.vocabulary_size, self.model_type, sentencepiece.__version__]
        digest = hashlib.sha256(json.dumps([settings, lines]).encode()).hexdigest()[:16]
        path = self.folder / f"{self.model_type}_{self.vocabulary_size}_{digest}.model"
        run_on_main(self._train, [path, lines])
        self._restore(path.read_bytes())

    def _train(self, path: Path, lines: list[str]) -> None:
        if path.exists():
            return
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type=self.model_type,
                vocab_size=self.vocabulary_size,
                character_coverage=1.0,
                normalization_rule_name="identity",
                max_sentence_length=2**20,  # longer ones would be left out without a word
                unk_id=0,  # never a unit of a text, so that its place is free for the blank
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise InputError(self._explain(str(error))) from error
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_bytes(path, model.getvalue())

    def _explain(self, message: str) -> str:
        """Say in a line what SentencePiece found wrong."""
        too_many = re.search(r"too high.*<= (\d+)", message)
        too_few = re.search(r"required_chars\. \d+ vs (\d+)", message)
        start = f"vocabulary_size is {self.vocabulary_size}, but the transcripts "
        if too_many:
            return f"{start}have pieces for {too_many[1]} at most: give {too_many[1]} or less."
        if too_few:
            return f"{start}have so many characters that {too_few[1]} are needed: give {too_few[1]} or more."
        return f"the tokenizer cannot be trained ({' '.join(message.split())[:200]}): give another vocabulary_size."

    def _check_trained(self) -> None:
        if self._processor is None:
            raise RuntimeError("the tokenizer is not trained yet: call fit with the training set's texts first.")

    def encode(self, text: str) -> list[int]:
        """Give the units of a text; spaces are single, and between words only.

        Arguments
        ---------
        text : str
            Words.

        Returns
        -------
        list of int

        Raises
        ------
        InputError
            If a character did not occur in training.
        """
        self._check_trained()
        units = self._processor.encode(text)
        if self.blank in units:
            known = {character for label in self._labels[1:] for character in label}
            unknown = sorted({character for character in text if not character.isspace()} - known)
            raise InputError(
                f"{text[:60]!r} has the character {unknown[0]!r}, which the training transcripts do not have: mend the "
                "transcript, or train with it."
            )
        return units

    def _state(self) -> bytes | None:
        return None if self._processor is None else self._processor.serialized_model_proto()

    def _restore(self, state: bytes) -> None:
        if not state:
            raise ValueError("an empty model")
        processor = sentencepiece.SentencePieceProcessor(model_proto=state)
        self._labels = [BLANK_LABEL, *(processor.id_to_piece(unit) for unit in range(1, processor.get_piece_size()))]
        self._processor = processor

    @mark_as_saver
    def _save_checkpoint(self, path: str) -> None:
        self.save(path)

    @mark_as_loader
    def _load_checkpoint(self, path: str, end_of_epoch: bool) -> None:
        self.load(path)


def check_texts(tokenizer: Tokenizer, texts: Mapping[str, str]) -> None:
    """See whether all texts can be encoded.

    Arguments
    ---------
    tokenizer : Tokenizer
        Trained.
    texts : mapping of str to str
        Text by the utterance's name.

    Raises
    ------
    InputError
        If one cannot: names the first utterance and its character, and counts the others.

    Example
    -------
    >>> check_texts(CharacterTokenizer("AB "), {"u1": "A B", "u2": "ABC"})
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: 1 of 2 transcripts cannot be spelt, such as u2: 'ABC' has the character 'C', \
which is not among 'AB ': add it to the tokenizer's characters, or mend the transcript.
    """
    failures = {}
    for name, text in texts.items():
        try:
            tokenizer.encode(text)
        except InputError as error:
            failures[name] = error
    if failures:
        name, error = next(iter(failures.items()))
        raise InputError(f"{len(failures)} of {len(texts)} transcripts cannot be spelt, such as {name}: {error}")


def frames_needed(units: Sequence[int]) -> int:
    """Count the frames that CTC needs for units: one for each, and a blank between two that are equal.

    Arguments
    ---------
    units : sequence of int
        Without blanks.

    Returns
    -------
    int

    Example
    -------
    >>> frames_needed([1, 2, 2, 3])
    5
    """
    return len(units) + sum(one == other for one, other in zip(units, units[1:], strict=False))


def find_unalignable(
    frames: Mapping[str, int], units: Mapping[str, Sequence[int]], name: str = "training"
) -> list[str]:
    """Find the utterances that CTC cannot align, for they have fewer frames than their units need; log them.

    Their loss would be infinite, and without a word no part of the training.

    Arguments
    ---------
    frames : mapping of str to int
        The encoder's frames of each utterance, at the fastest speed that it is played at.
    units : mapping of str to sequence of int
        Of the same utterances.
    name : str
        Of the set, for the log.

    Returns
    -------
    list of str
        Names of the utterances.

    Example
    -------
    >>> find_unalignable({"u1": 3, "u2": 3}, {"u1": [1, 2, 3], "u2": [1, 2, 2]})
    ['u2']
    """
    short = [one for one, count in frames.items() if count < frames_needed(units[one])]
    if short:
        logger.warning(
            "%d of %d %s utterances have fewer encoder frames than their transcript needs, and cannot be aligned: %s",
            len(short),
            len(frames),
            name,
            ", ".join(short[:NAMED]) + (", ..." if len(short) > NAMED else ""),
        )
    return short
