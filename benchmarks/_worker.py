"""How a benchmark drives programs in separate processes: one JSON line in, one JSON line out, asleep in between.

Standard library only, so that both ends run in any interpreter, whatever is installed there.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any


class WorkerError(RuntimeError):
    """What went wrong in a worker, by its own account."""

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


class Worker:
    """A script that `serve`s, in a separate process; a context manager that ends it."""

    def __init__(self, interpreter: str, script: str, environment: Mapping[str, str]):
        self._process = subprocess.Popen(
            [interpreter, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        """The worker's answer to one command."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"Died: exit status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"], reply["traceback"])
        return reply["value"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        # Closing its input ends it, and gives it time to end its own processes.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=10 if kind is None else 1)
        self._process.kill()
        self._process.communicate()


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answer commands from standard input until it ends; blocked on the pipe, the process costs no CPU."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asks ends this process
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for a reply
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"value": commands[request["command"]](**request["arguments"])}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class Stopwatch:
    """Wall and CPU seconds of each run, and how busy the process was between its runs, when it should have slept."""

    def __init__(self):
        self.last = {"seconds": 0.0, "cpu_seconds": 0.0}
        self._begun = self._ended = self._idle = (0.0, 0.0)

    def __enter__(self) -> "Stopwatch":
        self._begun = _clocks()
        if self._ended[0]:
            self._idle = tuple(i + b - e for i, b, e in zip(self._idle, self._begun, self._ended, strict=True))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._ended = _clocks()
        seconds, cpu_seconds = (e - b for e, b in zip(self._ended, self._begun, strict=True))
        self.last = {"seconds": seconds, "cpu_seconds": cpu_seconds}

    def idle_load(self) -> float:
        """CPU seconds per second between the runs."""
        seconds, cpu_seconds = self._idle
        return cpu_seconds / seconds if seconds > 0.1 else 0.0


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def peak_memory() -> int | None:
    """The most memory this process has held since it began or was last reset, in bytes; None if not known."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
