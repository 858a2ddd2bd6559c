"""Archives, images, lists and pickles that are made to harm; all of them real files."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dualcl.benchmark.core.compat  # noqa: F401

# isort: split
from torchvision.datasets import CIFAR100

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets import cifar100
from dualcl.datasets.cifar100 import FOLDER, Cifar100
from dualcl.datasets.image_folder import ImageFolder
from dualcl.datasets.landmarks import CHOICE, Landmarks
from dualcl.datasets.reading import unpack as module
from dualcl.datasets.reading.folders import FolderImages
from dualcl.datasets.reading.unpack import extract_tar, extract_zip
from dualcl.datasets.reading.verify import why_unreadable
from dualcl.datasets.reading.views import decode_image, open_image

# --- archives ---------------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"") -> bytes:
    """One entry of a tar archive, as bytes."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.devmajor = kind, link, len(content), 1
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def refuses(archive: Path, match: str, *, max_bytes: int = 10**6, max_files: int = 50) -> None:
    """Unpacking it is a UserError of one line and leaves nothing but the archive."""
    unpack = extract_zip if archive.suffix == ".zip" else extract_tar
    with pytest.raises(UserError, match=match) as caught:
        unpack(archive, archive.parent / "out", max_bytes=max_bytes, max_files=max_files)
    assert "\n" not in str(caught.value)
    assert str(archive) in str(caught.value)
    assert [p.name for p in archive.parent.iterdir()] == [archive.name]


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (member("../x", content=b"1"), "leave the folder"),
        (member("/etc/x", content=b"1"), "leave the folder"),
        (member("a/../../x", tarfile.DIRTYPE), "leave the folder"),
        (member("x", tarfile.SYMTYPE, "/etc"), "no regular file"),
        (member("x", tarfile.LNKTYPE, "/etc/passwd"), "no regular file"),
        (member("x", tarfile.CHRTYPE), "no regular file"),
        (member("x", tarfile.BLKTYPE), "no regular file"),
        (member("x", tarfile.FIFOTYPE), "no regular file"),
        (member("x", content=b"1") * 2, "cannot unpack"),
        (member("x", content=b"1") + member("x", tarfile.SYMTYPE, "/etc") + member("x/y"), "no regular file"),
        (member("d", tarfile.DIRTYPE) + member("d", content=b"1"), "cannot unpack"),
        (member("n" * 300, content=b"1"), "cannot unpack"),
        (b"".join(member(f"d{i}", tarfile.DIRTYPE) for i in range(51)), "more than 50 files"),
        (member("a/" * 2000 + "x", tarfile.DIRTYPE), "cannot unpack|damaged"),
    ],
)
def test_tars_that_reach_out_or_flood(tmp_path: Path, entry: bytes, match: str) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(member("fine", content=b"1") + entry + bytes(1024))
    refuses(archive, match)


def test_an_archive_that_grows_too_much(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(member("zeros", content=bytes(8 * 2**20)) + bytes(1024)))
    assert archive.stat().st_size < 2**14
    refuses(archive, "more than 100 times its size", max_bytes=2**30)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_would_fill_the_memory(tmp_path: Path, kind: bytes) -> None:
    """tarfile reads a member's long name, or its pax header, whole."""
    archive = tmp_path / "a.tar.gz"
    with gzip.open(archive, "wb", compresslevel=1) as packed:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = kind, module.MAX_HEADER + 512
        packed.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(17):
            packed.write(bytes(2**20))
    refuses(archive, "damaged", max_bytes=2**30)


