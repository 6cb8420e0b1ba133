"""Sweeps: spaces, schedulers and searchers, the report; and, slow, real sweeps on Ray Tune."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import smallworld
import yaml

from midpo_ray.cli import main
from midpo_ray.config import dump, load_config
from midpo_ray.data.schema import Pair, response_key
from midpo_ray.errors import UserError
from midpo_ray.pipeline.signals import Scored, stage_table
from midpo_ray.storage import Storage
from midpo_ray.tuning.report import choose, write_sweep_report
from midpo_ray.tuning.space import Space, at, fix, known_points, load_space

SPACES = Path(__file__).parent.parent / "tune_spaces"
LAMBDA, TAU = "experts.*.objective.margin_scale", "experts.*.objective.temperature"
JOINT: dict[str, Any] = {
    "stages": ["safety", "helpfulness"],
    "set": {"experts.*.objective.name": "spe_b_dpo"},
    "space": {
        LAMBDA: {"about": "lambda", "uniform": [0.0, 1.0]},
        TAU: {"about": "tau", "loguniform": [0.1, 10.0]},
    },
    "points": [{LAMBDA: 0.0, TAU: float("inf")}],
    "metrics": {"safety.accuracy": "max", "helpfulness.accuracy": "max"},
    "samples": 12,
}


def space(**changes) -> Space:
    return Space.model_validate({**JOINT, **changes})


# --- spaces -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_spaces_are_sound(path: Path) -> None:
    found = load_space(str(path), {})
    config = fix(load_config("miniature"), found, str(path))
    assert all(key.about for key in found.space.values())
    assert at(config, found, found.points[0] if found.points else {}, "").name == "miniature"


BROKEN = {
    "not YAML": ("{", "not YAML"),
    "empty": ("", "a mapping of keys is expected"),
    "unknown key": ({"sampels": 3}, "did you mean samples"),
    "no metrics": ({"metrics": {}}, "metrics"),
    "unknown stage": ({"stages": ["safty"]}, "stages"),
    "unknown recipe key": ({"space": {"experts.*.objective.margn_scale": {"about": "", "uniform": [0, 1]}}},
                           "did you mean margin_scale"),
    "unknown recipe section": ({"space": {"expert.safety.lr": {"about": "", "uniform": [0, 1]}}}, "unknown key expert"),
    "frozen key": ({"space": {"data.max_length": {"about": "", "randint": [64, 512]}}}, "data.max_length"),
    "stage not trained": ({"stages": ["safety"], "metrics": {"safety.loss": "min"},
                           "space": {"experts.helpfulness.objective.beta": {"about": "", "uniform": [0.1, 1]}}},
                          "not trained here"),
    "empty range": ({"space": {LAMBDA: {"about": "", "uniform": [1.0, 1.0]}}}, "is empty"),
    "reversed range": ({"space": {LAMBDA: {"about": "", "uniform": [1.0, 0.0]}}}, "is empty"),
    "log range from zero": ({"space": {TAU: {"about": "", "loguniform": [0.0, 1.0]}}}, "above 0"),
    "infinite range": ({"space": {TAU: {"about": "", "uniform": [0.1, float("inf")]}}}, "not finite"),
    "value the recipe refuses": ({"space": {LAMBDA: {"about": "", "uniform": [-1.0, 1.0]}}}, "greater than or equal"),
    "no choice": ({"space": {LAMBDA: {"about": "", "choice": []}}}, "choice"),
    "unknown distribution": ({"space": {LAMBDA: {"about": "", "gaussian": [0, 1]}}}, "gaussian"),
    "two distributions": ({"space": {LAMBDA: {"about": "", "uniform": [0, 1], "choice": [1]}}}, "exactly one distribution"),
    "no meaning": ({"space": {LAMBDA: {"uniform": [0, 1]}}}, "about is missing"),
    "unknown metric": ({"metrics": {"safety.acuracy": "max"}}, "did you mean safety.accuracy"),
    "unknown direction": ({"metrics": {"safety.accuracy": "up"}}, "'max' or 'min'"),
    "scheduler's metric": ({"scheduler": {"metric": "router.loss"}}, "router.loss"),
    "grace of one": ({"scheduler": {"grace": 1.0}}, "scheduler.grace"),
    "no sample": ({"samples": 0}, "samples"),
    "grid of a range": ({"search": "grid"}, "a grid needs choice"),
    "condition on a later key": ({"space": {LAMBDA: {"about": "", "uniform": [0, 1], "when": {TAU: [1]}},
                                            TAU: {"about": "", "uniform": [1, 2]}}}, "is not an earlier key"),
    "point outside": ({"points": [{"lora.r": 4}]}, "lora.r is not a key of space"),
    "unknown rule": ({"select": "safety > 0.9"}, "is expected"),
    "rule's metric": ({"select": "safety>=0.9 then router"}, "metric router is unknown"),
}  # fmt: skip


@pytest.mark.parametrize(("broken", "says"), BROKEN.values(), ids=BROKEN)
def test_broken_spaces_are_one_line_before_ray(
    broken, says: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {k: v for k, v in JOINT.items() if k != "points" or "space" not in broken}
    Path("space.yaml").write_text(
        broken if isinstance(broken, str) else yaml.safe_dump({**content, **broken})
    )
    assert main(["tune", "space.yaml", "--recipe", "miniature"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert "space.yaml" in error
    assert not Path("runs").exists()


def test_a_longer_sweep_begins_with_a_shorter_one_s_points() -> None:
    keys = {
        "router.gate": {"about": "", "choice": ["linear", "mlp"]},
        "router.width": {"about": "", "randint": [4, 9], "when": {"router.gate": ["mlp"]}},
        "router.prior": {"about": "", "quniform": [0.0, 1.0, 0.25]},
    }
    routers = space(
        stages=["router"], set={}, space=keys, points=[], metrics={"router.loss": "min"}
    )
    short, long = known_points(routers, 7, 0), known_points(routers, 40, 0)
    assert short is not None
    assert long is not None
    assert short == long[:7]
    assert {p["router.gate"] for p in long} == {"linear", "mlp"}
    assert all(("router.width" in p) == (p["router.gate"] == "mlp") for p in long)
    assert {p["router.width"] for p in long if "router.width" in p} <= set(range(4, 9))
    assert all(p["router.prior"] * 4 == round(p["router.prior"] * 4) for p in long)
    assert known_points(space(), 3, 0)[0] == JOINT["points"][0]


def test_grid_leaves_out_what_does_not_apply() -> None:
    found = load_space(str(SPACES / "bdpo_temperature.yaml"), {})
    assert len(known_points(found, None, 0)) == 13  # infinite once, four others with three scalings


def small_scored() -> Scored:
    pairs, scored = [], []
    for n, row in enumerate(smallworld.rows(30)):
        answers = (row["response_0"], row["response_1"])
        safe = (row["is_response_0_safe"], row["is_response_1_safe"])
        prompt = (("user", row["prompt"]),)
        pairs.append(
            Pair(
                prompt,
                answers,
                safe,
                row["better_response_id"],
                row["safer_response_id"],
                None,
                f"f:{n}",
                {},
            )
        )
        for i, answer in enumerate(answers):
            scored.append({
                "key": response_key(prompt, answer), "prompt_ids": [1, 2], "response_ids": [3] * (2 + n % 3 + i), "reference_logp": -3.0 - n / 7 - i,
                "unconditional_logp": -4.0 - n / 5, "reward": row[f"reward_{i}"], "cost": row[f"cost_{i}"],
            })  # fmt: skip
    return Scored(pairs, pa.Table.from_pylist(scored))


def test_without_margin_and_at_infinite_temperature_a_trial_is_dpo() -> None:
    config = load_config("miniature")
    dpo = at(config, space(), {"experts.*.objective.name": "dpo"}, "")
    point = at(fix(config, space(), ""), space(), JOINT["points"][0], "")
    for stage in ("safety", "helpfulness"):
        assert (
            stage_table(point, stage, small_scored())[0]
            == stage_table(dpo, stage, small_scored())[0]
        )
    other = at(fix(config, space(), ""), space(), {LAMBDA: 0.5, TAU: 1.0}, "")
    assert (
        stage_table(other, "safety", small_scored())[0]
        != stage_table(dpo, "safety", small_scored())[0]
    )


# --- schedulers and searchers of Ray Tune -----------------------------------------------------------


def decisions(of: Space, points: list[dict], values: list[float]) -> list[str]:
    """What the scheduler says when trials with these values arrive one after the other."""
    from midpo_ray.tuning.search import make_scheduler

    scheduler, said = make_scheduler(of), []
    trials = [
        SimpleNamespace(trial_id=str(i), config={"trial": {"point": p}}, is_finished=lambda: False)
        for i, p in enumerate(points)
    ]
    for trial, value in zip(trials, values, strict=True):
        scheduler.on_trial_add(None, trial)
        said.append(scheduler.on_trial_result(None, trial, {"percent": 25, "objective": value}))
    return said


def test_asha_stops_late_comers_but_never_the_first_point() -> None:
    from ray.tune.schedulers import ASHAScheduler

    from midpo_ray.tuning.search import make_scheduler

    assert isinstance(make_scheduler(space()), ASHAScheduler)
    points = [{LAMBDA: i / 10, TAU: 1.0} for i in range(5)]
    values = [0.9, 0.8, 0.7, 0.1, 0.95]
    assert decisions(space(), points, values)[3:] == ["STOP", "CONTINUE"]
    first = [*points[:3], JOINT["points"][0], points[4]]
    assert decisions(space(), first, values)[3:] == ["CONTINUE", "CONTINUE"]


def test_schedulers_and_searchers_by_name() -> None:
    from ray.tune.schedulers import HyperBandScheduler, PopulationBasedTraining

    from midpo_ray.tuning.search import make_scheduler, make_searcher

    by_name = {"name": "hyperband", "arguments": {"reduction_factor": 2}}
    assert isinstance(make_scheduler(space(scheduler=by_name)), HyperBandScheduler)
    assert isinstance(make_scheduler(space(scheduler={"name": "pbt"})), PopulationBasedTraining)
    wrong = [
        ({"name": "nothing"}, "hyperband"),
        ({"name": "hyperband", "arguments": {"factor": 2}}, "factor"),
        ({"name": "asha", "arguments": {"brackets": 0}}, "brackets"),
    ]
    for section, named in wrong:
        with pytest.raises(UserError, match=named):
            make_scheduler(space(scheduler=section))
    assert make_searcher(space(), 0) is None
    for section, named in (("nothing", "optuna"), ("optuna", "factor")):
        with pytest.raises(UserError, match=named):
            make_searcher(space(search=section, search_arguments={"factor": 1}), 0)


def test_optuna_learns_from_two_metrics_and_takes_given_points_first() -> None:
    from midpo_ray.tuning.search import make_searcher

    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    of = space(search="optuna", metrics={"safety.loss": "min", "helpfulness.accuracy": "max"})
    searcher = make_searcher(of, 0)
    domains = {name: key.domain() for name, key in of.space.items()}
    searcher.set_search_properties(None, None, {"trial": {"point": domains, "seed": 0}})
    distances = []
    for number in range(60):
        drawn = searcher.suggest(str(number))["trial"]
        assert drawn["seed"] == 0
        if number == 0:
            assert drawn["point"] == JOINT["points"][0]
        distance = abs(drawn["point"][LAMBDA] - 0.3)
        distances.append(distance)
        result = {"safety.loss": distance, "helpfulness.accuracy": -distance}
        searcher.on_trial_complete(str(number), result)
    assert sum(distances[40:]) / 20 < 0.15  # 0.29 at random


# --- the report -------------------------------------------------------------------------------------


def test_winners() -> None:
    names = list(JOINT["metrics"])
    points = pd.DataFrame([(1.0, 0.0), (0.8, 0.8), (0.0, 1.0), (0.5, 0.5)], columns=names)
    assert choose(points, space()) == 1
    assert choose(points, space(select="safety")) == 0
    assert choose(points, space(select="safety>=0.5 then helpfulness")) == 1
    falling = space(metrics={names[0]: "max", names[1]: "min"}, select="helpfulness")
    assert choose(points, falling) == 0
    with pytest.raises(UserError, match=r"safety\.accuracy >= 2"):
        choose(points, space(select="safety>=2 then helpfulness"))


def made_up_rows(of: Space, seeds: int) -> list[dict[str, Any]]:
    rows = []
    for number, point in enumerate(known_points(of, 6, 0) or []):
        for seed in range(seeds if number != 3 else 1):
            names = [f"{s}.{m}" for s in of.stages for m in ("accuracy", "loss", "reward_margin")]
            curve = [{n: (number * 7 + i + seed) % 5 / 5 for i, n in enumerate(names)}] * 2
            state = "stopped" if number == 3 else "finished"
            shares = [0.25] if number == 3 else [0.25, 1.0]
            rows.append({
                "point": number, "seed": seed, "values": point, "state": state, "shares": shares,
                "curve": curve[: len(shares)], "error": "",
            })  # fmt: skip
    return rows


def test_report_and_best_recipe(tmp_path) -> None:
    of = space(about="<b>", seeds=2, select="safety>=0.1 then helpfulness")
    config = fix(load_config("miniature"), of, "")
    rows = made_up_rows(of, 2)
    write_sweep_report(Storage(tmp_path), of, config, rows, "joint", "midpo tune <joint>")
    table = pq.read_table(tmp_path / "results.parquet").to_pandas()
    assert table["state"].tolist() == [row["state"] for row in rows]
    assert table[LAMBDA].tolist() == [row["values"][LAMBDA] for row in rows]
    assert table["safety.accuracy"].tolist() == [
        row["curve"][-1]["safety.accuracy"] for row in rows
    ]
    assert math.isinf(pd.read_csv(tmp_path / "results.csv")[TAU][0])
    page = (tmp_path / "report.html").read_text()
    assert "<b>" not in page
    assert (
        page.count("data:image/svg") >= 9
    )  # 4 of a metric against a key, 2 maps, the front, 2 of curves
    best = load_config(tmp_path / "best.yaml")
    finished = table[table["state"] == "finished"].groupby("point")
    winner = finished["helpfulness.accuracy"].mean().idxmax()
    values = next(row["values"] for row in rows if row["point"] == winner)
    assert best.experts.safety.objective.margin_scale == values[LAMBDA]
    assert best.experts.helpfulness.objective.temperature == values[TAU]
    assert best.name == "miniature-best-joint"
    assert best.seed_of_training == 0


# --- the real thing ---------------------------------------------------------------------------------------------------------


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "midpo_ray.cli",
        "tune",
        "joint.yaml",
        "--recipe",
        "small.yaml",
        *words,
    ]
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_llama, byte_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    tiny_llama().save_pretrained(folder / "model")
    byte_tokenizer.save_pretrained(folder / "model")
    data = smallworld.write(folder / "pairs.jsonl", smallworld.rows(160))
    smallworld.recipe(folder, folder / "model", data)
    return folder


def write_space(folder: Path, **changes: Any) -> None:
    metrics = {"safety.reward_margin": "max", "helpfulness.reward_margin": "max"}
    content = {**JOINT, "samples": 5, "metrics": metrics, **changes}
    (folder / "joint.yaml").write_text(yaml.safe_dump(content))


def table_of(folder: Path) -> pd.DataFrame:
    return pq.read_table(folder / "results.parquet").to_pandas()


def records(folder: Path) -> dict[str, tuple[int, dict]]:
    """trial -> when its record was written, and what it holds."""
    found = folder.glob("trials/*/record.json")
    return {p.parent.name: (p.stat().st_mtime_ns, json.loads(p.read_text())) for p in found}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_that_was_killed_three_times_repeats_no_trial(small) -> None:
    write_space(small, seeds=2)
    command = ("--run-dir", "killed/run", "cache=cache")
    written: dict[str, tuple[int, dict]] = {}
    for kill in range(4):
        process, before = start(small, *command), len(records(small / "killed/run"))
        while process.poll() is None and (
            kill == 3 or len(records(small / "killed/run")) <= before
        ):
            time.sleep(0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        now = records(small / "killed/run")
        for name, (when, content) in written.items():
            if "1.0" in content["shares"]:
                assert now[name][0] == when, "a finished trial was trained again"
        written = now
    assert process.returncode == 0, process.stdout.read()
    table = table_of(small / "killed/run")
    finished = table[table["state"] == "finished"]
    assert finished.iloc[0]["point"] == 0
    whole = start(small, "--run-dir", "whole/run", "cache=cache", "--samples", "5")
    assert whole.wait(600) == 0, whole.stdout.read()
    other = table_of(small / "whole/run")
    keys = ["point", "seed"]
    both = finished.merge(other[other["state"] == "finished"], on=keys, suffixes=("", "_other"))
    assert len(both) >= 2
    for name in (LAMBDA, TAU, "safety.loss", "helpfulness.reward_margin"):
        assert (both[name] == both[f"{name}_other"]).all()
    best = load_config(small / "whole/run/best.yaml")
    run = ("run", small / "whole/run/best.yaml", "--run-dir", small / "best", "--until", "safety")
    assert main([str(word) for word in run]) == 0
    last = json.loads((small / "best/metrics/safety.jsonl").read_text().splitlines()[-1])
    row = other[other[LAMBDA] == best.experts.safety.objective.margin_scale].iloc[0]
    assert last["loss"] == pytest.approx(row["safety.loss"], abs=1e-5)
    assert dump(best)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("by_name", ["optuna", "hyperband", "pbt"])
def test_searchers_and_schedulers_by_name_run(small, by_name) -> None:
    if by_name == "optuna":
        write_space(small, search="optuna", concurrency=1, samples=4, scheduler={"name": "none"})
    else:
        write_space(small, samples=3, scheduler={"name": by_name, "measurements": 2})
    process = start(small, "--run-dir", f"{by_name}/run", "cache=cache")
    assert process.wait(500) == 0, process.stdout.read()
    table = table_of(small / by_name / "run")
    assert table["point"].tolist() == list(range(4 if by_name == "optuna" else 3))
    assert (table["state"] == "finished").any()
    assert table.iloc[0][LAMBDA] == 0.0 or by_name == "pbt"
    assert "front" in (small / by_name / "run/report.html").read_text()


@pytest.fixture
def two_labelled_nodes():
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for name in ("safety", "helpfulness"):
        cluster.add_node(num_cpus=1, labels={"midpo-group": name})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_experts_of_a_trial_train_at_the_same_time_on_their_own_nodes(
    small, two_labelled_nodes
) -> None:
    write_space(small, samples=1, scheduler={"name": "none"})
    labels = [
        f"experts.{name}.group.label_selector={{midpo-group: {name}}}"
        for name in ("safety", "helpfulness")
    ]
    steps = [f"experts.{name}.optim.steps=200" for name in ("safety", "helpfulness")]
    address = two_labelled_nodes.address
    process = start(
        small, "--run-dir", "labelled/run", "cache=cache", "--address", address, *labels, *steps,
        RAY_ADDRESS=address, HOME=os.environ["HOME"],
    )  # fmt: skip
    seen_together = False
    while process.poll() is None:
        steps_of = [
            {p.name for p in small.glob(f"labelled/run/trials/*/experts/{name}.work/checkpoints/*")}
            for name in ("safety", "helpfulness")
        ]
        ended = bool(records(small / "labelled/run"))
        seen_together = seen_together or (all(steps_of) and not ended)
        time.sleep(0.05)
    assert process.returncode == 0, process.stdout.read()
    assert seen_together
    assert len(table_of(small / "labelled/run")) == 1
