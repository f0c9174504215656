"""Texts as sequences of units: characters, or SentencePiece's."""

from collections.abc import Sequence

from speechbrain_bestrq.errors import InputError

#: What LibriSpeech's transcripts are made of.
LIBRISPEECH_CHARACTERS = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class CharacterTokenizer:
    """Characters as units; 0 is CTC's blank.

    Arguments
    ---------
    characters : str
        All that may occur. Texts are upper-cased where the characters have no lower case.

    Example
    -------
    >>> tokenizer = CharacterTokenizer()
    >>> tokenizer.encode("Hi"), tokenizer.decode([10, 11]), tokenizer.size
    ([10, 11], 'HI', 29)
    """

    blank = 0

    def __init__(self, characters: str = LIBRISPEECH_CHARACTERS):
        if len(set(characters)) != len(characters):
            raise InputError(f"characters {characters!r} has one twice: give each once.")
        self.characters = characters
        self.labels = ["", *characters]
        self.size = len(self.labels)
        self._unit = {character: number for number, character in enumerate(characters, start=1)}
        self._upper = not any(character.islower() for character in characters)

    def encode(self, text: str) -> list[int]:
        """Give the units of a text; spaces are single and within.

        Raises
        ------
        InputError
            If a character is none of these.
        """
        text = " ".join(text.split())
        if self._upper:
            text = text.upper()
        try:
            return [self._unit[character] for character in text]
        except KeyError as error:
            raise InputError(
                f"{text[:60]!r} has the character {error}, which is not among {self.characters!r}: add it to the "
                "tokenizer's characters, or mend the transcript."
            ) from error

    def decode(self, units: Sequence[int]) -> str:
        """Give the text of units without blanks."""
        return " ".join("".join(self.labels[unit] for unit in units).split())
