"""Functions that a user names as ``module:function``, for a scorer or a judge."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError

USER_FOLDERS = "MIDPO_USER_FOLDERS"  # an environment variable of workers: where user code is


def load_function(name: str, where: str) -> Callable[..., Any]:
    """Import a user's function; the working directory is the last place that is searched.

    Args:
        name: ``module:function``.
        where: what begins an error message, for example ``--judges my:rule``.

    Raises:
        UserError: the name has another form, or there is no such module or function.
    """
    module_name, function_name = _parts(name, where)
    _search_working_directory()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{where}: module {module_name} cannot be imported ({error})") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        names = sorted(k for k, v in vars(module).items() if callable(v) and k[0] != "_")
        known = ", ".join(names[:8]) or "none"
        raise UserError(
            f"{where}: module {module_name} has no function {function_name}; it has: {known}"
        )
    return function


def source_file(name: str, where: str) -> Path | None:
    """The file of the module that a ``module:function`` names; None where it has no file.

    Raises:
        UserError: the name has another form, or there is no such module.
    """
    module_name, _ = _parts(name, where)
    _search_working_directory()
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"{where}: no module {module_name!r} is found")
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def _parts(name: str, where: str) -> tuple[str, str]:
    module, _, function = name.partition(":")
    if not (module and function):
        raise UserError(f"{where}: module:function is expected, this is {name!r}")
    return module, function


def user_folders() -> str:
    """The working directory and the folder of the running script, for ``USER_FOLDERS``."""
    script = os.path.dirname(os.path.realpath(sys.argv[0]))
    return os.pathsep.join([os.getcwd(), *([script] if script in sys.path else [])])


def _search_working_directory() -> None:
    """Append the working directory to ``sys.path``: no file in it hides an installed package.

    In a worker, the folders of the process that started the run are appended, too.
    """
    for folder in (os.getcwd(), *os.environ.get(USER_FOLDERS, "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.append(folder)
