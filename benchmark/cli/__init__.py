"""The command line: `dualcl`. Tables and lists go to stdout, everything else to stderr.

Exit codes: 0 done, 1 a run failed, 2 the user's input, 130 interrupted (the same command resumes).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dualcl.benchmark.core.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, RunFailed, UserError, nearest
from dualcl.benchmark.core.machine import follower, launched
from dualcl.benchmark.core.text import printable
from dualcl.benchmark.models.bundled import bundled_backbones
from dualcl.benchmark.runs.progress import Reporter

if TYPE_CHECKING:
    from dualcl.benchmark.config.presets import Preset
    from dualcl.benchmark.core.settings import Resolved
    from dualcl.benchmark.grids.plan import Outcome, Planned
    from dualcl.benchmark.grids.survey import RunState
    from dualcl.results.tables import Summary

RUNS = Path("runs")
REPORT_FORMATS = ("md", "csv", "tex", "html", "png")
#: what a report can consist of besides, where the extra is installed
MORE_FORMATS = ("parquet",)
LISTS = ("methods", "presets", "backbones", "datasets", "published")
EXPORT_FORMATS = ("diffusers-lora", "kohya", "peft", "textual-inversion", "merged")
SCHEDULERS = ("ddim", "dpm")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors end in one `dualcl: error:` line, whichever sub-command found them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the error on stderr and exits with code 2."""
        self.print_usage(sys.stderr)
        self.exit(EXIT_USER, f"dualcl: error: {printable(message)}\n")


