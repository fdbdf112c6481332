"""A training run in a process of its own, for a program that must go on answering while it trains.

The settings of a `TrainConfig` come as one JSON object, the first line of standard input. Whatever happens goes to
standard output, a JSON object a line; libraries' own prints go to standard error:

    {"event": "encode", "done", "total"}             pictures and words encoded
    {"event": "step", "step", "steps", "loss", "seconds", "samples": [file, …]}   after each step; files of new previews
    {"event": "done", "output", "step", "steps", "loss", "examples", "parameters", "seconds"}
    {"event": "stopped", "step"}                     at the end of a run that was told to stop
    {"event": "error", "message"}                    a setting, picture or model that does not fit

Any further line on standard input, or its end (the other program is gone), stops the run politely: the step that runs
is finished and checkpointed, and the same settings go on from there. A kill loses what came after the last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path


def main() -> int:
    """Run as the module says; 0 when done or stopped, 1 after an error."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not break the lines

    def tell(**event: object) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    settings = json.loads(sys.stdin.readline())
    stop = threading.Event()
    threading.Thread(target=_wait_for_stop, args=(stop,), daemon=True).start()
    try:
        return _run(settings, stop, tell)
    except (ValueError, FloatingPointError, OSError) as error:
        tell(event="error", message=str(error))
    except Exception as error:
        traceback.print_exc()
        tell(event="error", message=f"{type(error).__name__}: {error}")
    return 1


def _wait_for_stop(stop: threading.Event) -> None:
    sys.stdin.readline()
    stop.set()


def _run(settings: dict, stop: threading.Event, tell) -> int:
    from .config import TrainConfig
    from .loop import Stopped
    from .run import run

    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    config = TrainConfig(**settings)
    previews = Path(config.output) / "previews"
    started, last = time.perf_counter(), 0

    def on_pair(done: int, total: int) -> None:
        if stop.is_set():
            raise Stopped
        tell(event="encode", done=done, total=total)

    def on_step(step: int, steps: int, loss: float) -> None:
        nonlocal last
        last = step
        samples = []
        if config.preview_every and step % config.preview_every == 0:
            samples = [str(path) for path in sorted(previews.glob(f"{step:07d}-*.png"))]
        seconds = round(time.perf_counter() - started, 2)
        tell(event="step", step=step, steps=steps, loss=loss, seconds=seconds, samples=samples)
        if stop.is_set():
            raise Stopped

    try:
        result = run(config, on_step=on_step, on_pair=on_pair)
    except Stopped:
        tell(event="stopped", step=last)
        return 0
    tell(
        event="done",
        output=str(result.output),
        step=result.step,
        steps=result.steps,
        loss=result.loss,
        examples=result.examples,
        parameters=result.parameters,
        seconds=round(time.perf_counter() - started, 2),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
