"""The configuration: shipped recipes, overrides, errors that name the key and the nearest one."""

from pathlib import Path
from typing import ClassVar

import pytest

from midpo_ray import UserError, load_config
from midpo_ray.config import Config, Section, dump, shipped_recipes, validated, with_overrides

MINIMAL = """
model: {path: x}
data: {sets: [{path: a.jsonl}]}
router: {rule: labels}
experts:
  safety: {objective: {name: b_dpo, temperature: .inf}}
  helpfulness: {objective: {name: dpo}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def test_shipped_recipes_are_valid() -> None:
    names = shipped_recipes()
    assert {"miniature", "smollm2-135m", "alpaca-7b-paper", "alpaca-7b", "qwen2-7b-bdpo"} <= set(
        names
    )
    for name in names:
        assert load_config(name).name == name


def test_paper_recipe_has_the_papers_values() -> None:
    config = load_config("alpaca-7b-paper")
    assert (config.lora.r, config.lora.alpha, config.lora.dropout, config.lora.target_modules) == (
        16,
        32,
        0,
        ("down_proj",),
    )
    optim = config.experts.safety.optim
    assert (optim.lr, optim.schedule, optim.warmup, optim.epochs) == (1e-5, "cosine", 0.03, 3)
    assert (
        config.router.gate,
        config.router.scope,
        config.router.prior.weight,
        config.router.rule,
    ) == (
        "bottleneck",
        "token",
        1,
        "labels",
    )
    assert config.data.max_length == 512
    assert config.data.template == "paper"


def test_resolved_configuration_reproduces_itself(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["experts.safety.optim.lr=1e-4", "data.sets.0.rows=5"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load_config(again) == config
    assert config.name == "mine"
    assert config.experts.safety.optim.lr == 1e-4
    assert config.data.sets[0].rows == 5
    assert config.experts.safety.objective.temperature == float("inf")


def test_an_override_of_one_expert_leaves_the_other() -> None:
    """The shipped recipes share sections by YAML's aliases, which are one object."""
    for recipe in shipped_recipes():
        before = load_config(recipe)
        after = load_config(
            recipe,
            [
                "experts.safety.objective.beta=0.77",
                "experts.safety.optim.lr=0.5",
                "router.optim.eps=0.3",
            ],
        )
        assert after.experts.safety.objective.beta == 0.77
        assert after.experts.helpfulness == before.experts.helpfulness
        assert after.experts.safety.optim == before.experts.safety.optim.model_copy(
            update={"lr": 0.5}
        )


