"""Downloads from a real server on this machine that breaks in the ways real servers do."""

import hashlib
import io
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import EXIT_USER, UserError
from dualcl.datasets import cifar100
from dualcl.datasets.reading.download import Checksum, alone_in, download
from dualcl.datasets.reading.unpack import extract_tar, extract_zip

CONTENT = bytes(range(256)) * 4096  # 1 MiB
GOOD = Checksum("sha256", hashlib.sha256(CONTENT).hexdigest())


class Server(ThreadingHTTPServer):
    """Serves CONTENT, at most `cut` bytes per answer, after `busy` answers of 503; `ranges` False ignores Range.

    `status` answers every request with that error, `stall` keeps an answer open after so many bytes until `go` is set,
    `length` is what Content-Length says (None: nothing), `page` is sent instead of the file.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut: int | None = None
        self.ranges = True
        self.busy = 0
        self.status: int | None = None
        self.stall: int | None = None
        self.go = threading.Event()
        self.length: str | None = "right"
        self.page: bytes | None = None
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.path == "/circle":
            self.send_response(302)
            self.send_header("Location", "/circle")
            return self.end_headers()
        if self.path == "/moved":
            self.send_response(301)
            self.send_header("Location", "/data.bin")
            return self.end_headers()
        if self.path != "/data.bin":
            return self.send_error(404)
        if self.server.status is not None:
            return self.send_error(self.server.status)
        if self.server.busy:
            self.server.busy -= 1
            return self.send_error(503)
        if self.server.page is not None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(self.server.page)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if self.server.length is not None:
            right = str(len(CONTENT) - start)
            self.send_header("Content-Length", right if self.server.length == "right" else self.server.length)
        self.end_headers()
        end = len(CONTENT) if self.server.cut is None else start + self.server.cut
        if self.server.stall is not None:
            self.wfile.write(CONTENT[start : start + self.server.stall])
            start += self.server.stall
            self.server.go.wait(30)
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(server: Server, path: Path, checksum: Checksum = GOOD, **options: float) -> Path:
    return download(server.url, path, checksum, **{"retries": 3, "timeout": 5, "pause": 0.001, **options})


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_plain_download_and_nothing_when_it_is_there(server, tmp_path):
    path = fetch(server, tmp_path / "new" / "data.bin")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["data.bin"]
    fetch(server, path)
    assert server.asked == [None]


def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path):
    server.cut = 300_000
    assert fetch(server, tmp_path / "d").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_later_call_goes_on_where_an_earlier_one_stopped(server, tmp_path):
    (tmp_path / "d.part").write_bytes(CONTENT[:1000])
    fetch(server, tmp_path / "d")
    assert server.asked == ["bytes=1000-"]


def test_a_complete_part_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "d.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "d").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "d.part").write_bytes(b"old")
    assert fetch(server, tmp_path / "d").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.busy = 2
    assert fetch(server, tmp_path / "d").read_bytes() == CONTENT
    assert len(server.asked) == 3


def test_no_progress_gives_up_and_keeps_what_there_is(server, tmp_path):
    server.cut = 0
    (tmp_path / "d.part").write_bytes(CONTENT[:1000])
    with pytest.raises(UserError, match=r"could not reach 127\.0\.0\.1 .*cut after 1000 of 1048576 bytes") as caught:
        fetch(server, tmp_path / "d")
    assert f"put it at {tmp_path / 'd'} and run again" in one_line(caught)
    assert len(server.asked) == 4
    assert (tmp_path / "d.part").stat().st_size == 1000


def test_a_wrong_checksum_is_said_and_the_download_removed(server, tmp_path):
    with pytest.raises(UserError, match=f"wrong md5 .*expected {'0' * 32}.*removed") as caught:
        fetch(server, tmp_path / "d", Checksum("md5", "0" * 32))
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_put_there_by_hand_is_named_and_kept(server, tmp_path):
    (tmp_path / "d").write_bytes(b"mine")
    with pytest.raises(UserError, match="is not the expected file") as caught:
        fetch(server, tmp_path / "d")
    one_line(caught)
    assert (tmp_path / "d").read_bytes() == b"mine"


def test_more_bytes_than_are_allowed(server, tmp_path):
    for length in ("right", None):  # said before, or only found out
        server.length = length
        with pytest.raises(UserError, match=r"holds more than the 1000 bytes .* and was removed") as caught:
            download(server.url, tmp_path / "d", None, max_bytes=1000)
        one_line(caught)
        assert list(tmp_path.iterdir()) == []
    assert download(server.url, tmp_path / "d", GOOD, max_bytes=len(CONTENT)).read_bytes() == CONTENT


def test_a_file_the_server_does_not_have(server, tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1 answered 404 .*by hand") as caught:
        download(server.url + "x", tmp_path / "d", GOOD)
    one_line(caught)
    assert len(server.asked) == 1


def test_nobody_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/d"
    with pytest.raises(UserError, match=r"could not reach 127\.0\.0\.1 .*refused.*by hand") as caught:
        download(url, tmp_path / "d", GOOD, retries=1, pause=0.001)
    one_line(caught)


def test_offline_says_so_at_once(tmp_path, monkeypatch):
    def no_name_service(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name_service)
    with pytest.raises(UserError, match=r"could not reach data\.example .*not known.*by hand") as caught:
        download("http://data.example/d", tmp_path / "d", GOOD, pause=60)  # a retry would take a minute
    one_line(caught)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(server, tmp_path):
    (tmp_path / "d.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"disk is full at {tmp_path}") as caught:
        fetch(server, tmp_path / "d")
    one_line(caught)


def test_too_little_space_is_said_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match="disk is full"):
        fetch(server, tmp_path / "d")
    assert not (tmp_path / "d.part").exists()


def test_a_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}.*another data.root") as caught:
        fetch(server, tmp_path / "file" / "d")
    one_line(caught)


@pytest.mark.parametrize(("status", "words"), [(403, "Forbidden"), (401, "Unauthorized"), (410, "Gone")])
def test_a_server_that_refuses_is_asked_once(server, tmp_path, status, words):
    server.status = status
    with pytest.raises(UserError, match=rf"127\.0\.0\.1 answered {status} {words}; fetch .*by hand") as caught:
        fetch(server, tmp_path / "d")
    one_line(caught)
    assert len(server.asked) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_that_stays_broken_is_given_up(server, tmp_path, status):
    server.status = status
    with pytest.raises(UserError, match=rf"could not reach 127\.0\.0\.1 \({status} .*by hand") as caught:
        fetch(server, tmp_path / "d")
    one_line(caught)
    assert len(server.asked) == 4


def test_a_redirection_is_followed_and_a_circle_is_said_in_one_line(server, tmp_path):
    base = server.url.removesuffix("data.bin")
    assert download(base + "moved", tmp_path / "d", GOOD).read_bytes() == CONTENT
    with pytest.raises(UserError, match=r"answered 302 .*infinite loop.*by hand") as caught:
        download(base + "circle", tmp_path / "e", GOOD)
    one_line(caught)


def test_a_server_that_stalls_is_asked_for_the_rest(server, tmp_path):
    server.stall = 300_000
    assert fetch(server, tmp_path / "d", timeout=0.2).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_server_that_sends_nothing_is_given_up(server, tmp_path):
    server.stall = 0
    with pytest.raises(UserError, match=r"could not reach 127\.0\.0\.1 \(.*timed out.*by hand") as caught:
        fetch(server, tmp_path / "d", timeout=0.1, retries=1)
    one_line(caught)
    assert len(server.asked) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_left_over_is_named(server, tmp_path):
    (tmp_path / "d").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"d is not the expected file .*remove it and run again") as caught:
        fetch(server, tmp_path / "d")
    one_line(caught)
    assert server.asked == []


@pytest.mark.parametrize("left", [CONTENT + b"more", bytes(1000)], ids=["longer", "of another file"])
def test_a_part_that_does_not_fit_is_dropped_and_the_next_call_succeeds(server, tmp_path, left):
    (tmp_path / "d.part").write_bytes(left)
    with pytest.raises(UserError, match=r"wrong sha256 .*removed; run again"):
        fetch(server, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []
    assert fetch(server, tmp_path / "d").read_bytes() == CONTENT


@pytest.mark.parametrize("length", [None, "many", "-1", str(len(CONTENT) + 1000)])
def test_a_wrong_content_length_does_no_harm(server, tmp_path, length):
    server.length = length
    assert fetch(server, tmp_path / "d").read_bytes() == CONTENT


def test_a_content_length_that_is_too_small_is_found_by_the_sum(server, tmp_path):
    server.length = "1000"
    with pytest.raises(UserError, match="wrong sha256") as caught:
        fetch(server, tmp_path / "d")
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_a_web_page_instead_of_the_file_is_called_so(server, tmp_path):
    server.page = b"\n<!DOCTYPE HTML><html>log in first</html>"
    with pytest.raises(UserError, match=r"is a web page, not the file: its wrong sha256.*removed") as caught:
        fetch(server, tmp_path / "d")
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extract", [extract_tar, extract_zip])
def test_a_web_page_without_a_checksum_is_no_archive(server, tmp_path, extract):
    server.page = b"<html>moved</html>"
    archive = download(server.url, tmp_path / "a", None)
    with pytest.raises(UserError, match=r"a is damaged \(.*remove it and run again") as caught:
        extract(archive, tmp_path / "out", max_bytes=100, max_files=3)
    one_line(caught)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_file_system_that_takes_no_files(server):
    with pytest.raises(UserError, match=r"cannot write /proc/dualcl/d .*another data\.root") as caught:
        fetch(server, Path("/proc/dualcl/d"))
    one_line(caught)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(server, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=r"cannot write .*Permission denied.*another data\.root") as caught:
        fetch(server, tmp_path / "d")
    one_line(caught)


def test_a_second_download_of_the_file_is_refused_while_the_first_goes_on(server, tmp_path):
    server.stall = 1000
    first = threading.Thread(target=fetch, args=(server, tmp_path / "d"), kwargs={"timeout": 30})
    first.start()
    while not server.asked:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"another process is fetching .*d; wait for it and run again") as caught:
        fetch(server, tmp_path / "d")
    one_line(caught)
    server.go.set()
    first.join()
    assert fetch(server, tmp_path / "d").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_killed_download_goes_on_where_it_was_killed(server, tmp_path):
    server.stall = 400_000
    code = (
        "import sys; from pathlib import Path; from dualcl.datasets.reading.download import download;"
        "download(sys.argv[1], Path(sys.argv[2]), None)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path / "d")])
    part = tmp_path / "d.part"
    while not (part.exists() and part.stat().st_size > 0):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    server.stall = None
    assert fetch(server, tmp_path / "d").read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={have}-"]


def test_the_sum_that_git_gives_a_file(tmp_path):
    (tmp_path / "d").write_bytes(b"hello\n")
    # what `git hash-object` prints
    assert Checksum("git", "ce013625030ba8dba906f756967f9e9ca394464a").matches(tmp_path / "d")
    assert not Checksum("git", "f572d396fae9206628714fb2ce00f72e94f2258f").matches(tmp_path / "d")


def tar_of(path: Path, *members: tuple[str, bytes | str | None]) -> Path:
    """A tar archive of (name, content); content None: a folder, text: a link to it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def unpack(archive: Path, folder: Path, max_bytes: int = 100, max_files: int = 3) -> None:
    extract_tar(archive, folder, max_bytes=max_bytes, max_files=max_files)


