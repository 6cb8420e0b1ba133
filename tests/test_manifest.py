"""What is done and what must run again, and why."""

import json
from pathlib import Path

import pytest

from midpo_ray import UserError, load_config
from midpo_ray.pipeline import plan as plan_module
from midpo_ray.pipeline.manifest import Manifest
from midpo_ray.pipeline.plan import content_id, fingerprints, plan
from midpo_ray.storage import Storage

RECIPE = """
name: mine
model: {path: some/model}
data: {sets: [{path: a.jsonl}]}
scores: {reward: {column: "r_{i}"}, cost: {column: "c_{i}"}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def finish(manifest: Manifest, run: Storage, steps: list) -> None:
    from midpo_ray.pipeline.plan import FOLDERS

    for step in steps:
        run.write(f"{FOLDERS[step.stage]}/file", step.stage.encode())
        manifest.commit(step.stage, step.parts, FOLDERS[step.stage], 1.0)


def reasons(recipe: Path, run: Storage, *overrides: str) -> dict[str, str | None]:
    return {s.stage: s.reason for s in plan(load_config(recipe, overrides), Manifest(run))}


def test_nothing_to_do_after_all_is_done(recipe: Path, tmp_path: Path) -> None:
    run = Storage(tmp_path / "run")
    config = load_config(recipe)
    manifest = Manifest(run)
    manifest.claim(config)
    steps = plan(config, manifest)
    assert [s.stage for s in steps] == ["score", "safety", "helpfulness", "dual", "router"]
    assert {s.reason for s in steps} == {"not done yet"}
    finish(manifest, run, steps)
    assert set(reasons(recipe, run).values()) == {None}
    # placement, logging and checkpoints change no result
    assert set(
        reasons(
            recipe, run, "router.group.workers=2", "logging.every=1", "checkpoint.keep=5"
        ).values()
    ) == {None}


def test_an_expert_made_again_takes_its_router_along(recipe: Path, tmp_path: Path) -> None:
    """Its bits may differ, and a router is of the very adapters that it was trained on."""
    run = Storage(tmp_path / "run")
    config = load_config(recipe)
    finish(Manifest(run), run, plan(config, Manifest(run)))
    run.write("experts/safety/file", b"something else")
    again = reasons(recipe, run)
    assert again["safety"] is not None
    assert again["router"] == "safety runs again"
    assert again["score"] is again["helpfulness"] is again["dual"] is None


def test_a_data_folder_is_its_files_at_any_depth(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "set/train").mkdir(parents=True)
    file = tmp_path / "set/train/rows.jsonl"
    file.write_text("{}")
    before = content_id(str(tmp_path / "set"))
    file.write_text("{ }")
    assert content_id(str(tmp_path / "set")) != before


def test_only_what_depends_on_a_change_runs_again(recipe: Path, tmp_path: Path) -> None:
    run = Storage(tmp_path / "run")
    config = load_config(recipe)
    manifest = Manifest(run)
    finish(manifest, run, plan(config, manifest))
    changed = reasons(recipe, run, "experts.safety.objective.margin_scale=0.5")
    assert changed == {
        "score": None,
        "safety": "changed: objective",
        "helpfulness": None,
        "dual": None,
        "router": "changed: safety",
    }
    changed = reasons(recipe, run, "router.prior=1")
    assert [s for s, why in changed.items() if why] == ["router"]
    changed = reasons(recipe, run, "router.rule=labels")
    assert [s for s, why in changed.items() if why] == ["dual", "router"]
    changed = reasons(recipe, run, "scores.cost={column: other}")
    assert [s for s, why in changed.items() if why] == ["score", "safety", "dual", "router"]
    assert all(reasons(recipe, run, "seed=1").values())


def test_a_deleted_or_altered_file_is_named(recipe: Path, tmp_path: Path) -> None:
    run = Storage(tmp_path / "run")
    manifest = Manifest(run)
    finish(manifest, run, plan(load_config(recipe), manifest))
    run.delete("router")
    assert reasons(recipe, run)["router"] == "router/file is missing"
    run.write("experts/safety/file", b"torn")
    assert (
        reasons(recipe, run)["safety"] == "experts/safety/file is not the file that the stage wrote"
    )


def test_data_is_known_by_content(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("one")
    first = fingerprints(load_config(recipe))["score"]["data"]
    (tmp_path / "a.jsonl").write_text("two")
    assert fingerprints(load_config(recipe))["score"]["data"] != first


def test_another_recipes_directory_is_refused(recipe: Path, tmp_path: Path) -> None:
    run = Storage(tmp_path / "run")
    Manifest(run).claim(load_config(recipe))
    with pytest.raises(UserError, match="holds a run of recipe 'mine', not 'other'"):
        Manifest(run).refuse_other(load_config(recipe, ["name=other"]))
    assert json.loads(run.read("manifest.json"))["recipe"] == "mine"
    run.write("manifest.json", b"{")
    with pytest.raises(UserError, match="not a run's manifest"):
        Manifest(run)


def test_until_names_the_stages(recipe: Path, tmp_path: Path) -> None:
    manifest = Manifest(Storage(tmp_path))
    assert [s.stage for s in plan(load_config(recipe), manifest, "score")] == ["score"]
    with pytest.raises(UserError, match="score, safety, helpfulness, dual, router"):
        plan(load_config(recipe), manifest, "rooter")


def test_the_packages_version_repeats_nothing_and_a_stages_own_version_does(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Storage(tmp_path / "run")
    manifest = Manifest(run)
    finish(manifest, run, plan(load_config(recipe), manifest))
    monkeypatch.setattr("midpo_ray.__version__", "9.9.9")
    monkeypatch.setattr("midpo_ray.pipeline.manifest.__version__", "9.9.9")
    assert set(reasons(recipe, run).values()) == {None}
    for version, repeated in {
        "router": {"router"},
        "dual": {"dual", "router"},
        "expert": {"safety", "helpfulness", "router"},
        "score": {"score", "safety", "helpfulness", "dual", "router"},
        "data": {"score", "safety", "helpfulness", "dual", "router"},
    }.items():
        with monkeypatch.context() as patch:
            patch.setitem(plan_module.VERSIONS, version, 99)
            assert {s for s, reason in reasons(recipe, run).items() if reason} == repeated


def test_a_hub_name_is_identified_by_its_commit(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def identify(*arguments: str | None) -> str:
        plan_module._hub_commit.cache_clear()
        return content_id(*arguments)

    commits = ["a" * 40, "b" * 40]
    refs = tmp_path / "datasets--some--pairs/refs"
    assert identify("some/pairs", None, "dataset") == "some/pairs@main"
    refs.mkdir(parents=True)
    for commit in commits:
        (refs / "main").write_text(commit)
        assert identify("some/pairs", None, "dataset") == f"some/pairs@{commit}"
    assert identify("some/pairs", "v1", "dataset") == "some/pairs@v1"
    (refs / "v1").write_text(commits[0])
    assert identify("some/pairs", "v1", "dataset") == f"some/pairs@{commits[0]}"
    assert identify("some/pairs", "c" * 40, "dataset") == f"some/pairs@{'c' * 40}"
    assert identify("some/pairs") == "some/pairs@main"  # a model of that name
    assert identify("runs/x/reward/cost") == "runs/x/reward/cost@main"
    changed = []
    for revision in ("v1", "v2"):
        config = load_config(recipe, [f"scores.cost={{model: some/scorer, revision: {revision}}}"])
        changed.append(fingerprints(config)["score"]["cost"])
    assert changed[0] != changed[1]
