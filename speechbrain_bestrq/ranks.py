"""The processes that train together, and whether they are of one mind."""

from typing import Any

import torch

from speechbrain_bestrq.errors import InputError


def rank_and_size() -> tuple[int, int]:
    """Number this process among those that train together, and count them.

    SpeechBrain's ``get_rank`` goes by the environment, which may speak of ranks where no group of them is.

    Returns
    -------
    rank, size : int

    Example
    -------
    >>> rank_and_size()
    (0, 1)
    """
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Put nested settings under dotted names.

    Arguments
    ---------
    settings : dict
    prefix : str
        Before each name.

    Returns
    -------
    dict

    Example
    -------
    >>> flat({"encoder": {"d_model": 8}, "seed": 1})
    {'encoder.d_model': 8, 'seed': 1}
    """
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def check_ranks_agree(**facts: Any) -> None:
    """Refuse to train on ranks that were given different things; a collective of all ranks.

    DDP would go on without a word: with other data a rank trains on them, with another
    model or other labels the sum of the gradients means nothing.

    Arguments
    ---------
    **facts
        What must be the same on all ranks: plain values, or dicts of them.

    Raises
    ------
    InputError
        On all ranks, naming what differs and where.
    """
    _, ranks = rank_and_size()
    if ranks == 1:
        return
    everyones: list[dict[str, Any]] = [{} for _ in range(ranks)]
    torch.distributed.all_gather_object(everyones, flat(facts))
    first = everyones[0]
    for rank, theirs in enumerate(everyones):
        names = sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
        if names:
            differences = ", ".join(f"{name}: {theirs.get(name)} there, {first.get(name)} on rank 0" for name in names)
            raise InputError(
                f"rank {rank} was given other things than rank 0 ({differences}): start all ranks with the same files "
                "and options."
            )
