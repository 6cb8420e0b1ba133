"""``midpo``: the command line. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .config import SCORES, dump, load_config, shipped_recipes, shipped_studies
from .errors import UserError
from .logs import set_up_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for bad input."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(
        arguments, "overrides"
    ):  # argparse does not gather positionals that stand behind options
        arguments.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in arguments.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # a job's log tells what is going on while it does
    set_up_logging(arguments.verbose - arguments.quiet)
    try:
        arguments.command(arguments)
    except BrokenPipeError:
        return 0
    except (
        UserError,
        OSError,
    ) as error:  # of files and storage: no permission, out of reach, no space
        print(f"midpo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("midpo: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="midpo", description="Align a language model for safety and helpfulness, on Ray."
    )
    parser.add_argument("--version", action="version", version=f"midpo_ray {__version__}")
    more = parser.add_mutually_exclusive_group()
    more.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="also details, and the libraries' messages",
    )
    more.add_argument("-q", "--quiet", action="count", default=0, help="warnings and results alone")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe, or what is missing of it")
    run.add_argument("recipe", help=f"a YAML file, or one of {', '.join(shipped_recipes())}")
    run.add_argument("overrides", nargs="*", metavar="key.sub=value")
    run.add_argument(
        "--address", help="local (default): a Ray cluster of its own; auto or HOST: one that runs"
    )
    run.add_argument(
        "--run-dir", metavar="DIR", help="path or URI that every node reaches (default runs/NAME)"
    )
    run.add_argument("--until", metavar="STAGE", help="the last stage to run")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and the plan, and do nothing",
    )
    run.set_defaults(command=_run)

    tune = commands.add_parser("tune", help="sweep over a space of objectives, on one scoring pass")
    tune.add_argument("space", help="a YAML file, as in tune_spaces/")
    tune.add_argument("overrides", nargs="*", metavar="key.sub=value")
    tune.add_argument(
        "--recipe", required=True, help="what is varied: a YAML file or a shipped recipe"
    )
    tune.add_argument("--address", help="as for run")
    tune.add_argument(
        "--run-dir",
        metavar="DIR",
        help="path or URI that every node reaches (default runs/RECIPE-tune-SPACE)",
    )
    tune.add_argument(
        "--samples", type=int, metavar="N", help="points in all, instead of the space's number"
    )
    tune.add_argument(
        "--add-samples",
        type=int,
        default=0,
        metavar="N",
        help="so many more than a finished sweep has",
    )
    tune.add_argument(
        "--seeds", type=int, metavar="K", help="trainings of every point: means get intervals"
    )
    tune.add_argument("--select", metavar="RULE", help="knee, METRIC, or 'METRIC>=X then METRIC'")
    tune.set_defaults(command=_tune)

    study = commands.add_parser(
        "study", help="many contenders and seeds, in one table of answers and one report"
    )
    study.add_argument(
        "study", help="a YAML file, or one of those shipped: " + ", ".join(shipped_studies())
    )
    study.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of its recipe")
    study.add_argument("--address", help="as for run")
    study.add_argument(
        "--run-dir",
        metavar="DIR",
        help="path or URI that every node reaches (default runs/study-NAME)",
    )
    study.add_argument("--seeds", metavar="N,N", help="instead of the study's own")
    study.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be trained and answered, and do nothing",
    )
    study.set_defaults(command=_study)

    reward = commands.add_parser(
        "reward", help="train a recipe's reward and cost models, and measure them"
    )
    reward.add_argument("recipe", help="as for run; its section reward_model says how")
    reward.add_argument("overrides", nargs="*", metavar="key.sub=value")
    reward.add_argument("--kind", choices=SCORES, help="only this one")
    reward.add_argument("--address", help="as for run")
    reward.add_argument("--run-dir", metavar="DIR", help="as for run")
    reward.set_defaults(command=_reward)

    submit = commands.add_parser("submit", help="run a recipe as a job on a cluster that is up")
    submit.add_argument("recipe", help="as for run")
    submit.add_argument("overrides", nargs="*", metavar="key.sub=value")
    submit.add_argument("--name", help="the run's name (default: the recipe's)")
    submit.add_argument(
        "--run-dir",
        metavar="DIR",
        help="on storage that every node reaches (default /mnt/midpo/runs/NAME)",
    )
    submit.add_argument("--follow", action="store_true", help="show what it says until it ends")
    status = commands.add_parser("status", help="the jobs of a cluster, or a run's newest")
    status.add_argument("run", nargs="?", help="a run's name or a job's id")
    logs = commands.add_parser("logs", help="what a run's job says")
    logs.add_argument("run")
    logs.add_argument("--follow", action="store_true", help="until it ends")
    stop = commands.add_parser(
        "stop", help="end a run's job, after a checkpoint; the same submit goes on"
    )
    stop.add_argument("run")
    fetch = commands.add_parser(
        "fetch", help="copy a run's adapters, router and report to this machine"
    )
    fetch.add_argument("run", help="a run's name, a job's id, or a run directory")
    fetch.add_argument("--to", metavar="DIR", help="default runs/NAME")
    for command, parse in (
        ("submit", submit),
        ("status", status),
        ("logs", logs),
        ("stop", stop),
        ("fetch", fetch),
    ):
        parse.add_argument("--cluster", metavar="FILE", help="a cluster file that `ray up` started")
        parse.add_argument(
            "--address", metavar="URL", help="or its job API, for example http://127.0.0.1:8265"
        )
        parse.add_argument(
            "--insecure",
            action="store_true",
            help="also a job API that others reach and that asks for no token",
        )
        parse.set_defaults(command=_jobs, job=command)

    inspect = commands.add_parser("inspect", help="what is in a preference set, before training")
    inspect.add_argument("data", help="a file or hub name")
    inspect.add_argument("--model", help="tokenise with this model's tokenizer and template")
    inspect.add_argument("--stage", choices=("safety", "helpfulness", "router"))
    inspect.add_argument(
        "--rule",
        default="pareto_labels",
        choices=("labels", "pareto_labels"),
        help="the router's dual rule",
    )
    inspect.add_argument("--template", default="auto")
    inspect.add_argument("--max-length", type=int, default=512)
    inspect.add_argument(
        "--show", type=int, default=2, metavar="N", help="pairs printed token by token"
    )
    inspect.set_defaults(command=_inspect)

    evaluate = commands.add_parser(
        "evaluate", help="models answer prompt sets, judges read the answers: a table and a report"
    )
    evaluate.add_argument(
        "what",
        nargs="+",
        help="a run directory, RUN:safety, RUN:helpfulness, RUN:base, an adapter, a model",
    )
    evaluate.add_argument(
        "--sets",
        nargs="+",
        required=True,
        metavar="SET",
        help="xstest, harmbench, ..., or files of prompts",
    )
    evaluate.add_argument(
        "--against",
        metavar="WHAT",
        help="win rates against this one; base: what the first WHAT stands on",
    )
    judges = "reward=MODEL, cost=MODEL, module:function, FILE.yaml of an endpoint; phrases, of refusals, is always there"
    evaluate.add_argument("--judges", nargs="+", default=[], metavar="JUDGE", help=judges)
    evaluate.add_argument("--out", metavar="DIR", help="of the report (default reports/WHAT-SETS)")
    evaluate.add_argument(
        "--cache",
        metavar="DIR",
        default="runs/cache",
        help="of answers and verdicts; every node reaches it",
    )
    evaluate.add_argument("--address", help="as for run")
    evaluate.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="actors (default: all GPUs, or up to 8 CPUs); 0: no Ray",
    )
    evaluate.add_argument(
        "--prompts", type=int, metavar="N", help="at most so many of each set, drawn by content"
    )
    tasks = "general capability: comma-separated names of lm-evaluation-harness' tasks, its YAML files, folders of them"
    evaluate.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help=tasks)
    evaluate.add_argument(
        "--task-limit", type=int, metavar="N", help="only the first N examples of each task"
    )
    evaluate.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    evaluate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    evaluate.add_argument("--top-p", type=float, default=1.0)
    evaluate.add_argument(
        "--seeds", type=int, default=1, metavar="K", help="answers to each prompt"
    )
    evaluate.add_argument(
        "--batch", type=int, default=16, metavar="N", help="prompts generated at once"
    )
    evaluate.add_argument(
        "--template", default="auto", help="of adapters and models; a run has its own"
    )
    evaluate.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of adapters and models"
    )
    evaluate.set_defaults(command=_evaluate)

    generate = commands.add_parser(
        "generate", help="an answer of the aligned model, and the gates that made it"
    )
    generate.add_argument("run_dir")
    generate.add_argument("--prompt", required=True)
    generate.add_argument(
        "--force-gates", metavar="S,H", help="two numbers instead of the router's own"
    )
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.set_defaults(command=_generate)

    doctor = commands.add_parser(
        "doctor", help="what is installed, what the cluster has, what would fail"
    )
    doctor.add_argument("--address")
    doctor.set_defaults(command=_doctor)

    cluster = commands.add_parser("cluster", help="cluster files").add_subparsers(
        required=True, metavar="COMMAND"
    )
    check = cluster.add_parser("check", help="whether a cluster file is sound, offline")
    check.add_argument("file")
    check.add_argument("--recipe", help="also whether it offers the groups that this recipe needs")
    check.set_defaults(command=_cluster_check)
    return parser


def _run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        from .pipeline.manifest import Manifest
        from .pipeline.plan import describe, plan
        from .pipeline.run import run_directory

        storage = run_directory(config, arguments.run_dir)
        manifest = Manifest(storage)
        manifest.refuse_other(config)
        print(dump(config), end="")
        print(f"\n# run directory {storage.uri}")
        for stage in ("safety", "helpfulness", "router"):
            group = config.group(stage)
            print(f"# group of {stage}: {group.model_dump(mode='json')}")
        print(describe(plan(config, manifest, arguments.until)))
        return
    from .pipeline.run import run

    result = run(config, arguments.address, run_dir=arguments.run_dir, until=arguments.until)
    if result.table is not None:
        from .evaluation.miniature import render_miniature

        print(render_miniature(result.table))
    print(f"result: {result.run_dir}")
    if not arguments.until:
        print(f'try it: midpo generate {result.run_dir} --prompt "..."')


def _tune(arguments: argparse.Namespace) -> None:
    from .tuning.sweep import tune

    names = ("address", "run_dir", "samples", "add_samples", "seeds", "select")
    options = {name: getattr(arguments, name) for name in names}
    command = " ".join([arguments.recipe, *arguments.overrides])
    tune(arguments.space, load_config(arguments.recipe, arguments.overrides), command, **options)


def _study(arguments: argparse.Namespace) -> None:
    from .study.run import study

    try:
        seeds = [int(s) for s in arguments.seeds.split(",")] if arguments.seeds else None
    except ValueError:
        raise UserError(
            f"--seeds {arguments.seeds}: whole numbers are expected, for example 0,1,2"
        ) from None
    options = {
        "address": arguments.address,
        "run_dir": arguments.run_dir,
        "seeds": seeds,
        "dry": arguments.dry_run,
    }
    study(arguments.study, arguments.overrides, **options)


def _reward(arguments: argparse.Namespace) -> None:
    from .evaluation.reward import train_score_models

    config, kinds = (
        load_config(arguments.recipe, arguments.overrides),
        [arguments.kind] if arguments.kind else SCORES,
    )
    report = train_score_models(config, arguments.address, run_dir=arguments.run_dir, kinds=kinds)
    for kind in kinds:
        print(f"scores.{kind}.model={report[kind]['model']}")


def _jobs(arguments: argparse.Namespace) -> None:
    from . import jobs

    run: Any = getattr(arguments, "run", None)
    act = arguments.job
    if act == "submit":
        config, name, run_dir = jobs.load(
            arguments.recipe, arguments.overrides, arguments.name, arguments.run_dir
        )
    if act == "fetch" and "/" in run:
        jobs.fetch(
            run,
            Path(arguments.to or f"runs/{run.rstrip('/').rpartition('/')[2]}"),
            arguments.cluster,
            print,
        )
        return
    with jobs.reach(arguments.cluster, arguments.address) as url:
        api = jobs.Jobs(url, insecure=arguments.insecure)
        if act == "submit":
            job = api.submit(config, name, run_dir, print)
            where = (
                f"--cluster {arguments.cluster}"
                if arguments.cluster
                else f"--address {arguments.address}"
            )
            for verb, more in (("logs", " --follow"), ("stop", ""), ("fetch", "")):
                print(f"  midpo {verb} {name} {where}{more}")
            if arguments.follow:
                api.logs(job, True, print)
        elif act == "status":
            api.status(run, print)
        elif act == "logs":
            api.logs(run, arguments.follow, print)
        elif act == "stop":
            api.stop(run, print)
        else:
            found = api.of(run).metadata
            jobs.fetch(
                found["run_dir"],
                Path(arguments.to or f"runs/{found['name']}"),
                arguments.cluster,
                print,
            )


def _inspect(arguments: argparse.Namespace) -> None:
    from .config import Data, DataSet, Model
    from .data.inspect import describe
    from .data.read import read_pairs

    sets = (DataSet(path=arguments.data),)
    if arguments.max_length < 2:
        raise UserError(f"--max-length {arguments.max_length}: at least 2 is expected")
    data = Data(
        sets=sets, template=arguments.template, max_length=arguments.max_length, long_prompts="drop"
    )
    pairs, report = read_pairs(data.sets, seed=0)
    tokenization = tokenizer = None
    if arguments.model:
        from .data.tokens import Tokenization
        from .models.base import load_tokenizer

        tokenizer = load_tokenizer(Model(path=arguments.model))
        tokenization = Tokenization(tokenizer, data)
    stage = arguments.rule if arguments.stage == "router" else arguments.stage
    print(
        describe(
            pairs,
            report,
            stage=stage,
            tokenization=tokenization,
            tokenizer=tokenizer,
            show=arguments.show,
        )
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    import shlex

    from .evaluation import evaluate as job

    names = ("max_new_tokens", "temperature", "top_p", "batch")
    options = job.GenerationOptions(**{name: getattr(arguments, name) for name in names})
    command = shlex.join(["midpo", *sys.argv[1:]])
    more = {
        name: getattr(arguments, name)
        for name in ("against", "judges", "seeds", "task_limit", "template", "dtype")
    }
    more["tasks"] = [name for word in arguments.tasks for name in word.split(",") if name]
    plan = job.make_plan(
        arguments.what,
        arguments.sets,
        options=options,
        limit=arguments.prompts,
        command=command,
        **more,
    )
    first = [
        Path(x).name.partition(".")[0].replace(":", "-")
        for x in (arguments.what[0], *arguments.sets)
    ]
    out = arguments.out or f"reports/{'-'.join(first)}"
    answers = job.evaluate(
        plan, out, cache=arguments.cache, address=arguments.address, workers=arguments.workers
    )
    print(job.render(answers))
    print(f"report: {out}/report.html")


def _generate(arguments: argparse.Namespace) -> None:
    from contextlib import nullcontext

    from . import load_routed

    gates: tuple[float, ...] = ()
    if arguments.force_gates:
        try:
            gates = tuple(float(x) for x in arguments.force_gates.split(","))
        except ValueError:
            gates = ()
        if len(gates) != 2:
            raise UserError(
                f"--force-gates {arguments.force_gates}: two numbers are expected, for example 1,0"
            )
    routed: Any = load_routed(arguments.run_dir)
    with routed.force_gates(*gates) if gates else nullcontext():
        print(routed.answer(arguments.prompt, max_new_tokens=arguments.max_new_tokens))
        decision = routed.routing([arguments.prompt])[0]
    print(f"gates: safety {decision['safety']:.3f}, helpfulness {decision['helpfulness']:.3f}")


def _doctor(arguments: argparse.Namespace) -> None:
    from .doctor import examine

    print(examine(arguments.address))


def _cluster_check(arguments: argparse.Namespace) -> None:
    from .cluster.check import check

    faults = check(
        Path(arguments.file), load_config(arguments.recipe) if arguments.recipe else None
    )
    if faults:
        print("\n".join(faults[:-1]), file=sys.stderr, end="\n" if faults[:-1] else "")
        raise UserError(faults[-1])
    print(f"{arguments.file}: sound")


if __name__ == "__main__":
    sys.exit(main())
