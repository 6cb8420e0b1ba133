"""`ray up` of the shipped on-prem file on three machines, with token mode on."""

from __future__ import annotations

import time

import pytest
from hosts import Hosts
from launch import API, FILE, HEAD, LAPTOP, NAMES, WORKERS, ask, down, nodes, prepare, up

from midpo_ray.cluster.check import check

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
SECONDS = 60  # for three nodes, on an otherwise idle computer with two cores
JOB = {"entrypoint": "echo harmless"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("cluster") / "hosts", NAMES) as made:
        yield made


def test_up_use_and_down(hosts):
    assert check(prepare(hosts)) == []
    seconds = up(hosts)
    print(f"three nodes in {seconds:.1f} s")

    # Every worker carries its group's label; the head has none.
    groups = {address: labels.get("midpo-group") for address, labels in nodes(hosts).items()}
    assert groups == {hosts[HEAD].address: None} | {hosts[name].address: name for name in WORKERS}

    # The token reached every machine and is for its owner's eyes only.
    assert {hosts[name].run("stat -c %a ~/.ray/auth_token").stdout for name in NAMES} == {"600\n"}

    # Jobs: refused without the token or with a wrong one; nothing answers beyond the head itself.
    assert ask(hosts, "/api/jobs/", None, JOB)[0] == 401
    assert ask(hosts, "/api/jobs/", "0" * 64, JOB)[0] == 403
    knock = f"curl -s -m 3 http://{hosts[HEAD].address}:8265/ > /dev/null; echo $?"
    assert hosts[LAPTOP].run(knock).stdout == "7\n"  # connection refused
    refused = hosts[HEAD].run(
        f"HOME=/tmp ray job submit --address {API} -- echo harmless", check=False
    )
    assert refused.returncode != 0
    assert "harmless" not in refused.stdout

    # With the token a job runs.
    done = hosts[LAPTOP].run(
        f"ray exec {FILE} 'RAY_AUTH_MODE=token ray job submit --address {API} -- echo it-ran'",
        timeout=120,
    )
    assert "it-ran" in done.stdout
    assert "succeeded" in done.stdout

    down(hosts)
    print(f"head down at once, workers after {wait_for_end(hosts):.1f} s")
    assert seconds <= SECONDS


def wait_for_end(hosts: Hosts, seconds: float = 120) -> float:
    """`ray down` stops the head; Ray on the workers ends when it has missed its head for a minute."""
    assert hosts[HEAD].processes("gcs_server") == []
    begun = time.monotonic()
    while left := {
        name: found for name in (HEAD, *WORKERS) if (found := hosts[name].processes("raylet"))
    }:
        assert time.monotonic() < begun + seconds, left
        time.sleep(1)
    return time.monotonic() - begun