class _Version(argparse.Action):
    """`--version`, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from dualcl.benchmark.core.machine import package_version

        print(f"dualcl {package_version('dualcl')}")
        parser.exit(0)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more: the exit code says the same
        print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number from 1 on, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"wants a whole number from 0 on, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wants a number, got {text!r}") from None


def _place(text: str) -> Path | str:
    return text if "://" in text else Path(text)


def _local_place(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"wants a folder, not a URL; got {text!r}")
    return Path(text)


def _confidence(text: str) -> float:
    if not 0.5 < (level := _number(text)) < 1:
        raise argparse.ArgumentTypeError(f"wants a level between 0.5 and 1, such as 0.95, got {text!r}")
    return level


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its sub-commands by name.

    `bench` comes without arguments: its module adds them when it is asked for.
    """
    parser = _Parser(
        prog="dualcl",
        description="Continual learning in two domains with one runner.",
        epilog="Start with `dualcl quickstart`. Exit codes: 0 done, 1 a run failed, 2 wrong input, 130 interrupted.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    def add_sets(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--set",
            dest="sets",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override a configuration value (see `dualcl show PRESET`); several may follow one --set",
        )

    def add_many(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--jobs", type=_positive, default=1, metavar="N", help="processes side by side (default 1)"
        )
        command.add_argument("--quiet", action="store_true", help="no progress; tables and errors still appear")

    def add_engine(command: argparse.ArgumentParser) -> None:
        command.add_argument("--engine", default="local", metavar="local|ray", help="ray: on a cluster (default local)")
        command.add_argument("--address", metavar="auto|HOST:PORT|local", help="of the Ray cluster (default auto)")

    def add_report(command: argparse.ArgumentParser) -> None:
        command.add_argument("--allow-mixed", action="store_true", help="put runs that do not compare in one table")
        command.add_argument(
            "--format",
            metavar="F[,F...]",
            help=f"what the report consists of (default {','.join(REPORT_FORMATS)}; also {','.join(MORE_FORMATS)})",
        )
        command.add_argument(
            "--baseline", metavar="METHOD", help="what the others are compared with (default: clora, or the best row)"
        )
        command.add_argument(
            "--confidence", type=_confidence, default=0.95, metavar="P", help="level of intervals (default 0.95)"
        )

    command = add("quickstart", "compare methods in both domains on the bundled models and data, in minutes")
    command.add_argument("--out", type=Path, default=RUNS / "quickstart", metavar="DIR", help="default %(default)s")
    add_many(command)
    command.set_defaults(func=_quickstart, jobs=None)

    command = add("compare", "run every method with every seed, then report")
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("--methods", metavar="A,B,C", help="default: the preset's own list")
    command.add_argument("--seeds", metavar="0,1,2", help="default: the preset's seed")
    add_sets(command)
    command.add_argument("--out", type=_place, metavar="DIR|URL", help="default runs/PRESET")
    add_many(command)
    add_engine(command)
    command.add_argument(
        "--print-slurm", action="store_true", help="print an array script for sbatch, and run nothing (plan: grid.json)"
    )
    command.add_argument(
        "--slurm-option",
        dest="slurm_options",
        action="append",
        default=[],
        metavar="K=V",
        help="a line of the script: #SBATCH --K=V; repeat",
    )
    add_report(command)
    command.set_defaults(func=_compare)

    command = add("run", "run one method with one seed; resumes an interrupted run")
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("method", metavar="METHOD", help="see `dualcl list methods`")
    command.add_argument("--seed", type=_natural, metavar="N", help="default: the preset's seed")
    add_sets(command)
    command.add_argument("--out", type=_place, metavar="DIR|URL", help="default runs/PRESET/METHOD-seedN")
    command.add_argument(
        "--wait", action="store_true", help="wait while another process has the folder, instead of refusing"
    )
    command.add_argument("--quiet", action="store_true", help="no progress; the table and errors still appear")
    command.set_defaults(func=_run)

    command = add("status", "show how the runs of a comparison or sweep stand")
    command.add_argument("dirs", nargs="+", type=_place, metavar="DIR|URL", help="where the runs are or will be")
    command.add_argument("--format", default="text", metavar="F", help="text, md, csv or json (default text)")
    command.add_argument("--watch", type=_positive, metavar="N", help="look again every N seconds")
    command.set_defaults(func=_status)

    command = add("report", "rebuild tables, plots and the HTML page from records alone")
    command.add_argument("dirs", nargs="+", type=_place, metavar="DIR|URL", help="run folders, or folders of them")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="default DIR/report; --format md, csv or tex alone: stdout only"
    )
    add_report(command)
    command.add_argument(
        "--with-published", action="store_true", help="published numbers too, apart from ours, with what differs"
    )
    command.add_argument(
        "--all-plots", action="store_true", help="each stream's plots, however many streams and runs there are"
    )
    command.add_argument(
        "--ledger", type=Path, metavar="FILE", help="write the reproduction ledger of these records, and nothing else"
    )
    command.set_defaults(func=_report)

    command = add("sweep", "run a grid of settings of one method and name the best")
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("method", metavar="METHOD", help="see `dualcl list methods`")
    command.add_argument(
        "--over", action="append", metavar="KEY=V1,V2,...", help="repeat for a grid; default: the preset's search space"
    )
    command.add_argument("--seeds", metavar="0,1,2", help="default: the preset's seed")
    add_sets(command)
    command.add_argument("--out", type=_local_place, metavar="DIR", help="default runs/sweep-PRESET")
    command.add_argument("--select", metavar="METRIC", help="what decides (default: A_last, A_mmd)")
    add_many(command)
    add_engine(command)
    command.set_defaults(func=_sweep)

    command = add("generate", "make images of learnt concepts from a customization run or an exported model")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's folder, or one made by `dualcl export`")
    command.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        required=True,
        metavar="TEXT",
        help='with concepts as "<c1>" or by name, "<cat>"; repeat for more prompts',
    )
    command.add_argument("-n", type=_positive, default=8, metavar="N", help="images per prompt (default %(default)s)")
    command.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="of the first image, the next one has N + 1 (default 0)"
    )
    command.add_argument("--steps", type=_positive, metavar="N", help="denoising steps (default: the run's eval.steps)")
    command.add_argument(
        "--guidance", type=_number, metavar="X", help="guidance scale (default: the run's eval.guidance)"
    )
    command.add_argument("--scheduler", metavar="|".join(SCHEDULERS), help="default: the run's eval.scheduler")
    command.add_argument("--negative", metavar="TEXT", help="negative prompt (default: the run's eval.negative_prompt)")
    command.add_argument("--after", type=_positive, metavar="K", help="the state after task K, where the run keeps it")
    command.add_argument("--base", metavar="MODEL", help="the model to put an exported LoRA on (default: its own)")
    command.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images at once (default 8)")
    command.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    command.add_argument("--out", type=Path, metavar="DIR", help="default RUN_DIR/generated")
    command.set_defaults(func=_generate)

    command = add("export", "write what a customization run learnt in the format of other tools")
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run, finished or partial")
    command.add_argument("--to", dest="kind", required=True, metavar="FORMAT", help=", ".join(EXPORT_FORMATS))
    command.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    command.add_argument(
        "--rank",
        type=_positive,
        metavar="R",
        help="largest rank of a LoRA (default: as many as hold the update exactly)",
    )
    command.set_defaults(func=_export)

    command = add("list", "list methods, presets, backbones, data sets and streams with published numbers")
    command.add_argument("what", nargs="?", metavar="|".join(LISTS), help="default: all but published")
    command.add_argument("stream", nargs="?", metavar="STREAM", help="after `published`: show this stream's numbers")
    command.set_defaults(func=_list)

    command = add("show", "show the resolved configuration and where each value comes from")
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("method", nargs="?", metavar="METHOD", help="default: what all methods share")
    add_sets(command)
    command.set_defaults(func=_show)

    command = add("prepare", "download, verify and split the data of a preset")
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("--root", metavar="DIR", help="where the data goes: the same as --set data.root=DIR")
    add_sets(command)
    command.set_defaults(func=_prepare)

    command = add("pretrain", "make a bundled model again")
    command.add_argument("name", metavar="NAME", help="see `dualcl list backbones`")
    command.add_argument("--seed", type=_natural, default=0, metavar="N", help="default %(default)s")
    command.add_argument("--out", type=Path, default=RUNS / "pretrain", metavar="DIR", help="default %(default)s")
    command.set_defaults(func=_pretrain)

    command = add("bench", "measure speed and memory")
    command.set_defaults(func=_bench)

    command = add("doctor", "check versions, devices, caches and writable places")
    command.set_defaults(func=_doctor)
    return parser, dict(commands.choices)


