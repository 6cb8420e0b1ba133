"""Rows of JSONL, JSON, Parquet and CSV files (each also .gz), of folders of these, and of sets on the hub.

Read here rather than by a library so that a fault is told by file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import UserError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}


def read_rows(
    path: str, split: str = "train", revision: str | None = None
) -> Iterator[tuple[str, Row]]:
    """(source, row) of a file, of a folder's files, or of a set on the hub; source is "FILE:LINE" or "FILE row N".

    Raises:
        UserError: no such file, an unknown ending, an empty or malformed file, text that is not UTF-8, a hub out of reach.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        yield from _folder(place, split)
    elif place.is_file():
        yield from _file(place)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and _ending(place) is None:
        yield from _hub(path, split, revision)
    else:
        raise UserError(f"{path}: no such file")


def _ending(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def _folder(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
    """All files beneath, sorted; where names tell splits (train-00000.parquet, test.jsonl) those of the split alone."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _ending(file))
    words = {
        file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files
    }
    named = set().union(*words.values()) & _SPLITS if files else set()
    chosen = [file for file in files if split in words[file]] if named else files
    if not chosen:
        found = (
            f"no file of the split {split!r}; there are {', '.join(sorted(named))}"
            if named
            else "no file ending in "
        )
        raise UserError(f"{folder}: {found}{'' if named else _endings()}")
    for file in chosen:
        yield from _file(file)


def _endings() -> str:
    return f"{', '.join(ENDINGS)} (each also with .gz)"


def _file(file: Path) -> Iterator[tuple[str, Row]]:
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}
    ending = _ending(file)
    if ending is None:
        raise UserError(f"{file}: unknown file ending, known are {_endings()}")
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


def _decoded(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """(line number, line with its end)."""
    for number, line in enumerate(stream, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}:{number}: not UTF-8 (byte {error.start + 1} of the line): convert the file"
            ) from None


def _json_lines(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    for number, line in _decoded(file, stream):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            what = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else "nested too deep"
            )
            raise UserError(f"{file}:{number}: malformed JSON ({what})") from None
        yield f"{file}:{number}", _object(row, f"{file}:{number}")


def _json(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    """One array of rows; or lines, which many files named .json hold."""
    lines = list(_decoded(file, stream))
    text = "".join(line for _, line in lines)
    if not text.lstrip().startswith("["):
        yield from _json_lines(file, io.BytesIO(text.encode()))
        return
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{file}{where}: malformed JSON ({getattr(error, 'msg', 'nested too deep')})"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{file} row {number}", _object(row, f"{file} row {number}")


def _object(row: Any, source: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"{source}: a JSON object with the row's columns is expected, this is {type(row).__name__}"
        )
    return row


def _csv(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    reader = csv.reader((line for _, line in _decoded(file, stream)), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            source, start = f"{file}:{start}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = fields
            elif len(fields) != len(header):
                raise UserError(f"{source}: {len(fields)} fields, the header has {len(header)}")
            else:
                yield (
                    source,
                    {
                        name: _csv_value(name, text)
                        for name, text in zip(header, fields, strict=True)
                    },
                )
    except csv.Error as error:
        raise UserError(f"{file}:{start}: malformed CSV ({error})") from None


def _csv_value(name: str, text: str) -> Any:
    """CSV has texts alone: labels are given their type here; a text that is no label is left for the reader to refuse."""
    if not re.fullmatch(r"is_response_[01]_safe|(better|safer)_response_id", name):
        return text
    known = {
        "": None,
        "null": None,
        "none": None,
        "nan": None,
        "true": True,
        "false": False,
        "0": 0,
        "1": 1,
        "0.0": 0,
        "1.0": 1,
    }
    return known.get(text.strip().lower(), text)


def _parquet(file: Path, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(
            io.BytesIO(stream.read()) if file.suffix == ".gz" else file
        ).iter_batches(4096):
            for row in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", row
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 (behind row {number}): convert the file") from None
    except pa.ArrowException as error:
        raise UserError(f"{file}: not a Parquet file ({' '.join(str(error).split())})") from None


def _hub(name: str, split: str, revision: str | None) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the hub's and the library's many errors alike: whatever it is, the set cannot be had
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: no such file or folder here, and as a set on the hub it cannot be had ({type(error).__name__}: {what})"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{name} row {number}", row
