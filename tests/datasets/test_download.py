"""Downloads from a real server on this machine that breaks in the ways real servers do."""

import hashlib
import io
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dualcl.benchmark.errors import UserError
from dualcl.datasets import download as module
from dualcl.datasets.download import Checksum, Progress, download, extract_tar

CONTENT = bytes(range(256)) * 4096  # 1 MiB
GOOD = Checksum("sha256", hashlib.sha256(CONTENT).hexdigest())


class Server(ThreadingHTTPServer):
    """Serves CONTENT, at most `cut` bytes per answer, after `busy` answers of 503; `ranges` False ignores Range."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut: int | None = None
        self.ranges = True
        self.busy = 0
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.path != "/data.bin":
            return self.send_error(404)
        if self.server.busy:
            self.server.busy -= 1
            return self.send_error(503)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = len(CONTENT) if self.server.cut is None else start + self.server.cut
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
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


def test_progress_goes_to_stderr_in_lines(capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    progress = Progress("data.bin", 4 << 20)
    progress.update(1 << 20)
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("data.bin: 1 of 4 MiB (25%), ")


def test_progress_of_things_that_are_no_bytes(capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    progress = Progress("checking", 10, unit=(1, "images"))
    progress.update(5)
    progress.close()
    assert capsys.readouterr().err.startswith("checking: 5 of 10 images (50%), ")


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
