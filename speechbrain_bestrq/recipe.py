"""What the ``main`` of every recipe does: options, YAML, one-line errors."""

import atexit
import difflib
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import speechbrain as sb
import torch
import yaml
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.run_opts import RunOptions

from speechbrain_bestrq.allocator import keep_freed_memory
from speechbrain_bestrq.digests import text_digest
from speechbrain_bestrq.errors import INTERRUPTED, LOST_RANK, START_AGAIN, USER_ERROR, InputError, explain_refusal
from speechbrain_bestrq.locking import fellow_writer, sole_writer
from speechbrain_bestrq.machine import check_gpus_usable
from speechbrain_bestrq.precision import loading_for
from speechbrain_bestrq.ranks import check_ranks_agree
from speechbrain_bestrq.stopping import StoppedError

#: SpeechBrain's run options that decide what is trained, where the YAML has no key of that name.
_RUN_OPTIONS = frozenset(
    "auto_mix_prec bfloat16_mix_prec grad_accumulation_factor max_grad_norm nonfinite_patience optimizer_step_limit "
    "precision remove_vector_weight_decay skip_nonfinite_grads".split()
)

#: The key of hparams under which :func:`build_hparams` puts what decides what is trained and is no plain value there.
GOVERNING = "__governing__"


#: Numbers of YAML 1.2, which HyperPyYAML reads, and not of 1.1.
_NUMBER = re.compile(r"[-+]?\d+[eE][-+]?\d+|0o[0-7]+")

#: The home folder at the beginning of a path, which a shell leaves as it is behind an equals sign and elsewhere.
_HOME = re.compile(r"^(random:)?~(?=/)")
_NO_FP16 = "fp16 is for GPUs: give --precision bf16 or fp32, and --eval_precision too where it is given."

#: Keys of the YAMLs whose values are paths.
PATHS = ("cache_folder", "data_folder", "encoder", "language_model", "output_folder", "save_folder")


def quote_paths(arguments: list[str]) -> list[str]:
    """Quote the paths among options: SpeechBrain reads all values as YAML, in which some are something else.

    Arguments
    ---------
    arguments : list of str
        Of a command line.

    Returns
    -------
    list of str
        The same, of which each path that YAML would take for something else is quoted.

    Raises
    ------
    InputError
        If a path has an equals sign, which SpeechBrain takes for a space.

    Example
    -------
    >>> quote_paths(["--data_folder", "/data/Tape #1", "--output_folder=2024", "--seed", "1"])
    ['--data_folder', '"/data/Tape #1"', '--output_folder="2024"', '--seed', '1']
    """
    quoted: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        key, value = before, word
        if word.startswith("--"):
            key, _, value = word.partition("=")
        if key.startswith("--") and key.removeprefix("--") in PATHS:
            if "=" in value:
                raise InputError(
                    f"{key} {value}: a path with an equals sign cannot be given: rename it, or give a link."
                )
            if value.startswith("("):
                raise InputError(f"{key} {value}: what begins with a bracket is taken for a tuple: write ./{value}.")
            full = _HOME.sub(lambda found: f"{found[1] or ''}{Path.home()}", value)
            word, value = word.removesuffix(value) + full, full
            if _is_no_text(value):
                text = yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True).strip()
                word = f"{key}={text}" if word.startswith("--") else text
        quoted.append(word)
    return quoted


def _is_no_text(value: str) -> bool:
    """Whether YAML takes a path for something else; not what is meant so: tags, quotes, null, and mappings."""
    if value[:1] in ("!", '"', "'", "{", "[") or value in ("null", "~", ""):
        return False
    try:
        return yaml.safe_load(value) != value or bool(_NUMBER.fullmatch(value))
    except yaml.YAMLError:
        return True


