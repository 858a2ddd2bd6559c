"""Every preset that needs `dualcl prepare`, from the first download to the record, on miniatures in the real layout.

The files are served on this machine, with ranges; each preset meets one connection that is cut.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.presets import bundled_presets, load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import EXIT_USER
from dualcl.benchmark.core.settings import Resolved
from dualcl.datasets import available_datasets, cifar100, domainnet, dreambooth, imagenet_r, landmarks
from dualcl.datasets.base import make_class_order
from dualcl.datasets.reading.download import Checksum
from dualcl.results.records import load_record
from dualcl.results.tables import summarise

PRESETS = [
    name for name in bundled_presets() if available_datasets()[load_preset(name).values["data.name"][0]].needs_prepare
]
CLASSIFICATION = [name for name in PRESETS if load_preset(name).domain == "classification"]
CUSTOMIZATION = [name for name in PRESETS if load_preset(name).domain == "customization"]


class Web(ThreadingHTTPServer):
    """Serves a folder, with ranges; the next answer is cut in the middle while `cut` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.cut = False
        self.asked: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        path, wanted = self.server.folder / self.path.lstrip("/"), self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        cut, self.server.cut = self.server.cut, False
        self.wfile.write(content[start : len(content) // 2 if cut else None])

    def log_message(self, *args: object) -> None:
        pass


@cache
def photo(value: int) -> bytes:
    """A JPEG that no other value gives."""
    buffer = io.BytesIO()
    Image.new("RGB", (10, 8), (value % 256, value // 256, 77)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def tar_of(path: Path, files: dict[str, bytes]) -> None:
    """A tar archive, gzipped where its name says so."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def put(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo(value))


def sha256(path: Path) -> Checksum:
    return Checksum("sha256", hashlib.sha256(path.read_bytes()).hexdigest())


def lists(folder: Path, parts: dict[str, list[tuple[str, int]]]) -> None:
    """CODA-Prompt's kind of lists, by file name."""
    for name, entries in parts.items():
        lines = ["data:", *(f"- {e}" for e, _ in entries), "targets:", *(f"- {t}" for _, t in entries)]
        (folder / name).write_text("\n".join(lines) + "\n")


def make_imagenet_r(web: Web, set_: Callable[..., None]) -> None:
    """200 folders of 2 images, a README with names, lists that number the classes in an order of their own."""
    parts: dict[str, list[tuple[str, int]]] = {name: [] for name in imagenet_r.LISTS}
    files = {"imagenet-r/README.txt": b"ImageNet-R\n\nn01440000 tench\n"}
    for i in range(200):
        wnid = f"n{1440000 + 37 * i:08d}"
        for k, entries in enumerate(parts.values()):
            files[f"imagenet-r/{wnid}/sketch_{k}.jpg"] = photo(2 * i + k)
            entries.append((f"data/imagenet-r/{wnid}/sketch_{k}.jpg", i * 7 % 200))
    tar_of(web.folder / "imagenet-r.tar", files)
    lists(web.folder, parts)
    set_(imagenet_r, "URL", f"{web.address}/imagenet-r.tar")
    set_(imagenet_r, "ARCHIVE", sha256(web.folder / "imagenet-r.tar"))
    set_(imagenet_r, "LISTS_URL", web.address)
    set_(imagenet_r, "LISTS", {name: sha256(web.folder / name) for name in parts})


def make_cifar100(web: Web, set_: Callable[..., None]) -> None:
    """Three pickles of 100 classes: 2 training and 1 test image of each."""
    files = {"meta": pickle.dumps({"fine_label_names": [f"thing {i:02d}" for i in range(100)]})}
    for part, n in (("train", 200), ("test", 100)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
        coarse = [i % 20 for i in range(n)]
        files[part] = pickle.dumps(
            {"data": pixels, "fine_labels": [i % 100 for i in range(n)], "coarse_labels": coarse}
        )
    tar_of(web.folder / "cifar.tar.gz", {f"cifar-100-python/{name}": content for name, content in files.items()})
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    set_(cifar100, "MD5", md5)
    set_(cifar100, "URL", f"{web.address}/cifar.tar.gz")
    set_(cifar100, "ARCHIVE", sha256(web.folder / "cifar.tar.gz"))


def make_domainnet(web: Web, set_: Callable[..., None]) -> None:
    """A zip per domain, CODA-Prompt's lists: each class has a training image in one domain, a test image in another."""
    parts: dict[str, list[tuple[str, int]]] = {name: [] for name in domainnet.CODA}
    archives = {}
    for number, domain in enumerate(domainnet.CODA_DOMAINS):
        archive = web.folder / f"{domain}.zip"
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr(f"{domain}/", b"")
            for label in range(345):
                name = f"{domain}/thing_{label:03d}/{domain}_{label + 1:03d}_000001.jpg"
                for entries, shift in zip(parts.values(), (0, 2), strict=True):
                    if (label + shift) % 5 == number:
                        packed.writestr(name, photo(345 * number + label))
                        entries.append((f"data/DomainNet/{name}", label))
        archives[domain] = (archive.name, sha256(archive))
    lists(web.folder, parts)
    set_(domainnet, "URL", web.address)
    set_(domainnet, "ARCHIVES", {**domainnet.ARCHIVES, **archives})
    set_(domainnet, "CODA_URL", web.address)
    set_(domainnet, "CODA", {name: sha256(web.folder / name) for name in parts})


def make_dreambooth(web: Web, set_: Callable[..., None]) -> None:
    """30 subjects of 4 images, with the list of class nouns and prompts."""
    subjects = [f"subject{i:02d}" for i in range(30)]
    files = {f"{s}/{k:02d}.jpg": photo(4 * i + k) for i, s in enumerate(subjects) for k in range(4)}
    rows = "\n".join(f"{s},{'dog' if i % 2 else 'vase'}" for i, s in enumerate(subjects))
    prompts = "".join(
        f"{kind} Prompts\n\nprompt_list = [\n'a wet {{0}} {{1}}'.format(unique_token, class_token),\n]\n\n"
        for kind in ("Object", "Live Subject")
    )
    text = f"Classes\n\nsubject_name,class\n{rows}\n\nPrompts\n\n{prompts}"
    files["prompts_and_classes.txt"] = text.encode()
    tar_of(web.folder / "main.tar.gz", {f"dreambooth-main/dataset/{name}": c for name, c in files.items()})
    set_(dreambooth, "URL", f"{web.address}/main.tar.gz")


def make_landmarks(web: Web, set_: Callable[..., None]) -> None:
    """The three tables, and 10 waterfalls with 15 images at addresses of their own."""
    categories, clean, rows = ["landmark_id,category"], ["landmark_id,images"], ["id,url,landmark_id"]
    for number in range(10):
        categories.append(f"{number},http://commons.wikimedia.org/wiki/Category:Wet_Falls_{number}")
        names = [f"{number:08x}{k:08x}" for k in range(15)]
        clean.append(f"{number},{' '.join(names)}")
        for k, name in enumerate(names):
            rows.append(f"{name},{web.address}/photos/{number}-{k}.jpg,{number}")
            put(web.folder / "photos" / f"{number}-{k}.jpg", 15 * number + k)
    for name, table in (("train.csv", rows), ("train_label_to_category.csv", categories), ("train_clean.csv", clean)):
        (web.folder / name).write_text("\n".join(table) + "\n")
    set_(landmarks, "METADATA_URL", web.address)


def put_celeba_hq(root: Path) -> None:
    """What a user fetches by hand: 10 identities with 15 images, the mapping and the identities."""
    identities, mapping = [], ["idx\torig_idx\torig_file"]
    for index in range(150):
        original = 7 * index + 3
        identities.append(f"{original:06d}.jpg {index // 15 + 40}")
        mapping.append(f"{index}\t{original - 1}\t{original:06d}.jpg")
        put(root / "CelebAMask-HQ" / "CelebA-HQ-img" / f"{index}.jpg", index)
    (root / "identity_CelebA.txt").write_text("\n".join(identities) + "\n")
    (root / "CelebAMask-HQ" / "CelebA-HQ-to-CelebA-mapping.txt").write_text("\n".join(mapping) + "\n")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """All miniatures, served; the suite takes the addresses and sums for the real ones."""
    web = Web(tmp_path_factory.mktemp("web"))
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for make in (make_imagenet_r, make_cifar100, make_domainnet, make_dreambooth, make_landmarks):
            make(web, partial(patch.setattr))
        yield web
    web.shutdown()
    web.server_close()
    thread.join()


def prepared(web: Web, preset: str, root: Path, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str | None]]:
    """What `dualcl prepare` asks for, the first answer being cut; it asks for nothing when it is called again."""
    web.cut, web.asked = True, []
    assert main(["prepare", preset, "--root", str(root)]) == 0
    assert capsys.readouterr().out.endswith(": ready\n")
    asked, web.asked = web.asked, []
    assert main(["prepare", preset, "--root", str(root)]) == 0
    assert web.asked == []
    web.cut = False
    return asked


def finished(preset: str, method: str, sets: list[str], folder: Path) -> tuple[Any, Resolved]:
    """The record of a run, and what was asked for; only the keys of `sets` differ from the preset's."""
    given = [argument for pair in sets for argument in ("--set", pair)]
    assert main(["run", preset, method, *given, "--out", str(folder), "--quiet"]) == 0
    record, plain = load_record(folder), resolve(preset, method)
    changed = {pair.split("=")[0] for pair in sets}
    asked, took = plain.flat(), resolve(preset, method, sets).flat()
    assert {k.split(".kwargs")[0] for k in asked if asked[k] != took.get(k)} <= {*changed, "backbone"}
    assert record.status == "finished"
    # what a table compares: data, split, order and weights by their hashes
    for key, digits in (("split_hash", 16), ("class_order_hash", 16), ("weights_sha256", 64)):
        assert re.fullmatch(f"[0-9a-f]{{{digits}}}", record.data["identity"][key])
    return record, plain


#: classes and split
SETS_OF = {
    "imagenet-r": (200, "imagenet-r:coda"),
    "cifar100": (100, "cifar100:official"),
    "domainnet": (345, "domainnet:coda"),
}


@pytest.mark.parametrize("preset", CLASSIFICATION)
def test_classification(preset: str, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = prepared(web, preset, tmp_path / "data", capsys)
    # the cut file, and only that, was asked for once more, from where it stopped
    assert asked[0][1] is None
    assert asked[1] == (asked[0][0], f"bytes={(web.folder / asked[0][0].lstrip('/')).stat().st_size // 2}-")
    assert len({path for path, _ in asked}) == len(asked) - 1

    plain = resolve(preset, "clora").flat()
    classes, split = SETS_OF[plain["data.name"]]
    method = "coda_prompt" if preset.endswith("-coda") else "clora"
    # prompted blocks are 0 to 4, and the components of CODA-P orthogonal to each other; ranks are up to 64
    width, depth = (128, 5) if method == "coda_prompt" else (64, 2)
    sets = [
        f"data.root={tmp_path / 'data'}",
        "data.limit=1",
        "backbone.name=vit_tiny_patch16_224",
        "backbone.pretrained=false",
        f"backbone.kwargs={{img_size: 32, patch_size: 8, embed_dim: {width}, num_heads: 2, depth: {depth}}}",
        "train.epochs=1",
        f"train.batch_size={classes // plain['stream.tasks']}",
        "input.workers=0",
        "threads=1",
    ]
    record, _ = finished(preset, method, sets, tmp_path / "run")
    identity = record.data["identity"]
    test_limit = "" if plain["data.test_limit"] is None else f"+test-limit-{plain['data.test_limit']}"
    assert (identity["data"], identity["split_name"]) == (plain["data.name"], f"{split}+limit-1{test_limit}")
    assert tuple(identity["class_order"]) == make_class_order(classes, plain["stream.class_order"], 0)
    tasks = record.data["tasks"]
    assert len(tasks) == plain["stream.tasks"]
    assert [(t["n_train"], t["n_test"]) for t in tasks] == [(classes // len(tasks),) * 2] * len(tasks)
    assert [row["total"] for row in record.data["matrix"]["rows"]] == [
        [classes // len(tasks)] * (i + 1) for i in range(len(tasks))
    ]
    view = identity["preprocess"]
    assert (view["resize"], view["augment"], view["interpolation"]) == (
        plain["input.resize"],
        plain["input.augment"],
        {"auto": "bicubic"}.get(plain["input.interpolation"], plain["input.interpolation"]),
    )
    assert (view["mean"] == [0, 0, 0]) == preset.endswith("-coda")
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "--format", "csv", "--out", str(tmp_path / "report")]) == 0
    assert method in capsys.readouterr().out


@pytest.mark.parametrize("preset", CUSTOMIZATION)
def test_customization(preset: str, web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_hand = preset.startswith("celeba")
    if by_hand:
        put_celeba_hq(tmp_path / "data")
    asked = prepared(web, preset, tmp_path / "data", capsys)
    assert [ranges is not None for _, ranges in asked[:2]] == ([] if by_hand else [False, True])
    sets = [
        f"data.root={tmp_path / 'data'}",
        "base.model=glyph-diffusion",
        "train.steps=1",
        "eval.n=1",
        "eval.steps=1",
        "eval.every=0",
        "eval.features=glyph-vit",
        "threads=1",
    ]
    record, plain = finished(preset, "clora", sets, tmp_path / "run")
    identity = record.data["identity"]
    assert identity["data"] == plain.data_name
    assert len(record.data["tasks"]) == plain.flat()["stream.tasks"] == 10
    images = {t["n_train"] for t in record.data["tasks"]}
    assert images == ({4} if preset == "dreambooth" else {15})
    assert json.dumps(record.data["config"]["concept"]) == json.dumps(plain.tree()["concept"])


@pytest.fixture(scope="module")
def small_run(web: Web, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """small_run(preset, *assignments) -> the folder of a run of class means: ten classes of CIFAR-100, two tasks."""
    place = tmp_path_factory.mktemp("small")

    def make(preset: str, *sets: str) -> Path:
        assert main(["prepare", preset, "--root", str(place / "data")]) == 0
        base = (
            f"data.root={place / 'data'}",
            "data.classes=10",
            "stream.tasks=2",
            "backbone.name=vit_tiny_patch16_224",
            "backbone.pretrained=false",
            "backbone.kwargs={img_size: 32, patch_size: 16, embed_dim: 32, num_heads: 2, depth: 2}",
            "threads=1",
        )
        folder = place / hashlib.sha256(repr((preset, sets)).encode()).hexdigest()[:8]
        given = [argument for pair in (*base, *sets) for argument in ("--set", pair)]
        if not folder.exists():
            assert main(["run", preset, "ncm", *given, "--out", str(folder), "--quiet"]) == 0
        return folder

    return make


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ("input.preprocess=none", "preprocess.mean"),
        ("input.interpolation=bilinear", "preprocess.interpolation"),
        ("input.resize=256", "preprocess.resize"),
        ("stream.class_order=shuffle", "class_order"),
        ("data.holdout=0.5", "split_name"),
        ("data.limit=1", "split_name"),
        ("backbone.kwargs.depth=3", "weights_sha256"),
        ("train.schedule=constant", "train.schedule"),
        ("train.optimizer=sgd", "train.optimizer"),
        ("head.init=zeros", "head.init"),
    ],
)
def test_a_changed_protocol_is_refused_beside_the_presets_own(
    changed: str,
    key: str,
    small_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, other = small_run("cifar100-10"), small_run("cifar100-10", changed, "label=other")
    capsys.readouterr()
    assert main(["report", str(own), str(other), "--out", str(tmp_path)]) == EXIT_USER
    out, err = capsys.readouterr()
    assert out == ""
    assert f"runs on cifar100-10 do not compare: {key} is " in err
    assert err.count("\n") == 1


def test_codas_protocol_and_the_suites_get_tables_of_their_own(
    small_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(small_run(preset)) for preset in ("cifar100-10", "cifar100-10-coda")]
    capsys.readouterr()
    assert main(["report", *folders, "--out", str(tmp_path), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["preset"] for row in rows] == ["cifar100-10", "cifar100-10-coda"]
    summary = summarise(folders)
    assert [t.preset for t in summary.tables] == ["cifar100-10", "cifar100-10-coda"]


def test_all_presets_that_need_data_are_here() -> None:
    assert set(CLASSIFICATION) >= {"imagenet-r-10", "imagenet-r-10-coda", "cifar100-10", "domainnet-5"}
    assert {resolve(p, "clora").data_name for p in CLASSIFICATION} == set(SETS_OF)
