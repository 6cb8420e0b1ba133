"""``midpo``: the command line. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperCommand

from . import __version__, load_routed
from .config import (
    SCORES,
    Config,
    Data,
    DataSet,
    Model,
    dump,
    load_config,
    reference,
    shipped_recipes,
    shipped_studies,
)
from .errors import MachineError, UserError
from .logs import set_up_logging

# Commands import what they run when they are called: no command's help waits for torch or Ray.

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Align a language model for safety and helpfulness, offline, on Ray.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
cluster_app = typer.Typer(help="Cluster files.")
app.add_typer(cluster_app, name="cluster", rich_help_panel="Cluster")


class _Command(TyperCommand):
    """A command whose options of several values take them as words: ``--sets a b``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for p in self.params if p.multiple for name in p.opts}
        words: list[str] = []
        option = None
        for word in args:
            if option and not word.startswith("-") and words[-1] != option:
                words.append(option)
            words.append(word)
            if word.startswith("-"):
                option = word if word in several else None
        return super().parse_args(ctx, words)


def _command(panel: str, example: str, group: typer.Typer = app, **more: Any) -> Callable[..., Any]:
    example = f"Example: [bold]midpo {example}[/bold]"
    return group.command(cls=_Command, rich_help_panel=panel, epilog=example, **more)


def _option(metavar: str | None, help: str, default: str | bool = True) -> Any:
    """An option; ``default`` describes what happens without it, where the value does not."""
    return Option(metavar=metavar, help=help, show_default=default)


Text = str | None
Number = int | None
Words = list[str] | None
Recipe = Annotated[str, Argument(help=f"A YAML file, or one of {', '.join(shipped_recipes())}.")]
_overrides = "Changed keys of the recipe; `midpo config` lists them."
Overrides = Annotated[
    Words, Argument(metavar="[KEY.SUB=VALUE]...", help=_overrides, show_default="none")
]
Address = Annotated[
    Text, _option(None, "auto or HOST: a running Ray cluster.", "a cluster of its own")
]
RunDir = Annotated[Text, _option("DIR", "Path or URI that every node reaches.", "runs/NAME")]
DryRun = Annotated[bool, Option("--dry-run", help="Print what would be done, and stop.")]
RunName = Annotated[str, Argument(help="Name of a run, or id of a job.")]
ClusterFile = Annotated[Text, _option("FILE", "A cluster file that `ray up` started.", "none")]
JobAddress = Annotated[
    Text,
    Option("--address", metavar="URL", help="Or a job API, http://HOST:8265.", show_default="none"),
]
_insecure = "Use a job API that other machines reach without a token."
Insecure = Annotated[bool, Option("--insecure", help=_insecure)]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"midpo_ray {__version__}")
        raise typer.Exit


_version = Option("--version", callback=_print_version, is_eager=True, help="Print the version.")


@app.callback()
def _options(
    verbose: Annotated[bool, Option("-v", "--verbose", help="Show details.")] = False,
    quiet: Annotated[bool, Option("-q", "--quiet", help="Show only warnings and results.")] = False,
    version: Annotated[bool, _version] = False,
) -> None:
    set_up_logging(verbose - quiet)


@_command("Prepare", "inspect pairs.jsonl --model gpt2 --stage safety")
def inspect(
    data: Annotated[str, Argument(help="A file, a folder or a hub name.")],
    model: Annotated[Text, _option(None, "Tokenise as this model does.", "no tokens")] = None,
    stage: Annotated[
        Literal["safety", "helpfulness", "router"] | None,
        _option(None, "Select the pairs of a stage.", "all pairs"),
    ] = None,
    rule: Annotated[
        Literal["labels", "pareto_labels", "safe_first"],
        Option(help="Rule that selects the router's pairs."),
    ] = "pareto_labels",
    template: Annotated[str, Option(help="Prompt format, as data.template.")] = "auto",
    max_length: Annotated[int, _option("N", "Longest prompt and response, in tokens.")] = 512,
    show: Annotated[int, _option("N", "Pairs that are printed token by token.")] = 2,
) -> None:
    """Print what a preference set holds, before training."""
    from .data.inspect import describe
    from .data.read import read_pairs
    from .data.tokens import Tokenization
    from .models.base import load_tokenizer

    if max_length < 2:
        raise UserError(f"--max-length {max_length}: at least 2 is expected")
    sets = (DataSet(path=data),)
    settings = Data(sets=sets, template=template, max_length=max_length, long_prompts="drop")
    pairs, report = read_pairs(sets, seed=0)
    tokenizer = load_tokenizer(Model(path=model)) if model else None
    tokenization = Tokenization(tokenizer, settings) if tokenizer else None
    rows = rule if stage == "router" else stage
    more: Any = {"tokenization": tokenization, "tokenizer": tokenizer, "show": show}
    print(describe(pairs, report, stage=rows, **more))