def _add_bench(command: argparse.ArgumentParser) -> None:
    from dualcl.benchmark.speed.pairs import KINDS

    kinds = command.add_subparsers(dest="kind", required=True, metavar="WHAT")
    for name, (module, summary) in KINDS.items():
        importlib.import_module(module).add_arguments(kinds.add_parser(name, help=summary))


# --- sub-commands -----------------------------------------------------------------------------------------------------


def _formats(text: str | None) -> tuple[str, ...]:
    if text is None:
        return REPORT_FORMATS
    from dualcl.benchmark.grids.plan import parse_names

    names = parse_names(text, "format")
    for name in names:
        if name not in (known := (*REPORT_FORMATS, *MORE_FORMATS)):
            raise UserError(f"unknown --format {name!r}; {nearest(name, known, 'formats')}")
    if "parquet" in names:  # said now, not after hours
        from dualcl.results.data import need_parquet

        need_parquet()
    return tuple(names)


def _write_report(
    summary: Summary, out: Path, formats: tuple[str, ...], with_published: bool = False, all_plots: bool = False
) -> None:
    from dualcl.results.report import build_report

    files = build_report(summary, out, formats, with_published=with_published, all_plots=all_plots)
    for note in files.notes:
        _say(f"note: {note}")
    _say(f"report: {files.html or files.out}")