def test_a_good_archive_is_unpacked(tmp_path):
    unpack(tar_of(tmp_path / "a.tar", ("d", None), ("d/x", b"1"), ("e/y", b"22")), tmp_path / "out")
    assert (tmp_path / "out" / "d" / "x").read_bytes() == b"1"
    assert (tmp_path / "out" / "e" / "y").read_bytes() == b"22"


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("../x", b"1")], "would leave the folder"),
        ([("a/../../x", b"1")], "would leave the folder"),
        ([("/x", b"1")], "would leave the folder"),
        ([("a", "/etc"), ("a/x", b"1")], "no regular file"),
        ([("a", b"1" * 101)], "more than 3 files or 100 bytes"),
        ([(str(i), b"") for i in range(4)], "more than 3 files"),
        ([("a", b"1"), ("a", b"2")], "cannot unpack"),
    ],
)
def test_a_bad_archive_leaves_nothing_behind(tmp_path, members, match):
    archive = tar_of(tmp_path / "a.tar", ("fine", b"1"), *members)
    with pytest.raises(UserError, match=match) as caught:
        unpack(archive, tmp_path / "out", max_files=3)
    one_line(caught)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_cut_off_archive(tmp_path):
    archive = tar_of(tmp_path / "a.tar", ("x", bytes(50)))
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.tar is damaged"):
        unpack(archive, tmp_path / "out")