@_command("Prepare", "doctor --address auto")
def doctor(address: Address = None) -> None:
    """Print what is installed, what the cluster has, and what would fail."""
    from .doctor import examine

    print(examine(address))


@_command("Prepare", "config miniature experts.safety.objective")
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
    if schema:
        print(reference.json_schema())
    elif markdown:
        print(reference.markdown(), end="")
    else:
        print(reference.describe_keys(load_config(recipe) if recipe else None, key))


@_command("Train", "run miniature router.prior=0.1 --run-dir runs/demo")
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    address: Address = None,
    run_dir: RunDir = None,
    until: Annotated[Text, _option("STAGE", "The last stage to run.", "all stages")] = None,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe, or what is missing of it: scores, experts, router."""
    from .pipeline import run as pipeline

    settings = load_config(recipe, overrides or [])
    if dry_run:
        _print_plan(settings, run_dir, until)
        return
    result = pipeline.run(settings, address, run_dir=run_dir, until=until)
    if result.table is not None:
        from .evaluation.miniature import render_miniature

        print(render_miniature(result.table))
    print(f"result: {result.run_dir}")
    if not until:
        print(f'try it: midpo generate {result.run_dir} --prompt "..."')


def _print_plan(settings: Config, run_dir: str | None, until: str | None) -> None:
    from .pipeline.manifest import Manifest
    from .pipeline.plan import describe, plan
    from .pipeline.run import run_directory

    storage = run_directory(settings, run_dir)
    manifest = Manifest(storage)
    manifest.refuse_other(settings)
    print(dump(settings), end="")
    print(f"\n# run directory {storage.uri}")
    for stage in ("safety", "helpfulness", "router"):
        print(f"# group of {stage}: {settings.group(stage).model_dump(mode='json')}")
    print(describe(plan(settings, manifest, until)))


@_command("Train", "tune tune_spaces/joint.yaml --recipe miniature --samples 6")
def tune(
    space: Annotated[str, Argument(help="A YAML file, as in tune_spaces/.")],
    recipe: Annotated[str, Option(help="The recipe that is varied: a YAML file or a name.")],
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[Text, _option("DIR", "As for run.", "runs/RECIPE-tune-SPACE")] = None,
    samples: Annotated[Number, _option("N", "Number of points.", "the space's")] = None,
    add_samples: Annotated[int, _option("N", "Points to add to a finished sweep.")] = 0,
    seeds: Annotated[Number, _option("N", "Trainings of every point.", "the space's")] = None,
    select: Annotated[
        Text, _option("RULE", "knee, METRIC, or 'METRIC>=X then METRIC'.", "the space's")
    ] = None,
) -> None:
    """Sweep over a space of objectives, on one table of scores."""
    from .tuning import sweep

    settings = load_config(recipe, overrides or [])
    options: Any = {"address": address, "run_dir": run_dir, "samples": samples}
    options |= {"add_samples": add_samples, "seeds": seeds, "select": select}
    sweep.tune(space, settings, " ".join([recipe, *(overrides or [])]), **options)


@_command("Train", "reward smollm2-135m-scores --kind cost")
def reward(
    recipe: Recipe,
    overrides: Overrides = None,
    kind: Annotated[
        Literal["reward", "cost"] | None, _option(None, "Train only this one.", "both")
    ] = None,
    address: Address = None,
    run_dir: RunDir = None,
) -> None:
    """Train the reward and the cost model of a recipe, and measure them."""
    from .evaluation.reward import train_score_models

    kinds = [kind] if kind else list(SCORES)
    settings = load_config(recipe, overrides or [])
    report = train_score_models(settings, address, run_dir=run_dir, kinds=kinds)
    for name in kinds:
        print(f"scores.{name}.model={report[name]['model']}")


_what = "Run directories, their parts (RUN:safety, RUN:helpfulness, RUN:base), adapters, models."
_judges = "reward=MODEL, cost=MODEL, module:function, FILE.yaml of an endpoint; phrases always."
_tasks = "Tasks of lm-evaluation-harness: names, YAML files, folders of them."


@_command("Measure", "evaluate runs/mine --sets xstest harmful.jsonl --against base")
def evaluate(
    what: Annotated[list[str], Argument(help=_what)],
    sets: Annotated[list[str], _option("SET...", "xstest, harmbench, ..., or files of prompts.")],
    against: Annotated[
        Text, _option("WHAT", "Win rates against this model, or base.", "none")
    ] = None,
    judges: Annotated[Words, _option("JUDGE...", _judges, "phrases")] = None,
    out: Annotated[Text, _option("DIR", "Folder of the report.", "reports/WHAT-SETS")] = None,
    cache: Annotated[
        str, _option("DIR", "Answers and verdicts, where every node reaches them.")
    ] = ("runs/cache"),
    address: Address = None,
    workers: Annotated[Number, _option("N", "Processes; 0: no Ray.", "all GPUs or 8 CPUs")] = None,
    prompts: Annotated[Number, _option("N", "Most prompts of each set.", "all")] = None,
    tasks: Annotated[Words, _option("TASK...", _tasks, "none")] = None,
    task_limit: Annotated[Number, _option("N", "Most examples of each task.", "all")] = None,
    max_new_tokens: Annotated[int, _option("N", "Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, _option(None, "Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, _option(None, "Share of probability to sample from.")] = 1.0,
    seeds: Annotated[int, _option("N", "Answers to each prompt.")] = 1,
    batch: Annotated[int, _option("N", "Prompts that are answered at once.")] = 16,
    template: Annotated[str, _option(None, "Prompt format of adapters and models.")] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16"], _option(None, "Weights of adapters and models.")
    ] = "float32",
) -> None:
    """Let models answer prompt sets and judges read the answers: a table and a report."""
    from .evaluation import evaluate as job

    options = job.GenerationOptions(max_new_tokens, temperature, top_p, batch=batch)
    more: Any = {"against": against, "judges": judges or [], "seeds": seeds, "limit": prompts}
    more["tasks"] = [name for word in tasks or [] for name in word.split(",") if name]
    more |= {"task_limit": task_limit, "template": template, "dtype": dtype}
    command = shlex.join(["midpo", *sys.argv[1:]])
    plan = job.make_plan(what, sets, options=options, command=command, **more)
    out = out or report_folder(what[0], sets)
    print(job.render(job.evaluate(plan, out, cache=cache, address=address, workers=workers)))
    print(f"report: {out}/report.html")


def report_folder(what: str, sets: Sequence[str]) -> str:
    """The default folder of a report; only the endings of data files are left out."""
    ending = re.compile(r"\.(jsonl?|csv|parquet|txt)(\.gz)?$")
    names = [Path(what).name, *(ending.sub("", Path(s).name) for s in sets)]
    return f"reports/{'-'.join(names).replace(':', '-')}"


@_command("Measure", "study miniature --seeds 0,1 --dry-run")
def study(
    study: Annotated[str, Argument(help=f"A YAML file, or one of {', '.join(shipped_studies())}.")],
    overrides: Overrides = None,
    address: Address = None,
    run_dir: Annotated[Text, _option("DIR", "As for run.", "runs/study-NAME")] = None,
    seeds: Annotated[Text, _option("N,N", "Seeds.", "the study's")] = None,
    dry_run: DryRun = False,
) -> None:
    """Train many models with several seeds: one table of answers and one report."""
    from .study import run as job

    chosen = _numbers("--seeds", seeds, int, "0,1,2") if seeds else None
    job.study(study, overrides or [], address=address, run_dir=run_dir, seeds=chosen, dry=dry_run)


@_command("Use", 'generate runs/mine --prompt "How do I sharpen a knife?"')
def generate(
    run_dir: Annotated[str, Argument(help="A run directory with a router.")],
    prompt: Annotated[str, Option(help="One user message.")],
    force_gates: Annotated[
        Text, _option("S,H", "Constant weights of both experts.", "the router's")
    ] = None,
    max_new_tokens: Annotated[int, _option("N", "Longest answer, in tokens.")] = 256,
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


@_command("Cluster", "submit miniature --cluster cluster.yaml --follow")
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    name: Annotated[Text, _option(None, "Name of the run.", "the recipe's")] = None,
    run_dir: Annotated[Text, _option("DIR", "As for run.", "/mnt/midpo/runs/NAME")] = None,
    shared: Annotated[Text, _option("DIR", "A folder that every node reaches.", "detected")] = None,
    follow: Annotated[bool, Option("--follow", help="Print the log until the job ends.")] = False,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Run a recipe as a job on a cluster that is up."""
    from . import jobs

    job = jobs.prepare_job(recipe, overrides or [], name, run_dir, shared)
    with jobs.job_api(cluster, address, insecure) as api:
        api.submit(job)
        where = f"--cluster {cluster}" if cluster else f"--address {address}"
        for command in ("logs --follow", "stop", "fetch"):
            verb, _, flag = command.partition(" ")
            print(f"  midpo {verb} {job.name} {where} {flag}".rstrip())
        if follow:
            api.logs(job.id, follow=True)


