"""What a synthetic corpus consists of: its utterances before they are spoken, and the files beside the audio."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from speechbrain_bestrq.corpora._intents import Sentence, draw_sentence
from speechbrain_bestrq.corpora._rooms import Room, draw_room
from speechbrain_bestrq.corpora._texts import compose, transcript
from speechbrain_bestrq.corpora._voices import Delivery, Speaker, draw_delivery, draw_speaker, estimate_seconds


class Utterance(NamedTuple):
    """One recording that is to be made; everything about it is a function of the seed and its place in the corpus."""

    path: str
    """Below the corpus's folder, with ``/``."""
    text: str
    """What is said."""
    speaker: Speaker
    delivery: Delivery
    room: Room
    labels: dict[str, Any]
    """What the files beside the audio say of it."""


class Layout(NamedTuple):
    """How a corpus lies on disk."""

    corpus: str
    """The corpus whose layout it is."""
    speakers: int
    """Speakers of the training part, if none are asked for."""
    any_speakers: bool
    """Whether there may be another number of them."""
    plan: Callable[[float, int, int], Iterator[Utterance]]
    """(hours, speakers, seed) to all utterances."""
    texts: Callable[[Sequence[Utterance], Sequence[float]], Iterator[tuple[str, str]]]
    """(utterances, seconds) to the path and the content of each file beside the audio."""