def test_zeros_behind_the_end_are_not_read_without_end(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(member("x", content=b"1") + bytes(16 * 2**20)))
    refuses(archive, r"damaged \(it unpacks to more than its limits", max_bytes=10)


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_other_compressions_are_no_archives(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(pack(member("x", content=b"1") + bytes(1024)))
    refuses(archive, "is damaged")


def test_plain_and_gzipped_tars_are_unpacked(tmp_path: Path) -> None:
    content = member("d", tarfile.DIRTYPE) + member("d/" + "n" * 90, content=b"12") + bytes(1024)
    for name, blob in {"a.tar": content, "a.tgz": gzip.compress(content)}.items():
        (tmp_path / name).write_bytes(blob)
        extract_tar(tmp_path / name, tmp_path / f"{name}-out", max_bytes=10, max_files=3)
        assert (tmp_path / f"{name}-out" / "d" / ("n" * 90)).read_bytes() == b"12"


def zip_of(path: Path, *entries: tuple[str, bytes, int], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, content, mode in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = (mode | 0o644) << 16, method
            packed.writestr(info, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([("../x", b"1", stat.S_IFREG)], "leave the folder"),
        ([("x", b"/etc/passwd", stat.S_IFLNK)], "no regular file"),
        ([("x", b"", stat.S_IFIFO)], "no regular file"),
        ([("x", b"", stat.S_IFBLK)], "no regular file"),
        ([("x", b"1", stat.S_IFREG)] * 2, "cannot unpack"),
        ([(f"d{i}/", b"", stat.S_IFDIR) for i in range(51)], "more than 50 files"),
        ([("zeros", bytes(8 * 2**20), stat.S_IFREG)], "more than 100 times its size"),
        ([("x" * 300, b"1", stat.S_IFREG)], "cannot unpack"),
    ],
)
def test_zips_that_reach_out_or_flood(tmp_path: Path, entries: list[tuple[str, bytes, int]], match: str) -> None:
    refuses(zip_of(tmp_path / "a.zip", *entries), match, max_bytes=2**30)


def test_a_zip_with_a_file_without_a_name(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", ("\0", b"1", stat.S_IFREG))
    refuses(archive, "is damaged")


def test_a_zip_that_asks_for_a_large_dictionary(tmp_path: Path) -> None:
    refuses(zip_of(tmp_path / "a.zip", ("x", b"1" * 99, stat.S_IFREG), method=zipfile.ZIP_LZMA), "LZMA")


# --- images -----------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG that says so many gray pixels and holds a few zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


HOSTILE: dict[str, tuple[bytes, str]] = {
    "bomb": (png(60_000, 60_000), "too many pixels"),
    "just too large": (png(17_000, 10_600), "too many pixels"),
    "no width": (png(0, 5), "cannot identify|no pixels|damaged"),
    "no pixels": (b"P6\n0 0\n255\n", "no pixels|cannot identify|damaged"),
    "cut off": (png(500, 500), "truncated|damaged|broken|not enough"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
    "Photoshop": (b"8BPS\x00\x01" + bytes(50), "not an image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "empty": (b"", "empty file"),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_files_that_are_no_images_or_too_large(tmp_path: Path, case: str) -> None:
    data, match = HOSTILE[case]
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(OSError):  # noqa: PT011 - the reason is below
        decode_image(path)
    reason = why_unreadable(path)
    assert reason is not None
    assert "\n" not in reason
    with pytest.raises(UserError, match=rf"cannot read the image .*photo\.jpg \(.*({match})"):
        FolderImages(tmp_path, ("photo.jpg",))(0)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(OSError, match="too many pixels"):
        open_image(io.BytesIO(png(30_000, 6_000)))
    assert open_image(io.BytesIO(png(500, 500))).size == (500, 500)


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    try:
        (tmp_path / "a" / os.fsdecode(b"\xff.png")).write_bytes(png(4, 4))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    with pytest.raises(UserError, match=r"the name of a file in .* no text in UTF-8"):
        ImageFolder.load(ImageFolder.Config(root=str(tmp_path)))


# --- lists and pickles ------------------------------------------------------------------------------------------------


def test_class_names_that_are_nested_without_end(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "class_names.json").write_text("[" * 10_000)
    with pytest.raises(UserError, match=r"class_names\.json \(it is nested deeper"):
        ImageFolder.load(ImageFolder.Config(root=str(tmp_path)))


@pytest.mark.parametrize("image", ["../../../../etc/passwd", "a/../../x", "", "x\n", "ABC"])
def test_a_choice_of_landmarks_leads_nowhere_else(tmp_path: Path, image: str) -> None:
    choice = {"by_rule": [7], "landmarks": {"7": {"category": "Some Falls", "images": [image]}}}
    (tmp_path / CHOICE).write_text(json.dumps(choice))
    with pytest.raises(UserError, match=r"concepts\.json is damaged"):
        Landmarks.load(Landmarks.Config(root=str(tmp_path), min_images=1, concepts=1))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["train", "meta"])
def test_cifar100_unpickles_arrays_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Even of files whose md5 is the official one."""
    pixels = np.arange(2 * 3072, dtype=np.uint16).astype(np.uint8).reshape(2, 3072)
    files = {
        "train": {"data": pixels, "fine_labels": [0, 1]},
        "test": {"data": pixels, "fine_labels": [0, 1]},
        "meta": {"fine_label_names": ["apple", "bear"]},
    }
    (tmp_path / FOLDER).mkdir()

    def write() -> None:
        sums = {}
        for name, content in files.items():
            blob = pickle.dumps(content, protocol=5 if name == "test" else 4)
            (tmp_path / FOLDER / name).write_bytes(blob)
            sums[name] = hashlib.md5(blob).hexdigest()
        monkeypatch.setattr(cifar100, "MD5", sums)

    write()
    data = Cifar100.load(Cifar100.Config(root=str(tmp_path)))
    assert np.array_equal(np.asarray(data.test.load(1)), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))
    files[where]["more"] = Trap(tmp_path / "trapped")
    write()
    with pytest.raises(UserError, match=rf"incomplete or damaged \({where}: it asks for .*\); remove it and run"):
        Cifar100.load(Cifar100.Config(root=str(tmp_path)))
    assert not (tmp_path / "trapped").exists()


def test_pickles_of_python_2_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the official files are: text for bytes, and numpy as it was then."""
    pixels = bytes(range(256)) * 12
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86"
    array += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
    array += struct.pack("<i", len(pixels)) + pixels + b"tb"
    part = b"\x80\x02}(U\x04data" + array + b"U\x0bfine_labels](K\x00eu."
    meta = b"\x80\x02}U\x10fine_label_names](U\x05appleU\x04beares."
    files = {"train": part, "test": part, "meta": meta}
    (tmp_path / FOLDER).mkdir()
    for name, blob in files.items():
        (tmp_path / FOLDER / name).write_bytes(blob)
    monkeypatch.setattr(cifar100, "MD5", {name: hashlib.md5(blob).hexdigest() for name, blob in files.items()})
    data = Cifar100.load(Cifar100.Config(root=str(tmp_path)))
    assert data.class_names == ("apple", "bear")
    assert data.train.labels.tolist() == [0]
    expected = np.frombuffer(pixels, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(data.train.load(0)), expected)


def test_cifar100_knows_the_official_sums() -> None:
    assert [["train", cifar100.MD5["train"]]] == CIFAR100.train_list
    assert [["test", cifar100.MD5["test"]]] == CIFAR100.test_list
    assert cifar100.MD5["meta"] == CIFAR100.meta["md5"]
