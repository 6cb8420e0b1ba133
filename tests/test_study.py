"""Studies: a strict file, trainings that contenders share, numbers against arithmetic by hand, and a killed one that goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import yaml

from midpo_ray.cli import main
from midpo_ray.config import digest, load_config
from midpo_ray.errors import UserError
from midpo_ray.metrics import Estimate, t_interval
from midpo_ray.miniature import base as miniature
from midpo_ray.pipeline import cluster
from midpo_ray.pipeline.stage import Outcome, StageResult
from midpo_ray.storage import Storage
from midpo_ray.study import work
from midpo_ray.study.numbers import above_front, by_seed, compare, dominates, minus, study_numbers
from midpo_ray.study.plan import StudyUnit, plan_study
from midpo_ray.study.run import run_units
from midpo_ray.study.spec import Comparison, load_study, shipped_studies

DPO = {"experts.safety.objective.name": "dpo"}


def content(**changes):
    return {
        "recipe": "miniature",
        "seeds": [0, 1],
        "main": "routed",
        "contenders": [
            {"name": "base", "serve": "base"},
            {"name": "safety", "serve": "safety"},
            {"name": "safety, DPO", "serve": "safety", "set": DPO},
            {"name": "both", "serve": "added", "gates": [0.5, 0.5]},
            {"name": "routed", "serve": "routed"},
            {"name": "routed, token", "serve": "routed", "set": {"router.scope": "token"}},
        ],
        **changes,
    }


def write(folder: Path, raw: dict) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def contender(name: str, **keys):
    return [*content()["contenders"], {"name": name, **keys}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contender": []}, "unknown key contender, did you mean contenders?"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds: 1 occurs twice"),
        ({"seeds": [0, 0]}, "seeds: 0 occurs twice"),
        ({"main": "router"}, "contenders: none is named 'router', did you mean 'routed'?"),
        (
            {"contenders": contender("safety", serve="base")},
            "contenders: 'safety' occurs twice",
        ),
        (
            {"contenders": contender("again", serve="safety")},
            "contenders: 'safety' and 'again'",
        ),
        (
            {"contenders": contender("x", serve="both")},
            "'base', 'safety', 'helpfulness', 'added' or 'routed'",
        ),
        (
            {"contenders": contender("x", serve="added")},
            "x: gates: [safety, helpfulness]",
        ),
        (
            {"contenders": contender("x", serve="base", sets={})},
            "unknown key contenders.6.sets, did you mean set?",
        ),
        (
            {"contenders": contender("x", serve="routed", set={"router.rho": 1})},
            "x: set: unknown key router.rho",
        ),
        (
            {"contenders": contender("x", serve="routed", set={"data.validation": 0})},
            "x: set: data.validation",
        ),
        (
            {"contenders": contender("x", serve="routed", set={"router.rule": "best"})},
            "key router.rule",
        ),
        (
            {"comparisons": [{"of": "safety", "against": "nobody", "by": "cost"}]},
            "none is named 'nobody'",
        ),
        ({"fronts": {"MODPO": ["nobody"]}}, "none is named 'nobody'"),
        ({"set": {"router.rules": "labels"}}, "unknown key router.rules, did you mean rule?"),
        (
            {"set": {"model.path": "gpt2"}},
            "sets is empty",
        ),
        (
            {"sets": ["xstest"]},
            "sets and judges: builtin:miniature",
        ),
        ({"sets": ["xstest"], "judges": ["phrase"]}, "--judges phrase: phrases, reward=SCORER"),
        ({"recipe": "minature"}, "recipe 'minature' is not known, did you mean miniature?"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, capsys, changes, words):
    assert (
        main(["study", write(tmp_path, content(**changes)), "--run-dir", str(tmp_path / "run")])
        == 2
    )
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_study_names_those_there(tmp_path, capsys):
    assert main(["study", "minature"]) == 2
    assert "did you mean miniature?" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "none.yaml")]) == 2
    assert main(["study", "miniature", "--seeds", "a"]) == 2


def test_contenders_share_trainings(tmp_path):
    """By hand, for each of two seeds: two safety experts, a helpfulness expert, two routers on the same experts."""
    graph = plan_study(*load_study(write(tmp_path, content())), "test")
    trained = [u for u in graph.units.values() if u.kind == "trainings"]
    assert sorted(u.stage for u in trained) == sorted(
        ["safety", "safety", "helpfulness", "router", "router"] * 2
    )
    assert len([u for u in graph.units.values() if u.kind == "scores"]) == 2
    assert len(graph.answers) == 12
    places = {unit: place for place, unit in enumerate(graph.units)}
    assert all(places[need] < places[u.id] for u in graph.units.values() for need in u.needs)
    routers = [u for u in trained if u.stage == "router" and u.seed == 0]
    assert routers[0].needs == routers[1].needs
    assert {u.config.seed for u in trained} == {0, 1}


def test_only_what_is_asked_for_and_not_there_runs(tmp_path):
    graph = plan_study(*load_study(write(tmp_path, content(seeds=[0]))), "test")
    everything = {u.id for u in graph.units.values()}
    assert {u.id for u in graph.missing(set())} == everything
    assert graph.missing(everything) == []
    lost = graph.answers["safety, DPO", 0]
    assert [u.id for u in graph.missing(everything - {lost})] == [lost]
    needs = set(graph.units[lost].needs)
    assert {u.id for u in graph.missing(everything - {lost} - needs)} == {lost, *needs}


def test_a_training_seed_keeps_the_world(tmp_path):
    graph = plan_study(*load_study(write(tmp_path, content(vary="training_seed"))), "test")
    assert len([u for u in graph.units.values() if u.kind == "scores"]) == 1
    assert len([u for u in graph.units.values() if u.kind == "trainings"]) == 10
    assert len(set(graph.answers.values())) == 12


def test_sets_whose_files_are_named_alike_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.csv").write_text(f"prompt,harmful\nhello {name},0\n")
    sets = [str(tmp_path / name / "prompts.csv") for name in ("a", "b")]
    path = write(tmp_path, content(sets=sets, judges=["phrases"]))
    assert main(["study", path, "--run-dir", str(tmp_path / "run")]) == 2
    assert "(prompts, prompts)" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["prompts.csv", "my_reward.py"])
def test_other_prompts_or_another_judge_are_answers_anew(tmp_path, monkeypatch, changed):
    """The names stay, what they stand for changes: every answer is anew, every training stays."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.csv").write_text("prompt,harmful\nhello,0\n")
    (tmp_path / "my_reward.py").write_text(
        "def reward(prompts, responses):\n    return [0.0] * len(prompts)\n"
    )
    judges = ["phrases", "reward=my_reward:reward"]
    path = write(tmp_path, content(seeds=[0], sets=[str(tmp_path / "prompts.csv")], judges=judges))
    before = plan_study(*load_study(path), "test")
    assert plan_study(*load_study(path), "test") == before
    with (tmp_path / changed).open("a") as file:
        file.write("\n# more\n")
    after = plan_study(*load_study(path), "test")
    assert not set(before.answers.values()) & set(after.answers.values())
    assert set(before.units) - set(before.answers.values()) == set(after.units) - set(
        after.answers.values()
    )
    said = [
        {graph.units[u].generation for u in graph.answers.values()} for graph in (before, after)
    ]
    assert (said[0] == said[1]) == (
        changed == "my_reward.py"
    )  # another judge: nothing is generated anew


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_load_and_plan(name):
    study, config = load_study(name)
    graph = plan_study(study, config, name)
    assert len(graph.answers) == len(study.contenders) * len(study.seeds)
    assert study.contender(study.main).serve == "routed"