def zip_of(path: Path, *members: tuple[str, bytes | str | None]) -> Path:
    """As `tar_of`, a zip archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members:
            info = zipfile.ZipInfo(name + "/" * (content is None))
            kind = stat.S_IFLNK if isinstance(content, str) else stat.S_IFDIR if content is None else stat.S_IFREG
            info.external_attr = (kind | 0o644) << 16
            packed.writestr(info, content or b"")
    return path


def unzip(archive: Path, folder: Path) -> None:
    extract_zip(archive, folder, max_bytes=100, max_files=3)


def test_a_good_zip_is_unpacked(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("d", None), ("d/x", b"1"), ("e/y", b"22"))
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr("plain", b"333")  # as a packer without Unix modes leaves it
    unzip(archive, tmp_path / "out")
    assert (tmp_path / "out" / "d" / "x").read_bytes() == b"1"
    assert (tmp_path / "out" / "e" / "y").read_bytes() == b"22"
    assert (tmp_path / "out" / "plain").read_bytes() == b"333"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("../x", b"1")], "would leave the folder"),
        ([("a/../../x", b"1")], "would leave the folder"),
        ([("/x", b"1")], "would leave the folder"),
        ([("C:x", b"1")], "would leave the folder"),
        ([("..\\x", b"1")], "would leave the folder"),
        ([("a", "/etc"), ("a/x", b"1")], "no regular file"),
        ([("a", b"1" * 101)], "more than 3 files or 100 bytes"),
        ([("bomb", bytes(10**6))], "more than 3 files or 100 bytes"),
        ([(str(i), b"") for i in range(4)], "more than 3 files"),
        ([("a", b"1"), ("a", b"2")], "cannot unpack"),
    ],
)
def test_a_bad_zip_leaves_nothing_behind(tmp_path, members, match):
    archive = zip_of(tmp_path / "a.zip", ("fine", b"1"), *members)
    with pytest.raises(UserError, match=match) as caught:
        unzip(archive, tmp_path / "out")
    one_line(caught)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_a_zip_that_lies_about_its_size_writes_no_more_than_it_says(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("bomb", bytes(10**6)))
    content = archive.read_bytes()
    assert content.count((10**6).to_bytes(4, "little")) == 4  # stored as it is, and said in both headers
    archive.write_bytes(content.replace((10**6).to_bytes(4, "little"), (50).to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"a\.zip is damaged") as caught:
        unzip(archive, tmp_path / "out")
    one_line(caught)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [(6, 1, "encrypted"), (8, 99, "compression method is not supported")],
    ids=["encrypted", "packed in an unknown way"],
)
def test_zips_that_cannot_be_read(tmp_path, at, value, match):
    archive = zip_of(tmp_path / "a.zip", ("x", b"1" * 50))
    content = bytearray(archive.read_bytes())
    for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        content[content.index(signature) + at + shift] = value
    archive.write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        unzip(archive, tmp_path / "out")
    one_line(caught)


def test_a_cut_off_zip(tmp_path):
    archive = zip_of(tmp_path / "a.zip", ("x", bytes(50)))
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.zip is damaged"):
        unzip(archive, tmp_path / "out")


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_whichever_byte_is_damaged_there_is_one_line_and_nothing_half_done(tmp_path, kind):
    noise = np.random.default_rng(0)
    members = [(f"d/{i}", noise.integers(0, 256, 60, dtype=np.uint8).tobytes()) for i in range(4)]
    make, extract = (tar_of, extract_tar) if kind == "gz" else (zip_of, extract_zip)
    archive = make(tmp_path / f"a.{kind}", *members)
    good, damaged = archive.read_bytes(), 0
    for place in range(0, len(good), 3):
        archive.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        said = ""
        try:
            extract(archive, tmp_path / "out", max_bytes=1000, max_files=10)
        except UserError as error:
            said = str(error)
        if said:
            damaged += 1
            assert str(archive) in said
            assert "\n" not in said
        else:
            # a date, say, or a zip's directory cut short, which only a checksum finds: no file is wrong
            found = {path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
            assert found <= {content for _, content in members}
            shutil.rmtree(tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == [archive.name]
    assert damaged > len(good) // 3 / 2


def test_a_tar_with_a_wrong_sum_at_its_end(tmp_path):
    archive = tar_of(tmp_path / "a.tar", ("x", bytes(50)))
    packed = bytearray(archive.read_bytes())
    packed[-6] ^= 1
    archive.write_bytes(packed)
    with pytest.raises(UserError, match=r"a\.tar is damaged \(CRC") as caught:
        unpack(archive, tmp_path / "out")
    one_line(caught)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize(("make", "extract"), [(tar_of, extract_tar), (zip_of, extract_zip)])
def test_an_unpacking_that_was_killed_leaves_nothing_in_the_next(tmp_path, make, extract):
    archive = make(tmp_path / "a", ("x", b"1"))
    half = tmp_path / "out.unpacking"
    half.mkdir()
    (half / "x").write_bytes(b"ha")
    (half / "y").write_bytes(b"lf")
    extract(archive, tmp_path / "out", max_bytes=100, max_files=3)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]


# --- as a user meets them ---------------------------------------------------------------------------------------------


def absent(folder: Path, root: Path) -> None:
    """Nothing is served."""


def refused(folder: Path, root: Path) -> None:
    (folder / "archive").mkdir()  # the server redirects to its listing
    (folder / "archive" / "index.html").write_text("<html>our files have moved</html>")


def altered(folder: Path, root: Path) -> None:
    (folder / "archive").write_bytes(b"another version")


def damaged(folder: Path, root: Path) -> None:
    (folder / "archive").write_bytes(tar_of(folder / "a", ("x", bytes(5000))).read_bytes()[:-30])


def escaping(folder: Path, root: Path) -> None:
    tar_of(folder / "archive", ("../x", b"1"))


def linking(folder: Path, root: Path) -> None:
    tar_of(folder / "archive", ("cifar-100-python", "/etc"))


def left_over(folder: Path, root: Path) -> None:
    root.mkdir()
    (root / "cifar-100-python.tar.gz").write_bytes(b"half of it")


def no_folder(folder: Path, root: Path) -> None:
    root.write_text("a file")


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (absent, "answered 404"),
        (refused, "is a web page, not the file"),
        (altered, "has the wrong sha256"),
        (damaged, "is damaged"),
        (escaping, "would leave the folder"),
        (linking, "is no regular file"),
        (left_over, "is not the expected file"),
        (no_folder, "choose another data.root"),
    ],
)
def test_prepare_ends_with_one_line_and_code_2(
    fault: Callable[[Path, Path], None], match: str, site, tmp_path, monkeypatch, capsys
):
    (folder, address), root = site, tmp_path / "data"
    fault(folder, root)
    served = folder / "archive"
    good = served.read_bytes() if served.is_file() and fault is not altered else b"the official archive"
    monkeypatch.setattr(cifar100, "URL", f"{address}/archive")
    monkeypatch.setattr(cifar100, "ARCHIVE", Checksum("sha256", hashlib.sha256(good).hexdigest()))
    assert main(["prepare", "cifar100-10", "--root", str(root)]) == EXIT_USER
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dualcl: error: ")
    assert err.count("\n") == 1
    assert match in err
    assert not (root / "cifar-100-python").exists()
    assert not (tmp_path / "x").exists()


def test_prepare_without_a_network(tmp_path, monkeypatch, capsys):
    def no_name_service(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name_service)
    assert main(["prepare", "cifar100-10", "--root", str(tmp_path)]) == EXIT_USER
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "could not reach www.cs.toronto.edu" in err
    assert "by hand" in err
    assert list(tmp_path.iterdir()) == []


def test_prepare_beside_another_prepare(tmp_path, capsys):
    with alone_in(tmp_path):
        assert main(["prepare", "cifar100-10", "--root", str(tmp_path)]) == EXIT_USER
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"another process prepares data at {tmp_path}; wait for it" in err