def _run(args: argparse.Namespace) -> int:
    from dualcl.benchmark.config.resolve import resolve
    from dualcl.benchmark.grids.plan import check_seed_given_once

    if args.seed is not None:
        check_seed_given_once(args.sets, "--seed")
    resolved = resolve(args.preset, args.method, args.sets, seed=args.seed)
    out = args.out or RUNS / resolved.preset / f"{args.method}-seed{resolved.general.seed}"
    args.place = out
    from dualcl.benchmark.runs.mirror import discard, run_folder
    from dualcl.benchmark.runs.runner import run
    from dualcl.results.report import terminal_table

    reporter = Reporter(quiet=args.quiet or follower() > 0)
    folder = run_folder(out, patient=args.wait)
    try:
        run(resolved, folder, reporter)
    finally:
        reporter.close()
    if follower():
        return 0
    print(terminal_table([folder.path]).rstrip("\n"))
    if not args.quiet:
        _say(f"record: {out}/record.json")
    discard(folder)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from dualcl.benchmark.config.presets import load_preset
    from dualcl.benchmark.grids.execute import execute
    from dualcl.benchmark.grids.plan import default_methods, parse_names, parse_seeds, plan_comparison

    methods = default_methods(args.preset) if args.methods is None else parse_names(args.methods, "methods")
    seeds = None if args.seeds is None else parse_seeds(args.seeds)
    formats = _formats(args.format)
    args.place = args.out or RUNS / load_preset(args.preset).name
    out, url = _local_and_url(args.place)
    plan = plan_comparison(args.preset, methods, seeds, args.sets, out, url)
    rows = dict.fromkeys([*methods, *(p.resolved.general.label or p.resolved.method for p in plan)])
    if args.baseline is not None and args.baseline not in rows:  # said now, not after hours
        raise UserError(f"the baseline {args.baseline!r} is not compared; {nearest(args.baseline, rows, 'methods')}")
    if args.print_slurm:
        return _print_slurm(plan, out, url, args.slurm_options)
    if args.slurm_options:
        raise UserError("--slurm-option is for --print-slurm; leave it out")
    outcomes = execute(
        plan, engine=args.engine, address=args.address, jobs=args.jobs, quiet=args.quiet, root=out, url=url
    )
    code = _conclude(outcomes, args.quiet)
    if any(o.code == 0 for o in outcomes):
        from dualcl.results.report import terminal_table
        from dualcl.results.tables import summarise

        dirs = [p.out for p in plan if (p.out / "record.json").is_file()]
        summary = summarise(dirs, allow_mixed=args.allow_mixed, baseline=args.baseline, confidence=args.confidence)
        print(terminal_table(summary).rstrip("\n"), flush=True)
        _write_report(summary, out / "report", formats)
        if url is not None:
            from dualcl.benchmark.runs.mirror import push_files

            push_files(out / "report", f"{url.rstrip('/')}/report")
    return code


def _local_and_url(place: Path | str) -> tuple[Path, str | None]:
    """The folder to read records from, and the URL of which it is a copy, if it is one."""
    if isinstance(place, Path):
        return place, None
    from dualcl.benchmark.runs.mirror import local_copy

    return local_copy(place, "records"), place


def _fetched(places: Sequence[Path | str]) -> list[Path]:
    """Folders as they are; of URLs the folders that their records were fetched into."""
    if all(isinstance(place, Path) for place in places):
        return [Path(place) for place in places]
    from dualcl.benchmark.runs.mirror import pull_records

    return [place if isinstance(place, Path) else pull_records(place) for place in places]


def _print_slurm(plan: list[Planned], out: Path, url: str | None, options: list[str]) -> int:
    from dualcl.benchmark.core.devices import available_devices
    from dualcl.benchmark.grids.slurm import array_script
    from dualcl.benchmark.grids.survey import PLAN, write_plan

    on_gpu = available_devices()[0].startswith("cuda")
    script = array_script(plan, url or os.path.abspath(out), options, cuda=on_gpu)
    write_plan(out, plan)
    if url is not None:
        from dualcl.benchmark.runs.mirror import push_files

        push_files(out / PLAN, url)
    print(script, end="")
    return 0


def _status(args: argparse.Namespace) -> int:
    from dualcl.benchmark.grids.status import FORMATS, render, watch
    from dualcl.benchmark.grids.survey import Survey

    if args.format not in FORMATS:
        raise UserError(f"unknown --format {args.format!r}; {nearest(args.format, FORMATS, 'formats')}")
    survey = Survey(_fetched(args.dirs))
    if args.watch is None:
        print(render(survey.look(), args.format), end="")
        return 0
    if args.format != "text":
        raise UserError("--watch shows text; leave out --format, or call again for every look")

    def look() -> list[RunState]:
        _fetched(args.dirs)
        return survey.look()

    watch(look, args.watch, sys.stdout)
    return 0


