"""The shipped on-prem cluster on test hosts: ``laptop`` types `ray up`, ``head``, ``safety`` and ``helpfulness`` run Ray."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from hosts import REPOSITORY, Hosts

LAPTOP, HEAD, WORKERS = "laptop", "head", ("safety", "helpfulness")
NAMES = (HEAD, *WORKERS, LAPTOP)
FILE = "/root/on-prem.yaml"
API = "http://127.0.0.1:8265"  # on the head


def prepare(hosts: Hosts) -> Path:
    """The token, made as docs/security.md says, and the shipped file with these hosts' addresses, both on the laptop."""
    laptop = hosts[LAPTOP]
    laptop.run("ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token")
    text = (REPOSITORY / "cluster" / "on-prem.yaml").read_text("utf-8")
    for name, shipped in zip(
        (HEAD, *WORKERS), ("192.168.1.10", "192.168.1.11", "192.168.1.12"), strict=True
    ):
        assert shipped in text
        text = text.replace(shipped, hosts[name].address)
    assert "ssh_user: midpo " in text
    path = laptop.folder / FILE.removeprefix("/")
    path.write_text(text.replace("ssh_user: midpo ", "ssh_user: root "), "utf-8")
    return path


def up(hosts: Hosts, seconds: float = 180) -> float:
    """`ray up`, until every node is alive; returns the seconds that this took."""
    begun = time.monotonic()
    hosts[LAPTOP].run(f"ray up -y {FILE}", timeout=seconds)
    wait_for_nodes(hosts, 1 + len(WORKERS), begun + seconds)
    return time.monotonic() - begun


def down(hosts: Hosts) -> None:
    hosts[LAPTOP].run(f"ray down -y {FILE}", timeout=180)


def wait_for_nodes(hosts: Hosts, count: int, deadline: float) -> None:
    while len(alive := nodes(hosts)) < count:
        assert time.monotonic() < deadline, f"{count} nodes are expected, alive are {alive}"
        time.sleep(0.5)


def nodes(hosts: Hosts) -> dict[str, dict[str, str]]:
    """Labels of the nodes that Ray holds for alive, by address, asked of the head with its token; {} while it does not answer."""
    status, answer = ask(hosts, "/nodes?view=summary", "$(cat ~/.ray/auth_token)")
    if status != 200:
        return {}
    summaries = [n["raylet"] for n in json.loads(answer)["data"]["summary"]]
    return {
        r["nodeManagerAddress"]: r.get("labels", {}) for r in summaries if r.get("state") == "ALIVE"
    }


def ask(
    hosts: Hosts, path: str, token: str | None, body: dict[str, Any] | None = None
) -> tuple[int, str]:
    """An HTTP request to the head's dashboard, from the head itself: (status, answer); status 0 where nothing listens."""
    headers = f'-H "Authorization: Bearer {token}"' if token else ""
    data = f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'" if body else ""
    done = hosts[HEAD].run(
        f"curl -s -m 5 -w '\\n%{{http_code}}' {headers} {data} '{API}{path}'", check=False
    )
    answer, _, status = done.stdout.rpartition("\n")
    return int(status or 0), answer
