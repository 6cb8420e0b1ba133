"""The test hosts themselves: apart from each other and from this computer, killed, cut off, and back again."""

from __future__ import annotations

import os
import subprocess

import pytest
from hosts import Hosts

pytestmark = pytest.mark.cluster
KNOCK = "timeout 2 bash -c 'echo > /dev/tcp/b/22' 2> /dev/null && echo open || echo shut"


def test_hosts_come_and_go(tmp_path):
    links = (
        subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout
        if os.geteuid() == 0
        else ""
    )
    with Hosts(tmp_path / "hosts", ["a", "b"]) as hosts:
        a, b = hosts["a"], hosts["b"]
        assert a.run(
            "ssh -o StrictHostKeyChecking=no b 'hostname; hostname -I'"
        ).stdout.split() == ["b", b.address]
        assert a.processes("sshd") == [1]  # and sees no process of any other machine
        a.run("touch /root/mine /tmp/mine /dev/shm/mine /run/shared/ours")
        assert b.run("ls /root/mine /tmp/mine /dev/shm/mine", check=False).stdout == ""
        assert b.run("ls /run/shared").stdout == "ours\n"

        hosts.partition("b")
        assert a.run(KNOCK).stdout == "shut\n"
        assert b.run("hostname").stdout == "b\n"  # it lives on
        hosts.heal("b")
        assert a.run(KNOCK).stdout == "open\n"

        b.run("touch /root/kept")
        b.kill()
        assert a.run(KNOCK).stdout == "shut\n"
        hosts.boot("b")
        hosts.wait("b")
        assert a.run(KNOCK).stdout == "open\n"
        assert b.run("ls /root").stdout == "kept\n"
        pids = [h.process.pid for h in hosts.hosts.values()]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout == links
