"""Files of a run on any filesystem: a local or shared path, or a URI of pyarrow or fsspec.

Every write is whole or not there: renamed into place on a local path, one put on an object store.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fsspec
import tenacity
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs as pafs

from .errors import UserError

PATIENCE = 120.0  # seconds that a storage may be out of reach
_PAUSE = 0.5  # seconds before the second attempt; twice as long each time, up to 10
# What a network file system answers while it is out of reach; no space and no permission are final.
_AWAY = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED,
    errno.EPIPE, errno.EREMOTEIO, errno.EAGAIN, errno.EINTR,
}  # fmt: skip
_AWAY_TEXT = re.compile(
    "NETWORK_CONNECTION|SLOW_DOWN|UNAVAILABLE|INTERNAL_FAILURE|TIMEOUT|DEADLINE|AWS Error UNKNOWN|"
    "curlCode"
)


def _is_away(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, UserError) else error
    if not isinstance(cause, OSError):
        return False
    return cause.errno in _AWAY or bool(_AWAY_TEXT.search(str(cause)))


_patiently = tenacity.retry(
    retry=tenacity.retry_if_exception(_is_away),
    wait=lambda state: min(10.0, _PAUSE * 2 ** (state.attempt_number - 1)),
    stop=lambda state: (state.seconds_since_start or 0.0) + _PAUSE > PATIENCE,
    reraise=True,
)


class Storage:
    """One folder. Names are relative to it, with ``/`` between parts; ``storage / "sub"`` is one.

    Raises:
        UserError: a URI of an unknown filesystem; writing fails for good.
        OSError: reading fails; what is out of reach is tried again for ``PATIENCE`` seconds.
    """

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        if "://" in text:
            self.fs, root = _remote(text)
            self.uri, self.root = text.rstrip("/"), root.rstrip("/") or "/"
        else:
            self.fs = LocalFileSystem()
            self.uri = self.root = os.path.abspath(os.path.expanduser(text))

    def __truediv__(self, name: str) -> Storage:
        path, options = self._parts()
        return Storage(f"{path}/{name}{options}")

    def beside(self, name: str) -> Storage:
        """A folder in the same parent; UserError for a bucket, which has none."""
        path, options = self._parts()
        parent = path.rsplit("/", 1)[0]
        if parent.endswith(":/"):
            raise UserError(
                f"{self.uri}: a folder in it is expected, such as {path}/runs/NAME, or set cache"
            )
        return Storage(f"{parent}/{name}{options}")

    def _parts(self) -> tuple[str, str]:
        """A URI's path, and its options with their question mark, which stay behind it."""
        path, mark, options = self.uri.partition("?")
        return path.rstrip("/"), mark + options

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None on a remote filesystem."""
        return Path(self.root) if isinstance(self.fs, LocalFileSystem) else None

    def path(self, name: str = "") -> str:
        return f"{self.root}/{name}" if name else self.root

    @_patiently
    def exists(self, name: str = "") -> bool:
        try:  # not fs.exists, for which a storage out of reach has no files
            self.fs.info(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @_patiently
    def names(self, name: str = "") -> list[str]:
        """Names (not paths) of a folder's entries, sorted; empty where there is no such folder."""
        try:
            return sorted(Path(p).name for p in self.fs.ls(self.path(name), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    @_patiently
    def files(self, name: str = "") -> list[str]:
        """All files at any depth, as names relative to the storage, sorted."""
        prefix = len(self.root.rstrip("/")) + 1
        found = self.fs.find(self.path(name))
        return sorted(path[prefix:] for path in found if path != self.path(name))

    @_patiently
    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    @_patiently
    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically, and make its folders."""
        path = self.path(name)
        with _errors_named(path):
            self._make_parent(path)
            if not self.local:
                self.fs.pipe_file(path, content)
                return
            aside = f"{path}.tmp-{os.getpid()}"
            try:
                with open(aside, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, path)
            except BaseException:
                Path(aside).unlink(missing_ok=True)
                raise

    @_patiently
    def make_folder(self) -> None:
        """Make the folder and those above it."""
        with _errors_named(self.root):
            self.fs.makedirs(self.root, exist_ok=True)

    @_patiently
    def append(self, name: str, content: bytes) -> None:
        """Add to a file's end; a remote file is written anew, so append in large pieces there."""
        if not self.local:
            return self.write(name, (self.read(name) if self.exists(name) else b"") + content)
        path = self.path(name)
        with _errors_named(path):
            self._make_parent(path)
            with open(path, "ab", buffering=0) as file:
                whole = file.tell()
                try:
                    if file.write(content) < len(content):
                        raise OSError(errno.ENOSPC, "no space is left")
                except OSError:
                    file.truncate(whole)  # a part of the content must not stay
                    raise

    @_patiently
    def delete(self, name: str = "") -> None:
        """Remove a file or a whole folder; nothing happens where there is none."""
        if self.exists(name):
            self.fs.rm(self.path(name), recursive=True)

    @_patiently
    def rename(self, old: str, new: str) -> None:
        """Move a file or folder over ``new``; on an object store by copy, then delete."""
        with _errors_named(self.path(new)):
            if not self.exists(old) and self.exists(new):
                return  # done by an attempt whose answer was lost
            self.delete(new)
            self._make_parent(self.path(new))
            if self.local:
                os.rename(self.path(old), self.path(new))
                return
            for name in self.files(old):
                target = self.path(new + name[len(old) :])
                self._make_parent(target)
                self.fs.cp_file(self.path(name), target)
            self.delete(old)

    @_patiently
    def upload(self, folder: Path, name: str) -> None:
        """Copy a local folder into ``name`` by way of another name: it is whole or not there."""
        aside = f"{name}.tmp-{os.getpid()}"
        with _errors_named(self.path(name)):
            self.delete(aside)
            try:
                self.fs.put(f"{folder}/", f"{self.path(aside)}/", recursive=True)
            except BaseException:
                self.delete(aside)
                raise
            self.rename(aside, name)

    @_patiently
    def download(self, name: str, folder: Path) -> Path:
        """A local folder with the files of ``name``: a local storage's own, else a copy."""
        if self.local:
            return Path(self.path(name))
        self.fs.get(f"{self.path(name)}/", f"{folder}/", recursive=True)
        return folder

    @_patiently
    def sha256(self, name: str) -> str:
        content = hashlib.sha256()
        with self.fs.open(self.path(name), "rb") as file:
            for block in iter(partial(file.read, 1 << 22), b""):
                content.update(block)
        return content.hexdigest()

    def _make_parent(self, path: str) -> None:
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def _remote(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URI and the path in it: pyarrow's own filesystems, else fsspec's."""
    try:
        arrow, root = pafs.FileSystem.from_uri(uri)
        local = isinstance(arrow, pafs.LocalFileSystem)
        return LocalFileSystem() if local else ArrowFSWrapper(arrow), root
    except (OSError, ValueError) as error:
        if uri.partition("://")[0] in ("s3", "gs", "gcs", "hdfs", "file", "abfs", "abfss"):
            raise UserError(f"{uri}: not a filesystem of pyarrow ({error})") from None
    try:
        return fsspec.url_to_fs(uri, use_listings_cache=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{uri}: not a filesystem of pyarrow or fsspec ({error})") from None


@contextmanager
def _errors_named(path: str) -> Iterator[None]:
    """An error of writing as one line that names the path."""
    try:
        yield
    except OSError as error:
        reasons = {errno.ENOSPC: "no space is left", errno.EACCES: "no permission to write"}
        raise UserError(f"{path}: {reasons.get(error.errno or 0, str(error))}") from error
