"""Machines for the cluster tests, on one computer: each has its own address, name, sshd, processes, /root, /tmp, /run, /dev/shm.

Every machine is one ``unshare`` process and what it started; a further one holds the switch (a bridge) between them. Nothing is
named or kept in the computer's own namespaces: when those processes end, network, mounts and processes are gone with them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NETWORK = "10.77.0"
NEEDED = {
    "ps": "procps",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
}
SSHD = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile /root/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
"""
# Runs as process 1 of a machine. /tmp comes last: what is bound before may lie in the old one.
BOOT = """\
set -e
mount --make-rprivate /
hostname {name}
mkdir -p {folder}/run/sshd {folder}/run/shared
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf $(readlink -f /etc/resolv.conf)
mount --bind {shared} {folder}/run/shared
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
{visible}
mount --rbind {folder}/run /run
cp {folder}/sshd_config {folder}/host_key /run/sshd/
mount --rbind {folder}/root /root
mount --rbind {folder}/tmp /tmp
ip link set lo up
cd /root
exec /usr/sbin/sshd -D -e -f /run/sshd/sshd_config
"""


def missing() -> str | None:
    """Why hosts cannot be made here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "test hosts need root on Linux"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = sorted(
        {package for program, package in NEEDED.items() if not shutil.which(program, path=path)}
    )
    if absent:
        return f"test hosts need the packages {', '.join(absent)}"
    tried = subprocess.run(
        [
            "unshare",
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "ip",
            "link",
            "add",
            "b0",
            "type",
            "bridge",
        ],
        capture_output=True,
        text=True,
    )
    return (
        f"test hosts need namespaces and bridges: {tried.stderr.strip()}"
        if tried.returncode
        else None
    )


def die_with_parent() -> None:
    """In a new process: be killed when the test run ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Host:
    """One machine; ``pid`` is the process whose end is the machine's."""

    def __init__(self, name: str, address: str, folder: Path, port: str) -> None:
        self.name, self.address, self.folder, self.port = name, address, folder, port
        self.mac = f"02:00:00:00:00:{int(address.rpartition('.')[2]):02x}"  # the same after a reboot: the others remember it
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def first(self) -> int:
        """Process 1 of the machine, by its number outside."""
        assert self.process is not None
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def run(
        self, command: str, timeout: float = 60, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """``command`` by a login shell on the machine, as somebody at its keyboard."""
        shell = ["timeout", "--kill-after=5", str(timeout), *self._shell(command)]
        done = subprocess.run(
            [*self._enter(), *shell],
            capture_output=True,
            text=True,
            env=self._clean(environment),
            preexec_fn=die_with_parent,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{self.name}: {command!r} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
            )
        return done

    def start(self, command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """``command`` in the background; what it says goes to ``log``. It ends with the machine."""
        with log.open("ab") as file:
            return subprocess.Popen(
                [*self._enter(), *self._shell(f"exec {command}")],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._clean(environment), preexec_fn=die_with_parent,
            )  # fmt: skip

    def _enter(self) -> list[str]:
        return [
            "nsenter",
            "--target",
            str(self.first),
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--pid",
            "--",
        ]

    def _shell(self, command: str) -> list[str]:
        return ["bash", "-c", f"cd /root; source /root/.bashrc; {command}"]

    def _clean(self, more: dict[str, str]) -> dict[str, str]:
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"HOME": "/root", "PATH": path, "TERM": "dumb", **more}

    def processes(self, word: str) -> list[int]:
        """Numbers, on the machine, of the processes whose command line has ``word``."""
        listed = self.run("ps -eo pid=,args= -ww").stdout.splitlines()
        return [int(line.split()[0]) for line in listed if word in line.partition(" ")[2]]

    def kill(self) -> None:
        """The power cut: every process of the machine ends at once, with its connections unclosed."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class Hosts:
    """``with Hosts(folder, ["head", "safety"]) as hosts``: the machines by name, all there and answering to SSH.

    Args:
        folder: where their disks lie; afterwards the logs can be read there.
        names: host names; addresses are 10.77.0.10 and on, in this order.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.shared = folder, folder / "shared"
        self.shared.mkdir(parents=True)
        self.hosts = {
            n: Host(n, f"{NETWORK}.{10 + i}", folder / n, f"port{i}") for i, n in enumerate(names)
        }
        self.switch: subprocess.Popen[bytes] | None = None

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Hosts:
        if reason := missing():
            pytest.skip(reason)
        try:
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "key"],
                check=True,
            )
            self.switch = self._unshare("switch", "sleep infinity", "--net")
            self._in_switch(
                f"ip link add b0 type bridge && ip addr add {NETWORK}.1/24 dev b0 && ip link set b0 up && ip link set lo up"
            )
            for host in self.hosts.values():
                self._furnish(host)
                self.boot(host.name)
            self.wait(*self.hosts)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in [h.process for h in self.hosts.values()] + [self.switch]:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()

    def boot(self, name: str) -> None:
        """Switch a machine on, for the first time or after ``kill``; its disk is as it was, its /dev/shm is empty."""
        host = self.hosts[name]
        shutil.rmtree(host.folder / "run", ignore_errors=True)
        (host.folder / "run").mkdir()
        flags = ("--net", "--mount", "--pid", "--uts", "--ipc", "--mount-proc")
        host.process = self._unshare(name, (host.folder / "boot").read_text("utf-8"), *flags)
        pid = host.process.pid
        self._in_switch(
            f"ip link delete {host.port} 2> /dev/null; "
            f"ip link add {host.port} type veth peer name eth0 address {host.mac} netns {pid} && "
            f"ip link set {host.port} master b0 up"
        )
        self._in(
            pid,
            f"ip addr add {host.address}/24 dev eth0 && ip link set eth0 up && ip route add default via {NETWORK}.1",
        )

    def wait(self, *names: str, seconds: float = 20) -> None:
        """Until the machines answer to SSH."""
        assert self.switch is not None
        deadline = time.monotonic() + seconds
        for name in names:
            probe = f"exec 3<> /dev/tcp/{self.hosts[name].address}/22 && head -c 4 <&3"
            while (
                b"SSH-"
                not in subprocess.run(
                    self._enter(self.switch.pid, probe), capture_output=True
                ).stdout
            ):
                log = (self.folder / f"{name}.log").read_text("utf-8")
                assert time.monotonic() < deadline, f"{name} does not answer to SSH: {log[-2000:]}"
                time.sleep(0.1)

    def partition(self, name: str) -> None:
        """The machine lives on and hears nobody: its port drops everything, without a sign on its own side."""
        self._in_switch(f"ip link set dev {self.hosts[name].port} nomaster")

    def heal(self, name: str) -> None:
        self._in_switch(f"ip link set dev {self.hosts[name].port} master b0")

    def _furnish(self, host: Host) -> None:
        """The machine's disk: keys, a shell that finds this Python's programs, names of all machines, no name server."""
        for part in ("root/.ssh", "tmp", "run"):
            (host.folder / part).mkdir(parents=True)
        os.chmod(host.folder / "tmp", 0o1777)
        ssh = host.folder / "root" / ".ssh"
        shutil.copy(self.folder / "key", ssh / "id_ed25519")
        shutil.copy(self.folder / "key.pub", ssh / "authorized_keys")
        shutil.copy(self.folder / "key", host.folder / "host_key")
        path = f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        settings = f"PYTHONPATH={REPOSITORY} OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 LC_ALL=C.UTF-8"
        bashrc = f"export PATH={path} {settings}\n"
        (host.folder / "root" / ".bashrc").write_text(bashrc, "utf-8")
        names = "".join(f"{h.address} {h.name}\n" for h in self.hosts.values())
        (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}", "utf-8")
        (host.folder / "resolv.conf").write_text("", "utf-8")
        (host.folder / "sshd_config").write_text(SSHD.format(folder="/run/sshd"), "utf-8")
        boot = BOOT.format(
            name=host.name, folder=host.folder, shared=self.shared, visible=self._visible(host)
        )
        (host.folder / "boot").write_text(boot, "utf-8")

    def _visible(self, host: Host) -> str:
        """Commands that keep this repository and its Python in sight where they lie in a folder that a machine has of its own."""
        lines = []
        for path in {REPOSITORY, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}:
            for top in ("root", "tmp", "run"):
                if path.is_relative_to(f"/{top}"):
                    inside = host.folder / top / path.relative_to(f"/{top}")
                    lines.append(f"mkdir -p {inside} && mount --rbind {path} {inside}")
        return "\n".join(sorted(lines, key=len))

    def _unshare(self, name: str, script: str, *flags: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                ["unshare", *flags, "--fork", "--kill-child", "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        ours, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 10
        while os.readlink(f"/proc/{process.pid}/ns/net") == ours:
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, (self.folder / f"{name}.log").read_text("utf-8")
            time.sleep(0.01)
        return process

    def _enter(self, pid: int, command: str) -> list[str]:
        return ["nsenter", "--target", str(pid), "--net", "--", "bash", "-c", command]

    def _in(self, pid: int, command: str) -> None:
        done = subprocess.run(self._enter(pid, command), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def _in_switch(self, command: str) -> None:
        assert self.switch is not None
        self._in(self.switch.pid, command)
