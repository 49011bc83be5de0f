"""How a program ends that does not come to its end: asked by SIGTERM or SIGINT, or by an error.

At a signal what is under way is finished and saved, and the process ends with 128 + the signal's number.
"""

import contextlib
import functools
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

from .errors import RunError
from .sharding import ask_to_stop, asked_to_stop, connected, first_leaves_last, say

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = "the same command resumes from the last checkpoint, if there is one"
GRACE_SECONDS = 25.0  # after which the process ends, whatever it is doing: what is on disk is whole at any time


class Stopped(SystemExit):
    """A run was asked to stop, and did. Its code is 128 + the signal's number: 143 or 130."""


@contextlib.contextmanager
def as_program(refusals: type[Exception] | tuple[type[Exception], ...] = RunError) -> Iterator[None]:
    """Within it a program does its work; a stop or an error ends the process.

    Args:
      refusals: the errors that are shown in one line, without a traceback.
    """
    try:
        yield
    except Stopped as stopped:
        # XLA's threads may still be compiling, and would abort an interpreter that shuts down.
        _leave(int(str(stopped.code)))
    except (Exception, KeyboardInterrupt) as error:
        refused = isinstance(error, refusals)
        if not connected():
            if refused:
                sys.exit(f"error: {error}")
            raise
        # An interpreter that shuts down would wait five minutes for the others, which wait for this process.
        _leave(1, f"error: {error}\n" if refused else traceback.format_exc())


def _leave(code: int, last_words: str = "") -> NoReturn:
    """End the process, but not by shutting down the interpreter."""
    try:
        print(last_words, end="", file=sys.stderr, flush=True)
        sys.stdout.flush()
        first_leaves_last()
    finally:
        os._exit(code)


class Stop:
    """A request to stop, from its signal to its consequence. Used as a context manager, which installs the handlers.

    Within `deferred` the program calls `requested` at places where it can stop. Elsewhere nothing is lost by stopping,
    and `Stopped` is raised at once, that is, as soon as Python's main thread runs, which it does not while XLA
    compiles. So a thread waits too. It ends the process after `GRACE_SECONDS`, or at the second signal.

    Where Python drops an exception, in a callback of the garbage collector or in `__del__`, `Stopped` is lost without a
    word, and the next `deferred` obeys the signal before its first step.

    Outside the main thread, where Python has no handlers, and before it is entered, it requests nothing.
    """

    def __init__(self):
        self._asked = 0
        self._deferred = False
        self._installed = contextlib.ExitStack()

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            read, write = os.pipe()
            os.set_blocking(write, False)
            # Python writes the number here at the moment of the signal, however busy the main thread is.
            earlier = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            self._installed.callback(os.close, write)
            self._installed.callback(signal.set_wakeup_fd, earlier)
            for number in SIGNALS:
                handler = signal.signal(number, self._handle)
                self._installed.callback(signal.signal, number, signal.SIG_DFL if handler is None else handler)
            self._installed.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
            sys.unraisablehook = functools.partial(_report_unless_stopped, sys.unraisablehook)
            threading.Thread(target=self._watch, args=(read,), name="stop", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._installed.close()
        if kind is Stopped:
            say(f"stopped; {AGAIN}")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it, signals only set what `requested` returns; at its end they are obeyed.

        Raises:
          Stopped: at the end, if a signal came; at the start, if one came earlier and Python dropped its exception.
        """
        self._obey()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self._obey()

    def requested(self) -> bool:
        """Whether this process, or with several any of them, was asked to stop: the same answer on all.

        With several, every process must call this at the same places; it costs one message from the first one to the
        others.
        """
        self._asked = asked_to_stop(self._asked)
        return self._asked > 0

    def _obey(self) -> None:
        if self._asked:
            raise Stopped(128 + self._asked)

    def _handle(self, number: int, frame: object) -> None:
        self._asked = self._asked or number
        if not self._deferred:
            self._obey()

    def _watch(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb", buffering=0) as numbers:
            number = _next_signal(numbers)
            if number:
                name = signal.Signals(number).name
                below = "\n" if sys.stdout.isatty() else ""  # the terminal's own ^C
                print(f"{below}{name}: finishing and saving what is under way; once more stops at once", flush=True)
                ask_to_stop(number)
                if not select.select([numbers], [], [], GRACE_SECONDS)[0] or _next_signal(numbers):
                    print(
                        f"stopped at once; {AGAIN}",
                        flush=True,
                    )
                    os._exit(128 + number)


def _report_unless_stopped(report: Callable[[Any], object], dropped: Any) -> None:
    """As `sys.unraisablehook`: an exception that Python dropped is reported, but for `Stopped`."""
    if dropped.exc_type is not Stopped:
        report(dropped)


def _next_signal(numbers: BinaryIO) -> int:
    """The next one of SIGNALS; 0 once nothing can come any more."""
    while byte := numbers.read(1):
        if byte[0] in SIGNALS:
            return byte[0]
    return 0