def chance(seed: int, *key: str | int) -> np.random.Generator:
    """A generator for one thing in the corpus: it depends on the seed and on the thing's name alone."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def take_turns(count: int, seconds: float, at_least: int, make: Callable[[int, int], Utterance]) -> Iterator[Utterance]:
    """Let speakers fill a time, each an equal part of it, by the estimated length of what they say.

    Arguments
    ---------
    count : int
        Speakers.
    seconds : float
        Of speech, by all of them.
    at_least : int
        Utterances of each, even if the time is over.
    make : callable
        (speaker, utterance), both from 0, to the utterance.

    Yields
    ------
    Utterance
    """
    total = 0.0
    for speaker in range(count):
        index = 0
        while index < at_least or total < seconds * (speaker + 1) / count:
            utterance = make(speaker, index)
            total += estimate_seconds(utterance.text, utterance.speaker, utterance.delivery)
            index += 1
            yield utterance


def draw_speakers(seed: int, layout: str, part: str, count: int) -> list[Speaker]:
    """Draw the speakers of a part, women and men in turn."""
    return [draw_speaker("FM"[number % 2], chance(seed, layout, part, number)) for number in range(count)]


def held_out(speakers: int, share: float) -> int:
    """Speakers of a part that is not trained on: a share of the others, at least four."""
    return max(4, round(share * speakers))


# --- LibriSpeech ---

SPLITS = {"train-clean-100": 1.0, "dev-clean": 0.1, "test-clean": 0.1}
_CHAPTER = 12


def _plan_librispeech(hours: float, speakers: int, seed: int) -> Iterator[Utterance]:
    first = 100
    for split, share in SPLITS.items():
        count = speakers if share == 1.0 else held_out(speakers, share)
        people = draw_speakers(seed, "librispeech", split, count)

        def make(number: int, index: int, split: str = split, people: list[Speaker] = people, first: int = first):
            generator = chance(seed, "librispeech", split, number, "utterance", index)
            person, speaker, chapter = people[number], first + number, f"{first + number}{index // _CHAPTER:02d}"
            words = (0.5 + 13.0 * generator.beta(1.8, 1.4)) * person.rate / 60.0
            identifier = f"{speaker}-{chapter}-{index % _CHAPTER:04d}"
            return Utterance(
                f"{split}/{speaker}/{chapter}/{identifier}.flac",
                compose("story", round(words), generator),
                person,
                draw_delivery(generator),
                draw_room(chance(seed, "librispeech", split, number, "chapter", index // _CHAPTER)),
                {"split": split, "speaker": speaker, "chapter": chapter, "identifier": identifier},
            )

        yield from take_turns(count, 3600.0 * hours * share, 1, make)
        first += count


def _librispeech_texts(utterances: Sequence[Utterance], seconds: Sequence[float]) -> Iterator[tuple[str, str]]:
    chapters: dict[str, list[str]] = {}
    minutes: dict[int, float] = {}
    people: dict[int, tuple[str, Speaker]] = {}
    for utterance, length in zip(utterances, seconds, strict=True):
        labels = utterance.labels
        speaker, chapter = labels["speaker"], labels["chapter"]
        path = f"{labels['split']}/{speaker}/{chapter}/{speaker}-{chapter}.trans.txt"
        chapters.setdefault(path, []).append(f"{labels['identifier']} {transcript(utterance.text)}\n")
        minutes[speaker] = minutes.get(speaker, 0.0) + length / 60.0
        people[speaker] = labels["split"], utterance.speaker
    for path, lines in chapters.items():
        yield path, "".join(lines)
    rows = [
        f"{speaker:<5}| {person.gender} | {split:<16} | {minutes[speaker]:<5.2f} | {person.voice}\n"
        for speaker, (split, person) in people.items()
    ]
    yield "SPEAKERS.TXT", ";ID  |SEX| SUBSET           |MINUTES| NAME\n" + "".join(rows)


# --- VoxCeleb ---

_VIDEO = 6
_TRIAL_SHARE = 0.2
_TRIALS = 2
# dB. A speaker's videos differ in their microphones, else the mean spectrum alone would tell who it is.
_VIDEO_COLOUR = 3.0
_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")


def _plan_voxceleb(hours: float, speakers: int, seed: int) -> Iterator[Utterance]:
    first = 10001
    for part, share in (("dev", 1.0), ("test", _TRIAL_SHARE)):
        count = speakers if part == "dev" else held_out(speakers, share)
        people = draw_speakers(seed, "voxceleb", part, count)

        def make(number: int, index: int, part: str = part, people: list[Speaker] = people, first: int = first):
            generator = chance(seed, "voxceleb", part, number, "utterance", index)
            # two videos from the start, so that each speaker has trials across videos
            video, place = (index % 2, index // 2) if index < 2 * _VIDEO else divmod(index, _VIDEO)
            session = chance(seed, "voxceleb", part, number, "video", video)
            words = (3.0 + 10.0 * generator.beta(1.0, 2.5)) * people[number].rate / 60.0
            room = draw_room(session, colour=_VIDEO_COLOUR)
            name = "".join(session.choice(_LETTERS, 11).tolist())
            return Utterance(
                f"wav/id{first + number}/{name}/{place + 1:05d}.wav",
                compose("talk", round(words), generator),
                people[number],
                draw_delivery(generator),
                room,
                {"part": part, "speaker": f"id{first + number}", "video": name},
            )

        yield from take_turns(count, 3600.0 * hours * share, 4, make)
        first += count


def _voxceleb_texts(utterances: Sequence[Utterance], seconds: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Trials of the held-out speakers, across videos, as many of the same speaker as of two; and who speaks."""
    trial = [utterance for utterance in utterances if utterance.labels["part"] == "test"]
    by_speaker: dict[str, list[Utterance]] = {}
    for utterance in trial:
        by_speaker.setdefault(utterance.labels["speaker"], []).append(utterance)
    lines = []
    for utterance in trial:
        own = by_speaker[utterance.labels["speaker"]]
        generator = chance(0, "voxceleb", "trials", utterance.path)
        same = [other for other in own if other.labels["video"] != utterance.labels["video"]]
        people = [person for person in by_speaker if person != utterance.labels["speaker"]]
        for _ in range(_TRIALS):
            others = by_speaker[people[int(generator.integers(len(people)))]]
            for label, pool in ((1, same), (0, others)):
                other = pool[int(generator.integers(len(pool)))]
                lines.append(f"{label} {utterance.path.removeprefix('wav/')} {other.path.removeprefix('wav/')}\n")
    yield "meta/veri_test.txt", "".join(dict.fromkeys(lines))
    people = {utterance.labels["speaker"]: utterance for utterance in utterances}
    rows = [
        f"{name}\t{utterance.speaker.voice}\t{utterance.speaker.gender.lower()}\tsynthetic\t{utterance.labels['part']}\n"
        for name, utterance in people.items()
    ]
    yield "meta/vox1_meta.csv", "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\n" + "".join(rows)


# --- IEMOCAP ---

_SESSIONS = 5
_DIALOGUE = 30


class Emotion(NamedTuple):
    """How an emotion is spoken, how it is rated and how often it occurs."""

    name: str
    share: float
    delivery: Delivery
    attributes: tuple[int, int, int]
    """Valence, activation and dominance, 1 to 5."""


