"""The command line, `python -m kontext_core` or `kontext`.

Results go to standard output, progress and warnings to standard error. A mistake of the user is one line,
`error: …`, and exit code 2; an interrupt exits with 130 and leaves no file half written. Nothing heavy is
imported before a command runs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .cli import bench, distill, edit, files, interrupts, train, turns

# What `pip install -e ".[standalone]"` brings, by the names under which it is imported.
NEEDED = ("torch", "einops", "numpy", "PIL", "safetensors", "tokenizers")

COMMANDS = (edit, turns, files, train, distill, bench)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _Lines(logging.Formatter):
    """`warning: …`, without time or name."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="kontext", description="FLUX.1 Kontext: edit and make pictures by instruction.")
    parser.add_argument("--version", action="version", version=f"kontext {__version__}")
    parser.add_argument("--verbose", action="store_true", help="say more, and show where an error arose")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for module in COMMANDS:
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    args = build_parser().parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    logger = logging.getLogger("kontext")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if args.verbose else logging.WARNING)
    interrupts.install()
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(
            f'error: {error.name} is not installed ({sys.executable}): pip install -e ".[standalone]" in the '
            "repository, or use the Python in .venv that `python dev.py demo` makes",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        # Of RuntimeErrors only torch's OutOfMemoryError, which cannot be named before torch is imported.
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
            raise
        if args.verbose:
            logger.exception("")
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
