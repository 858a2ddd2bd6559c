"""`dualcl check`: an honest method passes, and every broken promise is told in its line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.runs.method_check import PROPERTIES, check_method

FILE = '''
import torch
from dualcl.methods.base import Method, ParamGroup, register_method


@register_method("suspect", domains=("classification",), summary="s", source="nowhere")
class Suspect(Method):
    """Trains the classifier's rows, and more that is put below."""

    requires = ("features",)
    drift = 0.0
'''
RUNS, STEPS, LOSSES, ROWS, NETWORK, EVALUATION, TASK, NEIGHBOURS, KEPT, STORED, RESTORES, RESUMES = (
    "it runs a stream of tasks",
    *(str(holds.__doc__).partition("\n")[0] for holds in PROPERTIES),
)
#: what a method does -> the properties that it breaks, and a word of the reason of the first
BROKEN = {
    "def loss(self, batch):\n    raise ValueError('boom')": ([RUNS], "ValueError: boom"),
    "def loss(self, batch):\n    return super().loss(batch) * float('nan')": ([RUNS], "the loss is nan"),
    "def loss(self, batch):\n    return super().loss(batch).double()": ([LOSSES], "torch.float64"),
    "def penalty(self):\n    return torch.zeros(1)": ([LOSSES], r"penalty of shape \(1,\)"),
    "def loss(self, batch):\n"
    "    with torch.no_grad():\n"
    "        self.domain.model.norm.weight[0] += 0.1\n"
    "    return super().loss(batch)": ([STEPS, RESTORES, RESUMES], "model.norm.weight"),
    "def begin_task(self, task):\n    self.domain.model.norm.weight.requires_grad_(True)": (
        [STEPS],
        "gradients of what is not trained",
    ),
    "def end_task(self, task):\n"
    "    for j in range(task):\n"
    "        weight, bias = self.domain.output_rows(j)\n"
    "        self.domain.set_output_rows(j, 2 * weight, bias)": ([ROWS], r"`rewrites_rows`.*: 0\.weight"),
    "frozen = True\n"
    "def features(self, images, network):\n"
    "    return network(images)\n"
    "def end_task(self, task):\n"
    "    with torch.no_grad():\n"
    "        self.domain.model.norm.weight[0] += 0.1": ([NETWORK, RESTORES, RESUMES], r"these change: norm\.weight"),
    "frozen = True\n"
    "def features(self, images, network):\n"
    "    return network(images)\n"
    "def end_task(self, task):\n"
    "    self.domain.model.norm.register_forward_hook(lambda *given: None)": ([NETWORK], "modules or hooks"),
    "def features(self, images, network):\n"
    "    return network(images, key='mine')\n"
    "def end_task(self, task):\n"
    "    with torch.no_grad():\n"
    "        self.domain.model.norm.weight[0] += 0.1": ([RUNS], "features kept under the key 'mine'"),
    "def features(self, images, network):\n"
    "    return network(images, key='mine')\n"
    "def diagnostics(self):\n"
    "    with torch.no_grad():\n"
    "        self.domain.model.norm.weight[0] += 0.1 * (len(self.domain.heads) == 3)\n"
    "    return {}": ([EVALUATION, KEPT, RESTORES], "features kept under the key"),
    "def scores(self, features):\n"
    "    self.domain.model.norm.bias.data[0] += 0.1\n"
    "    return super().scores(features)": (
        [EVALUATION, TASK, NEIGHBOURS, KEPT, RESTORES, RESUMES],
        "norm.bias|second",
    ),
    "def scores(self, features):\n"
    "    return super().scores(features) + (self.domain._current or 0) * features[:, :1]": ([TASK], "is in task 0"),
    "def scores(self, features):\n    scores = super().scores(features)\n    return scores - scores.mean(0)": (
        [NEIGHBOURS],
        "away",
    ),
    "def scores(self, features):\n    return super().scores(features).double()": (
        [NEIGHBOURS],
        "scores are torch.float64",
    ),
    "def scores(self, features):\n    return super().scores(features)[:, :2]": (
        [NEIGHBOURS],
        r"shape \(7, 2\), not torch.float32 of \(7, 7\)",
    ),
    "def scores(self, features):\n    torch.rand(1)\n    return super().scores(features)": (
        [NEIGHBOURS],
        "random numbers are drawn",
    ),
    "def stored_parameters(self):\n    return 10": ([STORED], "says 10, and its checkpoint holds 0"),
    "def end_task(self, task):\n"
    "    self.drift += 1.0\n"
    "def scores(self, features):\n"
    "    scores = super().scores(features)\n"
    "    return scores + 99 * (self.drift - 1) * features[:, : scores.shape[1]]": ([RESTORES, RESUMES], "state_dict"),
    "def end_task(self, task):\n"
    "    self.rows = torch.rand(1)\n"
    "def restored(self, finished):\n"
    "    self.domain.heads[0].bias.data += 1": ([RESTORES, RESUMES], "differ"),
}


def checked(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str]:
    """Exit code, what is said of each property, and stderr."""
    file = folder / "suspect.py"
    file.write_text(FILE + "\n".join(f"    {line}" for line in text.splitlines()) + "\n")
    code = main(["check", str(file)])
    out, err = capsys.readouterr()
    lines = dict(line.removeprefix("classification: ").split(": ", 1) for line in out.splitlines())
    return code, lines, err


def test_an_honest_method_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = checked("", tmp_path, capsys)
    assert (code, err) == (0, "")
    assert [*lines][:3] == [RUNS, STEPS, LOSSES]
    assert len(lines) == 1 + len(PROPERTIES)
    assert all(said.split()[0] == "ok" for said in lines.values())


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_promise_is_told(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, reason = BROKEN[text]
    code, lines, err = checked(text, tmp_path, capsys)
    assert [name for name, said in lines.items() if said.startswith("failed: ")] == names
    assert re.search(reason, lines[names[0]])
    assert code == 1
    assert f"breaks {len(names)} of its promises" in err


UNCOUNTED = """
import torch
from dualcl.methods.base import register_method
from dualcl.methods.lora import LoRA


@register_method("dense", domains=("classification",), summary="s", source="nowhere")
class Dense(LoRA):
    def __init__(self, *given):
        super().__init__(*given)
        for i, update in enumerate(self.updates.values()):
            self.register_buffer(f"old_{i}", torch.zeros_like(update.summed), persistent=PERSISTENT)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
"""
COUNTED = """
    def stored_parameters(self):
        return super().stored_parameters() + sum(u.summed.numel() for u in self.updates.values())
"""


@pytest.mark.parametrize(
    ("text", "remark"),
    [(UNCOUNTED, True), (UNCOUNTED + COUNTED, False), (UNCOUNTED.replace("PERSISTENT", "False"), False)],
)
def test_numbers_that_an_inherited_count_misses_are_remarked_on(
    text: str, remark: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dense.py").write_text(text.replace("PERSISTENT", "True"))
    (said,) = (s for s in check_method(str(tmp_path / "dense.py"), ["method.rank=2"]) if s[1] == STORED)
    assert said[2] == ""
    found = re.findall(r"remark: LoRA.stored_parameters, which Dense inherits, .* ([\d,]+) numbers .*old_0", said[3])
    assert found == ["294,912"] * remark  # of the sites of the bundled ViT


def test_both_domains_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "lora", "--set", "method.rank=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + len(PROPERTIES))
    assert {line.partition(":")[0] for line in lines} == {"classification", "customization"}


def test_bad_input_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["nowhere.py"], ["lorra"], ["lora", "--set", "method.rnk=1"]):
        assert main(["check", *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


PAGE = Path(__file__).parents[2] / "methods" / "README.md"


def test_the_page_s_method_runs_and_keeps_its_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (shell,) = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("ridge.py").write_text(text)
    tiny = ["--set", "stream.tasks=4", "data.train_per_class=6", "data.test_per_class=4", "train.epochs=1"]
    commands = [shlex.split(line, comments=True)[1:] for line in shell.splitlines()]
    assert [words[0] for words in commands] == ["check", "show", "run", "compare"]
    for words in commands:
        assert main([*words, *(tiny if words[0] in ("run", "compare") else [])]) == 0, capsys.readouterr().err
    record = json.loads(Path("runs/ridge-10/record.json").read_text())
    assert (record["status"], record["config"]["method"]["strength"]) == ("finished", 10.0)
    row = record["matrix"]["rows"][-1]
    assert sum(row["correct"]) > sum(row["total"]) / 5  # of 20 classes
    assert [t["steps"] for t in record["tasks"]] == [0] * 4


def test_the_page_lists_every_file() -> None:
    text = PAGE.read_text()
    files = [p for p in (*PAGE.parent.glob("*.py"), *PAGE.parent.glob("shared/*.py")) if p.name != "__init__.py"]
    assert [p.name for p in files if f"`{p.name}`" not in text] == []