# --- numbers --------------------------------------------------------------------------------------


def answers(values, *, seed=0, harmful=lambda i: i % 2 == 0, **columns):
    """Rows with these rewards, and cost = -reward."""
    rows = []
    for i, value in enumerate(values):
        row = {
            "seed": seed, "set": "s", "id": f"{seed}-{i}", "harmful": harmful(i),
            "category": "harmful" if harmful(i) else "plain",
            "reward": value, "cost": -value, "safe": value > 0, "joint": value > 0, "refused": False, "malformed": False,
            "truncated": False, "tokens": 3, "gate_safety": None, "gate_helpfulness": None, "log_ratio": 0.0,
        }  # fmt: skip
        rows.append({**row, **{k: v[i] if isinstance(v, list) else v for k, v in columns.items()}})
    return pd.DataFrame(rows)


def test_differences_are_paired_by_seed():
    a, b = pd.Series({0: 1.0, 1: 2.0, 2: 3.5, 7: 9.0}), pd.Series({0: 0.5, 1: 1.6, 2: 2.9})
    half = 4.302652730 * statistics.stdev([0.5, 0.4, 0.6]) / math.sqrt(3)
    got = minus(a, b)
    assert got.n == 3
    assert (got.value, got.high) == (pytest.approx(0.5), pytest.approx(0.5 + half))