def load_recipe(arguments: list[str]) -> tuple[str, RunOptions, str, dict[str, Any]]:
    """Parse a recipe's command line, join the process group of a ``torchrun``, load the YAML.

    Arguments
    ---------
    arguments : list of str
        ``sys.argv[1:]``: the YAML, run options, ``--key value`` overrides.

    Returns
    -------
    hparams_file : str
        The YAML.
    run_opts : RunOptions
        SpeechBrain's; with gloo on CPUs, where no backend was named. They
        are *not* merged into hparams: Brain itself ranks defaults below the YAML.
    overrides : str
        As YAML; with the run options that are keys of the YAML too.
    hparams : dict
        What the YAML made (:func:`build_hparams`).

    Raises
    ------
    InputError
        If the YAML is missing, a placeholder is left, a key is unknown, or ranks were given different ones; or if no
        device is named and PyTorch cannot use the GPU that is there.
    """
    # what preparation says is shown, before the run's own log is opened
    logging.basicConfig(level=logging.INFO, format="%(name)s - %(message)s")
    hparams_file, run_opts, overrides = sb.parse_arguments(quote_paths(arguments))
    if run_opts["debug"]:  # SpeechBrain keeps its checkpoints out of the folder, and nothing else of what is written
        raise InputError(
            "--debug would write into the output folder as if a run began: leave it out, and give another "
            "--output_folder and --optimizer_step_limit 2 for a short try."
        )
    if run_opts["data_parallel_backend"]:  # torch.nn.DataParallel, which would cut up hidden states
        raise InputError("--data_parallel_backend is not for these recipes: start several GPUs by torchrun.")
    if "device" not in run_opts.overridden_args:
        check_gpus_usable()
    on_cpu = not torch.cuda.is_available() or str(run_opts["device"]).startswith("cpu")
    if on_cpu and "distributed_backend" not in run_opts.overridden_args:
        named = {name: run_opts[name] for name in run_opts.overridden_args}
        run_opts = RunOptions.from_dictionary({**named, "distributed_backend": "gloo"})
    if on_cpu and (run_opts["auto_mix_prec"] or "fp16" in (run_opts["precision"], run_opts["eval_precision"])):
        raise InputError(_NO_FP16)
    if not on_cpu and "device" in run_opts.overridden_args:
        _check_own_gpu(str(run_opts["device"]), run_opts["distributed_backend"])
    sb.utils.distributed.ddp_init_group(run_opts)
    if not Path(hparams_file).is_file():
        raise InputError(f"{hparams_file} does not exist: give the path of a YAML, such as hparams/bestrq.yaml.")
    text = Path(hparams_file).read_text(encoding="utf-8")
    _check_open_keys(hparams_file, text, overrides)
    # SpeechBrain keeps its run options out of the YAML, where others may refer to them
    for name in sorted(run_opts.overridden_args & dict(_top_level(text)).keys()):
        overrides = f"{overrides}\n{name}: {run_opts[name]}"
    # of the run options, those that name a rank or its device differ
    options = {name: str(run_opts[name]) for name in run_opts.overridden_args - {"device", "local_rank"}}
    check_ranks_agree(yaml=text_digest(text), options=overrides, run_options=options)
    try:
        with loading_for(run_opts["device"]):
            hparams = build_hparams(text, overrides, run_opts)
    except InputError:
        raise
    except (ValueError, TypeError) as error:  # a module's own refusal of a value, after HyperPyYAML's account of it
        raise InputError(f"{hparams_file}: {str(error).strip().splitlines()[-1]}") from error
    if on_cpu and "fp16" in (hparams.get("precision"), hparams.get("eval_precision")):
        raise InputError(_NO_FP16)
    for key in PATHS:
        if _HOME.search(str(hparams.get(key) or "")):
            raise InputError(f"{hparams_file}: {key} {hparams[key]}: write the path in full, without ~.")
    return hparams_file, run_opts, overrides, hparams


