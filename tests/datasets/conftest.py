import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address it is served at."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()
