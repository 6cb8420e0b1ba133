"""The command line itself: messages, exit codes, and what it imports."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from midpo_ray.cli import main
from midpo_ray.cli.app import app
from midpo_ray.cli.local import report_folder
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


@pytest.mark.slow
def test_workers_search_the_working_directory_last(tmp_path):
    """Ray would put it first in its workers."""
    (tmp_path / "mine.py").write_text("def score(prompts, responses):\n    return [1.0]\n")
    (tmp_path / "colorsys.py").write_text("raise SystemExit('executed')\n")
    (tmp_path / "start.py").write_text(
        "import ray\n"
        "from midpo_ray.pipeline.cluster import connect\n"
        "connect('local')\n"
        "@ray.remote\n"
        "def worker():\n"
        "    import colorsys\n"
        "    from midpo_ray.user_code import load_function\n"
        "    return load_function('mine:score', 'x')([], []), colorsys.rgb_to_hsv(0, 0, 0)\n"
        "assert ray.get(worker.remote()) == ([1.0], (0.0, 0.0, 0)), 'wrong'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "start.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


PANELS = {
    "Prepare": {"inspect", "doctor", "config"},
    "Train": {"run", "tune", "reward"},
    "Measure": {"evaluate", "study"},
    "Use": {"generate"},
    "Cluster": {"submit", "status", "logs", "stop", "fetch", "cluster"},
}
GROUP = typer.main.get_command(app)
COMMANDS = {name: c for name, c in GROUP.commands.items() if name != "cluster"}
COMMANDS["cluster check"] = GROUP.commands["cluster"].commands["check"]


def test_commands_are_grouped() -> None:
    panels: dict[str, set[str]] = {}
    for name, command in GROUP.commands.items():
        panels.setdefault(command.rich_help_panel, set()).add(name)
    assert panels == PANELS


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself(name: str, capsys, monkeypatch) -> None:
    """Every argument has help and a default, and there is an example."""
    monkeypatch.setenv("COLUMNS", "400")
    command = COMMANDS[name]
    assert f"midpo {name}" in command.epilog
    for parameter in command.params:
        assert parameter.help, parameter.name
        described = isinstance(parameter.show_default, str)
        assert parameter.required or described or parameter.default is not None, parameter.name
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"midpo {name}" in out
    for parameter in command.params:
        if isinstance(parameter.show_default, str):
            assert parameter.show_default in out


def test_help_is_fast_and_light() -> None:
    """At most 0.6 s of CPU per command in a new process, and none of the heavy packages."""
    code = (
        "import sys, time\n"
        "from midpo_ray.cli import main\n"
        "started = time.process_time()\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'pandas', 'scipy', 'matplotlib'}\n"
        f"for name in {['', *COMMANDS]}:\n"
        "    before = time.process_time()\n"
        "    assert main([*name.split(), '--help']) == 0\n"
        "    assert started + time.process_time() - before < 0.6, name\n"
        "    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (["runn", "miniature"], "'run'"),
        (["run", "miniature", "--dryrun"], "--dry-run"),
        (["run"], "recipe"),
        (["inspect", "x", "--stage", "saftey"], "safety"),
        (["cluster", "chek", "x"], "'check'"),
        ([], "command"),
    ],
)
def test_a_mistyped_command_is_one_line(words: list[str], known: str, capsys) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert known in error


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("midpo_ray ")


def test_overrides_stand_anywhere(tmp_path, capsys, loggers) -> None:
    words = ["seed=3", "--run-dir", str(tmp_path / "run"), "router.prior=0.5", "-q", "--dry-run"]
    assert main(["run", "miniature", *words, "lora.r=4"]) == 0
    out = capsys.readouterr().out
    for line in ("\nseed: 3\n", "    weight: 0.5\n", "  r: 4\n"):
        assert line in out
    assert loggers.level == logging.WARNING
    assert not (tmp_path / "run").exists()


def test_options_of_several_words(monkeypatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(
        "midpo_ray.evaluation.evaluate.make_plan",
        lambda what, sets, **more: seen.update(what=what, sets=sets, **more) or exit(),
    )
    words = ["evaluate", "a", "b", "--sets", "s", "t", "--seeds", "2", "--sets", "u"]
    words += ["--judges", "cost=c", "m:f", "--against", "base", "--tasks", "x,y", "z"]
    with pytest.raises(SystemExit):
        main(words)
    assert seen["what"] == ["a", "b"]
    assert seen["sets"] == ["s", "t", "u"]
    assert seen["judges"] == ["cost=c", "m:f"]
    assert seen["tasks"] == ["x", "y", "z"]
    assert (seen["against"], seen["seeds"]) == ("base", 2)


def test_report_folders_differ() -> None:
    """A dot in the name of a run is not the beginning of a file's ending (D18)."""
    assert report_folder("runs/exp-0.1", ["xstest"]) == "reports/exp-0.1-xstest"
    assert report_folder("runs/exp-0.5", ["xstest"]) == "reports/exp-0.5-xstest"
    assert (
        report_folder("runs/a:safety", ["few.jsonl.gz", "v1.2.csv"]) == "reports/a-safety-few-v1.2"
    )


def test_config_prints_keys(capsys) -> None:
    assert main(["config", "miniature", "experts.safety.objective.beta"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("experts.safety.objective.beta = 1.0")
    assert "> 0" in out
    assert "0.1" in out  # the default
    assert main(["config", "router.rule"]) == 0
    assert capsys.readouterr().out.startswith("router.rule  (")
    assert main(["config", "miniatur"]) == 2
    assert "miniature" in capsys.readouterr().err
    assert main(["config"]) == 0
    assert "deepspeed.stage" in capsys.readouterr().out
    assert main(["config", "miniature", "experts.safety.objective.bta"]) == 2
    assert "experts.safety.objective.beta" in capsys.readouterr().err