def _conclude(outcomes: Sequence[Outcome], quiet: bool) -> int:
    from dualcl.benchmark.grids.execute import exit_code, summary_lines

    code = exit_code(outcomes)
    if code or not quiet:
        for line in summary_lines(outcomes):
            _say(line)
    return code


#: preset, folder, methods (None: the preset's own) and settings of each part of the quickstart
QUICKSTART: tuple[tuple[str, str, str | None, tuple[str, ...]], ...] = (
    ("glyphs", "classification", None, ()),
    ("glyph-concepts-quick", "customization", None, ()),
)


def _quickstart(args: argparse.Namespace) -> int:
    from dualcl.benchmark.core.machine import usable_cpus
    from dualcl.benchmark.grids.execute import execute
    from dualcl.benchmark.grids.plan import default_methods, parse_names, plan_comparison
    from dualcl.results.report import terminal_table
    from dualcl.results.tables import summarise

    args.place = args.out
    plan = []
    for preset, folder, methods, sets in QUICKSTART:
        names = default_methods(preset) if methods is None else parse_names(methods, "methods")
        plan += plan_comparison(preset, names, [0], sets, args.out / folder)
    # the models are too small for several threads to pay: one process per core, with one thread each
    outcomes = execute(plan, jobs=args.jobs or min(usable_cpus(), 4), quiet=args.quiet, root=args.out)
    code = _conclude(outcomes, args.quiet)
    if any(o.code == 0 for o in outcomes):
        dirs = [p.out for p in plan if (p.out / "record.json").is_file()]
        summary = summarise(dirs)
        print(terminal_table(summary).rstrip("\n"), flush=True)
        _write_report(summary, args.out / "report", REPORT_FORMATS)
    return code


def _report(args: argparse.Namespace) -> int:
    from dualcl.results.report import terminal_table
    from dualcl.results.tables import summarise

    if args.out is None and not isinstance(args.dirs[0], Path) and args.ledger is None and args.format is None:
        raise UserError(f"a report on {args.dirs[0]} needs --out DIR, or --format md, csv or tex for stdout alone")
    args.dirs = _fetched(args.dirs)
    if args.ledger is not None:
        return _write_ledger(args)
    formats = _formats(args.format)
    alone = formats[0] if args.format is not None and len(formats) == 1 and formats[0] in ("md", "csv", "tex") else None
    if args.out is None and len(args.dirs) > 1 and not alone:
        raise UserError("a report on several folders needs --out DIR, or --format md, csv or tex for stdout alone")
    if args.with_published and alone == "csv" and args.out is None:
        raise UserError(
            "--with-published keeps published numbers out of our table: with --format csv give --out DIR too"
        )
    summary = summarise(args.dirs, allow_mixed=args.allow_mixed, baseline=args.baseline, confidence=args.confidence)
    # the table first: pictures take longer
    print(terminal_table(summary, alone or "text", with_published=args.with_published).rstrip("\n"), flush=True)
    if args.out is not None or not alone:
        _write_report(summary, args.out or args.dirs[0] / "report", formats, args.with_published, args.all_plots)
    return 0


