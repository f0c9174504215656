"""A trained n-gram model is a distribution, KenLM reads it with the scores it was given, other files are refused."""

import gzip
import itertools
import math
import sys

import pytest

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.ngram import SENTENCE_END, UNKNOWN, NGramModel, read_words, train_ngram

TEXTS = ["THE CAT SAT", "THE CAT SAT ON THE HAT", "A HAT", "THE HAT SAT", "A CAT", "CAT CAT CAT", ""]


@pytest.fixture
def model_file(tmp_path):
    """Return a function that writes a trained model."""

    def write(order=3, name="lm.arpa", texts=TEXTS):
        path = tmp_path / name
        path.write_text(train_ngram(texts, order))
        return path

    return write


def read_arpa(text):
    """Log-probability and weight for backing off of each n-gram, read as the format says."""
    entries = {}
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) > 1:
            entries[tuple(fields[1].split())] = (float(fields[0]), float(fields[2]) if len(fields) > 2 else 0.0)
    return entries


def log_prob(entries, order, context, word):
    """The score of a word after a context, by backing off as the format says."""
    context = tuple(context)[-(order - 1) :]
    if (*context, word) in entries:
        return entries[(*context, word)][0]
    return entries.get(context, (0.0, 0.0))[1] + log_prob(entries, order, context[1:], word)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("order", [2, 3, 4])
def test_probabilities_sum_to_one_after_every_context(model_file, order):
    model = NGramModel(model_file(order))
    predicted = [*model.words, SENTENCE_END, UNKNOWN]
    assert sorted(model.words) == ["A", "CAT", "HAT", "ON", "SAT", "THE"] and model.order == order
    for context in itertools.chain.from_iterable(
        itertools.product([*model.words, "NEW"], repeat=length) for length in range(4)
    ):
        state = model.start()
        for word in context:
            _, state = model.score(state, word)
        assert sum(10 ** model.score(state, word)[0] for word in predicted) == pytest.approx(1, abs=1e-5)


def test_kenlm_reads_back_every_score(model_file):
    path = model_file(3)
    entries, model = read_arpa(path.read_text()), NGramModel(path)
    assert len(entries) > 30
    for text in [*TEXTS, "ON A CAT", "HAT HAT HAT", "A NEW CAT SAT"]:
        words = [word if (word,) in entries else UNKNOWN for word in text.split()]
        sentence = ["<s>", *words, SENTENCE_END]
        expected = sum(log_prob(entries, 3, sentence[:place], sentence[place]) for place in range(1, len(sentence)))
        assert model.sentence_score(text) == pytest.approx(expected, abs=1e-5)


def test_probabilities_are_kneser_neys_by_hand():
    entries = read_arpa(train_ngram(["A B", "A"], order=2))
    # after <s>, A, B: </s> was seen after two words, A and B after one; two seen once and one twice: discount 1/2
    unigrams = {
        "A": 0.5 / 4 + 0.375 / 4,
        "B": 0.5 / 4 + 0.375 / 4,
        SENTENCE_END: 1.5 / 4 + 0.375 / 4,
        UNKNOWN: 0.375 / 4,
    }
    for word, expected in unigrams.items():
        assert 10 ** entries[word,][0] == pytest.approx(expected, abs=1e-6)
    # <s> A twice, A B, B </s> and A </s> once: discount 3/5
    assert 10 ** entries["<s>", "A"][0] == pytest.approx(1.4 / 2 + 0.3 * unigrams["A"], abs=1e-6)
    assert 10 ** entries["A", "B"][0] == pytest.approx(0.4 / 2 + 0.6 * unigrams["B"], abs=1e-6)
    assert 10 ** entries["A",][1] == pytest.approx(0.6, abs=1e-6)


def test_a_longer_context_predicts_the_training_text_better(model_file):
    scores = [sum(map(NGramModel(model_file(order)).sentence_score, TEXTS)) for order in (2, 3, 4)]
    assert scores[0] < scores[1] < scores[2]


def test_the_order_of_texts_and_their_spaces_do_not_matter():
    spaced = [f"  {text.replace(' ', '   ')} " for text in reversed(TEXTS)]
    assert train_ngram(spaced) == train_ngram(TEXTS)


