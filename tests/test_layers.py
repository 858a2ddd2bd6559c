"""Who may import whom: rooms in one direction, no circles, all imports at the top but those named here."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: what each room may import beside itself; `base` are the files of `methods` that are no method's own
MAY: dict[str, set[str]] = {"core": set(), "presets": set(), "benchmark": {"core"}}
MAY["datasets"] = MAY["models"] = MAY["base"] = MAY["results"] = {"core"}
MAY["methods"] = {"core", "base"}
MAY["domains"] = {"core", "datasets", "models", "base", "results"}
MAY["config"] = {*MAY["domains"], "domains"}
MAY["runs"] = {*MAY["config"], "config"}
MAY["exports"] = MAY["grids"] = {*MAY["runs"], "runs"}
MAY["speed"] = {*MAY["grids"], "exports", "grids"}
MAY["pretraining"] = {"core", "datasets", "models"}
MAY["cli"] = {*MAY["speed"], "speed", "pretraining"}
#: what is imported inside a function: installs that a user may do without
LAZY = {
    ("benchmark/core/processes.py", "accelerate"),
    ("benchmark/grids/ray.py", "ray"),
    ("benchmark/runs/mirror.py", "fsspec"),
    ("benchmark/runs/trackers.py", "torch.utils.tensorboard"),
    ("benchmark/runs/trackers.py", "wandb"),
    ("results/writers/parquet.py", "pyarrow"),
    ("results/writers/parquet.py", "pyarrow.parquet"),
}
#: who imports by name: the registry (methods, data sets), domains, commands, kinds of bench, engines, forms of a
#: report, published numbers, the ledger; a torch that may be broken; public code from a checkout
BY_NAME = {
    *("benchmark/core/registry.py", "benchmark/domains/__init__.py", "benchmark/cli/__init__.py"),
    "benchmark/core/imports.py",  # import_large, which domains and commands go by
    *("benchmark/cli/bench.py", "benchmark/grids/execute.py", "results/late.py", "benchmark/cli/doctor.py"),
    *(
        "benchmark/cli/list.py",
        "benchmark/cli/report.py",
        "benchmark/speed/peers/coda_prompt.py",
        "benchmark/speed/peers/pilot.py",
    ),
}
#: what starts without torch
LIGHT = ("results", "benchmark.cli", *(f"benchmark.cli.{name}" for name in ("options", "list", "report", "status")))
HEAVY = {"torch", "torchvision", "timm", "diffusers", "transformers", "safetensors", "accelerate"}

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("benchmark", "datasets", "methods", "results")
    for path in sorted((ROOT / top).rglob("*.py"))
}
#: module -> (imported module, line, whether inside a function, whether for type checkers alone)
Import = tuple[str, int, bool, bool]


def read(path: Path) -> list[Import]:
    found: list[Import] = []

    def walk(node: ast.AST, lazy: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((name.name, node.lineno, lazy, typing) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno} is a relative import"
            below = [f"{node.module}.{name.name}" for name in node.names]
            names = {x if x.removeprefix("dualcl.") in FILES else node.module for x in below}
            found.extend((name, node.lineno, lazy, typing) for name in names)
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing = typing or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            walk(child, lazy, typing)

    walk(ast.parse(path.read_text(encoding="utf-8")), False, False)
    return found


IMPORTS = {module: read(path) for module, path in FILES.items()}
OWN = {
    module: [(name.removeprefix("dualcl."), line) for name, line, *_ in found if name.startswith("dualcl.")]
    for module, found in IMPORTS.items()
}


def room(module: str) -> str:
    top, *below = module.split(".")
    if top == "benchmark" and below:
        return below[0]
    shared = not below or below[0] in ("base", "shared")
    return "base" if top == "methods" and shared else top


def test_there_is_no_circle() -> None:
    try:
        graphlib.TopologicalSorter({m: {name for name, _ in found} for m, found in OWN.items()}).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle of imports: {' <- '.join(error.args[1])}") from None


def test_rooms_import_in_one_direction() -> None:
    wrong = [
        f"{FILES[module].relative_to(ROOT)}:{line}: {room(module)} may not import dualcl.{name}"
        for module, found in OWN.items()
        for name, line in found
        if room(name) not in {*MAY[room(module)], room(module)}
    ]
    assert not wrong, "\n".join(wrong)


def test_a_method_builds_on_one_other_at_most() -> None:
    others = {m: {n for n, _ in found if room(n) == "methods"} for m, found in OWN.items() if room(m) == "methods"}
    assert {m: sorted(names) for m, names in others.items() if len(names) > 1} == {}


def test_imports_stand_at_the_top() -> None:
    lazy = {
        (path.relative_to(ROOT).as_posix(), name): line
        for module, path in FILES.items()
        for name, line, inside, _ in IMPORTS[module]
        if inside
    }
    wrong = [f"{file}:{lazy[file, name]}: imports {name} in a function" for file, name in sorted({*lazy} - LAZY)]
    assert not wrong, "\n".join(wrong)
    assert {*lazy} >= LAZY, f"listed, and no more there: {sorted(LAZY - {*lazy})}"


def test_who_imports_by_name_is_listed() -> None:
    calls = re.compile(r"import_(module|large)\(")
    found = (path for path in FILES.values() if calls.search(path.read_text(encoding="utf-8")))
    named = {path.relative_to(ROOT).as_posix() for path in found}
    assert named == BY_NAME, f"not listed: {sorted(named - BY_NAME)}; no more there: {sorted(BY_NAME - named)}"


def test_lists_and_reports_start_without_torch() -> None:
    way = {m: m for m in FILES if m in LIGHT or m.startswith("results.")}
    left = list(way)
    while left:
        module = left.pop()
        for name, line, lazy, typing in IMPORTS[module]:
            if lazy or typing:
                continue
            assert name.split(".")[0] not in HEAVY, f"{way[module]}:{line} imports {name}"
            parts = name.removeprefix("dualcl.").split(".")
            for own in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
                if own in FILES and own not in way:
                    way[own] = f"{way[module]} -> {own}"
                    left.append(own)