def _write_ledger(args: argparse.Namespace) -> int:
    for name in ("out", "format", "with_published", "allow_mixed", "baseline"):
        if getattr(args, name):
            raise UserError(f"--ledger writes the ledger and nothing else; leave out --{name.replace('_', '-')}")
    from dualcl.benchmark.grids.ledger import write_ledger

    args.place = args.ledger
    _say(f"ledger: {write_ledger(args.dirs, args.ledger)}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from dualcl.benchmark.config.presets import load_preset
    from dualcl.benchmark.grids import sweep as s
    from dualcl.benchmark.grids.execute import execute
    from dualcl.benchmark.grids.plan import parse_seeds

    seeds = None if args.seeds is None else parse_seeds(args.seeds)
    out = args.out or RUNS / f"sweep-{load_preset(args.preset).name}"
    args.place = out
    sweep = s.plan_sweep(args.preset, args.method, args.over, seeds, args.sets, out, select=args.select)
    if not args.quiet:
        _say(f"{len(sweep.points)} points, {len(sweep.plan)} runs, measured on {sweep.measured_on}")
    outcomes = execute(sweep.plan, engine=args.engine, address=args.address, jobs=args.jobs, quiet=args.quiet, root=out)
    scores = s.score_sweep(sweep, outcomes)
    print(s.sweep_table(sweep, scores))
    best = s.best_score(sweep, scores)
    if best is None:
        _say(f"no best point: none has all its seeds with a defined {sweep.select}")
    else:
        _say(f"best {sweep.select} {best.metrics[sweep.select][0]:.2f}; use it with: {s.set_line(best)}")
        _say(f"for `tuning:` in a preset: {sweep.tuning}")
    written = s.write_sweep(sweep, scores, out / args.method)
    _say(f"sweep: {', '.join(map(str, written))}")
    return _conclude(outcomes, args.quiet)


def _generate(args: argparse.Namespace) -> int:
    if args.scheduler is not None and args.scheduler not in SCHEDULERS:
        raise UserError(f"unknown --scheduler {args.scheduler!r}; {nearest(args.scheduler, SCHEDULERS, 'schedulers')}")
    args.place = args.out or args.run_dir / "generated"
    from dualcl.benchmark.exports.generate import generate, open_model

    model = open_model(args.run_dir, args.device, base=args.base, after=args.after, say=_say)
    paths = generate(
        model,
        args.prompts,
        args.place,
        n=args.n,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        scheduler=args.scheduler,
        negative_prompt=args.negative,
        batch_size=args.batch_size,
        say=_say,
    )
    print("\n".join(map(str, paths)))
    return 0


def _export(args: argparse.Namespace) -> int:
    if args.kind not in EXPORT_FORMATS:
        raise UserError(f"unknown --to {args.kind!r}; {nearest(args.kind, EXPORT_FORMATS, 'formats')}")
    args.place = args.out
    from dualcl.benchmark.exports.export import describe, export

    for line in describe(export(args.run_dir, args.kind, args.out, args.rank), args.out):
        _say(line)
    print(args.out)
    return 0


def _bundled_backbones() -> dict[str, str]:
    """Bundled backbones and what each was trained on, read without timm."""
    cards = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in bundled_backbones().items()}
    return {n: f"{c['timm_name']} at {c['input_size']} px, trained on {c['trained_on']}" for n, c in cards.items()}


def _list_rows(what: str) -> list[list[str]]:
    if what == "methods":
        from dualcl.methods import available_methods

        methods = sorted(available_methods().values(), key=lambda m: m.name)
        return [
            [m.name, ", ".join(m.domains), f"{m.summary}{'; stores data' if m.stores_data else ''} [{m.source}]"]
            for m in methods
        ]
    if what == "presets":
        from dualcl.benchmark.config.presets import bundled_presets, load_preset

        presets = [load_preset(name) for name in bundled_presets()]
        return [[p.name, p.domain, p.summary] for p in presets]
    if what == "datasets":
        from dualcl.datasets import available_datasets

        return [
            [d.name, d.domain, d.summary + ("; needs `dualcl prepare`" if d.needs_prepare else "")]
            for d in sorted(available_datasets().values(), key=lambda d: d.name)
        ]
    if what == "published":
        from dualcl.results.published.render import overview

        return overview()
    rows = [[name, "bundled", text] for name, text in _bundled_backbones().items()]
    return [
        *rows,
        ["TIMM_NAME.TAG", "timm", "any vision transformer of timm with its full tag: --set backbone.name=NAME.TAG"],
        ["FILE", "local", "weights from a file: --set backbone.name=NAME backbone.weights=FILE.safetensors"],
    ]


