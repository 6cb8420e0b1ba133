"""Commands on this machine: prepare, train, measure, use."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from .. import load_routed
from ..config import (
    SCORES,
    Config,
    Data,
    DataSet,
    Model,
    dump,
    load_config,
    reference,
    shipped_studies,
)
from ..errors import UserError
from .app import Address, DryRun, Number, Overrides, Recipe, RunDir, Text, Words, command, option

# Commands import what they run when they are called: no command's help waits for torch or Ray.


@command("Prepare", "inspect pairs.jsonl --model gpt2 --stage safety")
def inspect(
    data: Annotated[str, Argument(help="A file, a folder or a hub name.")],
    model: Annotated[Text, option(None, "Tokenise as this model does.", "no tokens")] = None,
    stage: Annotated[
        Literal["safety", "helpfulness", "router"] | None,
        option(None, "Select the pairs of a stage.", "all pairs"),
    ] = None,
    rule: Annotated[
        Literal["labels", "pareto_labels", "safe_first"],
        Option(help="Rule that selects the router's pairs."),
    ] = "pareto_labels",
    template: Annotated[str, Option(help="Prompt format, as data.template.")] = "auto",
    max_length: Annotated[int, option("N", "Longest prompt and response, in tokens.")] = 512,
    show: Annotated[int, option("N", "Pairs that are printed token by token.")] = 2,
) -> None:
    """Print what a preference set holds, before training."""
    from ..data.inspect import describe_pairs
    from ..data.read import read_pairs
    from ..data.tokens import Tokenization
    from ..models.base import load_tokenizer

    if max_length < 2:
        raise UserError(f"--max-length {max_length}: at least 2 is expected")
    sets = (DataSet(path=data),)
    settings = Data(sets=sets, template=template, max_length=max_length, long_prompts="drop")
    pairs, report = read_pairs(sets, seed=0)
    tokenization = Tokenization(load_tokenizer(Model(path=model)), settings) if model else None
    rows = rule if stage == "router" else stage
    print(describe_pairs(pairs, report, stage=rows, tokenization=tokenization, show=show))


@command("Prepare", "doctor --address auto")
def doctor(address: Address = None) -> None:
    """Print what is installed, what the cluster has, and what would fail."""
    from ..doctor import examine

    print(examine(address))


@command("Prepare", "config miniature experts.safety.objective")
def config(
    recipe: Annotated[
        Text, Argument(help="Print this recipe's values too.", show_default="none")
    ] = None,
    key: Annotated[
        Text, Argument(help="Print this key and those below it.", show_default="all keys")
    ] = None,
    schema: Annotated[bool, Option("--schema", help="Print a JSON schema for editors.")] = False,
    markdown: Annotated[bool, Option("--markdown", help="Print docs/configuration.md.")] = False,
) -> None:
    """Print the keys of a recipe: type, default and meaning."""
    if recipe and key is None and recipe.partition(".")[0] in Config.model_fields:
        recipe, key = None, recipe  # `midpo config KEY`
    if schema:
        print(reference.json_schema())
    elif markdown:
        print(reference.markdown(), end="")
    else:
        print(reference.describe_keys(load_config(recipe) if recipe else None, key))


@command("Train", "run miniature router.prior=0.1 --run-dir runs/demo")
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    address: Address = None,
    run_dir: RunDir = None,
    until: Annotated[Text, option("STAGE", "The last stage to run.", "all stages")] = None,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe, or what is missing of it: scores, experts, router."""
    from ..pipeline import run as pipeline

    settings = load_config(recipe, overrides or [])
    if dry_run:
        _print_plan(settings, run_dir, until)
        return
    result = pipeline.run(settings, address, run_dir=run_dir, until=until)
    if result.table is not None:
        from ..evaluation.miniature import render_miniature

        print(render_miniature(result.table))
    print(f"result: {result.run_dir}")
    if not until:
        print(f'try it: midpo generate {result.run_dir} --prompt "..."')


def _print_plan(settings: Config, run_dir: str | None, until: str | None) -> None:
    from ..pipeline.manifest import Manifest
    from ..pipeline.plan import describe_plan, plan
    from ..pipeline.run import run_directory

    storage = run_directory(settings, run_dir)
    manifest = Manifest(storage)
    manifest.refuse_other(settings)
    print(dump(settings), end="")
    print(f"\n# run directory {storage.uri}")
    for stage in ("safety", "helpfulness", "router"):
        print(f"# group of {stage}: {settings.group(stage).model_dump(mode='json')}")
    print(describe_plan(plan(settings, manifest, until)))


@command("Train", "tune tune_spaces/joint.yaml --recipe miniature --samples 6")
def tune(
    space: Annotated[str, Argument(help="A YAML file, as in tune_spaces/.")],
    recipe: Annotated[str, Option(help="The recipe that is varied: a YAML file or a name.")],
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[Text, option("DIR", "As for run.", "runs/RECIPE-tune-SPACE")] = None,
    samples: Annotated[Number, option("N", "Number of points.", "the space's")] = None,
    add_samples: Annotated[int, option("N", "Points to add to a finished sweep.")] = 0,
    seeds: Annotated[Number, option("N", "Trainings of every point.", "the space's")] = None,
    select: Annotated[
        Text, option("RULE", "knee, METRIC, or 'METRIC>=X then METRIC'.", "the space's")
    ] = None,
) -> None:
    """Sweep over a space of objectives, on one table of scores."""
    from ..tuning import sweep

    settings = load_config(recipe, overrides or [])
    options: Any = {"address": address, "run_dir": run_dir, "samples": samples}
    options |= {"add_samples": add_samples, "seeds": seeds, "select": select}
    sweep.tune(space, settings, " ".join([recipe, *(overrides or [])]), **options)


