"""What a study has to do, as a graph of content-addressed units. No Ray, no model, no data is loaded here.

    <study>/worlds/<id>/      scored: the table of frozen signals (and the run directory's manifest that vouches for it)
    <study>/trainings/<id>/   an expert's adapter, or both adapters and the router trained on them, as in a run directory
    <study>/answers/<id>/     answers.parquet: what one contender says to every prompt, judged
    each with record.json, written last: a unit is done where it stands
    <study>/said/<id>.json    what it says, before the judges: another judge generates nothing anew

An id is a digest of all that the result hangs on, so contenders share trainings, and an edited study keeps what it still needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import Config, Group, digest
from ..errors import UserError
from ..evaluation.judges import load_judge
from ..evaluation.prompts import split_name
from ..pipeline.plan import content_id, fingerprints, inputs
from .spec import Contender, Study

Kind = Literal["worlds", "trainings", "answers"]
VERSION = 2  # of the answers' columns: raise it when they change


@dataclass(frozen=True)
class Unit:
    kind: Kind
    id: str
    about: str  # for people
    seed: int
    config: Config  # one whose results these are; another contender's may differ in what does not matter here
    needs: tuple[
        str, ...
    ]  # units: an answer's trainings in their order, and the world of everything
    world: str
    stage: str = ""  # of a training
    contender: Contender | None = None  # of answers
    said: str = ""  # of answers: where what is said lies

    @property
    def folder(self) -> str:
        return f"{self.kind}/{self.id}"

    @property
    def group(self) -> Group:
        if self.kind == "trainings":
            return self.config.group(self.stage)
        return self.config.scores.group

    def spec(self, folder: str, study: Study) -> dict[str, Any]:
        """All that a worker needs, as plain values."""
        return {
            **{
                key: getattr(self, key)
                for key in ("kind", "id", "folder", "seed", "needs", "world", "stage", "said")
            },
            "config": self.config.model_dump(mode="json"),
            "contender": self.contender.model_dump() if self.contender else None,
            "study": folder,
            **study.model_dump(mode="json", include={"sets", "split", "judges", "answers"}),
        }


@dataclass(frozen=True)
class Plan:
    units: dict[str, Unit]  # by id, each behind those it needs
    answers: dict[tuple[str, int], str]  # (contender, seed) -> unit

    def missing(self, done: set[str]) -> list[Unit]:
        """What must run, in order: answers that are not done, and what they need and is not done."""
        wanted: set[str] = set()
        stack = [i for i in self.answers.values() if i not in done]
        while stack:
            if (unit := stack.pop()) not in wanted:
                wanted.add(unit)
                stack += [n for n in self.units[unit].needs if n not in done]
        return [u for i, u in self.units.items() if i in wanted]


def plan(study: Study, config: Config, where: str) -> Plan:
    """The study's units, seed by seed.

    Raises:
        UserError: a contender's overrides do not fit the recipe, two contenders are the same, or a judge is wrong.
    """
    units: dict[str, Unit] = {}
    answers: dict[tuple[str, int], str] = {}
    asked = digest(
        study.answers,
        [(Path(s).name, content_id(split_name(s)[0])) for s in study.sets],
        study.split,
    )
    judges = [load_judge(j).fingerprint for j in study.judges]
    for seed in study.seeds:
        seeded = config.model_copy(update={study.vary: seed})
        world = digest("world", fingerprints(seeded)["score"])
        several = (
            study.vary == "seed" and len(study.seeds) > 1
        )  # then each has one worker, and they run beside each other
        scores = seeded.scores.model_copy(update={"workers": 1}) if several else seeded.scores
        seeded = seeded.model_copy(update={"scores": scores})
        units.setdefault(
            world, Unit("worlds", world, f"world of seed {seed}", seed, seeded, (), world)
        )
        for contender in study.contenders:
            mine = contender.at(seeded, where)
            parts = fingerprints(mine)
            trained: list[str] = []
            for stage in contender.stages:
                needs = (world, *trained) if stage == "router" else (world,)
                unit = Unit(
                    "trainings",
                    digest(stage, parts[stage]),
                    f"{stage} of {contender.name}",
                    seed,
                    mine,
                    needs,
                    world,
                    stage,
                )
                units.setdefault(unit.id, unit)
                trained.append(unit.id)
            drawn = digest(asked, mine.seed_of_training)
            said = digest(
                "said", VERSION, inputs(mine), contender.serve, contender.gates, trained, drawn
            )
            told = digest("answers", said, judges)
            if told in units:
                other = units[told].contender
                raise UserError(
                    f"{where}: the contenders {other.name if other else ''!r} and {contender.name!r} are the same"
                )
            about = f"answers of {contender.name}"
            units[told] = Unit(
                "answers",
                told,
                about,
                seed,
                mine,
                (*trained, world),
                world,
                contender=contender,
                said=f"said/{said}.json",
            )
            answers[contender.name, seed] = told
    return Plan(units, answers)


def describe(plan: Plan, done: set[str]) -> str:
    """How much there is of each kind, and how much of it is done."""
    lines = []
    for kind in ("worlds", "trainings", "answers"):
        ids = [u.id for u in plan.units.values() if u.kind == kind]
        lines.append(f"{kind}: {len(ids)}, {len(done & set(ids))} done")
    return "; ".join(lines)
