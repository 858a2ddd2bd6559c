import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets.reading import cache
from dualcl.datasets.reading.cache import PixelStore, make_room, open_store
from dualcl.datasets.reading.threads import prepared
from dualcl.datasets.reading.views import Decoded

COUNT, LIMIT = 9, 2**20


def image(index: int, seed: int = 0) -> Decoded:
    """Noise whose size and pixels are functions of the index."""
    rng = np.random.default_rng([seed, index])
    pixels = rng.integers(0, 256, (5 + index, 7, 3), dtype=np.uint8)
    return Decoded(pixels, (70, 50 + 10 * index))


def opened(
    key: str = "a", decode: Callable[[int], Decoded] = image, count: int = COUNT, limit: int = LIMIT
) -> PixelStore | None:
    return open_store({"set": key}, count, decode, limit=limit, workers=2)


def never(index: int) -> Decoded:
    raise AssertionError(f"image {index} was decoded")


def files(own_cache: Path) -> list[Path]:
    return sorted((own_cache / "decoded").iterdir())


def holds(store: PixelStore | None, seed: int = 0) -> bool:
    assert store is not None
    expected = [image(i, seed) for i in range(len(store))]
    return all(np.array_equal(store[i].pixels, e.pixels) and store[i].full == e.full for i, e in enumerate(expected))


def test_a_store_is_decoded_once_and_opened_again(own_cache: Path):
    decoded: list[int] = []

    def counted(index: int) -> Decoded:
        decoded.append(index)
        return image(index)

    assert holds(opened(decode=counted))
    assert set(decoded) == set(range(COUNT))
    decoded.clear()
    assert holds(opened(decode=counted))
    assert len(decoded) <= 4  # the images that are compared with their files
    assert len(files(own_cache)) == 1


def test_other_keys_and_counts_are_other_stores(own_cache: Path):
    assert holds(opened("a"))
    assert holds(opened("b", lambda i: image(i, 1)), seed=1)
    assert holds(opened("a", count=4))
    assert holds(opened("a"))
    assert len(files(own_cache)) == 3


@pytest.mark.parametrize("change", ["empty", "half", "footer", "tail", "table", "foreign"])
def test_a_damaged_file_is_made_again(own_cache: Path, change):
    opened()
    (path,) = files(own_cache)
    good = path.read_bytes()
    table = len(good) - 28 - COUNT * 20
    damaged = {
        "empty": b"",
        "half": good[: len(good) // 2],
        "footer": good[:-1] + bytes([good[-1] ^ 1]),
        "tail": good + b"x",
        "table": good[: table + 3] + bytes([good[table + 3] ^ 1]) + good[table + 4 :],
        "foreign": b"not the file that was written here, and longer than a footer",
    }
    path.write_bytes(damaged[change])
    assert holds(opened())
    assert path.read_bytes() == good


def test_damaged_pixels_are_decoded_and_the_file_is_made_again(own_cache: Path):
    opened()
    (path,) = files(own_cache)
    good = path.read_bytes()
    at = int(np.cumsum([0] + [image(i).pixels.nbytes for i in range(COUNT)])[4]) + 1  # not one of those compared
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert holds(opened())
    assert not path.exists()
    assert holds(opened())
    assert path.read_bytes() == good


def test_a_file_of_other_images_under_the_same_key_is_made_again():
    assert holds(opened())
    assert holds(opened(decode=lambda i: image(i, 1)), seed=1)


def test_an_error_of_a_file_goes_to_the_caller_and_leaves_nothing(own_cache: Path):
    def broken(index: int) -> Decoded:
        if index == 6:
            raise UserError("cannot read the image x.jpg")
        return image(index)

    with pytest.raises(UserError, match=r"x\.jpg"):
        opened(decode=broken)
    assert files(own_cache) == []


def test_the_least_recently_used_that_is_not_open_makes_room(own_cache: Path):
    size = sum(image(i).pixels.nbytes for i in range(COUNT))
    limit = int(3.5 * size)
    paths = {}
    for age, key in enumerate("abc"):
        opened(key, limit=limit).close()
        (paths[key],) = set(files(own_cache)) - set(paths.values())
        os.utime(paths[key], (1000 + age, 1000 + age))
    opened("a", limit=limit).close()  # used again: now the oldest is b
    held = opened("b", limit=limit)
    os.utime(paths["b"], (1, 1))
    assert holds(opened("d", limit=limit))
    assert paths["a"].exists()
    assert paths["b"].exists()  # open
    assert not paths["c"].exists()
    assert holds(held)


def test_what_cannot_be_kept_removes_nothing_and_is_said_in_one_line(own_cache: Path, capsys):
    size = sum(image(i).pixels.nbytes for i in range(COUNT))
    opened("a").close()
    before = files(own_cache)
    assert opened("b", limit=size // 2) is None
    assert files(own_cache) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "input.cache_gib" in said


def test_a_full_disk_keeps_nothing(own_cache: Path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "RESERVE", 2**60)
    assert opened() is None
    assert files(own_cache) == []
    assert "decoded images are not kept" in capsys.readouterr().err


def test_a_disk_that_fills_up_meanwhile_keeps_nothing(own_cache: Path, capsys):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        assert opened() is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert files(own_cache) == []
    assert "decoded images are not kept" in capsys.readouterr().err


def test_a_cache_that_is_no_folder_is_done_without(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DUALCL_CACHE", str(tmp_path / "file"))
    assert opened() is None
    assert capsys.readouterr().err.count("\n") == 1


def _slow(index: int) -> Decoded:
    time.sleep(0.02)
    return image(index)


def _fill_and_compare(pause: float, results) -> None:
    time.sleep(pause)
    results.put(holds(opened(decode=_slow, count=40)))


def test_two_processes_that_fill_the_same_store_both_have_it(own_cache: Path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=_fill_and_compare, args=(pause, results)) for pause in (0.0, 0.1)]
    for process in both:
        process.start()
    assert [results.get(timeout=30) for _ in both] == [True, True]
    for process in both:
        process.join(10)
    assert len(files(own_cache)) == 1


def test_killed_while_filling_the_next_begins_anew(own_cache: Path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_fill_and_compare, args=(0.0, context.Queue()))
    process.start()
    while not list((own_cache / "decoded").glob("*.part")):
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.join(10)
    (left,) = files(own_cache)
    assert left.name.endswith(".part")
    # it makes room for another set, and is written over by its own
    left.write_bytes(b"as much as it had written" * 10)
    make_room(left.parent, LIMIT, LIMIT + 100)
    assert not left.exists()
    left.write_bytes(b"rest of a killed process")
    assert holds(opened(decode=_slow, count=40))
    assert [p.suffix for p in files(own_cache)] == [".pixels"]


def test_a_process_that_does_not_go_on_is_not_waited_for(own_cache: Path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    opened().close()
    (path,) = files(own_cache)
    path.unlink()
    part = path.with_name(path.name + ".part")
    with part.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert opened() is None
    assert "does not go on" in capsys.readouterr().err
    assert holds(opened())


def test_work_is_prepared_in_order_and_not_far_ahead():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    results = prepared(work, iter(range(100)), workers=2, ahead=3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    results.close()
    assert len(begun) <= 5 + 3
    assert list(prepared(work, range(5), workers=0, ahead=3)) == [0, 1, 4, 9, 16]