@pytest.mark.parametrize("texts", [["A"], ["A A A A"], ["A B", "A B"]])
def test_few_texts_make_a_model_too(model_file, texts):
    model = NGramModel(model_file(3, texts=texts))
    assert math.isfinite(model.sentence_score(texts[0])) and model.sentence_score(texts[0]) < 0


@pytest.mark.parametrize(
    ("texts", "order", "reason"),
    [
        ([], 3, "no word"),
        (["", " "], 3, "no word"),
        (["A <s>"], 3, "has <s>"),
        (["A"], 1, "order"),
        (["A"], 7, "order"),
    ],
)
def test_what_cannot_be_trained_is_refused(texts, order, reason):
    with pytest.raises(InputError, match=reason):
        train_ngram(texts, order)


# ---------------------------------------------------------------- reading


def test_a_gzip_file_scores_as_the_plain_one(model_file, tmp_path):
    path = model_file()
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(path.read_bytes()))
    plain, packed = NGramModel(path), NGramModel(tmp_path / "lm.arpa.gz")
    assert plain.words == packed.words
    assert [plain.sentence_score(text) for text in TEXTS] == [packed.sentence_score(text) for text in TEXTS]


def test_words_that_begin_no_ngram_and_words_beyond_ascii_are_read(tmp_path):
    path = tmp_path / "lm.arpa"
    lines = ["", "\\data\\", "ngram 1=6", "ngram 2=1", "", "\\1-grams:", "-1\t<unk>", "-99\t<s>\t-0.5", "-0.5\t</s>"]
    lines += ["-0.7\tA\t-0.3", "-0.8\tÉTÉ", "-0.9\tX\xa0Y", "", "\\2-grams:", "-0.1\tA ÉTÉ", "", "\\end\\", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_words(path) == (2, ["A", "ÉTÉ", "X\xa0Y"])
    model = NGramModel(path)
    assert model.sentence_score("A ÉTÉ") == pytest.approx(-0.5 - 0.7 - 0.1 - 0.5)


def bad_files(whole):
    """Files that are no language model, and what is said of them."""
    packed = gzip.compress(whole)
    several = whole.replace(b"ngram 3=", b"ngram 3=1\nngram 4=1\nngram 5=1\nngram 6=1\nngram 7=")
    return {
        "empty": (b"", "is empty"),
        "binary of KenLM": (b"mmap lm http://kheafield.com/code format version 5\n\0" + b"\1" * 99, "binary of KenLM"),
        "text": (b"once upon a time\n", "begins with 'once upon a time'"),
        "other binary": (b"\x80\x04\x95\xff\xfe" * 50, "is no text"),
        "cut in the header": (whole[:12], "is no whole ARPA file"),
        "cut in the words": (whole[: whole.index(b"\tCAT")], "is no whole ARPA file"),
        "cut in the n-grams": (whole[: whole.index(b"\\3-grams") + 40], "is no whole ARPA file"),
        "a count too low": (whole.replace(b"ngram 1=9", b"ngram 1=8"), "other words than its header counts"),
        "no numbers": (whole.replace(b"ngram 1=9", b"ngram 1=x"), "is no whole ARPA file"),
        "order 7": (several, "order 7"),
        "order 1": (b"\\data\\\nngram 1=1\n\n\\1-grams:\n-1 A\n\n\\end\\\n", "order 1"),
        "gzip cut": (packed[: len(packed) // 2], "is no whole (gzip|ARPA) file"),
        "gzip of text": (gzip.compress(b"once"), "begins with 'once'"),
        "gzip of nothing": (gzip.compress(b""), "begins with ''"),
        "gzip spoilt": (packed[:30] + b"\xff" * 30 + packed[60:], "gzip file|is no text|ARPA file"),
    }


@pytest.mark.parametrize("case", bad_files(b"ngram 3= \tCAT \\3-grams"))
def test_what_is_no_language_model_is_refused_in_one_line(model_file, tmp_path, case):
    content, reason = bad_files(model_file().read_bytes())[case]
    path = tmp_path / "bad.arpa"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        NGramModel(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "none.arpa", tmp_path):
        with pytest.raises(InputError, match=f"{path} cannot be read"):
            NGramModel(path)


def test_without_kenlm_it_says_what_to_install(model_file, monkeypatch):
    path = model_file()
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(InputError, match=r"pip install camel-kenlm"):
        NGramModel(path)
