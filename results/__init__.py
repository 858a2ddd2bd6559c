"""Metrics, tables, plots and reports, rebuilt from run records alone: no torch, no weights, no data."""

from dualcl.results.data import frame, load
from dualcl.results.records import Record, comparable, find_records, load_record
from dualcl.results.report import ReportFiles, build_report, render, terminal_table
from dualcl.results.tables import Summary, Table, summarise

__all__ = [
    "Record",
    "ReportFiles",
    "Summary",
    "Table",
    "build_report",
    "comparable",
    "find_records",
    "frame",
    "load",
    "load_record",
    "render",
    "summarise",
    "terminal_table",
]