@command("Train", "reward smollm2-135m-scores --kind cost")
def reward(
    recipe: Recipe,
    overrides: Overrides = None,
    kind: Annotated[
        Literal["reward", "cost"] | None, option(None, "Train only this one.", "both")
    ] = None,
    address: Address = None,
    run_dir: RunDir = None,
) -> None:
    """Train the reward and the cost model of a recipe, and measure them."""
    from ..pipeline.reward import train_score_models

    kinds = [kind] if kind else list(SCORES)
    settings = load_config(recipe, overrides or [])
    report = train_score_models(settings, address, run_dir=run_dir, kinds=kinds)
    for name in kinds:
        print(f"scores.{name}.model={report[name]['model']}")


_what = "Run directories, their parts (RUN:safety, RUN:helpfulness, RUN:base), adapters, models."
_judges = "reward=MODEL, cost=MODEL, module:function, FILE.yaml of an endpoint; phrases always."
_tasks = "Tasks of lm-evaluation-harness: names, YAML files, folders of them."


@command("Measure", "evaluate runs/mine --sets xstest harmful.jsonl --against base")
def evaluate(
    what: Annotated[list[str], Argument(help=_what)],
    sets: Annotated[
        list[str],
        option(
            "SET...",
            "xstest, harmbench, ..., or files of prompts; FILE:column=NAME names the column.",
        ),
    ],
    against: Annotated[
        Text, option("WHAT", "Win rates against this model, or base.", "none")
    ] = None,
    judges: Annotated[Words, option("JUDGE...", _judges, "phrases")] = None,
    out: Annotated[Text, option("DIR", "Folder of the report.", "reports/WHAT-SETS")] = None,
    cache: Annotated[str, option("DIR", "Answers and verdicts, where every node reaches them.")] = (
        "runs/cache"
    ),
    address: Address = None,
    workers: Annotated[Number, option("N", "Processes; 0: no Ray.", "all GPUs or 8 CPUs")] = None,
    prompts: Annotated[Number, option("N", "Most prompts of each set.", "all")] = None,
    tasks: Annotated[Words, option("TASK...", _tasks, "none")] = None,
    task_limit: Annotated[Number, option("N", "Most examples of each task.", "all")] = None,
    max_new_tokens: Annotated[int, option("N", "Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, option(None, "Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, option(None, "Share of probability to sample from.")] = 1.0,
    seeds: Annotated[int, option("N", "Answers to each prompt.")] = 1,
    batch: Annotated[int, option("N", "Prompts that are answered at once.")] = 16,
    template: Annotated[str, option(None, "Prompt format of adapters and models.")] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16"], option(None, "Weights of adapters and models.")
    ] = "float32",
) -> None:
    """Let models answer prompt sets and judges read the answers: a table and a report."""
    from ..evaluation import evaluate as job

    options = job.GenerationOptions(max_new_tokens, temperature, top_p, batch=batch)
    more: Any = {"against": against, "judges": judges or [], "seeds": seeds, "limit": prompts}
    more["tasks"] = [name for word in tasks or [] for name in word.split(",") if name]
    more |= {"task_limit": task_limit, "template": template, "dtype": dtype}
    more["command"] = shlex.join(["midpo", *sys.argv[1:]])
    plan = job.make_plan(what, sets, options=options, **more)
    out = out or report_folder(what[0], sets)
    print(job.render(job.evaluate(plan, out, cache=cache, address=address, workers=workers)))
    print(f"report: {out}/report.html")


def report_folder(what: str, sets: Sequence[str]) -> str:
    """The default folder of a report; only the endings of data files are left out."""
    ending = re.compile(r"\.(jsonl?|csv|parquet|txt)(\.gz)?$")
    names = [
        Path(what).name,
        *(ending.sub("", Path(s.partition(":column=")[0]).name) for s in sets),
    ]
    return f"reports/{'-'.join(names).replace(':', '-')}"


@command("Measure", "study miniature --seeds 0,1 --dry-run")
def study(
    study: Annotated[str, Argument(help=f"A YAML file, or one of {', '.join(shipped_studies())}.")],
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[Text, option("DIR", "As for run.", "runs/study-NAME")] = None,
    seeds: Annotated[Text, option("N,N", "Seeds.", "the study's")] = None,
    dry_run: DryRun = False,
) -> None:
    """Train many models with several seeds: one table of answers and one report."""
    from ..study import run as job

    chosen = _numbers("--seeds", seeds, int, "0,1,2") if seeds else None
    job.study(study, overrides or [], address=address, run_dir=run_dir, seeds=chosen, dry=dry_run)


@command("Use", 'generate runs/mine --prompt "How do I sharpen a knife?"')
def generate(
    run_dir: Annotated[str, Argument(help="A run directory with a router.")],
    prompt: Annotated[str, Option(help="One user message.")],
    force_gates: Annotated[
        Text, option("S,H", "Constant weights of both experts.", "the router's")
    ] = None,
    max_new_tokens: Annotated[int, option("N", "Longest answer, in tokens.")] = 256,
) -> None:
    """Print an answer of the aligned model, and the gates that made it."""
    gates = _numbers("--force-gates", force_gates, float, "1,0") if force_gates else []
    if gates and len(gates) != 2:
        raise UserError(f"--force-gates {force_gates}: two numbers are expected, such as 1,0")
    routed: Any = load_routed(run_dir)
    with routed.force_gates(*gates) if gates else nullcontext():
        print(routed.answer(prompt, max_new_tokens=max_new_tokens))
        decision = routed.routing([prompt])[0]
    print(f"gates: safety {decision['safety']:.3f}, helpfulness {decision['helpfulness']:.3f}")


def _numbers(option: str, text: str, kind: type, example: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: numbers are expected, such as {example}") from None