# Neighbours overlap, by the spread below.
EMOTIONS = {
    "ang": Emotion("Anger", 0.18, Delivery(1.10, 8.0, 20.0, 7.0, 2.0), (2, 4, 4)),
    "hap": Emotion("Happiness", 0.12, Delivery(1.05, 14.0, 20.0, 2.5, 0.8), (4, 3, 3)),
    "exc": Emotion("Excited", 0.12, Delivery(1.15, 20.0, 30.0, 4.0, 1.2), (4, 4, 3)),
    "neu": Emotion("Neutral state", 0.24, Delivery(), (3, 2, 3)),
    "sad": Emotion("Sadness", 0.18, Delivery(0.85, -8.0, -20.0, -6.0, -2.0), (2, 2, 2)),
    "fru": Emotion("Frustration", 0.10, Delivery(1.0, 3.0, 8.0, 3.0, 1.0), (2, 3, 3)),
    "sur": Emotion("Surprise", 0.02, Delivery(1.0, 20.0, 35.0, 2.0, 0.5), (3, 4, 3)),
    "fea": Emotion("Fear", 0.02, Delivery(1.2, 16.0, -5.0, -2.0, -0.5), (2, 4, 1)),
    "oth": Emotion("Other", 0.02, Delivery(0.95, -3.0, 5.0, 0.0, 0.0), (3, 3, 3)),
}
_EMOTION_SPREAD = 1.2


