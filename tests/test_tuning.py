"""Sweeps without Ray: spaces, verdicts, what runs next, the report; and, slow, a real one that is killed again and again."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

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
from midpo_ray.tuning import report
from midpo_ray.tuning.rungs import choose, front, goes_on, judge
from midpo_ray.tuning.space import Optuna, Space, at, fix, load_space
from midpo_ray.tuning.sweep import Sweep

SPACES = Path(__file__).parent.parent / "tune_spaces"
LAMBDA, TAU = "experts.*.objective.margin_scale", "experts.*.objective.temperature"
JOINT = {
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
UP = {"a": "max"}


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
    "frozen key": ({"space": {"data.max_length": {"about": "", "randint": [64, 512]}}}, "frozen signals"),
    "stage not trained": ({"stages": ["safety"], "metrics": {"safety.loss": "min"},
                           "space": {"experts.helpfulness.objective.beta": {"about": "", "uniform": [0.1, 1]}}},
                          "not trained here"),
    "empty range": ({"space": {LAMBDA: {"about": "", "uniform": [1.0, 1.0]}}}, "is empty"),
    "reversed range": ({"space": {LAMBDA: {"about": "", "uniform": [1.0, 0.0]}}}, "is reversed"),
    "log range from zero": ({"space": {TAU: {"about": "", "loguniform": [0.0, 1.0]}}}, "above 0"),
    "infinite range": ({"space": {TAU: {"about": "", "uniform": [0.1, float("inf")]}}}, "not finite"),
    "value the recipe refuses": ({"space": {LAMBDA: {"about": "", "uniform": [-1.0, 1.0]}}}, "greater than or equal"),
    "no choice": ({"space": {LAMBDA: {"about": "", "choice": []}}}, "choice"),
    "unknown distribution": ({"space": {LAMBDA: {"about": "", "gaussian": [0, 1]}}}, "gaussian"),
    "two distributions": ({"space": {LAMBDA: {"about": "", "uniform": [0, 1], "choice": [1]}}}, "exactly one distribution"),
    "no meaning": ({"space": {LAMBDA: {"uniform": [0, 1]}}}, "about is missing"),
    "unknown metric": ({"metrics": {"safety.acuracy": "max"}}, "did you mean safety.accuracy"),
    "unknown direction": ({"metrics": {"safety.accuracy": "up"}}, "'max' or 'min'"),
    "unknown scheduler": ({"scheduler": {"name": "hyperband"}}, "scheduler.name"),
    "grace of one": ({"scheduler": {"grace": 1.0}}, "scheduler.grace"),
    "no sample": ({"samples": 0}, "samples"),
    "grid of a range": ({"search": "grid"}, "a grid needs choice"),
    "condition on a later key": ({"space": {LAMBDA: {"about": "", "uniform": [0, 1], "when": {TAU: [1]}},
                                            TAU: {"about": "", "uniform": [1, 2]}}}, "stands before it"),
    "point outside": ({"points": [{"lora.r": 4}]}, "lora.r is not a key of space"),
    "unknown rule": ({"select": "safety > 0.9"}, "is expected"),
    "rule's metric": ({"select": "safety>=0.9 then router"}, "metric router is unknown"),
    "optuna on auto": ({"search": "optuna"}, "needs a number"),
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


def test_points_hang_on_their_number_and_conditions(tmp_path) -> None:
    keys = {
        "router.gate": {"about": "", "choice": ["linear", "mlp"]},
        "router.width": {"about": "", "randint": [4, 9], "when": {"router.gate": ["mlp"]}},
        "router.prior": {"about": "", "quniform": [0.0, 1.0, 0.25]},
    }
    routers = space(
        stages=["router"], set={}, space=keys, points=[], metrics={"router.loss": "min"}, samples=40
    )
    short, long = (sweep(tmp_path / str(n), routers, samples=n) for n in (7, 40))
    short.todo(), long.todo()
    assert short.points == long.points[:7]
    assert {p["router.gate"] for p in long.points} == {"linear", "mlp"}
    assert all(("router.width" in p) == (p["router.gate"] == "mlp") for p in long.points)
    assert {p["router.width"] for p in long.points if "router.width" in p} <= set(range(4, 9))
    assert all(p["router.prior"] * 4 == round(p["router.prior"] * 4) for p in long.points)


def test_grid_leaves_out_what_does_not_matter(tmp_path) -> None:
    found = load_space(str(SPACES / "bdpo_temperature.yaml"), {})
    made = sweep(tmp_path, found, samples=99, name="miniature")
    made.samples = len(made.grid)
    assert len(made.todo()) == 13  # infinite once, four temperatures with three scalings


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


# --- verdicts ---------------------------------------------------------------------------------------------------------------


def test_going_on() -> None:
    before = [{"a": x} for x in (0.5, 0.6, 0.7)]
    assert not goes_on({"a": 0.6}, before, UP, 3)  # one of three beats it
    assert goes_on({"a": 0.7}, before, UP, 3)  # equal is not beaten
    assert goes_on({"a": 0.0}, before[:2], UP, 3)  # too few to say
    both = {"a": "max", "b": "min"}
    assert goes_on(
        {"a": 0.0, "b": 0.0}, [{"a": 1.0, "b": 1.0}] * 3, both, 3
    )  # the front is not stopped
    assert not goes_on({"a": 0.0, "b": 2.0}, [{"a": 1.0, "b": 1.0}] * 3, both, 3)


def test_verdicts_do_not_depend_on_the_order_of_arrival() -> None:
    rng = random.Random(0)
    for _ in range(40):
        count, rungs = rng.randint(1, 9), rng.randint(1, 4)
        curves = [[{"a": rng.random()} for _ in range(rungs)] for _ in range(count)]
        failed = [rng.random() < 0.15 for _ in range(count)]
        lengths = [rng.randint(0, rungs - 1) if f else rungs for f in failed]
        curves = [c[:n] for c, n in zip(curves, lengths, strict=True)]
        final = judge(curves, failed, rungs, 2, UP)
        assert not {v.state for v in final} & {"waiting", "undecided"}
        known = [0] * count
        while known != lengths:
            i = rng.choice([i for i in range(count) if known[i] < lengths[i]])
            known[i] += 1
            told = [f and n == m for f, n, m in zip(failed, known, lengths, strict=True)]
            for now, then in zip(
                judge([c[:n] for c, n in zip(curves, known, strict=True)], told, rungs, 2, UP),
                final,
                strict=True,
            ):
                assert (
                    now.state in ("waiting", "undecided") or now == then
                )  # a decision is never taken back


def test_winners() -> None:
    points = [{"a": a, "b": b} for a, b in ((1.0, 0.0), (0.8, 0.8), (0.0, 1.0), (0.5, 0.5))]
    both = {"a": "max", "b": "max"}
    assert front(points, both) == [0, 1, 2]
    assert choose(points, both, ("knee",)) == 1
    assert choose(points, both, ("a",)) == 0
    assert choose(points, both, ("a", ">=", "0.5", "b")) == 1
    assert choose(points, {"a": "max", "b": "min"}, ("b",)) == 0
    with pytest.raises(UserError, match="no finished point has a >= 2"):
        choose(points, both, ("a", ">=", "2", "b"))


# --- what runs next, with a fake for the training ---------------------------------------------------------------------------


def sweep(folder: Path, of: Space, samples: int = 12, name: str = "miniature") -> Sweep:
    return Sweep(of, fix(load_config(name), of, ""), Storage(folder), "key", samples)


def fake_values(config, rung: float) -> dict[str, float]:
    """A function of the trial's configuration and rung alone, as a training is."""
    values = {}
    for stage in ("safety", "helpfulness"):
        objective = getattr(config.experts, stage).objective
        noise = random.Random(
            f"{stage}/{objective.margin_scale}/{objective.temperature}/{config.training_seed}/{rung}"
        ).random()
        values |= {f"{stage}.{m}": noise + rung for m in ("accuracy", "loss", "reward_margin")}
    return values


