"""The command line itself: messages, exit codes, and what it imports."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from midpo_ray.logs import set_up_logging

ROOT = Path(__file__).parent.parent


def midpo(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command as it is installed: the working directory is not on ``sys.path`` beforehand."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "midpo_ray.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture
def loggers():
    """The logging configuration as it was, after the test."""
    root, package = logging.getLogger(), logging.getLogger("midpo_ray")
    before = [(x, x.level, list(x.handlers)) for x in (root, package)]
    yield package
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [
        (-1, "warning: w\n"),
        (0, "i\nwarning: w\n"),
        (1, "d\ni\nwarning: w\n"),
    ],
)
def test_messages(loggers, capsys, verbosity, shown):
    """Once, plainly, on standard output; the libraries' messages on standard error."""
    for _ in range(2):  # a second command in one process prints no line twice
        set_up_logging(verbosity)
    log = logging.getLogger("midpo_ray.pipeline.run")
    log.debug("d")
    log.info("i")
    log.warning("w")
    logging.getLogger("a.library").info("noise")
    captured = capsys.readouterr()
    assert captured.out == shown
    assert ("noise" in captured.err) == (verbosity > 0)


def test_files_of_the_working_directory_are_not_executed(tmp_path, byte_tokenizer):
    """A downloaded folder may hold files that are named like libraries (D9)."""
    for name in ("transformers", "datasets", "torch", "pyarrow", "yaml"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w').write(__name__)\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    done = midpo("inspect", "pairs.jsonl", "--model", "./model", cwd=tmp_path)
    assert not (tmp_path / "executed").exists(), done.stderr
    assert done.returncode == 0, done.stderr


def test_a_function_of_the_working_directory_is_found_last(tmp_path):
    """``module:function`` is looked for beside the user's files, after the installed packages."""
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [1.0]\n")
    (tmp_path / "colorsys.py").write_text("raise SystemExit('executed')\n")
    code = (
        "import sys\n"
        "from midpo_ray.user_code import load_function, source_file\n"
        "before = list(sys.path)\n"
        "assert load_function('mine:score', 'x')([], []) == [1.0]\n"
        "assert sys.path[:-1] == before\n"
        "assert load_function('colorsys:rgb_to_hsv', 'x')(0, 0, 0) == (0.0, 0.0, 0)\n"
        "assert source_file('mine:score', 'x').name == 'mine.py'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
