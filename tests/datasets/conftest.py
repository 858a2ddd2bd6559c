from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test remembers verified files in a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DUALCL_CACHE", str(folder))
    return folder


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Path]:
    """make_tree({"train/cat": 3, ...}) -> a folder with that many small noise images in each place."""

    def make(counts: dict[str, int], suffix: str = ".png", root: Path = tmp_path / "tree") -> Path:
        rng = np.random.default_rng(0)
        for place, count in counts.items():
            (root / place).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
                image.save(root / place / f"img{i:02d}{suffix}")
        return root

    return make
