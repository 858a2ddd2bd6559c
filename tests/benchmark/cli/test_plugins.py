"""Methods and data sets from outside: files that a command names, and installed packages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.presets import load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.grids import ray as ray_engine
from dualcl.benchmark.grids.plan import Needs, plan_comparison
from dualcl.benchmark.runs.restore import restore
from dualcl.datasets import available_datasets
from dualcl.methods import available_methods, method_class, method_info

METHOD = '''
from dataclasses import dataclass, field

from dualcl.methods.base import Method, MethodConfig, register_method


@dataclass(frozen=True)
class Config(MethodConfig):
    """The method's own."""

    factor: float = field(default=1.0, metadata={"help": "of the loss"})


@register_method("mine", domains=("classification", "customization"), summary="trains rows", source="nowhere")
class Mine(Method):
    """Trains the domain's rows alone."""

    Config = Config

    def loss(self, batch):
        """The domain's, times the factor."""
        return self.config.factor * super().loss(batch)
'''
DATA = '''
from dualcl.datasets.base import register_dataset
from dualcl.datasets.glyphs import Glyphs


@register_dataset("my-glyphs", domain="classification", summary="glyphs again")
class Mine:
    """Glyphs."""

    Config = Glyphs.Config

    @classmethod
    def load(cls, config):
        """As glyphs."""
        return Glyphs.load(config)
