"""Checkpoints: whole or not there, the last k, a damaged one passed over, nothing left behind, size bounded."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch

from midpo_ray.errors import UserError
from midpo_ray.storage import Storage
from midpo_ray.training.checkpoint import (
    KINDS,
    STATE,
    TENSORS,
    Checkpoints,
    beyond,
    name_of,
    steps_in,
)


def tensors(seed: int = 0, numel: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{kind}/layer.{n}": torch.randn(numel, generator=generator)
        for kind in KINDS
        for n in range(2)
    }


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(Storage(tmp_path / "checkpoints"), keep=2, digest="abc")


def test_names():
    assert name_of(40) == "step-00000040"
    assert steps_in(["step-00000040", "step-00000003", "step-3", "writing-00000050", "notes"]) == [
        3,
        40,
    ]
    assert beyond([30, 10, 20], 2) == [10]
    assert beyond([10], 2) == []


def test_none_to_resume_from(checkpoints):
    assert checkpoints.resume() is None


def test_what_goes_in_comes_out_and_the_last_k_are_kept(checkpoints):
    for step in (10, 20, 30):
        checkpoints.save(step, tensors(step), {"window": [{"loss": 0.1 + 0.2}]})
    assert checkpoints.folder.names() == [name_of(20), name_of(30)]
    assert checkpoints.folder.names(name_of(30)) == [STATE, TENSORS]
    found = checkpoints.resume()
    assert found.step == 30
    assert found.state["window"] == [{"loss": 0.1 + 0.2}]  # to the last bit
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors(30).items())
    assert found.tensors.keys() == tensors().keys()


def truncate(folder):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])


def flip(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-5] ^= 1
    (folder / TENSORS).write_bytes(data)


def tear_state(folder):
    (folder / STATE).write_text((folder / STATE).read_text()[:20])


def empty(folder):
    (folder / STATE).unlink()
    (folder / TENSORS).unlink()


def rename_step(folder):
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**state, "step": 7}))


DAMAGES = [
    truncate,
    flip,
    tear_state,
    empty,
    rename_step,
    lambda f: (f / TENSORS).unlink(),
    lambda f: (f / STATE).write_bytes(b"\xff[]"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_warning(checkpoints, damage, caplog):
    checkpoints.save(10, tensors(10), {})
    checkpoints.save(20, tensors(20), {})
    damage(checkpoints.folder.local / name_of(20))
    with caplog.at_level(logging.WARNING):
        assert checkpoints.resume().step == 10
    assert "step-00000020 is" in caplog.text
    assert checkpoints.folder.names() == [name_of(10)]  # so that it can be written again
    checkpoints.save(20, tensors(20), {})
    assert checkpoints.resume().step == 20


def test_another_configuration_s_is_not_resumed_from(checkpoints, caplog):
    checkpoints.save(10, tensors(), {})
    other = Checkpoints(checkpoints.folder, keep=2, digest="xyz")
    assert other.resume() is None
    assert "another configuration" in caplog.text
    assert other.folder.names() == []


def test_nothing_half_written_is_left(checkpoints):
    checkpoints.save(10, tensors(), {})
    folder = checkpoints.folder.local
    (folder / "writing-00000020").mkdir()
    (folder / "writing-00000020" / f"{TENSORS}.tmp-1").write_bytes(
        b"half"
    )  # of a process that was killed
    assert checkpoints.resume().step == 10
    assert checkpoints.folder.names() == [name_of(10)]


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/full"),
    reason="needs root to mount a small file system",
)
def test_a_full_disk_leaves_the_one_before(tmp_path):
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        checkpoints = Checkpoints(Storage(disk / "checkpoints"), keep=2, digest="abc")
        checkpoints.save(10, tensors(10), {})
        with pytest.raises(UserError, match="no space"):
            checkpoints.save(20, tensors(20, numel=20_000), {})
        assert checkpoints.folder.names() == [name_of(10)]
        assert checkpoints.resume().step == 10
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_frozen_weight_or_another_dtype_is_refused(checkpoints):
    with pytest.raises(AssertionError, match="base"):
        checkpoints.save(1, {**tensors(), "base/weight": torch.zeros(10)}, {})
    with pytest.raises(AssertionError, match=r"layer\.9"):
        checkpoints.save(
            1, {**tensors(), "exp_avg/layer.9": torch.zeros(1, dtype=torch.float64)}, {}
        )
    assert checkpoints.folder.names() == []


def test_size_is_three_numbers_for_a_trained_parameter(checkpoints):
    checkpoints.save(1, tensors(numel=100_000), {"window": []})
    size = sum(f.stat().st_size for f in (checkpoints.folder.local / name_of(1)).iterdir())
    assert size <= 3 * 4 * 200_000 + 4096
