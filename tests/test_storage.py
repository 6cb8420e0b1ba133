"""Files of a run: whole or not there, and where they are."""

import hashlib
import re
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


@pytest.mark.parametrize("kind", ["path", "file://", "memory://", "mock://"])
def test_every_filesystem_has_the_same_files(tmp_path: Path, kind: str) -> None:
    """A path, pyarrow's filesystems and fsspec's."""
    uri = {"path": str(tmp_path / "run"), "file://": f"file://{tmp_path}/run"}
    run = Storage(uri.get(kind, f"{kind}{tmp_path.name}/run"))
    assert (run.local is None) == (kind in ("memory://", "mock://"))
    assert run.names() == run.files() == []
    assert not run.exists("a/b")
    run.delete("a")
    run.write("a/b", b"one")
    run.write("a/b", b"two")
    run.append("lines", b"1\n")
    run.append("lines", b"2\n")
    run.write("a/deep/c", b"c" * 5_000_000)
    assert run.exists()
    assert run.exists("a")
    assert run.exists("a/b")
    assert (run.read("a/b"), run.read("lines")) == (b"two", b"1\n2\n")
    assert run.names() == ["a", "lines"]
    assert run.names("a") == ["b", "deep"]
    assert run.files() == ["a/b", "a/deep/c", "lines"]
    assert run.files("a") == ["a/b", "a/deep/c"]
    assert run.files("lines") == []
    assert run.sha256("a/deep/c") == hashlib.sha256(b"c" * 5_000_000).hexdigest()
    with pytest.raises(FileNotFoundError):
        run.read("nothing")
    run.write("b/old", b"old")
    run.rename("a", "b")
    assert run.files() == ["b/b", "b/deep/c", "lines"]
    (tmp_path / "made/deep").mkdir(parents=True)
    (tmp_path / "made/deep/d").write_bytes(b"d")
    run.upload(tmp_path / "made", "b")
    assert run.files() == ["b/deep/d", "lines"]
    assert (run.download("b", tmp_path / "copy") / "deep/d").read_bytes() == b"d"
    run.delete("b/deep/d")
    run.delete("lines")
    assert run.files() == []
    run.delete()
    assert not run.exists("b")


def test_a_folder_of_a_uri_and_unknown_filesystems() -> None:
    run = Storage("memory://some/run")
    (run / "sub").write("file", b"x")
    assert run.files() == ["sub/file"]
    assert run.beside("cache").uri == "memory://some/cache"
    for uri in ("nonsense://a/b", "s3://?nonsense=1"):
        with pytest.raises(UserError, match=re.escape(uri)):
            Storage(uri)


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
