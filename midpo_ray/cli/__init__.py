"""``midpo``: the command line. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import typer

from ..errors import MachineError, UserError
from . import local, remote  # noqa: F401 - they add their commands to the application
from .app import app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 2 for bad input, 1 for a failing machine, 130 when interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a job's log is read while it is written
    words = list(sys.argv[1:] if argv is None else argv)
    words.sort(key=lambda word: word not in ("-v", "--verbose", "-q", "--quiet"))  # anywhere
    command = typer.main.get_command(app)
    try:
        with command.make_context("midpo", words) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except BrokenPipeError:
        return 0
    except (UserError, OSError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"midpo: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except MachineError as error:
        print(f"midpo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("midpo: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0
