"""The reproduction ledger: method by protocol, the published number, ours, command, commit, verified or why not.

Made from run records and presets alone; the same records give the same file, wherever they lie.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.config.presets import Preset, bundled_presets, load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.settings import flatten
from dualcl.benchmark.models.bundled import bundled_backbones, bundled_diffusion
from dualcl.datasets import available_datasets
from dualcl.results.files import write_text
from dualcl.results.metrics import KINDS, METRICS
from dualcl.results.published import CONCEPTS, Group, Number, groups, numbers_beside, numbers_for, our_metric, streams
from dualcl.results.published.differences import compare_number, is_of, variant
from dualcl.results.records import Record, assignments, comparable, scan_records, set_words
from dualcl.results.tables import DASH, PER_SEED, tell_apart
from dualcl.results.writers.markdown import markdown_code, markdown_text

#: seeds below which a mean is not held against a published one
MIN_SEEDS = 3
#: what must have been seen of a protocol before a number can be verified against it
REQUIRED = ("backbone", "weights", "preprocessing", "epochs", "batch", "optimizer", "learning rate")
RULE = (
    "**Verified** means: our mean over at least {n} seeds lies within one published standard deviation plus one of "
    "ours (a standard deviation that was not printed counts as 0), in every metric of the row that we have under the "
    "same definition, on the same protocol: nothing that was seen of it differs from our records, and {required} were "
    "seen. Anything else is not verified, with the first reason why."
)
NOT_PUBLISHED = "no published number for this stream"
#: last parts of keys that cannot change a result: no part of the command
_IDLE = frozenset({"threads", "device", "checkpoint_seconds", "log_every", "workers", "cache_mib", "cache_gib", "seed"})
#: data sets that are the user's own
_OWN_DATA = {"image-folder": "photographs of your own", "concept-folder": "photographs of your own"}
_PARITY = "tests/reference/README.md"


@dataclass(frozen=True)
class Line:
    """One row: a method under one published protocol, or without any."""

    method: str
    protocol: str
    published: str
    ours: str
    command: str
    commit: str
    #: verified, not verified or not run
    state: str
    why: str

    @property
    def verdict(self) -> str:
        """State and reason as text."""
        return f"{self.state}: {self.why}" if self.why else self.state


@dataclass(frozen=True)
class Section:
    """The rows of one stream; `place` is the folder of its records, "" where nothing was run."""

    preset: str
    domain: str
    place: str
    about: str
    lines: list[Line]
    notes: list[str]


@dataclass(frozen=True)
class _Run:
    """The runs of one label: finished ones by seed, and those that are not."""

    label: str
    records: list[Record]
    unfinished: list[Record]

    @property
    def first(self) -> Record:
        return (self.records or self.unfinished)[0]

    @property
    def method(self) -> str:
        return str(self.first.data["run"]["method"])

    @property
    def settings(self) -> Mapping[str, Any]:
        value = self.first.data["config"].get("method")
        return value if isinstance(value, Mapping) else {}

    def stat(self, key: str) -> tuple[float, float] | None:
        """Mean and standard deviation (ddof = 1; 0 for one seed) of a metric; None where undefined."""
        values = [v for r in self.records if (v := r.metrics.get(key)) is not None]
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _by_label(records: Sequence[Record]) -> list[_Run]:
    """Runs by label; copies are left out, and two that differ are a UserError."""
    kept: dict[tuple[str, int], Record] = {}
    for record in tell_apart(records):
        earlier = kept.setdefault((record.label, record.seed), record)
        if earlier is not record and comparable(earlier) != comparable(record):
            raise UserError(
                f"{record.label} seed {record.seed} on {record.table} is there twice with different results: "
                f"{earlier.directory} and {record.directory}; leave one of the two out"
            )
    runs: dict[str, list[Record]] = {}
    for record in sorted(kept.values(), key=lambda r: (r.joint, r.label, r.seed)):
        runs.setdefault(record.label, []).append(record)
    return [
        _Run(label, [r for r in group if r.finished], [r for r in group if not r.finished])
        for label, group in runs.items()
    ]


# --- cells ------------------------------------------------------------------------------------------------------------


def _published(numbers: Sequence[Number]) -> str:
    cells = ", ".join(f"{n.metric} {n.text}" for n in numbers)
    runs = "/".join(dict.fromkeys(f"{n.runs} run{'s' * (n.runs > 1)}" for n in numbers if n.runs)) or "runs not seen"
    return f"{numbers[0].method}: {cells} ({runs}, seen {'/'.join(dict.fromkeys(n.seen for n in numbers))})"


def _value(run: _Run, key: str) -> str:
    stat, metric = run.stat(key), METRICS[key]
    if stat is None:
        return ""
    spread = f" ± {stat[1]:.{metric.decimals}f}" if len(run.records) > 1 else ""
    return f"{metric.title} {stat[0]:.{metric.decimals}f}{spread}"


def _ours(run: _Run, numbers: Sequence[Number]) -> str:
    if not run.records:
        record = run.unfinished[0]
        return f"{DASH} ({record.status} after {len(record.data['matrix']['rows'])} of {record.n_tasks} tasks)"
    columns = run.first.kind.columns
    there = next((at for at, key in enumerate(columns) if _value(run, key)), 0)  # requests lack a kind's first measures
    keys = [key for n in numbers if (key := our_metric(n))] or list(columns[there : there + 2])
    cells = ", ".join(text for key in dict.fromkeys(keys) if (text := _value(run, key)))
    seeds = ", ".join(str(r.seed) for r in run.records)
    return f"{cells} (seed{'s' * (len(run.records) > 1)} {seeds}){'†' * bool(_caveats(run))}"


def _caveats(run: _Run) -> list[str]:
    return list(dict.fromkeys(c for r in run.records for c in r.caveats))


def _command(run: _Run) -> str:
    record = run.first
    seeds = ",".join(str(r.seed) for r in sorted([*run.records, *run.unfinished], key=lambda r: r.seed))
    words = ["dualcl", "compare", record.preset, "--methods", run.method, "--seeds", seeds]
    given = {key: value for key, value in assignments(record).items() if key.split(".")[-1] not in _IDLE}
    given |= _given_before(record, run.method, given)
    return shlex.join([*words, *set_words({key: _portable(value) for key, value in given.items()})])


def _given_before(record: Record, method: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the run that its preset gave then and does not give now, beside those `told` with `--set`."""
    try:
        now = resolve(record.preset, method, set_words(told)[1::2])
    except UserError:  # a preset, or a method, of the user's own; or settings that are refused now
        return {}
    was, given = (now.telling(values) for values in (flatten(record.data["config"]), now.flat()))
    keys = [key for key in was if key.startswith("method.") and key in given and key not in told]
    # of another type is what was called or counted otherwise then, and cannot be given any more
    return {key: was[key] for key in keys if was[key] != given[key] and type(was[key]) is type(given[key])}


