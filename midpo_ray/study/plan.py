"""What a study has to do, as a graph of content-addressed units. No Ray, model or data is loaded.

    <study>/scores/<id>/       a run directory with the table of frozen signals
    <study>/trainings/<id>/    a run directory with an expert, or with both experts and their router
    <study>/answers/<id>/      answers.parquet: the judged answers of one system to every prompt
    each with record.json, which is written last: its unit is finished
    <study>/generations/<id>.json    the answers before they are judged, for other judges

An id is a digest of all that the result depends on. So systems share trainings, and an edited study
keeps what it still needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import Config, Group, digest
from ..errors import UserError
from ..evaluation.judges import load_judge
from ..evaluation.prompts import split_name
from ..pipeline.plan import content_id, fingerprints, inputs
from ..storage import Storage
from .spec import Contender, Study

KINDS = ("scores", "trainings", "answers")
RECORD = "record.json"
_VERSION = 2  # of the answers' columns: increased when they change


@dataclass(frozen=True)
class StudyUnit:
    """One task of a study.

    Args:
        about: for people.
        config: one whose results these are; other systems' may differ in what does not matter here.
        needs: ids of units; the scores come first, then trainings in their order.
        stage: of a training.
        contender: of answers.
        generation: of answers; where they are stored before they are judged.
    """

    kind: Literal["scores", "trainings", "answers"]
    id: str
    about: str
    seed: int
    config: Config
    needs: tuple[str, ...] = ()
    stage: str = ""
    contender: Contender | None = None
    generation: str = ""

    @property
    def folder(self) -> str:
        return f"{self.kind}/{self.id}"

    @property
    def group(self) -> Group:
        return self.config.group(self.stage) if self.stage else self.config.scores.group


@dataclass(frozen=True)
class StudyPlan:
    """Units by id, each after those that it needs; (system, seed) -> the unit of its answers."""

    units: dict[str, StudyUnit]
    answers: dict[tuple[str, int], str]

    def missing(self, finished: set[str]) -> list[StudyUnit]:
        """In order: the answers that are not finished, and what they need that is not finished."""
        wanted: set[str] = set()
        open_units = [unit for unit in self.answers.values() if unit not in finished]
        while open_units:
            unit = open_units.pop()
            if unit not in wanted:
                wanted.add(unit)
                open_units += [n for n in self.units[unit].needs if n not in finished]
        return [unit for name, unit in self.units.items() if name in wanted]

    def finished(self, folder: Storage) -> set[str]:
        """Units that have a record."""
        existing = {kind: set(folder.names(kind)) for kind in KINDS}
        return {
            unit.id
            for unit in self.units.values()
            if unit.id in existing[unit.kind] and folder.exists(f"{unit.folder}/{RECORD}")
        }

    def describe(self, finished: set[str]) -> str:
        counts = []
        for kind in KINDS:
            ids = {unit.id for unit in self.units.values() if unit.kind == kind}
            counts.append(f"{kind}: {len(ids)}, {len(finished & ids)} finished")
        return "; ".join(counts)


def plan_study(study: Study, config: Config, where: str) -> StudyPlan:
    """The study's units, seed by seed.

    Raises:
        UserError: overrides do not fit the recipe, two systems are the same, or a judge is wrong.
    """
    units: dict[str, StudyUnit] = {}
    answers: dict[tuple[str, int], str] = {}
    sets = [(Path(s).name, content_id(split_name(s)[0])) for s in study.sets]
    asked = digest(study.answers, sets, study.split)
    judges = [load_judge(judge).fingerprint for judge in study.judges]
    for seed in study.seeds:
        seeded = config.model_copy(update={study.vary: seed})
        if study.vary == "seed" and len(study.seeds) > 1:  # all seeds are scored side by side
            scores = seeded.scores.model_copy(update={"workers": 1})
            seeded = seeded.model_copy(update={"scores": scores})
        scored = digest("scores", fingerprints(seeded)["score"])
        units.setdefault(scored, StudyUnit("scores", scored, "scores", seed, seeded))
        for contender in study.contenders:
            recipe = contender.at(seeded, where)
            trained = _trainings(units, contender, recipe, scored, seed)
            generation = digest(
                "generation", _VERSION, inputs(recipe), contender.serve, contender.gates, trained,
                asked, recipe.seed_of_training,
            )  # fmt: skip
            unit = StudyUnit(
                "answers", digest("answers", generation, judges), f"answers of {contender.name}",
                seed, recipe, (scored, *trained), contender=contender,
                generation=f"generations/{generation}.json",
            )  # fmt: skip
            if unit.id in units:
                other = units[unit.id].contender
                names = f"{other.name if other else ''!r} and {contender.name!r}"
                raise UserError(f"{where}: contenders: {names} are the same")
            units[unit.id] = unit
            answers[contender.name, seed] = unit.id
    return StudyPlan(units, answers)


def _trainings(
    units: dict[str, StudyUnit], contender: Contender, recipe: Config, scored: str, seed: int
) -> list[str]:
    """Ids of the trainings of one system, in order; those that are new are put into ``units``."""
    parts = fingerprints(recipe)
    trained: list[str] = []
    for stage in contender.stages:
        name = digest(stage, parts[stage])
        needs = (scored, *trained) if stage == "router" else (scored,)
        about = f"{stage} of {contender.name}"
        units.setdefault(name, StudyUnit("trainings", name, about, seed, recipe, needs, stage))
        trained.append(name)
    return trained
