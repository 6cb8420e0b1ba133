"""What the configuration says about itself: a page that is current, and a schema for editors."""

import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import yaml

from midpo_ray.config import load_config, shipped_recipes
from midpo_ray.config.reference import describe_keys, json_schema, markdown

PAGE = Path(__file__).parent.parent / "docs/configuration.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == markdown(), "run `make docs`"


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_schema_takes_shipped_recipes(name: str) -> None:
    schema = json.loads(json_schema())
    recipe = yaml.safe_load((resources.files("midpo_ray.recipes") / f"{name}.yaml").read_text())
    jsonschema.validate(recipe, schema)
    for spoiled in ({**recipe, "modle": 1}, {**recipe, "seed": -1}, {**recipe, "router": {"a": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoiled, schema)


def test_a_key_with_its_value() -> None:
    config = load_config("miniature", ["experts.safety.group.workers={min: 1, max: 2}"])
    lines = describe_keys(config, "data.sets.0.rows").splitlines()
    assert lines[0].startswith("data.sets.N.rows = [2000]")
    assert "workers = {max: 2, min: 1}" in describe_keys(config, "experts.safety.group")
    assert len(describe_keys(None, "router").splitlines()) > 20
