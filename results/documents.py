"""The files of this folder that are written from the code; `python -m dualcl.results.documents` writes them again.

record.schema.json from the fields of a record, the columns in SCHEMA.md, the numbers in published/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualcl.results.data import DTYPES, FRAMES
from dualcl.results.data import VERSION as COLUMNS_VERSION
from dualcl.results.files import write_text
from dualcl.results.metrics import KINDS
from dualcl.results.published import BENCHMARKS, published_numbers
from dualcl.results.published.render import legend, stream_blocks
from dualcl.results.record_type import FIELDS, FORMAT, VERSION
from dualcl.results.writers import markdown

FOLDER = Path(__file__).parent
#: what stands before the part that is written
_COLUMNS = f"## Columns, version {COLUMNS_VERSION}\n\n"
_NUMBERS = "Marks and metrics:\n\n"


def record_schema() -> dict[str, Any]:
    """The JSON Schema of record.json."""
    root: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"record.json of a dualcl run, version {VERSION}",
        "type": "object",
        "description": "Everything a run leaves behind but its log and its weights. New keys may come within a "
        "version, all optional; none is renamed, removed or changes its meaning.",
        "required": ["format", "version"],
        "properties": {"format": {"const": FORMAT}, "version": {"const": VERSION}},
    }
    for field in FIELDS:
        place = root
        *path, last = field.name.replace("[]", ".items").replace("{}", ".additionalProperties").split(".")
        for part in path:
            place = place[part] if part in ("items", "additionalProperties") else place["properties"][part]
        if last in ("items", "additionalProperties"):
            place[last] = field.schema()
            continue
        place.setdefault("properties", {})[last] = field.schema()
        if field.required:
            place.setdefault("required", []).append(last)
    root["properties"]["matrix"]["properties"]["kind"] = {"enum": list(KINDS)}
    root["properties"]["matrix"]["required"].append("kind")
    root["properties"]["matrix"]["allOf"] = [
        {"if": {"properties": {"kind": {"const": name}}}, "then": {"properties": {"rows": {"items": _row(name)}}}}
        for name in KINDS
    ]
    return root


def _row(name: str) -> dict[str, Any]:
    kind = KINDS[name]
    after = {"type": "integer", "minimum": 0, "description": f"the {kind.item} learnt last, from 0"}
    lists = {
        field.name: {"type": "array", "description": field.about, "items": field.schema(of_cells=True)}
        for field in kind.by_name.values()
    }
    return {
        "type": "object",
        "description": f"one evaluation, after the {kind.item} `after_task`; lists have an entry for each of the "
        f"{kind.item}s 0 to `after_task`, null where one was not evaluated",
        "required": ["after_task", *(field.name for field in kind.by_name.values() if field.required)],
        "properties": {"after_task": after, **lists},
    }


def columns() -> str:
    """The columns of all frames, for SCHEMA.md."""
    lines = []
    for what, (found, _) in FRAMES.items():
        lines += [f"### {what}", "", "| column | dtype | what it holds |", "| --- | --- | --- |"]
        lines += [f"| `{c.name}` | {DTYPES[c.kind]} | {c.what.replace('|', chr(92) + '|')} |" for c in found]
        lines.append("")
    return "\n".join(lines)


def numbers() -> str:
    """What the marks of published numbers mean, how many there are, and all of them, for published/README.md."""
    count = {b: sum(n.benchmark == b for n in published_numbers()) for b in BENCHMARKS}
    marks = [f"- {markdown.markdown_text(line)}" for line in legend()]
    counted = ", ".join(f"{name} {n}" for name, n in count.items())
    blocks = markdown.published(stream_blocks())
    return "\n".join([*marks, "", f"Numbers: {counted}; {sum(count.values())} in all.", "", blocks]).rstrip() + "\n"


def documents() -> dict[Path, str]:
    """Every file with its text as it should be; what people write of it is taken from the file itself."""
    found = {FOLDER / "record.schema.json": json.dumps(record_schema(), indent=1, ensure_ascii=False) + "\n"}
    for name, mark, text in (("SCHEMA.md", _COLUMNS, columns()), ("published/README.md", _NUMBERS, numbers())):
        before, _, _ = (FOLDER / name).read_text(encoding="utf-8").partition(mark)
        found[FOLDER / name] = before + mark + text.rstrip() + "\n"
    return found


if __name__ == "__main__":
    for path, text in documents().items():
        write_text(path, text)
