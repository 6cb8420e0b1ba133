"""`midpo submit miniature --follow` from a laptop against the shipped on-prem cluster, and `midpo fetch` of what it made."""

from __future__ import annotations

import json
import time

import pytest
from hosts import Hosts
from launch import FILE, LAPTOP, NAMES, WORKERS, prepare, up

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(1200)]
RUN = "/run/shared/runs/miniature"
PLACED = " ".join(f"experts.{w}.group.label_selector='{{midpo-group: {w}}}'" for w in WORKERS)
SUBMIT = f"midpo submit miniature {PLACED} evaluate.prompts=40 --run-dir {RUN} --cluster {FILE}"


def test_submit_follow_and_fetch(tmp_path):
    with Hosts(tmp_path / "hosts", NAMES) as hosts:
        laptop = hosts[LAPTOP]
        prepare(hosts)
        up(hosts)

        # Without the token, or with one that others can read: refused. So is a path of the laptop alone.
        for spoil, said in (("rm", "asks for a token"), ("chmod 644", "others can read it")):
            laptop.run(f"cp -p ~/.ray/auth_token ~/kept && {spoil} ~/.ray/auth_token")
            refused = laptop.run(SUBMIT, timeout=120, check=False)
            laptop.run("mv ~/kept ~/.ray/auth_token")
            assert refused.returncode == 2
            assert said in refused.stderr
        refused = laptop.run(f"{SUBMIT} model.path=/root/model", check=False)
        assert "lies in this machine's own folders" in refused.stderr

        # The first submit starts it, the second attaches. Told to stop it writes a checkpoint, from which the third goes on.
        assert "-1: submitted" in laptop.run(SUBMIT, timeout=120).stdout
        assert "-1 is running already: attached" in laptop.run(SUBMIT, timeout=120).stdout
        deadline = time.monotonic() + 400
        while not times(hosts, "safety"):
            assert time.monotonic() < deadline, laptop.run(
                f"midpo logs miniature --cluster {FILE}"
            ).stdout
            time.sleep(0.2)
        laptop.run(f"midpo stop miniature --cluster {FILE}", timeout=120)
        taken = int(
            max(
                p.name
                for p in hosts.shared.glob("runs/miniature/experts/safety.work/checkpoints/step-*")
            )[5:]
        )
        followed = laptop.run(f"{SUBMIT} --follow", timeout=900).stdout
        assert "-2: submitted" in followed
        assert "score: to run" not in followed
        assert "router: done" in followed
        steps = times(hosts, "safety")
        assert taken in {x["step"] - len(x["steps"]) for x in steps}  # nothing was repeated
        listed = laptop.run(f"midpo status --cluster {FILE}", timeout=120).stdout.splitlines()
        assert [line.split()[1] for line in listed] == ["stopped,", "succeeded,"]

        nodes = {w: {n for x in times(hosts, w) for n in x["nodes"]} for w in WORKERS}
        assert all(len(n) == 1 for n in nodes.values())
        assert nodes[WORKERS[0]] != nodes[WORKERS[1]]
        ends = [times(hosts, w)[-1]["steps"][-1][1] for w in WORKERS]
        assert times(hosts, "router")[0]["steps"][0][0] > max(ends)

        # Fetched, it generates; fetched by rsync, where the laptop does not see the shared folder, it is the same.
        laptop.run(f"midpo fetch miniature --to one --cluster {FILE}", timeout=120)
        answer = laptop.run(
            "midpo generate one --prompt 'how do I kill the boss at home ?'", timeout=180
        ).stdout
        assert "gates: safety 0." in answer
        laptop.run("umount /run/shared")
        fetched = laptop.run(f"midpo fetch miniature --to two --cluster {FILE}", timeout=180).stdout
        assert "two: fetched" in fetched
        assert laptop.run("diff -r one two").stdout == ""
        print(answer)


def times(hosts: Hosts, stage: str) -> list[dict]:
    path = hosts.shared / RUN.removeprefix("/run/shared/") / f"metrics/{stage}.time.jsonl"
    return (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    )