def _plan_iemocap(hours: float, speakers: int, seed: int) -> Iterator[Utterance]:
    # one room for all, and microphones near the mouth, as in the release
    laboratory = draw_room(chance(seed, "iemocap", "laboratory"), close=True)
    names, shares = tuple(EMOTIONS), [emotion.share for emotion in EMOTIONS.values()]
    for session in range(1, _SESSIONS + 1):
        people = draw_speakers(seed, "iemocap", f"session {session}", speakers // _SESSIONS)

        def make(_: int, index: int, session: int = session, people: list[Speaker] = people) -> Utterance:
            generator = chance(seed, "iemocap", session, "turn", index)
            number, turn = divmod(index, _DIALOGUE)
            dialogue = chance(seed, "iemocap", session, "dialogue", number)
            room = laboratory._replace(level=laboratory.level + float(dialogue.normal(0.0, 1.0)))
            mood = str(dialogue.choice(names, p=shares))
            # an improvisation has its mood, but nobody keeps to it
            emotion = mood if generator.random() < 0.3 else str(generator.choice(names, p=shares))
            person, letter = people[turn % 2], "FM"[turn % 2]
            name = f"Ses{session:02d}{'FM'[number % 2]}_impro{number // 2 + 1:02d}"
            words = (0.8 + 7.0 * generator.beta(1.2, 2.5)) * person.rate / 60.0
            return Utterance(
                f"Session{session}/sentences/wav/{name}/{name}_{letter}{turn // 2:03d}.wav",
                compose("dialogue", round(words), generator),
                person,
                draw_delivery(generator, EMOTIONS[emotion].delivery, _EMOTION_SPREAD),
                room,
                {"session": session, "dialogue": name, "emotion": emotion},
            )

        yield from take_turns(1, 3600.0 * hours / _SESSIONS, 2, make)


def _iemocap_texts(utterances: Sequence[Utterance], seconds: Sequence[float]) -> Iterator[tuple[str, str]]:
    evaluations: dict[str, str] = {}
    transcripts: dict[str, str] = {}
    ends: dict[str, float] = {}
    for utterance, length in zip(utterances, seconds, strict=True):
        dialogue = utterance.labels["dialogue"]
        turn = utterance.path.rpartition("/")[2].removesuffix(".wav")
        generator = chance(0, "iemocap", "evaluation", utterance.path)
        start = ends.get(dialogue, 0.0) + float(generator.uniform(0.3, 1.5))
        ends[dialogue] = end = start + length
        folder = f"Session{utterance.labels['session']}/dialog"
        path = f"{folder}/EmoEvaluation/{dialogue}.txt"
        evaluations.setdefault(path, "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n")
        evaluations[path] += _evaluation(turn, start, end, utterance.labels["emotion"], generator)
        path = f"{folder}/transcriptions/{dialogue}.txt"
        line = f"{turn} [{start:08.4f}-{end:08.4f}]: {utterance.text}\n"
        transcripts[path] = transcripts.get(path, "") + line
    yield from evaluations.items()
    yield from transcripts.items()


def _evaluation(turn: str, start: float, end: float, emotion: str, generator: np.random.Generator) -> str:
    """What three people call the emotion, two of them alike, and how two rate it."""
    ratings = [
        [min(max(usual + int(generator.integers(-1, 2)), 1), 5) for usual in EMOTIONS[emotion].attributes]
        for _ in range(2)
    ]
    means = ", ".join(f"{sum(pair) / 2:.4f}" for pair in zip(*ratings, strict=True))
    other = EMOTIONS[str(generator.choice(tuple(EMOTIONS)))].name
    lines = [f"[{start:.4f} - {end:.4f}]\t{turn}\t{emotion}\t[{means}]"]
    lines += [f"C-E{n}:\t{name};\t()" for n, name in enumerate([EMOTIONS[emotion].name] * 2 + [other], start=1)]
    lines += [f"A-E{n}:\tval {v}; act {a}; dom {d};\t()" for n, (v, a, d) in enumerate(ratings, start=1)]
    return "\n".join(lines) + "\n\n"


# --- SLURP ---

_SLURP_PARTS = {"train": 1.0, "devel": 0.15, "test": 0.2}


def _plan_slurp(hours: float, speakers: int, seed: int) -> Iterator[Utterance]:
    # One room for all, in front of a device or with a headset: words leave little trace in a mean spectrum, and a
    # room of each speaker's own would cover it.
    rooms = [draw_room(chance(seed, "slurp", "room", headset), close=True) for headset in range(2)]
    rooms[0] = rooms[0]._replace(direct=6.0)
    for number_of_part, (part, share) in enumerate(_SLURP_PARTS.items()):
        count = speakers if part == "train" else held_out(speakers, share)
        people = draw_speakers(seed, "slurp", part, count)
        first = number_of_part * 10**8

        def make(number: int, index: int, part: str = part, people: list[Speaker] = people, first: int = first):
            sentence = draw_sentence(part, chance(seed, "slurp", part, number, "sentence", index // 2))
            generator = chance(seed, "slurp", part, number, "recording", index)
            # women and men, all of English, as the release calls them
            user = f"{people[number].gender}E-{first // 10**4 + number}"
            # each sentence twice: from across the room, and by a headset
            headset = index % 2 == 1
            identifier = first + number * 10**4 + index // 2
            name = f"audio-{identifier:010d}{'-headset' if headset else ''}.flac"
            return Utterance(
                f"audio/slurp_real/{name}",
                sentence.text,
                people[number],
                draw_delivery(generator),
                rooms[headset]._replace(snr=rooms[headset].snr + float(generator.normal(0.0, 2.0))),
                {"part": part, "slurp_id": identifier, "file": name, "sentence": sentence, "user": user},
            )

        yield from take_turns(count, 3600.0 * hours * share, 2, make)


def _slurp_texts(utterances: Sequence[Utterance], seconds: Sequence[float]) -> Iterator[tuple[str, str]]:
    entries: dict[str, dict[int, dict[str, Any]]] = {part: {} for part in _SLURP_PARTS}
    metadata: dict[int, dict[str, Any]] = {}
    for utterance in utterances:
        part, identifier, file, sentence = (utterance.labels[key] for key in ("part", "slurp_id", "file", "sentence"))
        entry = entries[part].setdefault(identifier, _slurp_entry(identifier, sentence))
        heard = {"wer": 0.0, "ent_wer": 0.0, "status": "correct"}
        entry["recordings"].append({"file": file, **heard})
        spoken = metadata.setdefault(identifier, {"sentence": sentence.text, "recordings": {}})
        spoken["recordings"][file] = {"usrid": utterance.labels["user"], **heard}
    for part, found in entries.items():
        yield f"dataset/slurp/{part}.jsonl", "".join(json.dumps(entry) + "\n" for entry in found.values())
    yield "dataset/slurp/metadata.json", json.dumps(metadata) + "\n"


def _slurp_entry(identifier: int, sentence: Sentence) -> dict[str, Any]:
    return {
        "slurp_id": identifier,
        "sentence": sentence.text,
        "sentence_annotation": sentence.annotation,
        "intent": f"{sentence.scenario}_{sentence.action}",
        "action": sentence.action,
        "tokens": [{"surface": word, "id": place} for place, word in enumerate(sentence.words)],
        "scenario": sentence.scenario,
        "recordings": [],
        "entities": [{"span": list(range(start, end)), "type": kind} for kind, start, end in sentence.entities],
    }


LAYOUTS = {
    "librispeech": Layout("LibriSpeech", 40, True, _plan_librispeech, _librispeech_texts),
    "voxceleb": Layout("VoxCeleb", 40, True, _plan_voxceleb, _voxceleb_texts),
    "iemocap": Layout("IEMOCAP", 2 * _SESSIONS, False, _plan_iemocap, _iemocap_texts),
    "slurp": Layout("SLURP", 40, True, _plan_slurp, _slurp_texts),
}
