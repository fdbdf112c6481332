"""A signal ends a command even where the exception that its handler raises is dropped."""

from __future__ import annotations

import gc
import os
import signal
import sys

import pytest

from kontext_core.cli import common, interrupts
from kontext_core.samplers import StepInfo


@pytest.fixture
def installed():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job of a shell starts with it ignored
    interrupts.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts._asked = None


class Finalised:
    """Signals its own process while it is being thrown away."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        for _ in range(1000):  # the handler runs between two of these
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent the POSIX way")
@pytest.mark.parametrize(
    ("number", "error", "code"), [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, SystemExit, 143)]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_finaliser_swallows_is_raised_at_the_next_step(installed, number, error, code):
    interrupts.check()  # nothing was asked
    victim = Finalised(number)
    del victim
    gc.collect()
    with pytest.raises(error) as caught:
        common.Progress()(StepInfo(index=0, num_steps=2, t=0.5, x=None, x_0=None))
    if code is not None:
        assert caught.value.code == code


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent the POSIX way")
def test_an_ignored_interrupt_stays_ignored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts.install()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