def _list(args: argparse.Namespace) -> int:
    from dualcl.benchmark.core.text import align

    if args.what is not None and args.what not in LISTS:
        raise UserError(f"cannot list {args.what!r}; {nearest(args.what, LISTS, 'lists')}")
    if args.stream is not None:
        if args.what != "published":
            raise UserError(f"`dualcl list {args.what}` takes no further word, got {args.stream!r}; leave it out")
        from dualcl.results.report import terminal_stream

        print(terminal_stream(args.stream).rstrip("\n"))
        return 0
    blocks = []
    # published numbers are others' and long: on demand only
    own = [what for what in LISTS if what != "published"]
    for what in own if args.what is None else (args.what,):
        rows = _list_rows(what)
        lines = align(rows) if rows else ["none"]
        blocks.append("\n".join(lines if args.what else [f"{what}:", *(f"  {line}" for line in lines)]))
    print("\n\n".join(blocks))
    return 0


def _resolve_shared(preset: str, sets: Sequence[str]) -> Resolved:
    """The preset resolved with some method of its domain: right for everything but the section `method`."""
    from dualcl.benchmark.config.presets import load_preset
    from dualcl.benchmark.config.resolve import resolve
    from dualcl.methods import available_methods

    loaded = load_preset(preset)
    serving = [m.name for m in available_methods().values() if loaded.domain in m.domains]
    method = next(iter([*loaded.compare, *sorted(serving)]), None)
    if method is None:
        raise UserError(f"no method serves the domain {loaded.domain!r} of preset {preset}")
    return resolve(preset, method, sets)


def _shown_value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _show(args: argparse.Namespace) -> int:
    from dualcl.benchmark.config.presets import load_preset
    from dualcl.benchmark.config.resolve import help_text, resolve
    from dualcl.benchmark.core.text import align

    shared = args.method is None
    resolved = _resolve_shared(args.preset, args.sets) if shared else resolve(args.preset, args.method, args.sets)
    loaded = load_preset(args.preset)
    rows = []
    for key, value in resolved.flat().items():
        if key in ("preset", "domain", "method_name") or (shared and key.startswith("method.")):
            continue
        rows.append([key, _shown_value(value), resolved.sources.get(key, "default"), help_text(resolved, key)])
    print(f"{loaded.name} ({loaded.domain}): {loaded.summary}")
    if not shared:
        print(f"method: {args.method}")
        print(f"tuned by: {resolved.tuning}")
        print(f"search space: {_shown_space(loaded, args.method)}")
    print()
    print("\n".join(align([["key", "value", "from", "what it is"], *rows])))
    if shared:
        print()
        if loaded.compare:
            print(f"compared by default: {', '.join(loaded.compare)}")
        print("values of single methods, where they differ from the code's (all of them: dualcl show PRESET METHOD):")
        print("\n".join(align([["method", "values", "tuned by"], *_tuned_rows(args.preset, args.sets)])))
        if loaded.search:
            print()
            print(f"search spaces, {loaded.points} points each (dualcl sweep {args.preset} METHOD):")
            print("\n".join(align([[name, _shown_space(loaded, name)] for name in loaded.search])))
    return 0


def _shown_space(preset: Preset, method: str) -> str:
    """`method.lr=1e-3,1e-2 x method.rank=4,8`."""
    from dualcl.benchmark.grids.sweep import axes_of

    axes = axes_of(preset, method)
    return " x ".join(f"{axis.key}={','.join(axis.values)}" for axis in axes) or "none, give --over"


def _tuned_rows(preset: str, sets: Sequence[str]) -> list[list[str]]:
    """Method, its values that differ from the code's, and who tuned it: of all that a preset compares or speaks of."""
    from dualcl.benchmark.config.presets import load_preset
    from dualcl.benchmark.config.resolve import own_values, resolve
    from dualcl.benchmark.grids.sweep import typed

    loaded = load_preset(preset)
    spoken_of = [key.split(".")[1] for key in loaded.values if key.startswith("methods.")]
    rows = []
    for name in dict.fromkeys([*loaded.compare, *spoken_of, *loaded.tuning, *loaded.search]):
        try:
            resolved = resolve(preset, name, sets)
        except UserError:  # a key of other methods
            resolved = resolve(preset, name, [text for text in sets if not text.startswith(("method.", "method="))])
        values = " ".join(f"{k}={typed(v)}" for k, v in own_values(resolved).items())
        rows.append([name, values or "-", resolved.tuning])
    return rows


