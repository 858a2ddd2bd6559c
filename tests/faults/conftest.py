"""A world of small commands for the faults."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # the campaign is a script, and so are its parts


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Inputs, references and the server that forks commands."""
    from harness import World

    made = World(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()
