"""SIGTERM ends a run as Ctrl-C does: what is done is put on disk first.

``kill``, Kubernetes, Slurm and machines that are taken away send it, and SIGKILL some
seconds later. Lightning notes it and goes on predicting.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import Popen, TimeoutExpired
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

#: What the shell sees: 128 and the number of the signal.
EXIT_CODE = 143
#: Seconds for which a process waits for those that it has started to end.
PATIENCE = 20.0
#: Seconds after which a process ends whose main thread cannot be interrupted: PyTorch
#: may wait half an hour for another process to begin.
STUCK = 10.0

#: Environment variable by which a process tells its number to those that it starts.
_FIRST = 'DYNAMICVIS_GEO_FIRST_PROCESS'

_received = threading.Event()

Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | None
ExceptHook: TypeAlias = Callable[
    [type[BaseException], BaseException, TracebackType | None], Any
]


class Terminated(SystemExit):
    """SIGTERM has come; raised in the main thread, as KeyboardInterrupt is."""

    def __init__(self) -> None:
        """End the process with 143 if nobody catches it."""
        super().__init__(EXIT_CODE)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated` in a command, whatever that is doing."""
    _received.clear()
    _processes.ended = False
    before = signal.getsignal(signal.SIGTERM)
    if not _can_handle(before):
        yield
        return
    _set(_raise_after(before))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_guard, args=(ours,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        theirs.close()
        _set(before)


def say(word: str) -> None:
    """Tell how a command has ended, in one process of this machine."""
    if os.environ.get('LOCAL_RANK', '0') == '0':
        sys.stderr.write(f'dynamicvis-geo: {word}\n')
        sys.stderr.flush()


def in_worker(worker: int) -> None:
    """Have a DataLoader's worker pass SIGTERM on to the process that it works for.

    It would die, and that process with a traceback. Where the system does not say who
    has sent a signal (macOS, Windows) nothing is changed.

    Args:
        worker: Its number, as ``worker_init_fn`` gets it.
    """
    sys.excepthook = _unless_left(sys.excepthook)
    if hasattr(signal, 'sigwaitinfo'):
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_pass_on, args=(os.getppid(),), daemon=True).start()


def _unless_left(show: ExceptHook) -> ExceptHook:
    """Let a worker say nothing if it is left while it hands over a tensor.

    The thread of :mod:`multiprocessing` that does it shows errors by this hook.
    """

    def hook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        handing_over = threading.current_thread() is not threading.main_thread()
        if not (handing_over and isinstance(error, EOFError | OSError)):
            show(kind, error, trace)

    return hook


def _pass_on(parent: int) -> NoReturn:
    sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
    while sender != parent and os.getppid() == parent:
        os.kill(parent, signal.SIGTERM)
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
    os._exit(0)


def launch(trainer: Trainer) -> None:
    """Know the processes that a Trainer is going to start, one a device.

    Args:
        trainer: The Trainer, before it runs.
    """
    _processes.launcher = trainer.strategy.launcher
    if os.environ.get('LOCAL_RANK') is None:
        os.environ[_FIRST] = str(os.getpid())


def join(trainer: Trainer) -> None:
    """Know the processes of a run, in each of them, before Lightning handles signals.

    Args:
        trainer: The Trainer that sets up the run.
    """
    _received.clear()
    _processes.launcher = trainer.strategy.launcher
    _processes.started.clear()
    _processes.ended = False
    # The number says nothing on other machines.
    if trainer.num_nodes == 1:
        _processes.first = trainer.strategy.broadcast(os.getpid())
    _processes.before = signal.getsignal(signal.SIGTERM)


def begin(trainer: Trainer) -> None:
    """Let SIGTERM raise :class:`Terminated` in place of what Lightning does with it.

    The handler that was there before Lightning's is called first. Lightning restores it
    when the run ends.

    Args:
        trainer: The Trainer, which has begun to predict.

    Raises:
        Terminated: If SIGTERM has come already.
    """
    if _can_handle(_processes.before):
        _set(_raise_after(_processes.before))
        if trainer.received_sigterm:
            raise Terminated


def check() -> None:
    """Raise :class:`Terminated` if it was raised where exceptions are lost."""
    if _received.is_set():
        raise Terminated


@contextmanager
def ending() -> Iterator[None]:
    """Let no signal disturb the end of a run that has failed; end its processes, too.

    Those that this process has started are told first and waited for last.
    """
    before = signal.getsignal(signal.SIGTERM)
    _set(_ignore)
    # Nor what Python clears up after it: errors there are shown and lost.
    _processes.ended = True
    _received.set()
    _end_started()
    try:
        yield
        _wait_for_started()
    finally:
        _set(before)


class _Processes:
    """The processes of the present run on this machine."""

    def __init__(self) -> None:
        self.launcher: Any = None
        self.started: list[Popen[bytes]] = []
        self.ended = False
        #: Number of the first process, which has started this one or is this one.
        self.first = int(os.environ[_FIRST]) if _is_started() else None
        self.before: Handler = signal.SIG_DFL


def _is_started() -> bool:
    """True if Lightning has started this process for a run of another one."""
    return _FIRST in os.environ and os.environ.get('LOCAL_RANK', '0') != '0'


_processes = _Processes()


def _raise_after(before: Handler) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        _received.set()
        if _processes.ended:
            return
        # Once: what follows is not to be disturbed.
        _set(_ignore)
        # Else PyTorch raises an error where a worker of a DataLoader has ended.
        if hasattr(signal, 'SIGCHLD'):
            signal.signal(signal.SIGCHLD, _ignore)
        for child in multiprocessing.active_children():
            if child.daemon:
                child.terminate()
        _tell_first()
        if callable(before):
            before(number, frame)
        raise Terminated

    return handle


def _guard(signals: socket.socket) -> None:
    """End the process if its main thread does not come to handle SIGTERM."""
    while received := signals.recv(1):
        if received[0] == signal.SIGTERM:
            _end_started()
            if not _received.wait(STUCK):
                _tell_first()
                say('terminated')
                os._exit(EXIT_CODE)


def _tell_first() -> None:
    if _processes.first == os.getppid():
        os.kill(os.getppid(), signal.SIGTERM)


def _end_started() -> None:
    processes = getattr(_processes.launcher, 'procs', [])
    _processes.started.extend(one for one in processes if isinstance(one, Popen))
    # Lightning kills this process when one of those that it knows has ended.
    processes.clear()
    for process in _processes.started:
        process.terminate()


def _wait_for_started() -> None:
    deadline = time.monotonic() + PATIENCE
    for process in _processes.started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except TimeoutExpired:
            process.kill()


def _can_handle(before: Handler) -> bool:
    """True if SIGTERM may be handled: here, and neither ignored nor handled in C."""
    here = threading.current_thread() is threading.main_thread()
    return here and before not in (signal.SIG_IGN, None)


def _set(handler: Handler) -> None:
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing; unlike SIG_IGN, without a word if a signal is on its way."""