def _check_own_gpu(device: str, backend: str) -> None:
    """Refuse under torchrun and NCCL a GPU that several ranks would share: they would wait for each other for hours."""
    rank, here = os.environ.get("LOCAL_RANK"), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    taken = "cuda:0" if device == "cuda" else device
    if rank is not None and here > 1 and backend == "nccl" and taken != f"cuda:{rank}":
        raise InputError(
            f"--device {device} under torchrun would give rank {rank} a GPU that is not its own: leave --device out, "
            "or give --distributed_backend gloo as well, where ranks are to share one."
        )


def build_hparams(text: str, overrides: str, run_opts: RunOptions) -> dict[str, Any]:
    """Make what a YAML says, and keep what else decides what is trained.

    Arguments
    ---------
    text, overrides : str
        YAML.
    run_opts : RunOptions
        SpeechBrain's.

    Returns
    -------
    dict
        Of HyperPyYAML; and under :data:`GOVERNING` what its objects are made with, by the path of keys, and the run
        options that decide what is trained, where the YAML has no key of that name.

    Example
    -------
    >>> hparams = build_hparams("head: !name:torch.nn.Linear\\n    bias: False", "", RunOptions())
    >>> governing = hparams[GOVERNING]
    >>> hparams["head"](2, 3).bias is None, governing["head.bias"], governing["grad_accumulation_factor"]
    (True, False, 1)
    """
    hparams = load_hyperpyyaml(text, overrides)
    # a run option without a default arrives as text
    options = {
        name: yaml.safe_load(value) if isinstance(value := run_opts[name], str) else value
        for name in sorted(_RUN_OPTIONS - hparams.keys())
    }
    hparams[GOVERNING] = {**options, **_nested(text, overrides)}
    return hparams


def _nested(text: str, overrides: str) -> dict[str, Any]:
    """What the objects of a YAML are made with, by the path of keys; references and tags are left as they are."""
    found: dict[str, Any] = {}
    plain = yaml.constructor.SafeConstructor()

    def walk(path: str, node: yaml.Node) -> None:
        own = node.tag.startswith("!")
        if isinstance(node, yaml.ScalarNode):
            found[path] = f"{node.tag} {node.value}".strip() if own else plain.construct_object(node)
            return
        if own:
            found[path] = node.tag
        pairs = node.value if isinstance(node, yaml.MappingNode) else enumerate(node.value)
        for key, value in pairs:
            walk(f"{path}.{getattr(key, 'value', key)}", value)

    for document in (yaml.compose(one, Loader=yaml.SafeLoader) for one in (text, overrides)):
        for key, value in [] if document is None else document.value:
            if value.tag.startswith(("!new:", "!name:")):  # another object in the place of one
                for path in [path for path in found if path.split(".")[0] == key.value]:
                    del found[path]
                walk(key.value, value)
            elif key.value in found:  # some of what the object is made with
                walk(key.value, value)
    return found


def _check_open_keys(hparams_file: str, text: str, overrides: str) -> None:
    """Refuse an unknown key on the command line and a placeholder that it leaves, before anything is built."""
    document, options = _top_level(text), _top_level(overrides)
    given = [key for key, _ in options]
    for key in given:
        if given.count(key) > 1:
            raise InputError(f"--{key} is given more than once: give it once.")
        if key not in dict(document):
            close = difflib.get_close_matches(key, dict(document), n=1)
            hint = f": did you mean --{close[0]}?" if close else ": see the keys there."
            raise InputError(f"--{key} is no key of {hparams_file}{hint}")
    for key, tag in document:
        if tag == "!PLACEHOLDER" and key not in given:
            raise InputError(f"{hparams_file}: {key} is left open: give it on the command line, --{key} <value>.")


def given_keys(overrides: str) -> set[str]:
    """Tell which keys of a YAML were given on the command line.

    Arguments
    ---------
    overrides : str
        Of :func:`load_recipe`.

    Returns
    -------
    set of str

    Example
    -------
    >>> sorted(given_keys("{seed: 1, train_splits: [train-clean-100]}"))
    ['seed', 'train_splits']
    """
    return {key for key, _ in _top_level(overrides)}


