"""Parity with public code: a checkout to run it live, stored outputs of it, and how differences are measured.

Live tests carry the marker `reference` and skip unless an environment variable names a checkout. With
`--write-reference` they store what the public code gave; plain tests compare ours with the stored numbers in every run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/reference --write-reference` stores the outputs of the public code anew."""
    parser.addoption("--write-reference", action="store_true", help="store what the public code gives")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums in the order of one thread, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def relative_difference() -> Callable[[Any, Any], float]:
    """relative_difference(ours, theirs) -> max|ours - theirs| / max|theirs|, for tensors, arrays or numbers."""

    def measure(ours: Any, theirs: Any) -> float:
        a, b = (torch.as_tensor(t).detach().to(torch.float64) for t in (ours, theirs))
        assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
        assert bool(torch.isfinite(b).all()), "the reference holds a number that is not finite"
        if torch.equal(a, b):
            return 0.0
        return float((a - b).abs().max() / b.abs().max())

    return measure


@pytest.fixture(scope="session")
def checkout() -> Callable[[str, str], Path]:
    """checkout(variable, repository) -> the folder that the environment variable names; skips the test without it."""

    def find(variable: str, repository: str) -> Path:
        path = os.environ.get(variable)
        if not path:
            pytest.skip(f"set {variable} to a checkout of {repository}")
        assert Path(path).is_dir(), f"{variable}={path} is no folder"
        return Path(path)

    return find


@pytest.fixture(scope="session")
def writes_reference(request: pytest.FixtureRequest) -> bool:
    """Whether live tests store what the public code gave."""
    return bool(request.config.getoption("--write-reference", default=False))


@pytest.fixture(scope="session")
def stored() -> Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]:
    """stored(name) -> (tensors, metadata) of tests/reference/<name>.safetensors."""
    from safetensors import safe_open

    def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118

    return read


@pytest.fixture(scope="session")
def store() -> Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], None]:
    """store(name, tensors, metadata) writes tests/reference/<name>.safetensors; metadata values become text."""
    from safetensors.torch import save_file

    def write(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        kept = {k: v.detach().cpu().contiguous().clone() for k, v in sorted(tensors.items())}
        file = FOLDER / f"{name}.safetensors"
        save_file(kept, file, metadata=text)
        file.chmod(0o644)

    return write


@pytest.fixture(scope="session")
def write_table() -> Callable[[str, str], None]:
    """write_table(name, text) puts `text` between `<!-- name:begin -->` and `<!-- name:end -->` of the README here."""

    def write(name: str, text: str) -> None:
        readme = FOLDER / "README.md"
        before, rest = readme.read_text(encoding="utf-8").split(f"<!-- {name}:begin -->")
        _, after = rest.split(f"<!-- {name}:end -->")
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        readme.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")

    return write