def test_a_key_that_is_switched_off_stays_off(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["router.optim.clip=null", "checkpoint.every_steps=null"])
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config.router.optim.clip is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.path=1", ["modle", "did you mean model?"]),
        ("experts.safety.optim.learning_rate=1", ["experts.safety.optim.learning_rate", "lr"]),
        ("experts.safety.objective.bta=1", ["experts.safety.objective.bta", "did you mean beta?"]),
        ("experts.safety.optim.lr=abc", ["experts.safety.optim.lr", "valid number", "'abc'"]),
        ("experts.safety.optim.lr=-1", ["experts.safety.optim.lr", "greater than 0", "-1"]),
        ("model=3", ["key model"]),
        ("data.sets=[]", ["data.sets", "at least 1"]),
        ("deepspeed.stage=4", ["deepspeed.stage", "0, 1, 2 or 3"]),
        ("router.group.workers=0", ["router.group", "workers is 0, at least 1"]),
        ("router.optim.betas=[2, 3]", ["router.optim.betas", "less than 1"]),
        (
            "experts.safety.group.workers={min: 3, max: 1}",
            ["key experts.safety.group.workers:", "min is 3", "1"],
        ),
        ("router.group.workers={min: 3}", ["key router.group.workers.max is missing"]),
        ("router.group.workers=many", ["key router.group.workers:", "integer", "'many'"]),
        ("scores.workers=-3", ["key scores.workers:", "greater than or equal to 0", "-3"]),
        ("scores.workers=all", ["key scores.workers:", "integer", " or ", "'auto'"]),
        ("experts.*.optim.lr=no", ["experts.safety.optim.lr", "experts.helpfulness.optim.lr"]),
        ("experts.safety.objective.name=dpoo", ["'dpo'", "'dpoo'"]),
        (
            "scores.reward={model: a, column: b}",
            ["scores.reward", "exactly one of model, column, function"],
        ),
        ("router.rule=pareto", ["router.rule is pareto", "scores.reward and scores.cost"]),
        (
            "experts.helpfulness.objective.name=spe_dpo",
            ["experts.helpfulness", "scores.reward", "b_dpo"],
        ),
        ("experts.safety.objective.name=modpo", ["experts.safety", "scores.reward"]),
        ("a.b", ["key.sub=value is expected"]),
        ("data.sets.3.rows=2", ["'3' is not a key there"]),
        ("seed=[", ["not YAML"]),
    ],
)
def test_bad_keys_and_values_in_one_line(recipe: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(recipe, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_every_wrong_key_is_named_at_once(recipe: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(recipe, ["seed=-1", "router.betta=1", "model.path=null"])
    message = str(caught.value)
    assert "\n" not in message
    assert "key seed:" in message
    assert "unknown key router.betta, did you mean beta?" in message
    assert "key model.path:" in message


def test_overrides_leave_their_source_alone() -> None:
    shared = {"lr": 1.0}
    raw = {
        "name": "x",
        "model": {"path": "x"},
        "data": {"sets": [{"path": "a"}]},
        "router": {"rule": "labels"},
        "experts": {
            "safety": {"objective": {"name": "dpo"}, "optim": shared},
            "helpfulness": {"objective": {"name": "dpo"}, "optim": shared},
        },
    }
    changed = with_overrides(raw, {"experts.safety.optim.lr": 2.0, "data.sets.0.rows": 3}, "x")
    assert changed.experts.safety.optim.lr == 2.0
    assert changed.experts.helpfulness.optim.lr == 1.0
    assert shared == {"lr": 1.0}
    assert raw["data"] == {"sets": [{"path": "a"}]}
    again = with_overrides(
        changed, {"experts.*.objective.beta": 0.5, "scores.cost.column": "c"}, "x"
    )
    assert {e.objective.beta for e in (again.experts.safety, again.experts.helpfulness)} == {0.5}
    assert again.scores.cost is not None
    assert again.scores.cost.column == "c"
    assert changed.scores.cost is None
    assert with_overrides(changed, {}, "x") == changed
    with pytest.raises(UserError, match=r"study s: name\.first: 'first'"):
        with_overrides(changed, {"name.first": 1}, "study s")


def test_a_key_that_was_replaced_names_its_successor() -> None:
    class Renamed(Section):
        renamed: ClassVar[dict[str, str]] = {"margin": "margin_scale"}
        margin_scale: float = 1.0

    with pytest.raises(UserError, match=r"unknown key margin, .*margin_scale"):
        validated(Renamed, {"margin": 2}, "x")


def test_every_key_has_a_meaning() -> None:
    def check(section: type[Section], path: str) -> None:
        for name, field in section.model_fields.items():
            assert field.description, f"{path}{name}"
            assert field.description.endswith("."), f"{path}{name}"
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, Section):
                check(annotation, f"{path}{name}.")

    check(Config, "")


def test_margin_scale_zero_needs_no_scorer(recipe: Path) -> None:
    load_config(
        recipe, ["experts.safety.objective.name=spe_dpo", "experts.safety.objective.margin_scale=0"]
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("- a", "list"),
        ("a: [", "not YAML"),
        ("data: {sets: [{path: a}]}", "key model is missing"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        load_config(path)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean miniature"):
        load_config("miniatur")
    with pytest.raises(UserError, match="cannot be read"):
        load_config("no/such/file.yaml")