def _portable(value: Any) -> Any:
    """A value without the folder that a file or a data set happened to lie in."""
    absolute = isinstance(value, str) and (os.path.isabs(value) or value.startswith("~"))
    return f"DIR/{Path(value).name}" if absolute else value


def _commit(run: _Run) -> str:
    commits = dict.fromkeys(commit[:8] for r in run.records for commit in r.made_in("commit") or ["unknown"])
    return ", ".join(commits) + (" with changes" if _dirty(run) else "")


def _dirty(run: _Run) -> bool:
    return any(bool(r.dirty) for r in run.records)


def judge(group: Group, numbers: Sequence[Number], run_records: Sequence[Record]) -> tuple[bool, str]:
    """Whether finished runs of one method (a seed each, at least one) verify its published numbers, and why not.

    Without a reason the numbers are verified; see RULE.
    """
    run = _Run(run_records[0].label, list(run_records), [])
    found = compare_number(group, numbers[0], run.first)
    if found.differs:
        what = "; ".join(f"{what} {theirs}, ours {ours}" for what, theirs, ours in found.differs)
        return False, f"another protocol ({what})"
    pairs = [(n, key) for n in numbers if (key := our_metric(n)) and run.stat(key)]
    if not pairs:
        return False, "no metric of ours with the same definition"
    if lacking := [what for what in REQUIRED if what in found.unseen]:
        return False, f"not seen there: {', '.join(lacking)}"
    if _dirty(run):
        return False, "run from a working tree with uncommitted changes"
    if len(run.records) < MIN_SEEDS:
        return False, f"{len(run.records)} of at least {MIN_SEEDS} seeds"
    far = []
    for number, key in pairs:
        mean, std = run.stat(key) or (0.0, 0.0)
        away, allowed = abs(mean - float(number.value)), float(number.std or 0) + std
        if away > allowed:
            far.append(f"{number.metric} is {away:.2f} away, more than {allowed:.2f}")
    return not far, "; ".join(far)


