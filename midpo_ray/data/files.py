"""Rows of JSONL, JSON, Parquet and CSV files (each also .gz), of folders of these, and of hub sets.

The files are read here and not by a library, so that a fault names its file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import UserError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
_ENDINGS = f"{', '.join(ENDINGS)} (each also with .gz)"
_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ABOUT = re.compile(r"(readme|license|licence|citation|changelog|dataset_infos?|dataset_dict)\b")
# Lists and structs are converted in these columns alone, plain values in all.
_NESTED = re.compile(
    r"prompt|chosen|rejected|response_[01](_harm_category)?|system\w*|question|instruction|query"
    r"|input|context\w*|goal|behavior|text|messages|conversations?|history|turns",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Unconverted:
    """A value of a column that is not read, such as a date; it shows the column's type."""

    type: str

    def __repr__(self) -> str:
        return f"<{self.type}>"


@dataclass
class Rows:
    """(source, row) of every row; the source is "FILE:LINE" or "FILE row N"."""

    files: list[Path] = field(default_factory=list)  # empty for a hub set
    notes: list[str] = field(default_factory=list)  # what of a folder is not read
    hub: Callable[[], Iterator[tuple[str, Row]]] | None = None

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        if self.hub is not None:
            yield from self.hub()
        for file in self.files:
            yield from _file(file)


def read_rows(
    path: str, split: str = "train", revision: str | None = None, config: str | None = None
) -> Rows:
    """The rows of a file, of a folder's files, or of a set on the hub.

    Hidden files and folders (names that begin with a dot or an underscore) and descriptions of a
    set (README.json, dataset_info.json) are not data. Where file names contain splits, as in
    train-00000.parquet, only those of ``split`` are read.

    Raises:
        UserError: no such file, an unknown ending, an empty or malformed file, a column or key
            that is there twice, text that is not UTF-8, or a hub that does not answer.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder(place, split)
    if place.is_file():
        return Rows([place])
    if _HUB_NAME.fullmatch(path) and _ending(place) is None:
        return Rows(hub=lambda: _hub(path, split, revision, config))
    raise UserError(f"{path}: no such file")


def _ending(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def _folder(folder: Path, split: str) -> Rows:
    every = [f for f in sorted(folder.rglob("*")) if f.is_file() and _ending(f)]
    files, hidden, about = [], [], []
    for file in every:
        if any(part[0] in "._" for part in file.relative_to(folder).parts):
            hidden.append(file)
        elif _ABOUT.match(file.name.lower()) or _is_description(file):
            about.append(file)
        else:
            files.append(file)
    words = {f: set(re.split(r"[^a-z]+", str(f.relative_to(folder)).lower())) for f in files}
    named = set().union(*words.values()) & _SPLITS
    chosen = [f for f in files if not named or split in words[f]]
    if not chosen:
        found = f"no file ending in {_ENDINGS}"
        if named:
            found = f"no file of the split {split!r}; there are {', '.join(sorted(named))}"
        elif hidden:
            found += f" that is not hidden ({hidden[0].relative_to(folder)} is)"
        raise UserError(f"{folder}: {found}")
    others = [f for f in files if f not in chosen]
    notes = []
    for what, left in (("hidden", hidden), ("description", about), ("of another split", others)):
        if left:
            names = ", ".join(str(f.relative_to(folder)) for f in left[:3])
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            notes.append(f"{folder}: not read ({what}): {names}{more}")
    return Rows(chosen, notes)


def _is_description(file: Path) -> bool:
    """Whether a .json file of a folder is one object that has none of a row's columns."""
    if not file.name.lower().endswith(".json") or file.stat().st_size > 1 << 20:
        return False
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (ValueError, RecursionError, OSError):
        return False  # lines of rows, or a fault that is reported when the file is read
    return isinstance(content, dict) and not any(_NESTED.fullmatch(name) for name in content)