def play(
    folder: Path, of: Space, workers: int, rng: random.Random, kills: bool
) -> tuple[list, int]:
    """A sweep by so many fake workers at random speeds; with kills, all is forgotten but the records. (rows, rungs trained)"""
    done, made, running = 0, sweep(folder, of), {}
    while True:
        todo = {u.id: u for u in made.todo()}
        for unit in todo.values():
            if len(running) < workers:
                running.setdefault(unit.id, unit)
        if not running:
            assert not todo
            return report.rows(made), done
        unit = running[rng.choice(sorted(running))]
        rung = made.rungs[len(made.curve(unit))]
        record = made.records[unit.id] or {"rungs": {}, "clock": []}
        record["rungs"][str(rung)] = fake_values(unit.config, rung)
        made.run.write(f"trials/{unit.id}/record.json", json.dumps(record).encode())
        made.records[unit.id], done = record, done + 1
        if unit.id not in {u.id for u in made.todo()}:
            del running[unit.id]
        if kills and rng.random() < 0.2:
            made, running = sweep(folder, of), {}


@pytest.mark.parametrize(
    "changes", [{}, {"seeds": 3}, {"search": "optuna", "concurrency": 3, "samples": 14}], ids=str
)
def test_the_table_hangs_on_neither_workers_nor_kills(tmp_path, changes) -> None:
    of, rng = space(**changes), random.Random(1)
    first, least = play(tmp_path / "0", of, 1, rng, kills=False)
    states = [r["state"] for r in first]
    assert "stopped" in states
    assert states.count("finished") > 2
    for number, (workers, kills) in enumerate([(2, False), (5, False), (1, True), (3, True)], 1):
        table, trained = play(tmp_path / str(number), of, workers, rng, kills)
        assert table == first
        assert trained <= least + 2 * len(first)  # undecided trials may run on a little