def _pairs(numbers: Sequence[Number], method: str, settings: Mapping[str, Any]) -> list[tuple[Group, list[Number]]]:
    """Published numbers of one of our methods, by protocol and source."""
    found = []
    for group in groups(numbers):
        own = [n for n in group.numbers if is_of(n, method, settings)]
        for name in dict.fromkeys(n.method for n in own):
            found.append((group, [n for n in own if n.method == name]))
    return found


def _protocol(group: Group) -> str:
    weights = f", {group.weights} weights" if group.weights else ""
    return f"{group.protocol.protocol}: {group.source}{weights}"


# --- lines ------------------------------------------------------------------------------------------------------------


def _lines_of_run(run: _Run, numbers: Sequence[Number]) -> list[Line]:
    command, commit = _command(run), _commit(run)
    pairs = _pairs(numbers, run.method, run.settings)
    if not pairs:
        why = "no published number of this method on this stream" if numbers else NOT_PUBLISHED
        return [Line(run.label, DASH, DASH, _ours(run, ()), command, commit or DASH, "not verified", why)]
    lines = []
    for group, own in pairs:
        verified, why = judge(group, own, run.records) if run.records else (False, "no finished run")
        state = "verified" if verified else "not verified"
        lines.append(
            Line(run.label, _protocol(group), _published(own), _ours(run, own), command, commit or DASH, state, why)
        )
    return lines


def _needs(preset: Preset) -> list[str]:
    """What a run of the preset needs that the project does not bring."""
    values = {key: value for key, (value, _) in preset.values.items()}
    data = str(values.get("data.name", ""))
    dataset = available_datasets().get(data)
    needs = []
    if data in _OWN_DATA:
        needs.append(_OWN_DATA[data])
    elif dataset is not None and dataset.needs_prepare:
        needs.append(f"the data set {data}")
    model = str(values.get("backbone.name") or values.get("base.model") or "")
    if model and model not in bundled_backbones() and model not in bundled_diffusion():
        needs += [f"the weights of {model}", "a GPU"]
    return needs


def _lines_not_run(preset: Preset, method: str, numbers: Sequence[Number]) -> list[Line]:
    why = f"needs {', '.join(_needs(preset))}" if _needs(preset) else "all it needs is bundled"
    own = [n for n in numbers if n.dualcl_method == method]
    lines = []
    for settings in dict.fromkeys([frozenset(), *(variant(n.settings) for n in own)]):
        name = f"{method} ({', '.join(f'{key}={value}' for key, value in sorted(settings))})" if settings else method
        words = ["dualcl", "compare", preset.name, "--methods", method, "--seeds", "0,1,2"]
        for key, value in sorted(settings):
            words += ["--set", f"method.{key}={value}"]
        pairs = _pairs(numbers, method, dict(settings))
        command = shlex.join(words)
        for group, found in pairs:
            lines.append(Line(name, _protocol(group), _published(found), DASH, command, DASH, "not run", why))
        if not pairs:
            nothing = "no published number of this method on this stream" if numbers else NOT_PUBLISHED
            lines.append(Line(name, DASH, DASH, DASH, command, DASH, "not run", f"{why}; {nothing}"))
    return lines