def test_equal_kl_is_read_between_the_strengths():
    tables = {
        "a": answers([1.0, 1.0], log_ratio=3.0),
        "weak": answers([0.0, 0.0], log_ratio=2.0),  # a wins all
        "strong": answers([2.0, 2.0], log_ratio=6.0),  # a wins none
    }
    comparison = Comparison(of="a", against="weak", by="reward", grid=("strong",))
    one = compare(comparison, tables)
    assert one["equal_steps"].value == 1.0
    assert one["equal_kl"].value == pytest.approx(0.75)  # a quarter of the way from 2 to 6
    assert one["clamped"] == 0
    assert compare(Comparison(of="a", against="weak", by="cost"), tables)["equal_kl"] is None
    beyond = compare(comparison, {**tables, "a": answers([1.0, 1.0], log_ratio=8.0)})
    assert (beyond["equal_kl"].value, beyond["clamped"]) == (0.0, 1)


def test_gates_separate():
    gates = {"gate_safety": [0.9, 0.2, 0.6, 0.7], "gate_helpfulness": [0.1, 0.9, 0.5, 0.4]}
    rows = answers([1.0] * 4, **gates)
    assert by_seed(rows, "auroc").to_dict() == {0: 0.75}  # harmful .8 and .1, benign -.7 and .3
    assert math.isnan(by_seed(rows, "auroc_lookalike")[0])
    assert math.isnan(by_seed(answers([1.0] * 4), "auroc")[0])


def lead(value, high, n=5):
    return Estimate(value, math.nan, high, n)


@pytest.mark.parametrize(
    ("helpfulness", "safe_rate", "expected"),
    [
        (lead(-0.1, 0.1), lead(-0.2, -0.1), True),
        (lead(-0.1, 0.1), lead(-0.2, 0.1), False),  # within its interval
        (lead(0.1, 0.2), lead(-0.2, -0.1), False),  # worse on one axis
        (lead(math.nan, math.nan, 0), lead(-0.2, -0.1), False),
        (lead(-0.1, math.nan, 1), lead(-0.1, math.nan, 1), True),  # one seed has no interval
    ],
)
def test_what_dominates(helpfulness, safe_rate, expected):
    assert dominates({"helpfulness": helpfulness, "safe_rate": safe_rate}) == expected


def test_a_front_is_read_at_equal_helpfulness():
    def system(helpfulness, safe_rate):
        return {"helpfulness": pd.Series(helpfulness), "safe_rate": pd.Series(safe_rate)}

    front = [system([0.0, 0.0], [1.0, 1.0]), system([2.0, 2.0], [0.2, 0.2])]
    found, clamped = above_front(system([0.5, 3.0], [0.9, 0.7]), front)
    assert found.value == pytest.approx((0.9 - 0.8 + 0.7 - 0.2) / 2)
    assert clamped == 1