'''
PRESET = """
extends: glyphs
compare: [ncm, parts/mine.py]
data: {name: parts/data.py, classes: 4, train_per_class: 6, test_per_class: 4}
stream: {tasks: 2}
train: {epochs: 1}
tuning: {mine: by hand}
methods: {mine: {factor: 0.5}}
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with own.yaml and the method and the data set that it names, from which commands are called."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.py").write_text(METHOD)
    (tmp_path / "parts" / "data.py").write_text(DATA)
    (tmp_path / "own.yaml").write_text(PRESET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """said(*arguments) -> (exit code, stdout, stderr) of `dualcl`."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def refused(said: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """refused(*arguments) -> the one line of the error of `dualcl`, which exits with 2."""

    def call(*arguments: str) -> str:
        code, _, err = said(*arguments)
        assert code == 2, err
        (line,) = err.splitlines()
        assert line.startswith("dualcl: error: ")
        return line.removeprefix("dualcl: error: ")

    return call


def record_of(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return tree


# --- by path ----------------------------------------------------------------------------------------------------------


def test_a_run_of_files_is_recorded_by_plain_names_and_hashes(place: Path, said: Any) -> None:
    code, out, err = said("run", "own.yaml", "parts/mine.py", "--quiet")
    assert code == 0, err
    assert "mine" in out
    record = record_of(place / "runs" / "own" / "mine-seed0")
    run = record["run"]
    assert (run["method"], run["label"], run["tuning"]) == ("mine", "mine", "by hand")
    method, data = place / "parts" / "mine.py", place / "parts" / "data.py"
    assert run["method_source"] == {"kind": "file", "file": "mine.py", "sha256": sha256(method)}
    assert run["data_source"] == {"kind": "file", "file": "data.py", "sha256": sha256(data)}
    assert (record["config"]["method_name"], record["config"]["data"]["name"]) == ("mine", "my-glyphs")
    assert record["config"]["method"]["factor"] == 0.5
    assert str(place) not in json.dumps(record)


def test_records_of_built_ins_stay_as_they_are(place: Path, said: Any) -> None:
    assert said("run", "own.yaml", "ncm", "--set", "data.name=glyphs", "--out", "built", "--quiet")[0] == 0
    assert not {"method_source", "data_source"} & record_of(place / "built")["run"].keys()
    assert resolve("glyphs", "lora").plugins == {}


def test_one_hash_resumes_and_another_is_refused(place: Path, said: Any, refused: Any) -> None:
    words = ("run", "own.yaml", "parts/mine.py", "--out", "run", "--quiet")
    assert said(*words)[0] == 0
    before = record_of(place / "run")
    assert said(*words)[0] == 0
    assert record_of(place / "run") == before
    for part, noun in (("mine", "method"), ("data", "data set")):
        file = place / "parts" / f"{part}.py"
        text, old = file.read_text(), sha256(file)[:12]
        file.write_text(f"{text}# another text\n")
        wanted = f"has another {noun}: sha256 there {old}, now {sha256(file)[:12]}"
        assert wanted in refused(*words)
        file.write_text(text)
    assert said(*words)[0] == 0
    (place / "parts" / "mine.py").write_text(METHOD + "\n")
    assert said("compare", "own.yaml", "--methods", "ncm", "--out", "grid", "--quiet", "--format", "csv")[0] == 0
    shutil.copytree(place / "run", place / "grid" / "mine-seed0")
    assert "has another method" in refused("compare", "own.yaml", "--methods", "parts/mine.py", "--out", "grid")


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_compare_and_its_children_take_files_and_names(jobs: str, place: Path, said: Any) -> None:
    more = ("--set", "methods.mine.factor=0.25") if jobs == "1" else ()
    code, out, err = said("compare", "own.yaml", "--jobs", jobs, "--out", "grid", "--format", "md", "--quiet", *more)
    assert code == 0, err
    assert "ncm" in out
    assert record_of(place / "grid" / "mine-seed0")["config"]["method"]["factor"] == (0.25 if more else 0.5)
    hashes = {record_of(place / "grid" / f"{m}-seed0")["run"]["data_source"]["sha256"] for m in ("ncm", "mine")}
    assert hashes == {sha256(place / "parts" / "data.py")}


def test_arguments_of_another_process_are_absolute_and_hold_the_hash(place: Path, refused: Any) -> None:
    (planned,) = plan_comparison("own.yaml", ["parts/mine.py"], None, [], place / "grid")
    method, data = place / "parts" / "mine.py", place / "parts" / "data.py"
    words = planned.arguments()
    assert words[:3] == ["run", str(place / "own.yaml"), f"{method}:mine@{sha256(method)}"]
    assert words[-1] == f'data.name="{data}:my-glyphs@{sha256(data)}"'
    assert planned.label == "mine seed 0"
    method.write_text(METHOD + "\n")
    assert re.search(r"mine\.py has changed: .* sha256 [0-9a-f]{12}; put it back", refused(*words))


def test_slurm_s_script_names_the_files(place: Path, said: Any) -> None:
    code, out, err = said("compare", "own.yaml", "--print-slurm", "--out", "grid")
    assert code == 0, err
    assert f"{place / 'parts' / 'mine.py'}:mine@{sha256(place / 'parts' / 'mine.py')}" in out


def run_on_a_node(place: Path) -> tuple[Any, dict[str, Any]]:
    """The plan, and the recorded source, of a run whose files are gone when the node gets it."""
    (planned,) = plan_comparison("own.yaml", ["parts/mine.py"], None, [], place / "grid")
    job = ray_engine._job(planned, Needs(1, 0.0, None))
    shutil.rmtree(place / "parts")
    (place / "own.yaml").write_text(PRESET.replace("parts/mine.py", "lora").replace("tuning: {mine: by hand}", ""))
    code, last = ray_engine._run(*job.arguments)
    assert code == 0, last
    return planned, record_of(place / "grid" / "mine-seed0")["run"]["method_source"]


def test_ray_carries_the_text(place: Path) -> None:
    _, source = run_on_a_node(place)
    assert source == {"kind": "file", "file": "mine.py", "sha256": hashlib.sha256(METHOD.encode()).hexdigest()}


def test_sweep_and_show_take_a_file(place: Path, said: Any) -> None:
    code, out, err = said("show", "own.yaml", "parts/mine.py")
    assert code == 0, err
    assert f"method: mine from {place / 'parts' / 'mine.py'}" in out
    assert "method.factor" in out
    assert "of the loss" in out
    code, out, err = said("show", "own.yaml")
    assert code == 0, err
    assert re.search(r"^mine +factor=0\.5 +by hand$", out, re.MULTILINE)
    over = ("--over", "method.factor=0.5,1.0", "--set", "data.train_per_class=8", "--out", "sweep", "--quiet")
    code, _, err = said("sweep", "own.yaml", "parts/mine.py", *over)
    assert code == 0, err
    assert json.loads((place / "sweep" / "mine" / "sweep.json").read_text())["method"] == "mine"


def test_a_file_is_no_one_else_s(place: Path, said: Any, refused: Any) -> None:
    assert said("run", "own.yaml", "parts/mine.py", "--quiet", "--out", "run")[0] == 0
    assert "mine" not in available_methods()
    assert "my-glyphs" not in available_datasets()
    assert not any(line.split()[:1] == ["mine"] for line in said("list", "methods")[1].splitlines())
    assert "unknown method 'mine'" in refused("run", "glyphs", "mine")


def test_several_registrations_are_told_apart(place: Path) -> None:
    other = METHOD.replace('"mine"', '"other"').replace("class Mine", "class Other")
    (place / "two.py").write_text(METHOD + other)
    assert method_info("two.py:other").name == "other"
    assert method_class("two.py:other").__name__ == "Other"
    assert method_class("two.py:mine").__name__ == "Mine"


def test_the_ledger_leaves_plugins_out(place: Path, said: Any, refused: Any) -> None:
    assert said("run", "own.yaml", "parts/mine.py", "--quiet", "--out", "all/mine")[0] == 0
    assert "no record.json of built-in methods" in refused("report", "all", "--ledger", "ledger.md")
    words = ("--set", "data.classes=4", "stream.tasks=2", "train.epochs=1", "--out", "all/ncm")
    assert said("run", "glyphs", "ncm", "--quiet", *words)[0] == 0
    assert said("report", "all", "--ledger", "ledger.md")[0] == 0
    assert "mine" not in (place / "ledger.md").read_text()


def test_a_report_imports_no_method(place: Path, said: Any) -> None:
    assert said("run", "own.yaml", "parts/mine.py", "--quiet", "--out", "run")[0] == 0
    (place / "parts" / "mine.py").write_text("raise SystemExit('imported')\n")
    (place / "own.yaml").unlink()
    code, out, _ = said("report", "run", "--format", "md")
    assert code == 0
    assert "mine" in out


# --- modules beside a file --------------------------------------------------------------------------------------------

HELPED = METHOD.replace("from dualcl", "from beside import SCALE\nfrom dualcl").replace(
    "factor * ", "factor * SCALE * "
)


@pytest.fixture
def beside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """beside.py, which parts/mine.py imports, in a process that has not imported it."""
    monkeypatch.syspath_prepend(place / "parts")
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (place / "parts" / "mine.py").write_text(HELPED)
    (place / "parts" / "beside.py").write_text("SCALE = 1.0\n")
    yield place / "parts" / "beside.py"
    sys.modules.pop("beside", None)


def hash_of(reference: str) -> str:
    plugin = method_info(reference).plugin
    assert plugin is not None
    return plugin.sha256


def test_a_run_goes_on_with_the_same_modules_beside_its_file_only(beside: Path, said: Any, refused: Any) -> None:
    words = ("run", "own.yaml", "parts/mine.py", "--out", "run", "--quiet")
    assert said(*words)[0] == 0
    before = record_of(Path("run"))
    assert said(*words)[0] == 0
    assert record_of(Path("run")) == before
    old = before["run"]["method_source"]["sha256"]
    assert old == hash_of("parts/mine.py") != sha256(Path("parts/mine.py"))
    beside.write_text("SCALE = 10.0\n")
    assert "beside.py has changed since this process imported it; start a new one" in refused(*words)
    del sys.modules["beside"]
    new = hash_of("parts/mine.py")
    assert f"has another method: sha256 there {old[:12]}, now {new[:12]}" in refused(*words)
    shutil.copytree("run", "grid/mine-seed0")
    assert "has another method" in refused("compare", "own.yaml", "--methods", "parts/mine.py", "--out", "grid")


def test_which_modules_the_hash_covers(place: Path) -> None:
    parts = place / "parts"
    mine = parts / "mine.py"
    plain = hash_of("parts/mine.py")
    assert plain == sha256(mine)
    (parts / "beside.py").write_text("")
    (parts / "dualcl").mkdir()  # a checkout
    (parts / "dualcl" / "methods.py").write_text("")
    assert hash_of("parts/mine.py") == plain
    imports = {
        "import torch, beside\n": ("beside.py",),
        "def f():\n    from beside import x\n": ("beside.py",),
        "from beside import *\n": ("beside.py",),
        "import pack.one\n": ("pack/__init__.py", "pack/one.py", "pack/two.py", "beside.py"),
        "from pack import deep\n": ("pack/__init__.py", "pack/deep/__init__.py", "pack/two.py"),
        "from loose.three import x\n": ("loose/three.py",),
    }
    for folder in ("pack/deep", "loose"):
        (parts / folder).mkdir(parents=True)
    texts = {
        "pack/__init__.py": "",
        "pack/one.py": "from . import two\nfrom beside import x\n",
        "pack/two.py": "import pack.one\nimport mine\n",  # in a circle
        "pack/deep/__init__.py": "from ..two import x\n",
        "loose/three.py": "def f(:\n",
        "other.py": "",
    }
    for line, covered in imports.items():
        for name, text in texts.items():
            (parts / name).write_text(text)
        (parts / "beside.py").write_text("")
        mine.write_text(line + METHOD)
        first = hash_of("parts/mine.py")
        changing = []
        for name in (*texts, "beside.py"):
            text = (parts / name).read_text()
            (parts / name).write_text(text + "# changed\n")
            changing += [name] * (hash_of("parts/mine.py") != first)
            (parts / name).write_text(text)
        if line.startswith("from pack"):  # by way of two
            covered = (*covered, "pack/one.py", "beside.py")
        assert sorted(changing) == sorted(covered), line
        assert hash_of("parts/mine.py") == first


def test_a_file_of_a_package_has_the_package_beside_it(place: Path) -> None:
    package = place / "pack" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package.parent / "help.py").write_text("SCALE = 1\n")
    (package / "mine.py").write_text("from pack.help import SCALE\n" + METHOD)
    before = hash_of("pack/inner/mine.py")
    (package.parent / "help.py").write_text("SCALE = 10\n")
    assert hash_of("pack/inner/mine.py") != before


def test_another_module_than_the_one_beside_the_file_is_refused(beside: Path, place: Path, refused: Any) -> None:
    (place / "others").mkdir()
    (place / "others" / "mine.py").write_text(HELPED)
    (place / "others" / "beside.py").write_text("SCALE = 10.0\n")
    method_class("parts/mine.py")
    told = refused("run", "glyphs", "others/mine.py")
    own = place / "others" / "beside.py"
    assert f"it imports beside from {beside}, but {own} lies beside it; rename one of the two" in told


def test_ray_carries_the_modules_beside_a_file(beside: Path, place: Path) -> None:
    here = "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent))\n"
    (place / "parts" / "mine.py").write_text(here + HELPED)
    planned, source = run_on_a_node(place)
    assert source["sha256"] == planned.resolved.plugins["method"].sha256


# --- a record runs no code --------------------------------------------------------------------------------------------


@pytest.fixture
def concept_run(place: Path, concepts_preset: Any, said: Any) -> Path:
    """The folder of a finished customization run of the file."""
    sets = ("eval.n=1", "eval.steps=1", "train.steps=1", "train.epochs=1", "stream.tasks=1", "data.concepts=2")
    words = ("data.per_concept=2", "prior.n=2", "eval.features=glyph-vit")
    code, _, err = said("run", "glyph-concepts", "parts/mine.py", "--out", "run", "--quiet", "--set", *sets, *words)
    assert code == 0, err
    return place / "run"


@pytest.fixture
def concepts_preset() -> None:
    """Nothing: presets are the bundled ones here."""


def test_export_and_generate_import_a_file_only_when_it_is_named_again(
    concept_run: Path, place: Path, said: Any, refused: Any
) -> None:
    file = place / "parts" / "mine.py"
    export = ("export", "run", "--to", "textual-inversion", "out")
    hint = f"the run is of the method 'mine' in mine.py (sha256 {sha256(file)[:12]}): name it, --method FILE"
    assert refused(*export) == hint
    assert refused("generate", "run", "--prompt", "a <c1>", "--steps", "1") == hint
    code, _, err = said(*export, "--method", "parts/mine.py")
    assert code == 0, err
    code, _, err = said("generate", "run", "--prompt", "a <c1>", "--steps", "1", "-n", "1", "--method", "parts/mine.py")
    assert code == 0, err
    assert "needs neither --method nor --data" in refused("generate", "out", "--prompt", "a <c1>", "--data", "x.py")
    (place / "marker.py").write_text(METHOD + "\nopen('executed', 'w').close()\n")
    assert "another method" in refused("export", "run", "--to", "merged", "out2", "--method", "marker.py")
    (place / "other.py").write_text(METHOD.replace('"mine"', '"other"') + "\nopen('executed', 'w').close()\n")
    assert "is 'other', but the run is of the method 'mine'" in refused(*export[:4], "out3", "--method", "other.py")
    assert not (place / "executed").exists()


@pytest.mark.parametrize("source", [None, {"kind": "package", "package": "x", "version": "1", "sha256": "0" * 64}])
@pytest.mark.parametrize("key", ["method_name", "data"])
def test_a_record_that_names_a_file_runs_nothing(key: str, source: Any, concept_run: Path, place: Path) -> None:
    evil = place / "evil.py"
    evil.write_text(METHOD + "\nopen('executed', 'w').close()\n")
    path = concept_run / "record.json"
    record = json.loads(path.read_text())
    record.pop("sha256")
    if key == "data":
        record["config"]["data"]["name"] = str(evil)
    else:
        record["config"]["method_name"] = str(evil)
        record["run"].pop("method_source")
        record["run"].update({} if source is None else {"method_source": source})
    from dualcl.benchmark.runs.folder import RunFolder

    RunFolder(concept_run).write_record(record)
    method = "parts/mine.py" if key == "data" else None
    with pytest.raises(UserError, match="which dualcl never writes"):
        restore(concept_run, method=method)
    assert not (place / "executed").exists()


# --- bad files --------------------------------------------------------------------------------------------------------

#: without a Config
ONE = re.sub("@dataclass.*?(?=@register_method)|    Config = Config\n", "", METHOD, flags=re.DOTALL)
BOTH = '("classification", "customization")'
#: the text of a file, and what is said of it
BAD = {
    "no registration": ("x = 1\n", "registers no method: decorate its class with @register_method(...)"),
    "several": (ONE + ONE.replace('"mine"', '"ours"'), "registers 2 methods, mine, ours; choose one, bad.py:mine"),
    "twice": (ONE + ONE, "registers 'mine' twice"),
    "syntax": ("def f(:\n", "bad.py, line 1 is no Python: invalid syntax"),
    "null bytes": ("x = 1\0\n", "is no Python"),
    "built in": (ONE.replace('"mine"', '"lora"'), "'lora' is registered in dualcl.methods.lora and in {place}/bad.py"),
    "import error": ("import nowhere\n" + ONE, "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    "exits": ("raise SystemExit(3)\n" + ONE, "bad.py cannot be imported: SystemExit: 3"),
    "several lines": ("raise ValueError('one\\ntwo')\n" + ONE, "cannot be imported: ValueError: one"),
    "no literal": (ONE.replace('"mine"', "NAME"), '@register_method("name", key=value, ...) wants literals'),
    "no call": (re.sub("@register_method.*", "@register_method", ONE), "wants literals"),
    "two names": (ONE.replace('"mine"', '"mine", "ours"'), "wants literals"),
    "bad name": (ONE.replace('"mine"', '"my method"'), "letters, digits, _ and -; got 'my method'"),
    "unknown keyword": (ONE.replace("summary=", "sumary="), "@register_method got an unexpected keyword argument 'su"),
    "missing keyword": (ONE.replace(', source="nowhere"', ""), "missing 1 required keyword-only argument: 'source'"),
    "wrong type": (ONE.replace(BOTH, '"classification"'), "domains must be a tuple of texts"),
    "no method": (ONE.replace("(Method)", "").replace("super().loss(batch)", "0"), "is no dualcl.methods.base.Method"),
    "bare config": (METHOD.replace("@dataclass(frozen=True)\n", ""), "Config must be a MethodConfig decorated with"),
    "old takes_steps": (ONE + "\n    takes_steps = False\n", "bad.py: Mine.takes_steps is a method now"),
    "old capability": (ONE + '\n    requires = ("prefix",)\n', 'bad.py: Mine.requires: "prefix" is "prefixes" now'),
    "old hook": (ONE + "\n    def set_prefix_provider(self): ...\n", "bad.py: Mine.set_prefix_provider is features("),
    "another domain": (ONE.replace(BOTH, '("customization",)'), "it serves: customization"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused_in_one_line(what: str, place: Path, refused: Any) -> None:
    text, hint = BAD[what]
    (place / "bad.py").write_text(text)
    assert hint.format(place=place) in refused("run", "glyphs", "bad.py")


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("nowhere.py", "cannot read {place}/nowhere.py: No such file or directory"),
        ("parts", "unknown method 'parts'"),
        ("parts/", "parts/ is no .py file"),
        ("own.yaml", "own.yaml is no .py file; give the method's, FILE.py:NAME"),
        ("parts/mine.py:mime", "registers no method 'mime'; did you mean 'mine'? (there: mine)"),
        ("parts/mine.py@" + "0" * 64, "mine.py has changed: the run was planned with sha256 000000000000"),
        ("lora@" + "0" * 64, "dualcl.methods.lora is built in"),
        ("cloar", "did you mean 'clora'"),
    ],
)
def test_a_bad_reference_is_refused_in_one_line(reference: str, hint: str, place: Path, refused: Any) -> None:
    for command in ("run", "show", "sweep"):
        assert hint.format(place=place) in refused(command, "glyphs", reference)
    assert hint.format(place=place) in refused("compare", "glyphs", "--methods", f"ncm,{reference}")
    assert hint.format(place=place) in refused("check", reference)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("x = 1\n", "registers no data set: decorate its class with @register_dataset(...)"),
        (DATA.replace('"my-glyphs"', '"glyphs"'), "'glyphs' is registered in dualcl.datasets.glyphs and in"),
        (DATA.replace("classification", "customization"), "data set 'my-glyphs' is of the domain 'customization'"),
        (DATA.replace("    Config = Glyphs.Config\n", ""), "my-glyphs: Mine needs Config"),
        (DATA.replace("def load", "def lode"), "my-glyphs: Mine needs load"),
        ("import nowhere\n" + DATA, "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_bad_data_file_is_refused_in_one_line(text: str, hint: str, place: Path, refused: Any) -> None:
    (place / "bad.py").write_text(text)
    assert hint in refused("run", "glyphs", "ncm", "--set", "data.name=bad.py")
    assert "cannot read" in refused("run", "glyphs", "ncm", "--set", "data.name=nowhere.py")


def test_a_traceback_is_shown_with_debug_only(place: Path, said: Any) -> None:
    (place / "bad.py").write_text("import nowhere\n" + ONE)
    assert "Traceback" not in said("run", "glyphs", "bad.py")[2]
    shown = said("run", "glyphs", "bad.py", "--debug")[2]
    assert "Traceback" in shown
    assert "import nowhere" in shown


def test_a_preset_knows_the_methods_of_the_files_that_it_compares(place: Path) -> None:
    assert load_preset("own.yaml").compare == ("ncm", str(place / "parts" / "mine.py"))
    assert resolve("own.yaml", "ncm").data_name == "my-glyphs"
    (place / "own.yaml").write_text(PRESET.replace(", parts/mine.py", ""))
    with pytest.raises(UserError, match=r"unknown method in tuning\.mine"):
        resolve("own.yaml", "ncm")
    assert resolve("own.yaml", "parts/mine.py").tuning == "by hand"
    (place / "again.py").write_text(METHOD)
    (place / "own.yaml").write_text(PRESET.replace("ncm", "again.py"))
    with pytest.raises(UserError, match=r"'mine' is registered in .*again\.py and in .*mine\.py"):
        load_preset("own.yaml")


def test_a_method_given_twice_is_refused(place: Path, refused: Any) -> None:
    methods = "parts/mine.py,./parts/mine.py"
    assert "--methods names 'mine' twice" in refused("compare", "own.yaml", "--methods", methods)


# --- installed packages -----------------------------------------------------------------------------------------------

SETUP = """
[metadata]
name = my-package
version = 1.2

[options]
packages = my_package

[options.entry_points]
dualcl.methods =
    mine = my_package.mine
dualcl.datasets =
    my-glyphs = my_package.data:Mine
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed wheel that brings a method and a data set."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "my_package").mkdir()
    (source / "my_package" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (source / "my_package" / "mine.py").write_text(METHOD)
    (source / "my_package" / "data.py").write_text(DATA)
    (source / "setup.cfg").write_text(SETUP)
    (source / "setup.py").write_text("from setuptools import setup\n\nsetup()\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(source), "."]
    subprocess.run(wheel, check=True, cwd=source)
    (found,) = source.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(found)], check=True)
    return target


def outside(site: Path, *words: str, code: str = "pass") -> subprocess.CompletedProcess[str]:
    """`dualcl` with a folder of packages; `code` is executed first."""
    program = f"import sys; {code}; from dualcl.benchmark.cli import main; done = main(sys.argv[1:])"
    program += "; print('torch' in sys.modules, 'my_package' in sys.modules, file=sys.stderr); sys.exit(done)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment, cwd=site
    )


def test_a_list_shows_packages_and_imports_none_of_them(installed: Path) -> None:
    done = outside(installed, "list")
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["False", "False"]
    shown = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines()]
    domains = "classification, customization"
    assert ["mine", domains, "my-package 1.2", "trains rows [nowhere]"] in shown
    assert ["my-glyphs", "classification", "my-package 1.2", "glyphs again"] in shown
    assert next(cells for cells in shown if cells[0] == "lora")[2] == "built in"
    assert "did you mean 'mine'" in outside(installed, "run", "glyphs", "mime").stderr


def test_a_package_s_method_and_data_run_and_are_recorded(installed: Path, tmp_path: Path) -> None:
    init = installed / "my_package" / "__init__.py"
    init.write_text("")  # it may be imported now
    sets = ("data.name=my-glyphs", "data.classes=4", "data.train_per_class=6", "stream.tasks=2", "train.epochs=1")
    words = ("run", "glyphs", "mine", "--out", str(tmp_path / "run"), "--quiet", "--set", *sets)
    done = outside(installed, *words)
    assert done.returncode == 0, done.stderr
    run = record_of(tmp_path / "run")["run"]
    assert run["method"] == "mine"
    for part, file in (("method", "mine.py"), ("data", "data.py")):
        own = {"kind": "package", "package": "my-package", "version": "1.2"}
        assert run[f"{part}_source"] == {**own, "sha256": sha256(installed / "my_package" / file)}
    file = installed / "my_package" / "mine.py"
    text = file.read_text()
    try:
        file.write_text(text + "# changed\n")
        assert "has another method" in outside(installed, *words).stderr
    finally:
        file.write_text(text)


def test_the_hash_of_a_package_s_method_covers_what_it_imports_of_the_package(installed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    package = site / "my_package"
    (package / "__init__.py").write_text("")
    (package / "beside.py").write_text("SCALE = 1.0\n")
    (package / "mine.py").write_text(HELPED.replace("from beside", "from .beside"))
    sets = ("data.name=my-glyphs", "data.classes=4", "data.train_per_class=6", "stream.tasks=2", "train.epochs=1")
    words = ("run", "glyphs", "mine", "--out", str(tmp_path / "run"), "--quiet", "--set", *sets)
    done = outside(site, *words)
    assert done.returncode == 0, done.stderr
    (package / "beside.py").write_text("SCALE = 10.0\n")
    assert "has another method" in outside(site, *words).stderr


def test_a_name_of_a_package_is_taken(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    done = outside(installed, "run", "glyphs", str(tmp_path / "mine.py"))
    assert done.returncode == 2
    assert f"'mine' is registered in my-package 1.2 ({installed / 'my_package' / 'mine.py'}) and in" in done.stderr


@pytest.mark.parametrize(
    ("text", "value", "hint"),
    [
        (METHOD.replace('"mine"', '"lora"'), "mod", "'lora' is registered in dualcl.methods.lora and in other 2 ("),
        (METHOD, "mod", "'mine' is registered in my-package 1.2 ("),
        ("x = 1\n", "mod", "package other: its entry point m = mod (dualcl.methods) registers no method"),
        (METHOD, "mod:Nothing", "registers no method"),
        (METHOD, "elsewhere", "m = elsewhere (dualcl.methods) names no file of the package"),
        ("def f(:\n", "mod", "mod.py, line 1 is no Python"),
    ],
)
def test_a_bad_package_is_refused_in_one_line(
    text: str, value: str, hint: str, installed: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    info = site / "other-2.dist-info"
    info.mkdir()
    (site / "mod.py").write_text(text)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2\n")
    (info / "entry_points.txt").write_text(f"[dualcl.methods]\nm = {value}\n")
    (info / "RECORD").write_text("mod.py,,\n")
    done = outside(site, "list", "methods")
    assert done.returncode == 2
    assert hint in done.stderr.splitlines()[0]


def test_an_editable_package_is_found_without_an_import(tmp_path: Path) -> None:
    """Its list of files names none of its modules."""
    site, source = tmp_path / "site", tmp_path / "source"
    info = site / "other-2.dist-info"
    info.mkdir(parents=True)
    (source / "own").mkdir(parents=True)
    (source / "own" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (source / "own" / "mod.py").write_text(METHOD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2\n")
    (info / "entry_points.txt").write_text("[dualcl.methods]\nm = own.mod\n")
    (info / "RECORD").write_text("__editable__.other-2.pth,,\n")
    done = outside(site, "list", "methods", code=f"sys.path.append({str(source)!r})")
    assert done.returncode == 0, done.stderr
    assert "other 2" in done.stdout


def test_a_module_that_hides_the_package_s_is_refused(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "mine.py").write_text(METHOD)
    done = outside(installed, "run", "glyphs", "mine", code=f"sys.path.insert(0, {str(tmp_path)!r})")
    assert done.returncode == 2
    assert f"but Python imports {tmp_path / 'my_package' / 'mine.py'}" in done.stderr
