"""Files of a run on any filesystem that pyarrow knows: a local or shared path, file://, s3://, gs://.

Every write is whole or not there: written aside and renamed on a local path, one put on an object store.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from pyarrow import fs as pafs

from .errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE = 120.0  # seconds that a storage may be out of reach (ours)
_PAUSE = 0.5  # seconds before the second try; then twice as long each time, up to 10
# What a network file system says while it is out of reach. No space, no permission, no such file are answers.
_AWAY = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EPIPE,
    errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO, errno.EAGAIN, errno.EINTR,
}  # fmt: skip
_AWAY_TEXT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|UNAVAILABLE|INTERNAL_FAILURE|TIMEOUT|DEADLINE|AWS Error UNKNOWN|curlCode"
)


def _patiently(
    method: Callable[Concatenate[Storage, P], T],
) -> Callable[Concatenate[Storage, P], T]:
    """Try again, up to ``PATIENCE`` seconds, while the storage is out of reach."""

    @functools.wraps(method)
    def call(self: Storage, *args: P.args, **kwargs: P.kwargs) -> T:
        deadline, pause = time.monotonic() + PATIENCE, _PAUSE
        while True:
            try:
                return method(self, *args, **kwargs)
            except (OSError, UserError) as error:
                cause = error.__cause__ if isinstance(error, UserError) else error
                away = isinstance(cause, OSError) and (
                    cause.errno in _AWAY or _AWAY_TEXT.search(str(cause))
                )
                if not away or time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 10.0)

    return call


class Storage:
    """One folder. Names are relative to it, with ``/`` between parts; ``storage / "sub"`` is a folder beneath."""

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        self.fs: pafs.FileSystem
        if "://" in text:
            try:
                self.fs, self.root = pafs.FileSystem.from_uri(text)
            except (OSError, ValueError) as error:
                raise UserError(f"{text}: not a filesystem that pyarrow knows ({error})") from None
            self.uri = text.rstrip("/")
        else:
            self.fs, self.root = pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
            self.uri = self.root
        self.root = self.root.rstrip("/") or "/"

    def __truediv__(self, name: str) -> Storage:
        path, options = self._parts()
        return Storage(f"{path}/{name}{options}")

    def beside(self, name: str) -> Storage:
        """A folder in the same parent; UserError for a bucket, which has none."""
        path, options = self._parts()
        parent = path.rsplit("/", 1)[0]
        if parent.endswith(":/"):
            raise UserError(
                f"{self.uri}: a folder in it is expected, for example {path}/runs/NAME, or set cache"
            )
        return Storage(f"{parent}/{name}{options}")

    def _parts(self) -> tuple[str, str]:
        """A URI's path, and its options with their question mark, which stay behind it."""
        path, mark, options = self.uri.partition("?")
        return path.rstrip("/"), mark + options

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None on a remote filesystem."""
        return Path(self.root) if isinstance(self.fs, pafs.LocalFileSystem) else None

    def path(self, name: str = "") -> str:
        return f"{self.root}/{name}" if name else self.root

    @_patiently
    def exists(self, name: str = "") -> bool:
        return self.fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    @_patiently
    def names(self, name: str = "") -> list[str]:
        """Names (not paths) of what lies in the folder, sorted; empty where there is no such folder."""
        selector = pafs.FileSelector(self.path(name), allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    @_patiently
    def files(self, name: str = "") -> list[str]:
        """All files at any depth, as names relative to the storage, sorted."""
        selector = pafs.FileSelector(self.path(name), allow_not_found=True, recursive=True)
        infos = self.fs.get_file_info(selector)
        return sorted(
            info.path[len(self.root) + 1 :] for info in infos if info.type == pafs.FileType.File
        )

    @_patiently
    def read(self, name: str) -> bytes:
        with self.fs.open_input_file(self.path(name)) as stream:
            return stream.read()

    @_patiently
    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically, making its folders."""
        with _told(self.path(name)):
            self._make_parent(name)
            if not self.local:
                with self.fs.open_output_stream(self.path(name)) as stream:
                    stream.write(content)
                return
            aside = f"{self.path(name)}.tmp-{os.getpid()}"
            try:
                with open(aside, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, self.path(name))
            except BaseException:
                Path(aside).unlink(missing_ok=True)
                raise

    @_patiently
    def make_folder(self) -> None:
        """Make the folder and those above it; an object store needs none."""
        with _told(self.root):
            if self.local:
                self.local.mkdir(parents=True, exist_ok=True)

    @_patiently
    def append(self, name: str, content: bytes) -> None:
        """Add to a file's end; a remote file is written anew, so append in large pieces there."""
        if not self.local:
            return self.write(name, (self.read(name) if self.exists(name) else b"") + content)
        with _told(self.path(name)):
            self._make_parent(name)
            with open(self.path(name), "ab", buffering=0) as file:
                whole = file.tell()
                try:
                    if file.write(content) < len(content):
                        raise OSError(errno.ENOSPC, "no space is left")
                except OSError:
                    file.truncate(whole)  # no half of it stays
                    raise

    @_patiently
    def delete(self, name: str = "") -> None:
        """Remove a file or a whole folder; nothing happens where there is none."""
        kind = self.fs.get_file_info(self.path(name)).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(self.path(name))
        elif kind == pafs.FileType.File:
            self.fs.delete_file(self.path(name))

    @_patiently
    def rename(self, old: str, new: str) -> None:
        """Move a file or folder over whatever stands at ``new``; on an object store by copy, then delete."""
        with _told(self.path(new)):
            if not self.exists(old) and self.exists(new):
                return  # done by a try whose answer was lost
            self.delete(new)
            self._make_parent(new)
            if self.local:
                os.rename(self.path(old), self.path(new))
            else:
                pafs.copy_files(
                    self.path(old),
                    self.path(new),
                    source_filesystem=self.fs,
                    destination_filesystem=self.fs,
                )
                self.delete(old)

    @_patiently
    def upload(self, folder: Path, name: str) -> None:
        """Copy a local folder's files into ``name`` by way of a temporary name, so that ``name`` is whole or not there."""
        with _told(self.path(name)):
            aside = f"{name}.tmp-{os.getpid()}"
            self.delete(aside)
            try:
                self.fs.create_dir(self.path(aside), recursive=True)
                pafs.copy_files(str(folder), self.path(aside), destination_filesystem=self.fs)
            except BaseException:
                self.delete(aside)
                raise
            self.rename(aside, name)

    @_patiently
    def download(self, name: str, folder: Path) -> Path:
        """A local folder with the files of ``name``: that folder itself where the storage is local, else a copy in ``folder``."""
        if self.local:
            return Path(self.path(name))
        pafs.copy_files(self.path(name), str(folder), source_filesystem=self.fs)
        return folder

    @_patiently
    def sha256(self, name: str) -> str:
        with self.fs.open_input_stream(self.path(name)) as stream:
            content = hashlib.sha256()
            while block := stream.read(1 << 22):
                content.update(block)
        return content.hexdigest()

    def _make_parent(self, name: str) -> None:
        self.fs.create_dir(self.path(name).rsplit("/", 1)[0], recursive=True)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """No permission, no space and the like as one line that names the path."""
    try:
        yield
    except OSError as error:
        what = {
            errno.ENOSPC: "no space is left",
            errno.EACCES: "no permission to write",
            errno.EROFS: "read-only",
        }
        raise UserError(f"{path}: {what.get(error.errno or 0, str(error))}") from error