@_command("Cluster", "status --cluster cluster.yaml")
def status(
    run: Annotated[
        Text, Argument(help="Name of a run, or id of a job.", show_default="all")
    ] = None,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Print the jobs of a cluster, or the newest of a run."""
    from . import jobs

    with jobs.job_api(cluster, address, insecure) as api:
        api.status(run)


@_command("Cluster", "logs miniature --follow --cluster cluster.yaml")
def logs(
    run: RunName,
    follow: Annotated[bool, Option("--follow", help="Print until the job ends.")] = False,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Print the log of a run's job."""
    from . import jobs

    with jobs.job_api(cluster, address, insecure) as api:
        api.logs(run, follow)


@_command("Cluster", "stop miniature --cluster cluster.yaml")
def stop(
    run: RunName,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Stop a run's job after a checkpoint; the same submit resumes it."""
    from . import jobs

    with jobs.job_api(cluster, address, insecure) as api:
        api.stop(run)


@_command("Cluster", "fetch miniature --cluster cluster.yaml --to runs/miniature")
def fetch(
    run: Annotated[str, Argument(help="Name of a run, id of a job, or a run directory.")],
    to: Annotated[Text, _option("DIR", "Target folder.", "runs/NAME")] = None,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Copy a run's adapters, router and report to this machine."""
    from . import jobs

    run_dir, name = run, run.rstrip("/").rpartition("/")[2]
    if "/" not in run:
        with jobs.job_api(cluster, address, insecure) as api:
            found = api.newest(run).metadata
            run_dir, name = found["run_dir"], found["name"]
    jobs.fetch(run_dir, Path(to or f"runs/{name}"), cluster)


@_command("Cluster", "cluster check cluster.yaml --recipe alpaca-7b", group=cluster_app)
def check(
    file: Annotated[str, Argument(help="A cluster file: `ray up` YAML or Kubernetes manifest.")],
    recipe: Annotated[
        Text, _option(None, "Also check that it offers this recipe's groups.", "none")
    ] = None,
) -> None:
    """Check a cluster file, offline."""
    from .cluster.check import check as faults_of

    faults = faults_of(Path(file), load_config(recipe) if recipe else None)
    for fault in faults[:-1]:
        print(fault, file=sys.stderr)
    if faults:
        raise UserError(faults[-1])
    print(f"{file}: sound")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 1 for a failing machine, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a job's log is read while it is written
    words = list(sys.argv[1:] if argv is None else argv)
    words.sort(key=lambda word: word not in ("-v", "--verbose", "-q", "--quiet"))  # anywhere
    command = typer.main.get_command(app)
    try:
        with command.make_context("midpo", words) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except BrokenPipeError:
        return 0
    except (UserError, OSError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"midpo: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except MachineError as error:
        print(f"midpo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("midpo: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
