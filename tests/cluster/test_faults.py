"""Pull any plug: each fault strikes a real run at a random step, and the run ends with the undisturbed one's files.

The table of what was measured is printed at the end, and lies in faults.md beside the hosts' folders.
"""

from __future__ import annotations

import json
import re
import signal
import time

import pytest
import smallworld
from faultrun import EVERY, STEPS, Run, Told
from hosts import Hosts
from launch import FILE, HEAD, LAPTOP, NAMES, WORKERS, nodes, prepare, up, wait_for_nodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]
SAFETY = WORKERS[0]
CODE = 130  # of a driver that was told to stop
BY_ITSELF = ("worker", "raylet", "host", "partition", "notice to a node")  # the run goes on
AGAIN = ("head", "driver", "notice to the driver", "corrupt checkpoint")  # the same command goes on


class World:
    """The cluster, the undisturbed run, and the rows so far."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.rows = hosts, []
        self.base = Run(hosts, "base")

    def tell(self, told: Told) -> None:
        self.rows.append(told)
        print(told.row(), flush=True)

    def whole(self, seconds: float = 120) -> None:
        wait_for_nodes(self.hosts, 1 + len(WORKERS), time.monotonic() + seconds)

    def dead(self, name: str, since: float, seconds: float = 60) -> float:
        """Seconds until the head held a host for dead."""
        while self.hosts[name].address in nodes(self.hosts):
            assert time.time() < since + seconds, f"{name} still counts as alive"
            time.sleep(0.1)
        return time.time() - since


@pytest.fixture(scope="module")
def world(tmp_path_factory, request, tiny_llama, byte_tokenizer):
    folder = tmp_path_factory.mktemp("faults")
    with Hosts(folder / "hosts", NAMES) as hosts:
        tiny_llama().save_pretrained(hosts.shared / "model")
        byte_tokenizer.save_pretrained(hosts.shared / "model")
        smallworld.write(hosts.shared / "pairs.jsonl", smallworld.rows(60))
        cluster = {"resources_timeout": 120, "max_failures": 10}
        smallworld.recipe(
            hosts.shared,
            "/run/shared/model",
            "/run/shared/pairs.jsonl",
            cache="/run/shared/cache",
            cluster=cluster,
        )
        file = prepare(hosts)
        text = file.read_text("utf-8").replace(
            "--labels=", "--resources='{\"slot\": 1}' --labels="
        )  # for the elastic group
        file.write_text(text, "utf-8")
        up(hosts)
        made = World(hosts)
        made.base.start().end()
        yield made
        table = [
            "| fault | at step | detected s | resumed s | repeated | identical | other expert |",
            "|---|---|---|---|---|---|---|",
        ]
        table += [told.row() for told in made.rows]
        (folder / "faults.md").write_text("\n".join(table) + "\n", "utf-8")
        terminal = request.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line("\n" + "\n".join(table))


def kill_process(world: World, word: str) -> None:
    host = world.hosts[SAFETY]
    found = host.processes(word)
    assert found, f"no {word} on {SAFETY}"
    host.run(f"kill -9 {' '.join(map(str, found))}")


def back(world: World, name: str) -> None:
    """Boot, and wait until Ray is up there: the dashboard may still list the node that died under the same address."""
    host = world.hosts[name]
    world.hosts.boot(name)
    world.hosts.wait(name)
    deadline = time.monotonic() + 60
    while name != HEAD and not host.processes("raylet/raylet"):
        assert time.monotonic() < deadline, f"Ray does not start on {name}"
        time.sleep(0.2)


def strike(world: World, run: Run, fault: str, told: Told) -> None:
    """Let the fault happen; afterwards the run goes on by itself, or ``again`` is needed."""
    hosts, since = world.hosts, time.time()
    if fault == "worker":
        kill_process(world, "RayTrainWorker")
    elif fault == "raylet":
        kill_process(world, "raylet/raylet")
        world.dead(SAFETY, since)
    elif fault == "host":
        hosts[SAFETY].kill()
        told.detected = world.dead(SAFETY, since)
        back(world, SAFETY)
    elif fault == "partition":
        hosts.partition(SAFETY)
        told.detected = world.dead(SAFETY, since)
        hosts.heal(SAFETY)
    elif fault == "notice to a node":
        drain = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 30"
        node = next(n for n in run.lines()[-1]["nodes"])
        hosts[HEAD].run(
            f"RAY_AUTH_MODE=token ray drain-node --address {hosts[HEAD].address}:6379 --node-id {node} {drain}"
        )
        deadline = time.monotonic() + 25
        while hosts[SAFETY].processes("RayTrainWorker") and time.monotonic() < deadline:
            time.sleep(0.2)
        told.detected = time.time() - since
        told.at_step = run.step()
        hosts[SAFETY].kill()  # the machine is taken
        world.dead(SAFETY, since)
        back(world, SAFETY)
    elif fault == "head":
        hosts[HEAD].kill()
        back(world, HEAD)
        hosts[LAPTOP].run(f"ray up -y {FILE}", timeout=180)
        world.whole()
    elif fault == "notice to the driver":
        run.signal(signal.SIGTERM)
        run.end(CODE, seconds=30)
        told.detected = time.time() - since
        told.at_step = run.step()
    else:
        run.kill()
        if fault == "corrupt checkpoint":
            file = run.newest_checkpoint() / "trainable.safetensors"
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(bytes(content))


@pytest.mark.parametrize("fault", BY_ITSELF + AGAIN)
def test_fault(world, fault):
    again = fault in AGAIN
    run = Run(world.hosts, fault.replace(" ", "-")).start()
    told = Told(fault, at_step=run.somewhere())
    since = time.time()
    strike(world, run, fault, told)
    if again:
        run.start()
    run.end()
    world.tell(run.judge(told, since, world.base))
    world.whole()
    assert told.resumed is not None
    assert (
        told.repeated <= (2 if fault == "corrupt checkpoint" else 1) * EVERY + 4
    )  # two steps a line of the time file
    if not again:
        assert told.other == "trained on"


def test_disk_full_during_a_checkpoint(world):
    """On a machine of its own, whose disk is small."""
    laptop = world.hosts[LAPTOP]
    laptop.run("mkdir -p /root/small && mount -t tmpfs -o size=32m tmpfs /root/small")
    run = Run(world.hosts, "full", host=LAPTOP)
    run.address, run.place = "", "/root/small/run"
    run.command = run.command.replace("/run/shared/runs/full", run.place)
    run.command = re.sub(r" experts.\w+.group.label_selector='[^']*'", "", run.command)
    run.dir = world.hosts.folder / "none"
    run.start()
    told = Told("disk full", at_step=0)
    deadline, kept = time.monotonic() + 120, []
    while len(kept) < 2:
        assert time.monotonic() < deadline, run.said()
        listed = laptop.run(
            "ls /root/small/run/experts/safety.work/checkpoints 2> /dev/null", check=False
        ).stdout
        kept = sorted(name for name in listed.split() if name.startswith("step-"))
    told.at_step = int(kept[-1].removeprefix("step-"))
    since = time.time()
    laptop.run("head -c 64m /dev/zero > /root/small/filler", check=False)
    run.end(2)
    told.detected = time.time() - since
    assert "no space is left" in run.said()
    laptop.run("rm /root/small/filler")
    run.start().end()
    laptop.run(
        "mkdir -p /run/shared/runs && cp -r /root/small/run /run/shared/runs/full && umount /root/small"
    )
    run.dir = world.hosts.shared / "runs/full"
    world.tell(run.judge(told, since, world.base))


def test_a_host_that_stays_away_is_named_and_the_other_expert_is_kept(world):
    """Bounded patience; when the machine is back, the same command goes on."""
    run = Run(
        world.hosts, "away", "cluster.resources_timeout=0"
    ).start()  # that is, the least: a minute
    told = Told("host away for a minute", at_step=run.somewhere())
    since = time.time()
    world.hosts[SAFETY].kill()
    run.end(2)
    assert (
        "group of stage safety: 1 worker(s) of 1 CPU on nodes labelled {'midpo-group': 'safety'} are needed"
        in run.said()
    )
    assert run.weights("helpfulness") == world.base.weights("helpfulness")
    assert "helpfulness: done" in run.said()
    back(world, SAFETY)
    time.sleep(5)  # the raylet registers
    world.whole()
    run.start().end()
    world.tell(run.judge(told, since, world.base))


def test_elastic_group_goes_on_with_less_and_takes_more(world):
    """Of two hosts one is gone for good; a node comes back later."""
    hosts = world.hosts
    group = "experts.safety.group='{workers: {min: 1, max: 2}, resources: {slot: 1}}'"
    run = Run(hosts, "elastic", group, f"experts.safety.optim.steps={STEPS}", until="safety")
    run.command = run.command.replace(
        "experts.safety.group.label_selector='{midpo-group: safety}' ", ""
    )
    run.start()
    told = Told("host gone, elastic group", at_step=run.somewhere())
    gone = WORKERS[1]
    since = time.time()
    assert len(run.lines()[-1]["nodes"]) == 2
    hosts[gone].kill()
    told.detected = world.dead(gone, since)
    run.end()
    lines = run.lines()
    after = next(x for x in lines if x["steps"][0][0] > since and len(x["nodes"]) == 1)
    told.resumed = after["steps"][0][0] - since
    told.repeated = told.at_step - (after["step"] - len(after["steps"]))
    pairs = zip(
        run.metrics("safety").splitlines(), world.base.metrics("safety").splitlines(), strict=True
    )
    worst = max(abs(a - b) / abs(b) for a, b in ((loss(x), loss(y)) for x, y in pairs))
    told.other = f"loss within {worst:.1e}"
    world.tell(told)
    back(world, gone)
    assert worst <= 1e-4


def loss(line: str) -> float:
    return json.loads(line)["loss"]
