"""stop: signals in this very process; tests/test_reliability.py sends them to whole runs."""

import gc
import signal
import sys

import pytest

from gompertz_jax.training.stop import SIGNALS, Stop, Stopped


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_obeyed_at_once_outside_of_deferred(number, capsys):
    with pytest.raises(Stopped) as stopped, Stop():
        signal.raise_signal(number)
        pytest.fail("the signal was not obeyed")
    assert stopped.value.code == 128 + number
    assert "the same command resumes" in capsys.readouterr().out


def test_within_deferred_a_signal_is_obeyed_at_the_end():
    reached = []
    with Stop() as stop, pytest.raises(Stopped), stop.deferred():
        assert not stop.requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested()
        reached.append("the last line")
    assert reached


def test_a_signal_whose_exception_python_drops_is_neither_lost_nor_reported(capsys):
    """XLA has a callback in the garbage collector, which runs often while JAX traces."""

    def callback(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            signal.raise_signal(signal.SIGTERM)

    began = []
    with Stop() as stop:
        gc.callbacks.append(callback)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(callback)
        with pytest.raises(Stopped, match="143"), stop.deferred():
            began.append("a step")
    assert not began
    assert capsys.readouterr().err == ""


def test_other_dropped_exceptions_are_reported_as_before(monkeypatch):
    class Unclosable:
        def __del__(self) -> None:
            raise OSError("cannot be closed")

    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: dropped.append(report.exc_value))
    hook = sys.unraisablehook
    with Stop():
        Unclosable()
        gc.collect()
    assert [str(exception) for exception in dropped] == ["cannot be closed"]
    assert sys.unraisablehook is hook


def test_the_handlers_that_were_there_come_back():
    earlier = [signal.getsignal(number) for number in SIGNALS]
    with Stop():
        assert all(signal.getsignal(number) != handler for number, handler in zip(SIGNALS, earlier, strict=True))
    assert [signal.getsignal(number) for number in SIGNALS] == earlier
