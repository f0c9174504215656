"""The check of a pre-training YAML's codebooks on the user's audio: ``sb-bestrq check-codebook``."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechbrain_bestrq.audio import AudioTable
from speechbrain_bestrq.codebook_plot import draw_codebook_use
from speechbrain_bestrq.codebook_use import choose_audio, count_codes, judge, use_statistics
from speechbrain_bestrq.corpora import prepare_corpus, read_manifest
from speechbrain_bestrq.corpora.manifest import corpus_name
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.quantizer import FrameQuantizer
from speechbrain_bestrq.recipe import load_recipe


def check_codebook(
    hparams_file: str,
    output_folder: str | Path,
    minutes: float = 10.0,
    data_folder: str | None = None,
    manifest: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Check the codebooks of a pre-training YAML on the user's audio, and draw their use.

    What training would measure (normalisation, whitening) is measured on the audio
    chosen here: a random choice over the corpus, by the YAML's ``seed``.

    Arguments
    ---------
    hparams_file : str
        The YAML.
    output_folder : path
        Where ``codebook.png`` and the corpus' manifests go; the YAML's own output folder is
        not touched.
    minutes : float
        Audio to look at.
    data_folder : str, optional
        The corpus, prepared as training would.
    manifest : str, optional
        A manifest in place of a corpus.
    overrides : sequence of str
        ``--key value`` as the recipe takes them.

    Returns
    -------
    dict
        Ready for JSON: "status", "reasons", "remedy", "hparams", "audio", "utterances",
        "minutes", "frames" (of speech), "silent_share", "codebook_size", "codebooks" (for
        each, :func:`use_statistics` of the speech, and of everything under
        "with_silence"), "plot".

    Raises
    ------
    InputError
        If the YAML, an override or the audio cannot be used, or there is too little
        speech to judge.
    """
    if not minutes > 0.0:
        raise InputError(f"--minutes is above 0, not {minutes:g}.")
    if manifest is not None and data_folder is not None:
        raise InputError("--data_folder and --manifest exclude each other: give one.")
    for before, word in zip(["", *overrides], overrides, strict=False):
        if not word.startswith("--") and (not before.startswith("--") or "=" in before):
            raise InputError(f"{word!r} belongs to no option: give keys of the YAML as --key value.")
    corpus = manifest if data_folder is None else data_folder
    given = [] if corpus is None else ["--data_folder", str(corpus)]
    with tempfile.TemporaryDirectory() as scratch:
        # the YAML makes its checkpoint folder, and clears a running training's unfinished checkpoints
        _, _, _, hparams = load_recipe([hparams_file, *given, "--output_folder", scratch, "--device=cpu", *overrides])
    corpus = corpus or hparams["data_folder"]  # the YAML may name its own
    model = hparams["model"]
    quantizer = getattr(model, "quantizer", None)
    if not isinstance(quantizer, FrameQuantizer):
        raise InputError(f"{hparams_file}: its model has no quantizer of frames, so there is nothing to check.")
    output_folder = Path(output_folder)
    if manifest is None:
        manifest = prepare_corpus(hparams, output_folder / "manifests")["train"]
    limits = {"min_seconds": hparams["min_seconds"], "max_seconds": hparams["max_seconds"]}
    table = AudioTable.from_manifest(read_manifest(manifest), hparams["sample_rate"], **limits)
    audio = choose_audio(table, minutes, hparams["seed"], hparams["max_unreadable"])
    try:
        model.measure(audio)
    except ValueError as error:
        raise InputError(f"statistics of {corpus}: {error}") from error
    use = count_codes(model.speech_encoder.frontend, quantizer, audio)
    verdict = judge(use, quantizer)
    heard = sum(wavs.shape[1] for wavs, _ in audio) / table.sample_rate / 60
    if verdict is None:
        remedy = "add audio" if len(audio) == len(table) else "raise --minutes"
        raise InputError(
            f"{corpus}: {use.frames} frames of speech in {heard:.1f} minutes are too few to judge a codebook of "
            f"{quantizer.codebook_size}, whose perplexity they bound: {use.frames_needed} are needed; {remedy}."
        )
    # a picture is shown elsewhere: it bears what the recordings are, and no path of this machine
    name = corpus_name(corpus, Path(corpus).resolve().name)
    title = f"{Path(hparams_file).name} on {name}: {heard:.1f} minutes, {use.frames:,} frames of speech"
    return {
        "status": verdict.status,
        "reasons": list(verdict.reasons),
        "remedy": verdict.remedy,
        "hparams": hparams_file,
        "audio": str(corpus),
        "utterances": len(audio),
        "minutes": heard,
        "frames": use.frames,
        "silent_share": use.silent_share,
        "codebook_size": quantizer.codebook_size,
        "codebooks": [
            {**use_statistics(speech), "with_silence": use_statistics(everything)}
            for speech, everything in zip(use.speech, use.everything, strict=True)
        ],
        "plot": str(draw_codebook_use(use, output_folder / "codebook.png", title)),
    }


def check_text(result: dict[str, Any]) -> str:
    """Put the result of :func:`check_codebook` into a table that reads well in a terminal.

    Arguments
    ---------
    result : dict
        The result.

    Returns
    -------
    str
        Lines without the last line break.
    """
    codes = result["codebook_size"]
    lines = [
        f"{result['hparams']} on {result['audio']}: {result['utterances']} utterances, {result['minutes']:.1f} "
        f"minutes, {result['frames']:,} frames of speech, {result['silent_share']:.1%} silence",
        "",
        "| codebook | frames | codes used | perplexity | commonest code | entropy, nats |",
        "|---|---|---|---|---|---|",
    ]
    for book, values in enumerate(result["codebooks"], start=1):
        for name, row in ((f"{book}, speech", values), (f"{book}, with silence", values["with_silence"])):
            lines.append(
                f"| {name} | {row['frames']:,} | {row['codes_used']:,} of {codes:,} | {row['perplexity']:,.1f} "
                f"({row['perplexity_share']:.2%}) | {row['commonest_share']:.1%} | {row['entropy']:.2f} |"
            )
    lines += ["", f"plot: {result['plot']}", f"result: {result['status']}"]
    lines += [f"  {reason}" for reason in result["reasons"]]
    if result["remedy"]:
        lines.append(f"remedy: {result['remedy']}")
    return "\n".join(lines)
