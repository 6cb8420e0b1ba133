"""Logging of the command line: the package's messages on standard output, as plain text."""

from __future__ import annotations

import logging
import sys


class _Plain(logging.Formatter):
    """The bare message at INFO, and ``warning: ...`` or ``error: ...`` above it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return f"{record.levelname.lower()}: {text}"


def set_up_logging(verbosity: int = 0) -> None:
    """Show the messages of ``midpo_ray`` on standard output.

    Args:
        verbosity: 0 shows what a command does; -1 only warnings; 1 also details, and the messages
            of the libraries on standard error.
    """
    package = logging.getLogger("midpo_ray")
    package.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG))
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(_Plain())
    package.handlers = [lines]

    # The package's messages also reach the root logger, which must not print them a second time.
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    libraries.addFilter(lambda record: not record.name.startswith("midpo_ray"))
    libraries.set_name("midpo libraries")
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if h.get_name() != libraries.get_name()]
    root.addHandler(libraries)
    root.setLevel(logging.DEBUG if verbosity > 0 else logging.WARNING)