def _top_level(text: str) -> list[tuple[str, str]]:
    """The keys of a YAML and the tags of their values, in order."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"the YAML, or an option after it, cannot be read: {' '.join(str(error).split())}") from error
    return [] if node is None else [(key.value, value.tag) for key, value in node.value]


@contextmanager
def own_folder(folder: str | os.PathLike, part: str | os.PathLike | None = None) -> Iterator[None]:
    """Keep a run's folder for this job while the ``with`` block runs: the main process locks it.

    Arguments
    ---------
    folder : str or Path
        Is made if it is not there.
    part : str or Path, optional
        A folder in it: jobs that keep other parts may run at the same time, one that keeps the whole may not.

    Raises
    ------
    InputError
        On entry, if another job is writing there.

    Example
    -------
    >>> run = getfixture("tmp_path") / "run"
    >>> with own_folder(run, run / "first"), own_folder(run, run / "second"):
    ...     pass
    """
    with ExitStack() as locks:
        if sb.utils.distributed.if_main_process():
            if part is not None:
                locks.enter_context(fellow_writer(Path(folder)))
            locks.enter_context(sole_writer(Path(folder if part is None else part)))
        yield


def run_recipe(main: Callable[[list[str]], None]) -> None:
    """Run a recipe's ``main`` on the command line.

    The user's errors become one line from each rank that meets one, and exit status 2; a run that was asked to
    stop, and did in order, one line and 75 ("start me again"); an interruption one line and 130; another rank that
    is gone, the traceback and one line from each that is left, and 1.

    Arguments
    ---------
    main : callable
        Takes ``sys.argv[1:]``.
    """
    keep_freed_memory()
    status = _exit_status(main)
    if torch.distributed.is_initialized():
        # not after an error: the other ranks may be waiting in a collective, and this would wait for them
        if status == 0:
            torch.distributed.destroy_process_group()
        _leave(status)
    if status:
        sys.exit(status)


def _exit_status(main: Callable[[list[str]], None]) -> int:
    """Run it; what is no fault of the program's is told in one line."""
    try:
        main(sys.argv[1:])
    except OSError as error:
        if (refusal := explain_refusal(error)) is None:
            raise
        _print_error(refusal)
        return USER_ERROR
    except InputError as error:
        # a loader's worker hands its error over with the whole traceback: the last line is the message
        message = str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")
        _print_error(message)
        return USER_ERROR
    except StoppedError as stopped:
        if sb.utils.distributed.if_main_process():
            print(f"stopped: {stopped}", file=sys.stderr)
        return START_AGAIN
    except KeyboardInterrupt:
        if sb.utils.distributed.if_main_process():
            print("interrupted: the same command goes on from the last checkpoint.", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        traceback.print_exc()
        print(
            f"error: rank {torch.distributed.get_rank()} has lost another rank, which died or cannot be reached: see "
            "what that one said last. The same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST_RANK)  # the way out through Python would wait for the other rank
    return 0


def _leave(status: int) -> NoReturn:
    """End a rank's process without taking Python apart around the threads of its process group.

    They outlive the group, which DistributedDataParallel keeps even when both are gone, and one that still has a
    tensor to give back, or anything else to do with Python, may end it by SIGABRT (PyTorch's issue 190489): a run
    that is done would look like one that crashed, and one that was stopped in order would not be started again.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _print_error(message: str) -> None:
    """In one line; another rank may have an error of its own, such as a disk of its own that is full."""
    where = "" if sb.utils.distributed.if_main_process() else f" on rank {sb.utils.distributed.get_rank()}"
    print(f"error{where}: {message}", file=sys.stderr)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone; gloo says so in the message alone."""
    if not torch.distributed.is_initialized():
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def command_line() -> str:
    """Return the command that started this process, for the records.

    Example
    -------
    >>> command_line().startswith("python ")
    True
    """
    return shlex.join(["python", *sys.argv])