def test_adding_samples_changes_no_verdict(tmp_path) -> None:
    rng = random.Random(2)
    short, _ = play(tmp_path, space(), 2, rng, kills=False)
    longer = sweep(tmp_path, space(), samples=20)
    assert all(u.point >= 12 for u in longer.todo())
    assert [r for r in report.rows(longer) if r["point"] < 12] == short


def test_optuna_uses_what_it_is_told() -> None:
    keys = {LAMBDA: JOINT["space"][LAMBDA]}
    of = space(
        search="optuna", concurrency=1, metrics={"safety.loss": "min"}, space=keys, points=[]
    )
    study, distances = Optuna(of, 0), []
    for number in range(60):
        distances.append(abs(study.ask(number)[LAMBDA] - 0.3))
        study.tell(number, distances[-1:])
    assert sum(distances[40:]) / 20 < 0.15  # 0.29 by chance


# --- the report -------------------------------------------------------------------------------------------------------------


def test_report_and_best_recipe(tmp_path) -> None:
    of, said = space(about="<b>", seeds=2, select="safety>=0.1 then helpfulness"), []
    play(tmp_path, of, 2, random.Random(3), kills=False)
    made = sweep(tmp_path, of)
    made.todo()
    report.write(
        made, fix(load_config("miniature"), of, ""), "joint", "midpo tune <joint>", said.append
    )
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert table == report.rows(made)
    page = (tmp_path / "report.html").read_text()
    assert "<b>" not in page
    assert "http" not in page  # one file
    pictures = [ElementTree.fromstring(p) for p in re.findall("<svg.*?</svg>", page)]
    assert (
        len(pictures) == 10
    )  # 4 of a metric against a key, 2 heat maps, the front, 2 of curves, parallel coordinates
    for picture in pictures:
        for circle in picture.iter("circle"):
            assert 0 < float(circle.get("cx")) < float(picture.get("width"))
            assert 0 < float(circle.get("cy")) < float(picture.get("height"))
    best = load_config(tmp_path / "best.yaml")
    winner = max(
        (r for r in table if r["seed"] == 0 and r["state"] == "finished"),
        key=lambda r: means(table, r["point"]),
    )
    assert best.experts.safety.objective.margin_scale == winner[LAMBDA]
    assert best.experts.helpfulness.objective.temperature == winner[TAU]
    assert best.name == "miniature-best-joint"
    assert best.seed_of_training == 0
    assert any("±" in line for line in said)


