"""One self-contained page: tables, pictures, and where every number comes from."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from dualcl.results import tables
from dualcl.results.metrics import COST, COSTS
from dualcl.results.published.render import NONE, NOTE, TITLE, Block, legend, sentence
from dualcl.results.record_type import MatrixKind
from dualcl.results.records import Record, command
from dualcl.results.tables import Summary, Table
from dualcl.results.writers.pictures import Pictures


def _facts(record: Record) -> list[tuple[str, Any]]:
    """What a reader needs to know of a run, or to repeat it."""
    data = record.data
    *earlier, environment = record.environments
    shown = {key: value for key, value in data["identity"].items() if key != "class_order"}
    order = "class" if record.kind.item == "task" else record.kind.item
    return [
        ("status", record.status),
        ("error", data.get("error")),
        ("directory", record.directory),
        *((key.replace("_", " "), data.get(key)) for key in ("config_hash", "created", "finished")),
        *(
            (key, json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value)
            for key, value in (dict(environment) | shown).items()
            if key != "earlier"
        ),
        *(("before that", _before(part, environment)) for part in earlier),
        (f"{order} order", " ".join(map(str, data["identity"].get("class_order") or []))),
    ]


def _before(part: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differed in an environment that a run began in, and until where."""
    until = ("tasks", "step")
    other = ", ".join(f"{key} {value}" for key, value in part.items() if key not in until and value != now.get(key))
    return f"{other}, until step {part.get('step')} after {part.get('tasks')} finished tasks"


def _configuration(record: Record) -> str:
    return json.dumps(record.data["config"], indent=2, ensure_ascii=False, default=str)


def _definitions(kind: MatrixKind, numbered: Sequence[tuple[int, Table]]) -> list[tuple[str, str]]:
    """Columns of the tables of a kind, then what else they measure."""
    measures = {m.key: m for _, table in numbered for m in (*table.metrics, *table.all_metrics) if m.key not in COST}
    return [(f"{m.title} {tables.arrow(m)}", m.definition) for m in measures.values()]


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["b64"] = lambda data: base64.b64encode(data).decode()
for _function in (
    tables.arrow, tables.caveat_lines, tables.cell, tables.compared_rows, tables.difference_metrics,
    tables.difference_notes, tables.difference_parts, tables.difference_title, tables.difference_unit, tables.few_seeds,
    tables.ranking_lines, tables.row_name, tables.seeds_note, tables.shared_seeds, tables.unit,
    command, legend, sentence,
):  # fmt: skip
    _ENVIRONMENT.globals[_function.__name__] = _function
_ENVIRONMENT.globals.update(
    facts=_facts, configuration=_configuration, definitions=_definitions, published_title=TITLE, published_note=NOTE,
    published_none=NONE, costs=[(f"{m.title} {tables.arrow(m)}", m.definition) for m in COSTS],
)  # fmt: skip


def page(
    summary: Summary,
    pictures: Pictures,
    shown: Sequence[Record],
    blocks: Sequence[Block] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page; `shown` are the runs in full, `blocks` the published numbers, `notes` what is left out."""
    numbered = list(enumerate(summary.tables))
    by_kind = [(kind, [(i, t) for i, t in numbered if t.kind is kind]) for kind, _ in tables.sections(summary)]
    by_table: dict[tuple[str, str], list[Record]] = {}
    for record in shown:
        by_table.setdefault((record.table, record.kind.heading), []).append(record)
    runs = [(table, by_table.get((table.preset, table.kind.heading), [])) for table in summary.tables]
    template = _ENVIRONMENT.get_template("report.html.j2")
    return template.render(summary=summary, pictures=pictures, by_kind=by_kind, runs=runs, blocks=blocks, notes=notes)