# --- sections ---------------------------------------------------------------------------------------------------------


def _preset_numbers(preset: Preset) -> list[Number]:
    tasks = preset.values.get("stream.tasks", (None, ""))[0]
    data = preset.values.get("data.name", (None, ""))[0]
    return numbers_for(str(data), tasks) if isinstance(tasks, int) else []


def _methods(preset: Preset, numbers: Sequence[Number]) -> list[str]:
    """What the preset compares, then what it has a search space for and others report a number of."""
    reported = {n.dualcl_method for n in numbers}
    return [*preset.compare, *(m for m in preset.search if m in reported and m not in preset.compare)]


def _bundled() -> dict[str, Preset]:
    return {name: load_preset(name) for name in bundled_presets()}


def _place(record: Record, here: Path) -> str:
    place = Path(os.path.relpath(record.directory.parent.resolve(), here.resolve())).as_posix()
    return "" if place.startswith("..") else place


def _identity(record: Record) -> str:
    """The identity that all runs of a table share, as text."""
    drawn = record.data["identity"].get("weights") == "random"
    flat = {
        key: value
        for key, value in flatten(record.data["identity"]).items()
        if key.split(".")[-1] not in PER_SEED and not (drawn and key == "weights_sha256")
    }
    pictures = (record.data.get("content") or {}).get("data")
    return json.dumps([record.n_tasks, record.data["matrix"]["kind"], flat, pictures], sort_keys=True, default=str)


def _streams(records: Sequence[Record], here: Path) -> list[list[Record]]:
    """Records that may share a table: by preset, folder, number of tasks and identity."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.table, _place(record, here), _identity(record)), []).append(record)
    return [found[key] for key in sorted(found)]


def sections(records: Sequence[Record], here: Path) -> list[Section]:
    """A section per stream that was run, with its preset's methods that were not; then a section per other preset."""
    presets, out = _bundled(), []
    run_methods: dict[str, set[str]] = {}
    for record in records:
        run_methods.setdefault(record.preset, set()).add(str(record.data["run"]["method"]))
    told: set[str] = set()
    for stream in _streams(records, here):
        first = stream[0]
        identity = first.data["identity"]
        numbers = numbers_beside(first) if first.kind is KINDS["accuracy"] else []
        runs = _by_label(stream)
        lines = [line for run in runs for line in _lines_of_run(run, numbers)]
        preset = presets.get(first.table)
        if preset is not None and preset.name not in told:
            told.add(preset.name)
            for method in _methods(preset, numbers):
                if method not in run_methods.get(preset.name, set()):
                    lines += _lines_not_run(preset, method, numbers)
        facts = [f"{first.n_tasks} {first.kind.item}s"]
        facts += [f"{key} {identity[key]}" for key in ("data", "split_name", "backbone") if identity.get(key)]
        notes = [f"†{run.label}: {text}" for run in runs for text in _caveats(run)]
        domain = str(first.data["run"]["domain"])
        out.append(Section(first.table, domain, _place(first, here), ", ".join(facts), lines, notes))
    for name, preset in presets.items():
        if name in told or name in run_methods or not preset.compare or not preset.listed:
            continue
        numbers = _preset_numbers(preset)
        lines = [line for method in _methods(preset, numbers) for line in _lines_not_run(preset, method, numbers)]
        out.append(Section(name, preset.domain, "", preset.summary[:1].upper() + preset.summary[1:], lines, []))
    return [*out, *_without_preset()]