def test_the_best_rival_is_that_of_the_highest_joint_rate(tmp_path):
    study, _ = load_study(write(tmp_path, content()))
    values = {
        "base": [-1.0, -1.0],
        "safety": [1.0, -1.0],
        "routed": [1.0, 1.0],
        "routed, token": [1.0, 1.0],
    }
    tables = {n: pd.concat([answers(v, seed=s) for s in (0, 1)]) for n, v in values.items()}
    result = study_numbers(study, tables)
    assert [c["name"] for c in result["contenders"]] == [*values]
    expected = {"above": [], "best_rival": "safety", "joint_lead": t_interval([0.5, 0.5])}
    assert result["front"] == expected
    assert [d["against"] for d in result["differences"]] == ["base", "safety", "routed, token"]
    assert [c["joint"].value for c in result["contenders"]] == [0.0, 0.5, 1.0, 1.0]


# --- on a cluster ---------------------------------------------------------------------------------


def unit(name, *needs, cpus=1.0):
    scores = load_config("miniature").scores.model_copy(
        update={"cpus_per_worker": cpus, "workers": 1}
    )
    config = load_config("miniature").model_copy(update={"scores": scores})
    return StudyUnit("answers", name, name, 0, config, needs)


@pytest.fixture(scope="module")
def small_cluster():
    """A cluster of one node with one CPU; more can be added."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def recorder(folder: Path):
    """A unit's work, for Ray to pickle by value: it notes its name, and its needs' results."""

    def run(unit, study, uri, *needed):
        with (folder / "order").open("a") as file:
            file.write(f"{unit.id} after {'+'.join(needed)}\n")
        if unit.id == "broken":
            raise UserError("a wrong judge")
        return unit.id

    return run


@pytest.mark.slow
def test_a_unit_waits_for_a_node_that_returns(tmp_path, small_cluster):
    """A 2-CPU unit on a cluster that has one CPU for a moment is queued, and runs when a node joins."""
    units = [unit("large", cpus=2), unit("small"), unit("last", "small", "large")]
    arguments = (units, None, Storage(tmp_path), 60.0, recorder(tmp_path))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run_units, *arguments)
        time.sleep(4)
        assert not running.done()
        small_cluster.add_node(num_cpus=2)
        assert running.result(timeout=60) == {}
    order = (tmp_path / "order").read_text().splitlines()
    assert order == ["small after ", "large after ", "last after small+large"]


@pytest.mark.slow
def test_a_failure_ends_what_depends_on_it_and_a_shortage_ends_in_time(
    tmp_path, small_cluster, monkeypatch
):
    monkeypatch.setattr(cluster, "RETURN", 0.0)
    units = [unit("broken"), unit("after", "broken"), unit("huge", cpus=99), unit("well")]
    started = time.monotonic()
    failed = run_units(units, None, Storage(tmp_path), 1.0, recorder(tmp_path))
    assert time.monotonic() - started < 60
    assert set(failed) == {"broken, seed 0", "after, seed 0", "huge, seed 0"}
    assert str(failed["broken, seed 0"]) == "a wrong judge"
    assert "99 CPU" in str(failed["huge, seed 0"])
    assert sorted((tmp_path / "order").read_text().splitlines()) == ["broken after ", "well after "]


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (Outcome.FINISHED, None),
        (Outcome.STOPPED, UserError),  # a notice to the study
        (Outcome.PREEMPTED, work.Preempted),  # a notice to the node: Ray runs the task again
    ],
)
def test_a_training_is_a_stage_that_listens_to_the_study(tmp_path, monkeypatch, outcome, error):
    """The stage runner, with its watchdog, runs it; ``logs/stop`` in the study's folder stops it."""
    plan = plan_study(*load_study(write(tmp_path, content(seeds=[0]))), "test")
    training = next(u for u in plan.units.values() if u.stage == "safety")
    specs = []
    monkeypatch.setattr(work, "_scored", lambda run: run)
    monkeypatch.setattr(work, "_resolved", lambda config, study: config)
    monkeypatch.setattr(work, "stage_table", lambda *_: (pa.table({"x": [1]}), {"pairs": 1}))
    monkeypatch.setattr(work, "run_alone", lambda s: specs.append(s) or StageResult(outcome, 3))
    folder = Storage(tmp_path / "run")
    if error is None:
        work.run_unit(training, None, folder.uri)
    else:
        with pytest.raises(error):
            work.run_unit(training, None, folder.uri)
    (spec,) = specs
    assert (spec.stage, spec.digest, spec.notice) == ("safety", training.id, folder.uri)
    assert spec.run == (folder / training.folder).uri
    is_finished = outcome is Outcome.FINISHED
    assert folder.exists(f"{training.folder}/record.json") == is_finished
    assert spec.work.exists("pairs.parquet") != is_finished
    assert (plan.finished(folder) == {training.id}) == is_finished


