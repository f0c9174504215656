"""What the ``main`` of every recipe does: options, YAML, one-line errors."""

import shlex
import sys
from collections.abc import Callable
from typing import Any

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.run_opts import RunOptions

from speechbrain_bestrq.errors import InputError


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
        SpeechBrain's; with gloo where there is no GPU and no backend was named. They
        are *not* merged into hparams: Brain itself ranks defaults below the YAML.
    overrides : str
        As YAML.
    hparams : dict
        What the YAML made.

    Raises
    ------
    InputError
        If the YAML is missing, a placeholder is left, or a key is unknown.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    if not torch.cuda.is_available() and "distributed_backend" not in run_opts.overridden_args:
        named = {name: run_opts[name] for name in run_opts.overridden_args}
        run_opts = RunOptions.from_dictionary({**named, "distributed_backend": "gloo"})
    sb.utils.distributed.ddp_init_group(run_opts)
    try:
        with open(hparams_file, encoding="utf-8") as file:
            return hparams_file, run_opts, overrides, load_hyperpyyaml(file, overrides)
    except FileNotFoundError as error:
        if error.filename != hparams_file:
            raise
        raise InputError(f"{hparams_file} does not exist: give the path of a YAML, such as hparams/bestrq.yaml.") from None
    except ValueError as error:
        message = " ".join(str(error).split())
        if "PLACEHOLDER" in message:
            key = message.split("'")[1] if "'" in message else message
            raise InputError(f"{hparams_file}: {key} is left open: give it on the command line, --{key} <value>.") from None
        raise
    except KeyError as error:
        raise InputError(f"{hparams_file}: {' '.join(str(error.args[0]).split())}") from None


def run_recipe(main: Callable[[list[str]], None]) -> None:
    """Run a recipe's ``main`` on the command line; the user's errors become one line and exit status 2.

    Arguments
    ---------
    main : callable
        Takes ``sys.argv[1:]``.
    """
    try:
        main(sys.argv[1:])
    except InputError as error:
        if sb.utils.distributed.if_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def command_line() -> str:
    """Return the command that started this process, for the records.

    Example
    -------
    >>> command_line().startswith("python ")
    True
    """
    return shlex.join(["python", *sys.argv])