def _without_preset() -> list[Section]:
    """Published streams of concepts and requests: none is of a preset, as their pictures and base models are others."""
    found = []
    for name, numbers in streams().items():
        scenario = numbers[0].scenario
        if scenario not in CONCEPTS:
            continue
        lines = []
        for group in groups(numbers):
            for method in group.methods:
                own = [n for n in group.numbers if n.method == method]
                ours = own[0].dualcl_method
                why = "no preset of ours has this stream" if ours else "no method of ours has this name"
                row = (_protocol(group), _published(own), DASH, DASH, DASH, "not run", why)
                lines.append(Line(ours or DASH, *row))
        about = f"Published, {scenario}" + (f": {numbers[0].tasks} {CONCEPTS[scenario]}" if numbers[0].tasks else "")
        found.append(Section(name, "customization", "", about, lines, []))
    return found


def _link(text: str, target: str, here: Path) -> str:
    return f"[{text}]({target})" if (here / target).exists() else f"`{text}`"


def to_markdown(found: Sequence[Section], command: str, here: Path) -> str:
    """The ledger as Markdown, with links as from the folder `here`."""
    count = {state: sum(line.state == state for s in found for line in s.lines) for state in STATES}
    lines = [
        "# Reproduction ledger",
        "",
        f"Generated: `{command}`. Do not edit; make records, and generate it again.",
        "",
        "What others report, what this code gives, and whether the two were compared on the same protocol. One row per "
        f"method and published protocol; {_link('published/README.md', 'published/README.md', here)} says how the "
        "published numbers were seen, and what their sources leave open.",
        "",
        RULE.format(n=MIN_SEEDS, required=", ".join(REQUIRED[:-1]) + " and " + REQUIRED[-1]),
        "",
        f"Rows: {', '.join(f'{n} {state}' for state, n in count.items())}.",
        "",
        "## Parity with reference code",
        "",
        "Whether losses, logits and gradients agree with public reference code is another question than accuracies: "
        f"see {_link(_PARITY, f'../{_PARITY}', here)}.",
        "",
    ]
    for domain in sorted({s.domain for s in found}):
        lines += [f"## {domain.capitalize()}", ""]
        for section in (s for s in found if s.domain == domain):
            lines += _section(section, several=[s.preset for s in found].count(section.preset) > 1)
    return "\n".join(lines).rstrip() + "\n"


STATES = ("verified", "not verified", "not run")
_HEAD = ("method", "protocol", "published", "ours", "command", "commit", "verified?")


def _section(section: Section, several: bool) -> list[str]:
    title = f"{section.preset}: {section.place}" if several and section.place else section.preset
    where = f" Records: [{section.place}]({section.place})." if section.place else ""
    lines = [f"### {markdown_text(title)}", "", f"{markdown_text(section.about)}.{where}", ""]
    lines += ["| " + " | ".join(_HEAD) + " |", "| --- |" + " --- |" * (len(_HEAD) - 1)]
    for line in section.lines:
        cells = [*map(markdown_text, (line.method, line.protocol, line.published, line.ours))]
        cells += [markdown_code(line.command), markdown_text(line.commit), markdown_text(line.verdict)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *(f"- {markdown_text(note)}" for note in section.notes), *([""] if section.notes else [])]


def ledger(dirs: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str]) -> str:
    """The ledger of all records below `dirs`, with links as from the file `path`.

    Raises UserError without any record, for one that cannot be read, and for two of one run that differ.
    """
    records, problems = scan_records(places := [Path(d) for d in dirs])
    if problems:
        raise UserError(problems[0])
    # what is not of this project is no reproduction by it
    records = [r for r in records if not {"method_source", "data_source"} & r.data["run"].keys()]
    if not records:
        where = ", ".join(map(str, places))
        raise UserError(f"no record.json of built-in methods below {where}; give the folder that holds the runs")
    here = Path(path).parent
    words = ["dualcl", "report", *(_given(place) for place in places), "--ledger", _given(Path(path))]
    return to_markdown(sections(records, here), shlex.join(words), here)


def _given(path: Path) -> str:
    return path.name if path.is_absolute() else path.as_posix()


def write_ledger(dirs: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Writes `ledger` to `path`, which it returns; UserError also when that cannot be written."""
    path, text = Path(path), ledger(dirs, path)
    try:
        return write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --ledger FILE") from None