def means(table: list[dict], point: int) -> float:
    values = [r["helpfulness.accuracy"] for r in table if r["point"] == point]
    return sum(values) / len(values)


def test_axes_take_zero_infinity_and_words() -> None:
    place, ticks = report.scale([0.0, 0.1, 10.0, float("inf")])
    assert [place(v) for v in (0.0, 0.1, 10.0, float("inf"))] == pytest.approx([0.0, 0.1, 0.9, 1.0])
    assert list(ticks) == ["0", "0.1", "10", "inf"]
    assert report.scale(["last", "token"])[0]("token") == 1.0


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


@pytest.fixture
def small(tmp_path, tiny_model_dir) -> Path:
    smallworld.recipe(
        tmp_path, tiny_model_dir(), smallworld.write(tmp_path / "pairs.jsonl", smallworld.rows(160))
    )
    content = {
        **JOINT,
        "samples": 6,
        "metrics": {"safety.reward_margin": "max", "helpfulness.reward_margin": "max"},
    }
    (tmp_path / "joint.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_sweep_ends_with_the_same_table_and_best_runs_alike(small) -> None:
    whole = start(small, "--run-dir", "whole/run")
    assert whole.wait(600) == 0, whole.stdout.read()
    rng, killed = random.Random(4), 0
    while True:
        process = start(small, "--run-dir", "killed/run", "cache=whole/cache")
        deadline = time.monotonic() + rng.uniform(6, 20)
        while process.poll() is None and (time.monotonic() < deadline or killed == 5):
            time.sleep(0.1)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert process.returncode == 0, process.stdout.read()
    assert (small / "killed/run/results.csv").read_text() == (
        small / "whole/run/results.csv"
    ).read_text()
    best = load_config(small / "whole/run/best.yaml")
    assert (
        main(
            [
                "run",
                str(small / "whole/run/best.yaml"),
                "--run-dir",
                str(small / "whole/best"),
                "--until",
                "safety",
            ]
        )
        == 0
    )
    last = json.loads((small / "whole/best/metrics/safety.jsonl").read_text().splitlines()[-1])
    rows = pq.read_table(small / "whole/run/results.parquet").to_pylist()
    row = next(r for r in rows if r[LAMBDA] == best.experts.safety.objective.margin_scale)
    assert last["loss"] == pytest.approx(row["safety.loss"], abs=1e-5)
    assert dump(best)


@pytest.fixture
def four_nodes():
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(4):
        cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def on_cluster(folder: Path, address: str, *words: str) -> list[dict]:
    """Clocks of the trials of a sweep on a cluster, each from its first entry to its last."""
    # the cluster's own HOME: there is its token, if it has one
    process = start(
        folder,
        "--run-dir",
        "on/run",
        "--address",
        address,
        *words,
        RAY_ADDRESS=address,
        HOME=os.environ["HOME"],
    )
    assert process.wait(900) == 0, process.stdout.read()
    clocks = [
        json.loads(p.read_text())["clock"] for p in (folder / "on/run/trials").glob("*/record.json")
    ]
    return [{**c[0], "ended": c[-1]["ended"]} for c in clocks]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_nodes_are_in_use_while_trials_wait(small, four_nodes) -> None:
    long = [f"experts.{e}.optim.steps=120" for e in ("safety", "helpfulness")]
    clocks = on_cluster(
        small, four_nodes.address, "--samples", "14", *long, "checkpoint.every_steps=100"
    )
    asked = sorted(c["asked"] for c in clocks)
    begin, end = asked[3], asked[-1]  # all four have begun; none waits any more
    used = sum(max(0.0, min(c["ended"], end) - max(c["asked"], begin)) for c in clocks)
    assert used >= 0.9 * 4 * (end - begin)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trials_of_two_workers_do_not_wait_for_each_other(small, four_nodes) -> None:
    groups = [f"experts.{e}.group.workers=2" for e in ("safety", "helpfulness")]
    clocks = on_cluster(small, four_nodes.address, "--samples", "4", *groups)
    assert len(clocks) == 4
    ordered = sorted(clocks, key=lambda c: c["asked"])
    assert ordered[1]["asked"] < ordered[0]["ended"]  # two at a time
