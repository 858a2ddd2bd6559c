"""What every command takes. Nothing heavy is imported here: the work is in a file per command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dualcl.benchmark.cli import bench
from dualcl.benchmark.core.errors import EXIT_USER
from dualcl.benchmark.core.machine import package_version
from dualcl.benchmark.core.reading import MOST_SEED, SEEDS, natural
from dualcl.benchmark.core.text import printable

RUNS = Path("runs")
REPORT_FORMATS = ("md", "csv", "tex", "html", "png")
#: what a report can consist of besides, where the extra is installed
MORE_FORMATS = ("parquet",)
LISTS = ("methods", "presets", "backbones", "models", "datasets", "published")
EXPORT_FORMATS = ("diffusers-lora", "kohya", "peft", "textual-inversion", "ip-adapter", "merged")
SCHEDULERS = ("ddim", "dpm")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one `dualcl: error:` line that names the help of the command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Prints the error on stderr and exits with code 2."""
        self.exit(EXIT_USER, f"dualcl: error: {printable(message)}; see {self.prog} --help\n")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse's; what a command does not know is its own error, not that of the parser above it."""
        found, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


class _Version(argparse.Action):
    """`--version`, looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"dualcl {package_version('dualcl')}")
        parser.exit(0)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number from 1 on, got {text!r}")
    return int(text)


def _whole(most: int, span: str) -> Callable[[str], int]:
    """Reads a whole number from 0 to `most`, which `span` says in words."""

    def read(text: str) -> int:
        try:
            return natural(text, most)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wants a whole number {span}, got {text!r}") from None

    return read


_natural = _whole(2**63 - 1, "from 0 to 2^63 - 1")
_seed = _whole(MOST_SEED, SEEDS)


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


# --- shared by commands -----------------------------------------------------------------------------------------------


def _add_sets(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a configuration value (see `dualcl show PRESET`); several may follow one --set",
    )


def _add_many(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes side by side (default 1)")
    command.add_argument("--quiet", action="store_true", help="no progress; tables and errors still appear")


def _add_tuned(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tuned-on",
        type=_local_place,
        metavar="SWEEP",
        help="--out of sweeps on another stream, whose best settings are used (--set goes before them)",
    )
    command.add_argument(
        "--allow-same-stream",
        action="store_true",
        help="even where the sweep was on what is reported; the table says so",
    )


def _add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--engine", default="local", metavar="local|ray", help="ray: on a cluster (default local)")
    command.add_argument("--address", metavar="auto|HOST:PORT|local", help="of the Ray cluster (default auto)")


def _add_report(command: argparse.ArgumentParser) -> None:
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


# --- the commands -----------------------------------------------------------------------------------------------------


def _quickstart(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=RUNS / "quickstart", metavar="DIR", help="default %(default)s")
    _add_many(command)
    command.set_defaults(jobs=None)


def _compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("--methods", metavar="A,B,C", help="default: the preset's own list")
    command.add_argument("--seeds", metavar="0,1,2", help="default: the preset's seed")
    _add_sets(command)
    _add_tuned(command)
    command.add_argument("--out", type=_place, metavar="DIR|URL", help="default runs/PRESET")
    _add_many(command)
    _add_engine(command)
    command.add_argument("--dry-run", action="store_true", help="say how many runs, how long, what disk; run nothing")
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
    _add_report(command)


def _run(command: argparse.ArgumentParser) -> None:
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("method", metavar="METHOD", help="see `dualcl list methods`, or FILE.py, FILE.py:NAME")
    command.add_argument("--seed", type=_seed, metavar="N", help="default: the preset's seed")
    _add_sets(command)
    _add_tuned(command)
    command.add_argument("--out", type=_place, metavar="DIR|URL", help="default runs/PRESET/METHOD-seedN")
    command.add_argument(
        "--wait", action="store_true", help="wait while another process has the folder, instead of refusing"
    )
    command.add_argument("--quiet", action="store_true", help="no progress; the table and errors still appear")


def _status(command: argparse.ArgumentParser) -> None:
    command.add_argument("dirs", nargs="+", type=_place, metavar="DIR|URL", help="where the runs are or will be")
    command.add_argument("--format", default="text", metavar="F", help="text, md, csv or json (default text)")
    command.add_argument("--watch", type=_positive, metavar="N", help="look again every N seconds")


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument("dirs", nargs="+", type=_place, metavar="DIR|URL", help="run folders, or folders of them")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="default DIR/report; --format md, csv or tex alone: stdout only"
    )
    _add_report(command)
    command.add_argument(
        "--with-published", action="store_true", help="published numbers too, apart from ours, with what differs"
    )
    command.add_argument(
        "--predicts",
        metavar="STREAM",
        help="does it rank methods as published for imagenet-r-10 or the like? Kendall's tau, prediction.md and a plot",
    )
    command.add_argument(
        "--all-plots", action="store_true", help="each stream's plots, however many streams and runs there are"
    )
    command.add_argument(
        "--ledger", type=Path, metavar="FILE", help="write the reproduction ledger of these records, and nothing else"
    )


def _sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("method", metavar="METHOD", help="see `dualcl list methods`, or FILE.py, FILE.py:NAME")
    command.add_argument(
        "--over", action="append", metavar="KEY=V1,V2,...", help="repeat for a grid; default: the preset's search space"
    )
    command.add_argument("--seeds", metavar="0,1,2", help="default: the preset's seed")
    _add_sets(command)
    command.add_argument("--out", type=_local_place, metavar="DIR", help="default runs/sweep-PRESET")
    command.add_argument(
        "--select", metavar="METRIC", help="what decides (default: what the preset says, else A_last, A_mmd)"
    )
    _add_many(command)
    _add_engine(command)


def _generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's folder, or one made by `dualcl export`")
    command.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        required=True,
        metavar="TEXT",
        help='with concepts as "<c1>", by name, "<cat>", or by number, "<#1>"; repeat for more prompts',
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
    command.add_argument(
        "--base", metavar="MODEL", help="where a run's base model is now; the model to put an exported LoRA on"
    )
    command.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images at once (default 8)")
    command.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    _add_files(command)
    command.add_argument("--out", type=Path, metavar="DIR", help="default RUN_DIR/generated")


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run, finished or partial")
    command.add_argument("--to", dest="kind", required=True, metavar="FORMAT", help=", ".join(EXPORT_FORMATS))
    command.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    command.add_argument(
        "--rank",
        type=_positive,
        metavar="R",
        help="largest rank of a LoRA (default: as many as hold the update exactly)",
    )
    command.add_argument("--base", metavar="MODEL", help="where the run's base model is now")
    _add_files(command)


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", metavar="FILE", help="of the run's method, if it is a file's: a record names none")
    command.add_argument("--data", metavar="FILE", help="of the run's data set, likewise")


def _list(command: argparse.ArgumentParser) -> None:
    command.add_argument("what", nargs="?", metavar="|".join(LISTS), help="default: all but published")
    command.add_argument("stream", nargs="?", metavar="STREAM", help="after `published`: show this stream's numbers")
    command.add_argument("--all", action="store_true", help="also what is kept for tests alone")


def _check(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "method", nargs="?", metavar="METHOD", help="FILE.py, FILE.py:NAME, or a name of `dualcl list methods`"
    )
    command.add_argument(
        "--backbones",
        nargs="*",
        metavar="GLOB",
        help="instead: timm's transformers, each made small with random weights; all take some minutes",
    )
    _add_sets(command)


def _show(command: argparse.ArgumentParser) -> None:
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("method", nargs="?", metavar="METHOD", help="a name or file; default: what all share")
    command.add_argument(
        "--order", action="store_true", help="all classes of all tasks, in the order in which they run"
    )
    _add_sets(command)


def _prepare(command: argparse.ArgumentParser) -> None:
    command.add_argument("preset", metavar="PRESET", help="a bundled preset or a YAML file")
    command.add_argument("--root", metavar="DIR", help="where the data goes: the same as --set data.root=DIR")
    _add_sets(command)


def _pretrain(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="see `dualcl list backbones`")
    command.add_argument("--seed", type=_natural, default=0, metavar="N", help="default %(default)s")
    command.add_argument("--out", type=Path, default=RUNS / "pretrain", metavar="DIR", help="default %(default)s")


def _doctor(command: argparse.ArgumentParser) -> None:
    pass


#: command -> its summary, and what adds its arguments; the file of its name does it, in `main(args)`
COMMANDS: dict[str, tuple[str, Callable[..., None]]] = {
    "quickstart": ("compare methods in both domains on the bundled models and data, in minutes", _quickstart),
    "compare": ("run every method with every seed, then report", _compare),
    "run": ("run one method with one seed; resumes an interrupted run", _run),
    "status": ("show how the runs of a comparison or sweep stand", _status),
    "report": ("rebuild tables, plots and the HTML page from records alone", _report),
    "sweep": ("run a grid of settings of one method and name the best", _sweep),
    "generate": ("make images of learnt concepts from a customization run or an exported model", _generate),
    "export": ("write what a customization run learnt in the format of other tools", _export),
    "list": ("list methods, presets, backbones, data sets and streams with published numbers", _list),
    "show": ("show the resolved configuration and where each value comes from", _show),
    "check": ("check all that a method must keep to, on tiny streams, in about a minute", _check),
    "prepare": ("download, verify and split the data of a preset", _prepare),
    "pretrain": ("make a bundled model again", _pretrain),
    "bench": ("measure speed and memory", bench.add_arguments),
    "doctor": ("check versions, devices, caches and writable places", _doctor),
}


def build_parser(*only: str) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of the one given alone, and of that kind of `bench`."""
    parser = _Parser(
        prog="dualcl",
        description="Continual learning in two domains with one runner.",
        epilog="Start with `dualcl quickstart`. Exit codes: 0 done, 1 a run failed, 2 wrong input, 130 interrupted.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if not only or only[0] == name:
            add_arguments(command, *(only[1:2] if name == "bench" else ()))
    return parser


def expand_sets(argv: Sequence[str]) -> list[str]:
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
