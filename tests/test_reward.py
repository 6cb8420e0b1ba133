"""`midpo reward` through Ray on a tiny model: both kinds, resumed and repeated; and every refusal in one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import smallworld
from test_run import midpo
from transformers import AutoModelForSequenceClassification

from midpo_ray import UserError, load_config
from midpo_ray.pipeline.reward import train_score_models


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llama, byte_tokenizer) -> Path:
    """A folder with model, data and recipe; the recipe's scorers are those that are to be trained."""
    folder = tmp_path_factory.mktemp("reward")
    tiny_llama().save_pretrained(folder / "model")
    byte_tokenizer.save_pretrained(folder / "model")
    data = smallworld.write(folder / "pairs.jsonl", smallworld.rows(80))
    optim = {"lr": 1e-2, "steps": 6, "batch_size": 8, "batch_tokens": 512}
    scores = {kind: {"model": str(folder / f"run/reward/{kind}")} for kind in ("reward", "cost")}
    smallworld.recipe(
        folder,
        folder / "model",
        data,
        scores={**scores, "workers": 1},
        reward_model={"optim": optim},
    )
    return folder


@pytest.mark.slow
def test_both_kinds_are_trained_and_measured(world: Path, caplog) -> None:
    command = ("reward", world / "small.yaml", "--run-dir", world / "run")
    only = midpo(*command, "--kind", "cost")
    assert only.returncode == 0, only.stderr
    both = midpo(*command)
    assert both.returncode == 0, both.stderr
    assert "cost: to run" not in both.stdout
    caplog.set_level(logging.INFO, "midpo_ray")
    report = train_score_models(load_config(world / "small.yaml"), run_dir=str(world / "run"))
    assert "nothing to do: reward, cost" in caplog.messages[0]
    assert report == json.loads((world / "run/reward/report.json").read_text())
    for kind in ("reward", "cost"):
        told, folder = report[kind], world / "run/reward" / kind
        assert f"scores.{kind}.model={folder}" in both.stdout
        assert told["pairs"] + told["training_pairs"] == 80
        assert 0 <= told["accuracy"][1] <= told["accuracy"][0] <= told["accuracy"][2] <= 1
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1
        steps = [
            json.loads(line)["step"]
            for line in (world / f"run/metrics/{kind}.jsonl").read_text().splitlines()
        ]
        assert steps == [2, 4, 6, 6]
        assert not (world / f"run/reward/{kind}.work").exists()
    assert report["cost"]["sign"]["responses"] == 2 * report["cost"]["pairs"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.validation=0",
            "no pair with better_response_id is held out to measure the model on; data.validation is 0",
        ),
        (
            "reward_model.lora.target_modules=[nothing]",
            "lora.target_modules: 'nothing' matches no Linear",
        ),
        ("reward_model.layers=0", "key reward_model.layers: input should be greater than 0"),
        ("reward_model.kind=x", "unknown key reward_model.kind"),
        ("reward_model.layers=9", "reward_model.layers is 9, .* has 2"),
        ("data.template=nothing", "a text that holds {prompt}"),
        ("model.path=nowhere", "model nowhere: "),
    ],
)
def test_bad_input_is_one_line_before_ray_starts(world: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train_score_models(
            load_config(world / "small.yaml", [override]), run_dir=str(world / "bad")
        )
    assert "\n" not in str(error.value)
