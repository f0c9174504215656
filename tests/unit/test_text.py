"""Tokenizers give back what they were given, refuse what they cannot spell, and stay the same when saved."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.text import (
    CharacterTokenizer,
    SentencePieceTokenizer,
    check_texts,
    find_unalignable,
    frames_needed,
)

TEXTS = {f"u{number}": text for number, text in enumerate(["THE CAT'S HAT", "THAT IS THE HAT", "A CAT IS THAT"])}


@pytest.fixture
def subwords(tmp_path):
    """A trained tokenizer of subwords."""
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer", 14)
    tokenizer.fit(TEXTS)
    return tokenizer


# ---------------------------------------------------------------- characters


def test_librispeech_has_28_characters_and_a_blank():
    tokenizer = CharacterTokenizer()
    assert tokenizer.size == len(tokenizer.labels) == len(set(tokenizer.labels)) == 29 and tokenizer.blank == 0
    assert tokenizer.encode("A Z'") == [3, 1, 28, 2]


@given(st.text(" 'abzABZ\t"))
def test_characters_give_back_a_text_with_single_spaces(text):
    tokenizer = CharacterTokenizer()
    units = tokenizer.encode(text)
    assert tokenizer.decode(units) == " ".join(text.upper().split())
    assert all(0 < unit < tokenizer.size for unit in units)


def test_case_is_kept_where_the_characters_have_both():
    assert CharacterTokenizer("aA").encode("aA") == [1, 2]


def test_an_unknown_character_is_named_with_its_utterance():
    with pytest.raises(
        InputError, match="1 of 3 transcripts cannot be spelt, such as b: 'CAFÉ 2' has the character 'É'"
    ):
        CharacterTokenizer().fit({"a": "CAT", "b": "CAFÉ 2", "c": "HAT"})
    CharacterTokenizer("ACÉF 2").fit({"b": "CAFÉ 2"})


@pytest.mark.parametrize(
    ("characters", "reason"),
    [
        ("AA", "one twice"),
        ("A\t", r"'\\t', which cannot be a unit"),
        ("A▁", "cannot be a unit"),
        (" ", "nothing"),
        ("", "nothing"),
    ],
)
def test_characters_that_cannot_be_units_are_refused(characters, reason):
    with pytest.raises(InputError, match=reason):
        CharacterTokenizer(characters)


# ---------------------------------------------------------------- subwords


def test_subwords_give_back_a_text_with_single_spaces(subwords):
    assert subwords.size == len(subwords.labels) == 14 and len(set(subwords.labels)) == 14
    for text in [*TEXTS.values(), "  HATS   THE  ", ""]:
        units = subwords.encode(text)
        assert subwords.decode(units) == " ".join(text.split()) and subwords.blank not in units
    assert subwords.encode("THE") != CharacterTokenizer().encode("THE")


def test_subwords_are_trained_once_for_the_same_texts_and_settings(subwords):
    def models():
        return {path.name: path.stat().st_mtime_ns for path in subwords.folder.iterdir()}

    before = models()
    again = SentencePieceTokenizer(subwords.folder, 14)
    again.fit(TEXTS)
    assert models() == before and again.labels == subwords.labels
    for texts, settings in (({**TEXTS, "u3": "A HAT"}, (14,)), (TEXTS, (13,)), (TEXTS, (14, "bpe"))):
        count = len(models())
        SentencePieceTokenizer(subwords.folder, *settings).fit(texts)
        assert len(models()) == count + 1
    assert before.items() <= models().items() and not list(subwords.folder.glob("*.writing"))


def test_training_is_deterministic(tmp_path):
    states = []
    for name in "ab":
        tokenizer = SentencePieceTokenizer(tmp_path / name, 14)
        tokenizer.fit(TEXTS)
        states.append(next((tmp_path / name).iterdir()).read_bytes())
    assert states[0] == states[1]


@pytest.mark.parametrize(("size", "kind"), [(1000, "unigram"), (1000, "bpe"), (3, "unigram"), (3, "bpe")])
def test_a_vocabulary_that_the_texts_do_not_allow_for_is_refused_with_the_limit(tmp_path, size, kind):
    with pytest.raises(InputError, match=r"give \d+ or (less|more)\.$") as error:
        SentencePieceTokenizer(tmp_path, size, kind).fit(TEXTS)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    limit = int(str(error.value).split()[-3])
    tokenizer = SentencePieceTokenizer(tmp_path, limit, kind)
    tokenizer.fit(TEXTS)
    assert tokenizer.size == limit


def test_long_transcripts_are_not_left_out_of_the_training(tmp_path):
    tokenizer = SentencePieceTokenizer(tmp_path, 14)
    tokenizer.fit({**TEXTS, "long": "Z " * 10_000})
    assert tokenizer.decode(tokenizer.encode("Z")) == "Z"


def test_nothing_is_normalised_but_spaces(tmp_path):
    text = "ﬁ Ａ ½"  # NFKC would make FI, A and 1/2 of them
    tokenizer = SentencePieceTokenizer(tmp_path, 5)
    tokenizer.fit({"a": text})
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_character_that_was_not_trained_on_is_named(subwords):
    with pytest.raises(InputError, match="such as v: 'A DOG' has the character 'D'"):
        check_texts(subwords, {"u": "A HAT", "v": "A DOG"})


def test_what_is_not_trained_says_so(tmp_path):
    tokenizer = SentencePieceTokenizer(tmp_path)
    for use in (lambda: tokenizer.encode("A"), lambda: tokenizer.decode([1]), lambda: tokenizer.size):
        with pytest.raises(RuntimeError, match="call fit"):
            use()


def test_no_text_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="all transcripts are empty"):
        SentencePieceTokenizer(tmp_path).fit({"a": " "})


@pytest.mark.parametrize("options", [{"vocabulary_size": 1}, {"vocabulary_size": 5.0}, {"model_type": "word"}])
def test_options_that_are_none_are_refused(tmp_path, options):
    with pytest.raises(InputError, match=next(iter(options))):
        SentencePieceTokenizer(tmp_path, **options)


# ---------------------------------------------------------------- saving


def test_a_copy_for_a_loading_worker_is_the_same(subwords):
    for tokenizer in (subwords, CharacterTokenizer()):
        for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
            assert other.labels == tokenizer.labels and other.encode("THE HAT") == tokenizer.encode("THE HAT")


def test_saved_and_loaded_is_the_same(subwords, tmp_path):
    subwords.save(tmp_path / "saved")
    other = SentencePieceTokenizer(tmp_path / "elsewhere")
    other.load(tmp_path / "saved")
    assert other.labels == subwords.labels and other.encode("THE HAT") == subwords.encode("THE HAT")
    CharacterTokenizer().save(tmp_path / "characters")
    CharacterTokenizer().load(tmp_path / "characters")


def test_other_units_than_a_run_began_with_are_refused(subwords, tmp_path):
    subwords.save(tmp_path / "subwords")
    other = SentencePieceTokenizer(tmp_path / "elsewhere", 13)
    other.fit(TEXTS)
    CharacterTokenizer().save(tmp_path / "characters")
    cases = ((other, "subwords"), (CharacterTokenizer("ABC"), "characters"), (CharacterTokenizer(), "subwords"))
    for tokenizer, name in cases:
        with pytest.raises(InputError, match="other units"):
            tokenizer.load(tmp_path / name)


def test_what_is_no_tokenizer_cannot_be_loaded(tmp_path):
    (tmp_path / "text").write_text("no model")
    (tmp_path / "empty").write_text("")
    for name in ("text", "empty", "missing"):
        with pytest.raises(InputError, match=name) as error:
            SentencePieceTokenizer(tmp_path / "tokenizer").load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_checkpoint_keeps_the_tokenizer(subwords, tmp_path):
    Checkpointer(tmp_path / "save", {"tokenizer": subwords}).save_checkpoint()
    other = SentencePieceTokenizer(tmp_path / "elsewhere")
    Checkpointer(tmp_path / "save", {"tokenizer": other}).recover_if_possible()
    assert other.labels == subwords.labels
    with pytest.raises(InputError, match="other units"):
        Checkpointer(tmp_path / "save", {"tokenizer": CharacterTokenizer()}).recover_if_possible()


# ---------------------------------------------------------------- lengths


def test_equal_neighbours_need_a_blank_between_them():
    assert [frames_needed(units) for units in ([], [1], [1, 1], [1, 1, 1], [1, 2, 1])] == [0, 1, 3, 5, 3]


def test_what_is_too_short_is_named_and_counted(caplog):
    frames = {f"u{number}": number for number in range(9)}
    units = {name: [1, 1, 2, 3] for name in frames}
    assert find_unalignable(frames, units) == ["u0", "u1", "u2", "u3", "u4"]
    assert "5 of 9 training utterances" in caplog.text and "u0, u1, u2, u3, u4" in caplog.text
    caplog.clear()
    assert len(find_unalignable(frames, {name: [1] * 4 for name in frames}, "dev-clean")) == 7
    assert "7 of 9 dev-clean utterances" in caplog.text and "u4, ..." in caplog.text and "u5" not in caplog.text
    caplog.clear()
    assert find_unalignable({"u5": 5}, units) == [] and not caplog.text
