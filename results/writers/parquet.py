"""Records as pandas frames, and those as Parquet files; pyarrow is imported when it is asked for."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.results.data import FRAMES, VERSION, need_parquet
from dualcl.results.files import write_bytes
from dualcl.results.records import Record


def _typed(values: Sequence[Any], kind: str) -> Any:
    if kind == "number":
        known = [float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else None for v in values]
        return pd.Series(known, dtype="float64")
    if kind == "integer":
        return pd.Series([v if type(v) is int else None for v in values], dtype="Int64")
    if kind == "flag":
        return pd.Series([v if isinstance(v, bool) else None for v in values], dtype="boolean")
    text = pd.Series([None if v is None else str(v) for v in values], dtype="string")
    if kind == "time":
        return pd.to_datetime(text, utc=True, errors="coerce", format="ISO8601").dt.as_unit("us")
    return text


def frame_of(records: Iterable[Record], what: str = "runs") -> pd.DataFrame:
    """The frame `what` of these records, rows in their order. UserError for another name."""
    if what not in FRAMES:
        raise UserError(f"unknown frame {what!r}; {nearest(what, FRAMES, 'frames')}")
    columns, rows = FRAMES[what]
    values: dict[str, list[Any]] = {column.name: [] for column in columns}
    for record in records:
        for row in rows(record):
            for name, column in values.items():
                column.append(row.get(name))
    return pd.DataFrame({column.name: _typed(values[column.name], column.kind) for column in columns})


def write_parquet(records: Sequence[Record], what: str, path: Path) -> Path:
    """Writes a frame as Parquet; version and columns are in its metadata under `dualcl`. UserError without pyarrow."""
    need_parquet()
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pandas(frame_of(records, what), preserve_index=False)
    about = {"frame": what, "version": VERSION, "columns": {c.name: c.what for c in FRAMES[what][0]}}
    buffer = io.BytesIO()
    metadata = {**(table.schema.metadata or {}), b"dualcl": json.dumps(about).encode()}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), buffer)
    return write_bytes(path, buffer.getvalue())