def _file(file: Path) -> Iterator[tuple[str, Row]]:
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}
    ending = _ending(file)
    if ending is None:
        raise UserError(f"{file}: unknown file ending, known are {_ENDINGS}")
    empty = True
    try:
        with open(file, "rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if file.name.lower().endswith(".gz") else raw
            for row in readers[ending](file, stream):
                empty = False
                yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    if empty:
        raise UserError(f"{file}: the file is empty, rows are expected")


def _require_unique(names: Sequence[str], source: Any) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{source}: column {twice[0]!r} is there twice; rename or remove one")


def _decoded(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """(line number, line with its end)."""
    for number, line in enumerate(stream, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}:{number}: not UTF-8 (byte {error.start + 1} of the line): convert the file"
            ) from None


def _parse(text: str, source: str, lines: bool = False) -> Any:
    """A JSON document; an object that has a key twice is refused."""

    def row(items: list[tuple[str, Any]]) -> Row:
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            _require_unique(names, source)
        return dict(items)

    try:
        return json.loads(text, object_pairs_hook=row)
    except json.JSONDecodeError as error:
        where = f":{error.lineno}" if lines else ""
        what = error.msg if lines else f"{error.msg} at column {error.colno}"
        raise UserError(f"{source}{where}: malformed JSON ({what})") from None
    except RecursionError:
        raise UserError(f"{source}: malformed JSON (nested too deep)") from None
    except ValueError as error:  # a number of too many digits
        raise UserError(f"{source}: malformed JSON ({error})") from None


def _json_lines(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    for number, line in _decoded(file, stream):
        if not line.isspace():
            yield f"{file}:{number}", _object(_parse(line, f"{file}:{number}"), f"{file}:{number}")


def _json(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    """One array of rows; or lines, which many files named .json hold."""
    text = "".join(line for _, line in _decoded(file, stream))
    if not text.lstrip().startswith("["):
        yield from _json_lines(file, io.BytesIO(text.encode()))
        return
    for number, row in enumerate(_parse(text, str(file), lines=True), 1):
        yield f"{file} row {number}", _object(row, f"{file} row {number}")


def _object(row: Any, source: str) -> Row:
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise UserError(f"{source}: a JSON object with the row's columns is expected, not {kind}")
    return row


def _csv(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in _decoded(file, stream)), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            source, start = f"{file}:{start}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                _require_unique([name for name in header if name], file)
            elif len(fields) != len(header):
                raise UserError(f"{source}: {len(fields)} fields, the header has {len(header)}")
            else:
                yield source, {k: v for k, v in zip(header, fields, strict=True) if k}
    except csv.Error as error:
        raise UserError(f"{file}:{start}: malformed CSV ({error})") from None


def _parquet(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet as pq  # not below `midpo --help`

    def batches() -> Iterator[Any]:
        parquet = pq.ParquetFile(io.BytesIO(stream.read()) if file.suffix == ".gz" else file)
        _require_unique(parquet.schema_arrow.names, file)
        yield from parquet.iter_batches(4096)

    yield from _arrow_rows(str(file), batches(), "not a Parquet file that can be read")


def _hub(name: str, split: str, revision: str | None, config: str | None) -> Iterator[Any]:
    import datasets  # takes a second to import

    def batches() -> Iterator[Any]:
        try:
            loaded = datasets.load_dataset(name, config, split=split, revision=revision)
        except Exception as error:
            if any(sign in _what(error).lower() for sign in ("gated", "401", "403")):
                raise UserError(
                    f"{name} is gated: accept its terms at https://huggingface.co/datasets/{name}, "
                    "log in by `hf auth login`, or name a file of it"
                ) from None
            raise
        yield from loaded.with_format("arrow").iter(4096)

    fault = "no such file or folder, and it cannot be loaded from the hub"
    yield from _arrow_rows(name, batches(), fault)


def _arrow_rows(name: str, batches: Iterator[Any], fault: str) -> Iterator[tuple[str, Row]]:
    """Rows of Arrow tables or record batches; every error of the libraries is one line."""
    number = 0
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            rows = _converted(batch)
        except UserError:
            raise
        except UnicodeDecodeError:
            raise UserError(f"{name}: not UTF-8 (behind row {number}): convert the file") from None
        except Exception as error:  # only code of pyarrow and datasets runs here
            raise UserError(f"{name}: {fault} ({_what(error)})") from None
        for row in rows:
            number += 1
            yield f"{name} row {number}", row


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _converted(batch: Any) -> list[Row]:
    """The rows of a batch; columns that no reader needs are not converted."""
    import pyarrow as pa

    def plain(kind: Any) -> bool:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        texts = (pa.string(), pa.large_string(), pa.string_view())
        numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        return kind in texts or numbers or pa.types.is_boolean(kind) or pa.types.is_null(kind)

    rows: list[Row] = [{} for _ in range(batch.num_rows)]
    for column in batch.schema:
        nested = pa.types.is_nested(column.type) and _NESTED.fullmatch(column.name)
        values: list[Any] = [Unconverted(str(column.type))] * len(rows)
        if plain(column.type) or nested:
            values = batch.column(column.name).to_pylist()
        for row, value in zip(rows, values, strict=True):
            row[column.name] = value
    return rows
