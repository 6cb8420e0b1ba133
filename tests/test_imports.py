"""Imports go one way, and the maths, the data and the models need neither Ray nor DeepSpeed."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "midpo_ray"
# A module imports from layers of a lower number, or of its own room.
LAYER = {
    "errors": 0, "logs": 0, "user_code": 1, "storage": 1, "config": 1, "objectives": 1, "metrics": 1,
    "recipes": 1, "studies": 1,
    "data": 2, "report": 2, "models": 3, "miniature": 4, "training": 4, "pipeline": 5, "tuning": 6, "cluster": 6,
    "doctor": 6, "__init__": 6, "jobs": 7, "evaluation": 7, "study": 8, "cli": 9,
}  # fmt: skip
# The last stage of a run is an evaluation: imported in the task that computes it, by no module.
EXCEPTIONS = {("pipeline/run.py", "midpo_ray.evaluation.miniature")}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Dotted names, with the package's own made absolute; also those inside functions."""
    package = ("midpo_ray", *path.relative_to(PACKAGE).parent.parts)
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(x for x in (base, node.module or "") if x)
            names += (
                [module, *(f"{module}.{a.name}" for a in node.names)]
                if module == "midpo_ray"
                else [module]
            )
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    mine = room(path)
    for name in imported(path):
        if (path.relative_to(PACKAGE).as_posix(), name) in EXCEPTIONS:
            continue
        parts = name.split(".")
        if parts[0] == "midpo_ray" and len(parts) > 1 and parts[1] in LAYER:
            assert parts[1] == mine or LAYER[parts[1]] < LAYER[mine], f"{mine} imports {name}"
        if parts[0] == "ray":
            assert LAYER[mine] >= LAYER["pipeline"], f"{mine} imports ray"
        if parts[0] == "deepspeed":
            assert path.relative_to(PACKAGE) == Path("training/engine.py") or mine == "doctor", (
                f"{path} imports deepspeed"
            )


def test_every_room_has_a_layer() -> None:
    assert {room(p) for p in MODULES} <= set(LAYER)


@pytest.mark.slow
def test_light_without_ray_and_deepspeed() -> None:
    """objectives, data, models and the training steps import where neither is installed."""
    code = (
        "import sys\n"
        "sys.modules['ray'] = sys.modules['deepspeed'] = None  # an import of either now fails\n"
        "import midpo_ray, midpo_ray.objectives, midpo_ray.data, midpo_ray.models\n"
        "import midpo_ray.data.batching, midpo_ray.models.logprobs, midpo_ray.models.router, midpo_ray.models.scorers\n"
        "import midpo_ray.training.steps, midpo_ray.training.loop, midpo_ray.training.checkpoint\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Modules whose distribution has another name.
DISTRIBUTION = {"yaml": "pyyaml", "sklearn": "scikit-learn", "lm_eval": "lm-eval"}


def test_what_is_imported_is_declared() -> None:
    """Every package that a module imports is a dependency, or belongs to an extra."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *(d for name in extras for d in extras[name])]
    names = {re.split(r"[\[<>=]", d)[0].lower().replace("_", "-") for d in declared}
    used = {name.partition(".")[0] for path in MODULES for name in imported(path)}
    used -= {"", "midpo_ray", *sys.stdlib_module_names}
    missing = {DISTRIBUTION.get(n, n).lower().replace("_", "-") for n in used} - names
    assert not missing
