"""Ending in order: what asks a run to stop, or to go back, is heeded by all ranks after the same update."""

import os
import signal
import threading
import time
from datetime import timedelta
from enum import IntEnum
from types import FrameType

import torch

from speechbrain_bestrq.ranks import rank_and_size

#: What asks a run to stop: a scheduler's warning, a pre-emption, Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

#: For so long a signal that comes again is taken for the same one.
SAME_SIGNAL_SECONDS = 3.0

#: How long ranks wait for one that writes to a slow disk: as long as SpeechBrain's own group does.
PATIENCE = timedelta(hours=2)


class StoppedError(Exception):
    """The run ended in order because it was asked to; started again it goes on."""


class Request(IntEnum):
    """What a rank may ask for; where several ask, the highest counts."""

    GO_ON = 0
    REWIND = 1
    STOP = 2


class Requests:
    """Collects requests to stop, from signals, and to go back to the last checkpoint, on all ranks.

    A signal may reach one rank only, or the ranks at different updates. After each update every
    rank calls :meth:`agreed`; the answer is the same on all, one update late where there are several,
    so that nobody waits.

    The same signal once more, some seconds later, does what it did before: a second Ctrl-C interrupts at once. Sooner
    it is taken for the same: a scheduler may signal all processes, and a launcher hand it on to them.

    Example
    -------
    >>> with Requests() as requests:
    ...     before = requests.agreed()
    ...     signal.raise_signal(signal.SIGUSR1)
    ...     (before.name, requests.agreed().name, requests.signal)
    ('GO_ON', 'STOP', 'SIGUSR1')
    """

    def __init__(self) -> None:
        self.signal = ""
        """The signal that came here, if any."""
        self._asked = Request.GO_ON
        self._before: dict[int, object] = {}
        self._came: dict[int, float] = {}
        self._group = self._pending = None

    def __enter__(self) -> "Requests":
        if rank_and_size()[1] > 1:
            # requests travel between the hosts, whatever the devices do
            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._came.setdefault(number, now)
        if now - first > SAME_SIGNAL_SECONDS:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        self.signal = signal.Signals(number).name
        self.ask(Request.STOP)

    def ask(self, request: Request) -> None:
        """Ask for something; may be called on any rank, at any time."""
        self._asked = max(self._asked, request)

    def agreed(self) -> Request:
        """Give what was asked for on any rank; to be called after each update, on all ranks."""
        asked = self._asked
        if self._group is not None:
            asked, mine = Request.GO_ON, torch.tensor([int(self._asked)])
            if self._pending is not None:
                theirs, work = self._pending
                work.wait()
                asked = Request(int(theirs))
            work = torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = mine, work
        if asked == Request.REWIND:  # is done, and over
            self._asked = Request.GO_ON if self._asked == Request.REWIND else self._asked
            self._finish()
        return asked

    def _finish(self) -> None:
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        if error[0] is None:
            self._finish()


def leave_stopping_to_parent(worker: int = 0) -> None:
    """Live on through signals that ask a run to stop; for the processes that load data, which get them too.

    A scheduler and a terminal signal all processes of a run, and a run that lost a worker could not end in
    order. Only the process that started this one may end it: PyTorch and ``multiprocessing`` do so by SIGTERM,
    and then wait for it without end.

    Arguments
    ---------
    worker : int
        Number of the worker, as PyTorch's ``worker_init_fn`` is given.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    # blocked in this thread and all it starts, so that it waits for sigwaitinfo, which knows who sent it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
