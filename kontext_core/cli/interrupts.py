"""Ctrl-C and a polite kill (SIGTERM), which end a command as an exception would: files half written are taken away.

An exception raised in a signal's handler is lost when the handler happens to run inside a finaliser, where Python
prints and drops it. So the handler also remembers, and `check`, called at every step, raises again.
"""

from __future__ import annotations

import signal

TERMINATED = 128 + signal.SIGTERM

_asked: int | None = None


def install() -> None:
    """Answer SIGTERM, and SIGINT unless it is ignored here (as it is in a shell's background job)."""
    global _asked
    _asked = None
    signal.signal(signal.SIGTERM, _on_signal)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _on_signal)


def check() -> None:
    """Raise what a signal asked for, if one came.

    Raises:
        KeyboardInterrupt: after SIGINT.
        SystemExit: after SIGTERM, with 143.
    """
    if _asked == signal.SIGINT:
        raise KeyboardInterrupt
    if _asked is not None:
        raise SystemExit(TERMINATED)


def _on_signal(number: int, frame: object) -> None:
    global _asked
    _asked = number
    check()
