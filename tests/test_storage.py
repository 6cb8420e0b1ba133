"""Files of a run: whole or not there, and where they are."""

from pathlib import Path

import pytest

from midpo_ray import UserError, load_config
from midpo_ray.pipeline.run import cache_folder
from midpo_ray.storage import Storage


def test_a_folder_is_uploaded_whole(tmp_path: Path) -> None:
    source, run = tmp_path / "made", Storage(tmp_path / "run")
    (source / "deep").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"a")
    (source / "deep/b.bin").write_bytes(b"b")
    for content in (b"a", b"second"):
        (source / "a.bin").write_bytes(content)
        run.upload(source, "experts/safety")
        assert run.files() == ["experts/safety/a.bin", "experts/safety/deep/b.bin"]
        assert run.read("experts/safety/a.bin") == content


def test_an_upload_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    run = Storage(tmp_path / "run")
    run.write("experts/safety/a.bin", b"old")
    with pytest.raises(UserError, match="experts/safety"):
        run.upload(tmp_path / "nowhere", "experts/safety")
    assert run.files() == ["experts/safety/a.bin"]
    assert run.names("experts") == ["safety"]


def test_a_uris_options_stay_behind_the_path(tmp_path: Path) -> None:
    shared = Storage("s3://bucket/path?region=x&endpoint_override=127.0.0.1:1")
    beneath = shared / "scored"
    assert (beneath.root, beneath.uri.partition("?")[2]) == (
        "bucket/path/scored",
        shared.uri.partition("?")[2],
    )
    cache = cache_folder(load_config("miniature"), shared)
    assert cache.root == "bucket/cache"
    with pytest.raises(UserError, match="a folder in it is expected"):
        cache_folder(load_config("miniature"), Storage("s3://bucket?region=x"))