def test_a_data_file_is_hashed_once(tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "p", "chosen": "x" * (1 << 20), "rejected": "y"}) + "\n")
    opened = []
    digest_of = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda *args: opened.append(args) or digest_of(*args)
    )
    changes = {"data.sets": [{"path": str(data)}]}
    plan_study(*load_study(write(tmp_path, content(set=changes))), "test")
    assert len(opened) == 1


# --- killed, and run again --------------------------------------------------------------------------------------------------


def records(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob("*/*/record.json")
    }


@pytest.mark.slow
def test_a_killed_study_is_resumed(tmp_path):
    made = miniature.build_files(tmp_path / "made", seed=0, rows=200, steps=2)
    expected = f"miniature-{digest('miniature', miniature.VERSION, 0, 200, miniature.STEPS)}"
    cache = tmp_path / "cache/miniature"
    cache.mkdir(parents=True)
    made.base.parent.rename(cache / expected)  # a base of two steps is enough here
    optim = {"lr": 1e-3, "steps": 4, "batch_size": 8}
    changes = {"data.sets": [{"path": "builtin:miniature", "rows": 200}], "router.optim": optim}
    changes |= {f"experts.{e}.optim": optim for e in ("safety", "helpfulness")}
    path = write(tmp_path, content(seeds=[0], set=changes, answers={"prompts": 12}))
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "midpo_ray.cli",
        "study",
        path,
        "--run-dir",
        str(run),
        f"cache={tmp_path / 'cache'}",
    ]
    begun = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while len(records(run)) < 3 and time.monotonic() < deadline:
        assert begun.poll() is None, begun.communicate()[0]
        time.sleep(0.1)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.communicate()
    before = records(run)
    assert 3 <= len(before) < 12

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    after = records(run)
    assert len(after) == 12  # a world, five trainings, six answers
    assert all(after[name] == when for name, when in before.items())
    result = json.loads((run / "study.json").read_text())
    assert [c["name"] for c in result["contenders"]] == [c["name"] for c in content()["contenders"]]
    kl = {c["name"]: c["kl"]["value"] for c in result["contenders"]}
    assert kl["base"] == 0.0
    assert all(abs(value) > 1e-6 for name, value in kl.items() if name != "base")
    assert (run / "answers.csv").read_text().count("\n") == 6 * 12 + 1
    report = json.loads((run / "report.json").read_text())  # of one seed: intervals over prompts
    assert "over prompts" in report["about"]["intervals"]
    joint = {
        r["model"]: r for r in report["summary"] if r["metric"] == "joint" and not r["category"]
    }
    assert len(joint) == 6
    assert all(r["low"] <= r["value"] <= r["high"] and r["prompts"] == 12 for r in joint.values())
    assert any(
        c["over"] == "prompts of miniature" and c["low"] <= c["value"] <= c["high"]
        for c in report["comparisons"]
    )

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert records(run) == after