def _prepare(args: argparse.Namespace) -> int:
    from dualcl.datasets import available_datasets, dataset_class
    from dualcl.datasets.reading.download import alone_in

    sets = list(args.sets)
    if args.root is not None:
        sets.append(f"data.root={json.dumps(args.root)}")
    resolved = _resolve_shared(args.preset, sets)
    info = available_datasets()[resolved.data_name]
    if not info.needs_prepare:
        print(f"{info.name}: nothing to prepare")
        return 0
    config = resolved.sections["data"]
    with alone_in(Path(config.root).expanduser()):
        dataset_class(info.name, resolved.domain).prepare(config)
    print(f"{info.name}: ready")
    return 0


def _pretrain(args: argparse.Namespace) -> int:
    args.place = args.out
    from dualcl.benchmark.pretraining.vit import pretrain

    pretrain(args.name, args.out, seed=args.seed)
    _say(f"written to {args.out}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from dualcl.benchmark.speed.pairs import KINDS

    return int(importlib.import_module(KINDS[args.kind][0]).main(args))


def _doctor(args: argparse.Namespace) -> int:
    from dualcl.benchmark.cli.doctor import doctor

    return doctor()


# --- entry ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless it is ignored (nohup), stop like Ctrl-C: after the current step, resumable."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            old[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _silence_stdout() -> None:
    """Sends what is still buffered for a stdout that takes no more to nowhere, or Python complains at its exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _expand_sets(argv: Sequence[str]) -> list[str]:
    """`--set a=1 b=2 PRESET` -> `--set a=1 --set b=2 PRESET`: argparse would take PRESET for another value."""
    out: list[str] = []
    inside = False
    for i, word in enumerate(argv):
        first = i > 0 and argv[i - 1] == "--set"
        inside = word == "--set" or first or (inside and "=" in word and not word.startswith("-"))
        if inside and word != "--set" and not first:
            out.append("--set")
        out.append(word)
    return out


def _dispatch(argv: list[str]) -> int:
    parser, commands = build_parser()
    word = next((a for a in argv if not a.startswith("-")), None)
    if word is not None and word not in commands:
        raise UserError(f"unknown command {word!r}; {nearest(word, commands, 'commands')}")
    if word == "bench":
        _add_bench(commands["bench"])
    args = parser.parse_args(_expand_sets(argv))
    if args.command != "run" and launched() > 1:
        raise UserError(f"a launcher started {launched()} processes; they share one `dualcl run`, not {args.command}")
    try:
        code: int = args.func(args)
        sys.stdout.flush()
        return code
    except OSError as error:
        # writing to an open file tells no name: say at least which folder was being filled
        if error.filename is None and not isinstance(error, BrokenPipeError):
            error.filename = str(getattr(args, "place", "standard output"))
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dualcl` with these arguments (default: the process's); returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with contextlib.suppress(AttributeError):  # names that are no UTF-8 must not stop a table; not all streams can
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    error: BaseException
    try:
        with _stop_signals():
            return _dispatch(words)
    except SystemExit as stop:  # argparse: --help, --version, wrong usage
        return stop.code if isinstance(stop.code, int) else EXIT_USER
    except KeyboardInterrupt as interrupt:
        resumes = bool({"run", "compare", "sweep", "quickstart"} & set(words[:1]))
        error, code = interrupt, EXIT_INTERRUPTED
        text = "interrupted; the same command resumes" if resumes else "interrupted"
    except UserError as wrong:
        error, code, text = wrong, EXIT_USER, f"error: {wrong}"
    except RunFailed as failed:
        error, code, text = failed, EXIT_FAILED, f"run failed: {failed}"
    except BrokenPipeError:  # `dualcl list | head -1`
        _silence_stdout()
        return 0
    except OSError as broken:
        from dualcl.benchmark.grids.plan import describe_os_error

        _silence_stdout()
        error, code, text = broken, EXIT_USER, f"error: {describe_os_error(broken, '?')}"
    if "--debug" in words:
        traceback.print_exception(error)
    _say(f"dualcl: {f'process {follower()}: ' if follower() else ''}{printable(text)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
