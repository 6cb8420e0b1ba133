"""A small real run on the test hosts' cluster, and what the clock and the files say of a fault in it."""

from __future__ import annotations

import datetime
import itertools
import json
import random
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hosts import Host, Hosts
from launch import HEAD

STEPS, EVERY = 400, 25  # of each expert; between checkpoints
STAGES = ("safety", "helpfulness")
PAUSE = 4.0  # seconds between two steps that tell of another process
TRAIN = "experts.{0}.optim.steps={1} experts.{0}.group.label_selector='{{midpo-group: {0}}}'"
SETTINGS = (
    " ".join(TRAIN.format(stage, STEPS) for stage in STAGES)
    + f" checkpoint.every_steps={EVERY} logging.every=2"
)


@dataclass
class Told:
    """A fault's row of the table; seconds."""

    fault: str
    at_step: int = 0
    detected: float | None = None
    resumed: float | None = None
    repeated: int | None = None
    identical: bool | None = None
    other: str = ""
    notes: list[str] = field(default_factory=list)

    def row(self) -> str:
        def shown(value: float | None) -> str:
            return (
                "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
            )

        same = {True: "yes", False: "NO", None: "-"}[self.identical]
        cells = (
            self.fault,
            self.at_step,
            shown(self.detected),
            shown(self.resumed),
            shown(self.repeated),
            same,
            self.other,
        )
        return "| " + " | ".join(map(str, cells)) + " |"


class Run:
    """`midpo run` of the tiny recipe on a host, up to both experts; ``start`` again is the same command again."""

    def __init__(
        self, hosts: Hosts, name: str, *more: str, host: str = HEAD, until: str = "helpfulness"
    ) -> None:
        self.hosts, self.name, self.host = hosts, name, host
        self.place = f"/run/shared/runs/{name}"
        self.dir, self.log = hosts.shared / "runs" / name, hosts.folder / f"{name}.log"
        settings = " ".join((SETTINGS, *more))
        self.command = (
            f"midpo run /run/shared/small.yaml {settings} --until {until} --run-dir {self.place}"
        )
        self.address = "--address auto"
        self.process: subprocess.Popen[bytes] | None = None
        self.seen: list[
            tuple[float, int]
        ] = []  # (when, the safety expert's step), for a resumed stage cuts its files back

    @property
    def driver(self) -> Host:
        return self.hosts[self.host]

    def start(self) -> Run:
        self.process = self.driver.start(
            f"{self.command} {self.address}", self.log, RAY_AUTH_MODE="token"
        )
        threading.Thread(target=self.look, args=(self.process,), daemon=True).start()
        return self

    def look(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            self.seen.append((time.time(), self.step()))
            time.sleep(0.2)

    def signal(self, number: int) -> None:
        for pid in self.driver.processes("bin/midpo run"):
            self.driver.run(f"kill -{number} {pid}", check=False)

    def end(self, code: int = 0, seconds: float = 240) -> None:
        assert self.process is not None
        assert self.process.wait(seconds) == code, self.said()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(30)

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")[-4000:]

    def lines(self, stage: str = "safety") -> list[dict[str, Any]]:
        """Of the stage's time file: step, and [start, end] of the steps since the line before, in one process."""
        path = self.dir / f"metrics/{stage}.time.jsonl"
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step(self) -> int:
        lines = self.lines()
        return lines[-1]["step"] if lines else 0

    def wait(self, step: int, seconds: float = 180) -> int:
        """Until so many steps are taken; returns the steps."""
        deadline = time.monotonic() + seconds
        while (now := self.step()) < step:
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"step {now} of {step}: {self.said()}"
            time.sleep(0.05)
        return now

    def somewhere(self) -> int:
        """Wait for a random step in the first half of the training."""
        return self.wait(random.randint(EVERY + 5, STEPS // 2))

    def detected(self, since: float) -> float | None:
        """Seconds until Train's controller knew of a failure."""
        for log in sorted(
            self.driver.folder.glob("tmp/ray/session_*/logs/train/ray-train-sys-controller-*.log")
        ):
            for line in log.read_text("utf-8", "replace").splitlines():
                if "[FailurePolicy]" in line:
                    stamp = datetime.datetime.strptime(
                        json.loads(line)["asctime"], "%Y-%m-%d %H:%M:%S,%f"
                    ).timestamp()
                    if stamp > since:
                        return stamp - since
        return None

    def judge(self, told: Told, since: float, base: Run) -> Told:
        """Fill in the row of a fault that struck at ``since``, and hold the run to the undisturbed one."""
        told.detected = min(
            (s for s in (told.detected, self.detected(since)) if s is not None), default=None
        )
        lines = self.lines()
        for before, line in zip([None, *lines], lines, strict=False):
            begun, first = line["steps"][0][0], line["step"] - len(line["steps"])
            paused = before is None or begun - before["steps"][-1][1] > PAUSE
            if begun > since and paused:
                # where the workers outlived the fault for a while, as those that were cut off do, they were further than at_step
                reached = max([told.at_step, *(step for when, step in self.seen if when < begun)])
                told.resumed, told.repeated = begun - since, reached - first
                break
        told.identical = all(self.weights(s) == base.weights(s) for s in STAGES)
        same_metrics = all(self.metrics(s) == base.metrics(s) for s in STAGES)
        told.other = self.gaps("helpfulness", since)
        assert told.identical, f"{self.name}: adapters differ"
        assert same_metrics, f"{self.name}: metrics differ"
        assert self.files() == base.files()
        return told

    def gaps(self, stage: str, since: float) -> str:
        """Whether the other expert went on meanwhile; a process that starts anew pauses for longer."""
        spans = [span for line in self.lines(stage) for span in line["steps"]]
        longest = max(
            (b[0] - a[1] for a, b in itertools.pairwise(spans) if b[0] > since), default=0.0
        )
        return "restarted too" if longest > PAUSE else "trained on"

    def weights(self, stage: str) -> bytes:
        return (self.dir / f"experts/{stage}/adapter_model.safetensors").read_bytes()

    def metrics(self, stage: str) -> str:
        return (self.dir / f"metrics/{stage}.jsonl").read_text("utf-8")

    def files(self) -> set[str]:
        """Every file but the logs: an interrupted run leaves no more than another one."""
        names = {str(p.relative_to(self.dir)) for p in self.dir.rglob("*") if p.is_file()}
        return {n for n in names if not n.startswith("logs/")}

    def newest_checkpoint(self, stage: str = "safety") -> Path:
        return sorted(self.dir.glob(f"experts/{stage}.work/checkpoints/step-*"))[-1]
