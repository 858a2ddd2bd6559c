"""README.md says what is there: methods and domains, metrics, commands and their options, and an example that runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualcl.benchmark.cli.options import build_parser, expand_sets
from dualcl.benchmark.cli.quickstart import QUICKSTART
from dualcl.benchmark.config.presets import load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.grids.sweep import plan_sweep
from dualcl.methods import available_methods

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def table(first: str) -> list[list[str]]:
    """The cells of the table whose head starts with the columns `first`."""
    lines = iter(README[README.index(first) :].splitlines()[2:])
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def commands() -> Iterator[list[str]]:
    """The arguments of every `dualcl` command in a shell block."""
    for line in "\n".join(blocks("sh")).splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if words and words[0].rpartition("/")[2] == "dualcl":
                yield words[1:]


def test_the_table_lists_the_registered_methods_with_their_domains() -> None:
    told = {name: tuple(domains.split(", ")) for name, domains, *_ in table("| name | domains |")}
    assert told == {m.name: m.domains for m in available_methods().values()}


def test_the_metrics_are_those_of_the_tables() -> None:
    from dualcl.results.metrics import COST, KINDS, METRICS

    told = {name: arrow == "↑" for name, _, arrow in table("| name | definition | better |")}
    shown = {*KINDS["accuracy"].columns, *COST} - {"time_s", "peak_mib"}
    assert told == {key: METRICS[key].higher_is_better for key in shown}


def save_example(folder: Path) -> Path:
    """README's method as a file in `folder`."""
    (text,) = blocks("python")
    (folder / "bitfit.py").write_text(text, encoding="utf-8")
    return folder


def test_every_command_is_one_that_the_command_line_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(save_example(tmp_path))
    parser = build_parser()
    used = set()
    for words in commands():
        args = parser.parse_args(expand_sets(words))
        used.add(args.command)
        if args.command in ("run", "show"):
            resolve(args.preset, args.method or load_preset(args.preset).compare[0], args.sets)
        elif args.command == "compare":
            for method in args.methods.split(",") if args.methods else load_preset(args.preset).compare:
                resolve(args.preset, method, args.sets)
        elif args.command == "sweep":
            assert plan_sweep(args.preset, args.method, args.over, None, args.sets, tmp_path).plan
        elif args.command == "prepare":
            load_preset(args.preset)
    assert used >= {"quickstart", "list", "show", "run", "compare", "report", "sweep", "prepare", "bench"}


def test_the_two_commands_stand_alone_and_pin_the_same_torch() -> None:
    lines = [line for line in "\n".join(blocks("sh")).splitlines() if line.startswith("python3 -m venv ")]
    assert [line.split(" && ")[-1] for line in lines] == [".venv/bin/dualcl quickstart", ".venv-test/bin/pytest"]
    assert [len((methods and methods.split(",")) or load_preset(p).compare) for p, _, methods, _ in QUICKSTART] == [
        4,
        5,
    ]
    assert "compares five methods in classification and four in customization" in README
    pins = [re.findall(r"torch==\S+", line) for line in lines]
    assert pins[0] == pins[1]
    assert len(pins[0]) == 1


def test_every_relative_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_preset_example_resolves(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    flat = resolve(str(file), "clora").flat()
    assert (flat["data.classes"], flat["stream.tasks"], flat["method.rank"]) == (4, 2, 8)


def test_the_example_of_a_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from dualcl.benchmark.runs.runner import run

    monkeypatch.chdir(save_example(tmp_path))
    sets = ["train.epochs=2", "data.classes=4", "data.train_per_class=6", "data.test_per_class=4", "stream.tasks=2"]
    record = run(resolve("glyphs", "bitfit.py", sets), tmp_path / "run")
    assert record["status"] == "finished"
    assert record["run"]["method"] == "bitfit"
    assert [len(row["correct"]) for row in record["matrix"]["rows"]] == [1, 2]
    # 6 blocks with 3 x 128 biases each, and 2 classifier rows of 128 + 1
    assert [t["parameters_trained"] for t in record["tasks"]] == [6 * 384 + 2 * 129] * 2
    from safetensors.torch import load_file

    saved = load_file(next((tmp_path / "run").glob("checkpoints/task_1/*.safetensors")))
    biases = [v for k, v in saved.items() if k.startswith("method.biases")]
    assert len(biases) == 6
    assert all(torch.isfinite(b).all() for b in biases)
