"""Commands on a cluster: jobs, and the check of cluster files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..config import load_config
from ..errors import UserError
from .app import Overrides, Recipe, Text, cluster_app, command, option

RunName = Annotated[str, Argument(help="Name of a run, or id of a job.")]
ClusterFile = Annotated[Text, option("FILE", "A cluster file that `ray up` started.", "none")]
JobAddress = Annotated[
    Text,
    Option("--address", metavar="URL", help="Or a job API, http://HOST:8265.", show_default="none"),
]
_insecure = "Use a job API that other machines reach without a token."
Insecure = Annotated[bool, Option("--insecure", help=_insecure)]


@command("Cluster", "submit miniature --cluster cluster.yaml --follow")
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    name: Annotated[Text, option(None, "Name of the run.", "the recipe's")] = None,
    run_dir: Annotated[Text, option("DIR", "As for run.", "/mnt/midpo/runs/NAME")] = None,
    shared: Annotated[Text, option("DIR", "A folder that every node reaches.", "detected")] = None,
    follow: Annotated[bool, Option("--follow", help="Print the log until the job ends.")] = False,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Run a recipe as a job on a cluster that is up."""
    from .. import jobs

    job = jobs.prepare_job(recipe, overrides or [], name, run_dir, shared)
    with jobs.job_api(cluster, address, insecure) as api:
        api.submit(job)
        where = f"--cluster {cluster}" if cluster else f"--address {address}"
        for words in ("logs --follow", "stop", "fetch"):
            verb, _, flag = words.partition(" ")
            print(f"  midpo {verb} {job.name} {where} {flag}".rstrip())
        if follow:
            api.logs(job.id, follow=True)


@command("Cluster", "status --cluster cluster.yaml")
def status(
    run: Annotated[
        Text, Argument(help="Name of a run, or id of a job.", show_default="all")
    ] = None,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Print the jobs of a cluster, or the newest of a run."""
    from .. import jobs

    with jobs.job_api(cluster, address, insecure) as api:
        api.status(run)


@command("Cluster", "logs miniature --follow --cluster cluster.yaml")
def logs(
    run: RunName,
    follow: Annotated[bool, Option("--follow", help="Print until the job ends.")] = False,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Print the log of a run's job."""
    from .. import jobs

    with jobs.job_api(cluster, address, insecure) as api:
        api.logs(run, follow)


@command("Cluster", "stop miniature --cluster cluster.yaml")
def stop(
    run: RunName,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Stop a run's job after a checkpoint; the same submit resumes it."""
    from .. import jobs

    with jobs.job_api(cluster, address, insecure) as api:
        api.stop(run)


@command("Cluster", "fetch miniature --cluster cluster.yaml --to runs/miniature")
def fetch(
    run: Annotated[str, Argument(help="Name of a run, id of a job, or a run directory.")],
    to: Annotated[Text, option("DIR", "Target folder.", "runs/NAME")] = None,
    cluster: ClusterFile = None,
    address: JobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Copy a run's adapters, router and report to this machine."""
    from .. import jobs

    run_dir, name = run, run.rstrip("/").rpartition("/")[2]
    if "/" not in run:
        with jobs.job_api(cluster, address, insecure) as api:
            found = api.newest(run).metadata
            run_dir, name = found["run_dir"], found["name"]
    jobs.fetch(run_dir, Path(to or f"runs/{name}"), cluster)


@command("Cluster", "cluster check cluster.yaml --recipe alpaca-7b", group=cluster_app)
def check(
    file: Annotated[str, Argument(help="A cluster file: `ray up` YAML or Kubernetes manifest.")],
    recipe: Annotated[
        Text, option(None, "Also check that it offers this recipe's groups.", "none")
    ] = None,
) -> None:
    """Check a cluster file, offline."""
    from ..cluster.check import check as faults_of

    faults = faults_of(Path(file), load_config(recipe) if recipe else None)
    for fault in faults[:-1]:
        print(fault, file=sys.stderr)
    if faults:
        raise UserError(faults[-1])
    print(f"{file}: sound")
