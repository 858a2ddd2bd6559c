"""DomainNet from small zip archives and lists in the official layout, served on this machine."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets import domainnet
from dualcl.datasets.domainnet import ARCHIVES, CODA_DOMAINS, DomainNet
from dualcl.datasets.reading.download import Checksum

CLASSES = ["aircraft_carrier", "teddy-bear", "The_Eiffel_Tower"]
DOMAINS = tuple(ARCHIVES)


def git_sum(path: Path) -> Checksum:
    content = path.read_bytes()
    return Checksum("git", hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest())


def sha256(path: Path) -> Checksum:
    return Checksum("sha256", hashlib.sha256(path.read_bytes()).hexdigest())


def image_of(domain: str, label: int, k: int) -> str:
    """Numbers in file names start at 1, labels at 0."""
    suffix = "png" if domain == "quickdraw" else "jpg"
    return f"{domain}/{CLASSES[label]}/{domain}_{label + 1:03d}_{k:06d}.{suffix}"


def colour(domain: str, label: int, k: int) -> tuple[int, int, int]:
    return 40 * DOMAINS.index(domain), 60 * label, 30 * k


@pytest.fixture
def served(site, tmp_path, monkeypatch) -> Path:
    """Three classes, 4 images of each in each of six domains; paintings of class 2 are for tests only.

    Image 3 is for tests in the official lists, image 1 in CODA-Prompt's, which know no quickdraw.
    """
    folder, address = site
    archives, official = {}, {}
    coda: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for domain, (place, _) in ARCHIVES.items():
        lines: dict[str, list[str]] = {"train": [], "test": []}
        (folder / place).parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / place, "w") as packed:
            for label in range(len(CLASSES)):
                for k in range(4):
                    name = image_of(domain, label, k)
                    image = tmp_path / "image.png"
                    Image.new("RGB", (4, 5), colour(domain, label, k)).save(image)
                    packed.write(image, name)
                    part = "test" if k == 3 or (domain, label) == ("painting", 2) else "train"
                    lines[part].append(f"{name} {label}")
                    if domain != "quickdraw":
                        coda["test" if k == 1 else "train"].append((f"data/DomainNet/{name}", label))
        archives[domain] = (place, sha256(folder / place))
        (folder / domainnet.OFFICIAL_FOLDER).mkdir(parents=True, exist_ok=True)
        for part, entries in lines.items():
            path = folder / domainnet.OFFICIAL_FOLDER / f"{domain}_{part}.txt"
            path.write_text("\n".join(entries) + "\n")
            official[path.name] = sha256(path)
    sums = {}
    for part, entries in coda.items():
        np.random.default_rng(0).shuffle(entries)
        path = folder / f"domainnet_{part}.yaml"
        rows = ["data:", *(f"- {name}" for name, _ in entries), "targets:", *(f"- {label}" for _, label in entries)]
        path.write_text("\n".join(rows) + "\n")
        sums[path.name] = git_sum(path)
    for name, value in {
        "URL": address,
        "ARCHIVES": archives,
        "OFFICIAL": official,
        "CODA_URL": address,
        "CODA": sums,
        "N_CLASSES": len(CLASSES),
    }.items():
        monkeypatch.setattr(domainnet, name, value)
    return folder


def config(root: Path, **options: object) -> DomainNet.Config:
    return DomainNet.Config(**{"root": str(root), **options})


def refuses(match: str, call, *args: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("served")
def test_codas_five_domains_are_prepared_and_loaded(tmp_path):
    root = tmp_path / "data" / "domainnet"
    refuses(
        rf"domainnet_train\.yaml is missing; run: dualcl prepare domainnet-5 --root {root}",
        DomainNet.load,
        config(root),
    )
    DomainNet.prepare(config(root))
    assert not (root / "quickdraw").exists()
    assert not list(root.glob("*.unpack*"))
    data = DomainNet.load(config(root))
    assert data.class_names == ("aircraft carrier", "teddy-bear", "The Eiffel Tower")
    assert data.split_name == "domainnet:coda"
    assert (len(data.train), len(data.test)) == (5 * 3 * 3, 5 * 3)
    assert set(data.test.ids) == {image_of(d, label, 1) for d in CODA_DOMAINS for label in range(3)}
    for images in (data.train, data.test):
        for i, name in enumerate(images.ids):
            domain, folder, file = name.split("/")
            assert folder == CLASSES[images.labels[i]]
            found = images.load(i).getpixel((1, 1))
            assert found == colour(domain, int(images.labels[i]), int(file[-10:-4]))


@pytest.mark.usefixtures("served")
def test_the_official_lists_with_all_domains_or_some(tmp_path):
    root = tmp_path / "domainnet"
    DomainNet.prepare(config(root, split="official", domains=["sketch", "clipart"]))
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == ["clipart", "sketch"]
    some = DomainNet.load(config(root, split="official", domains=["sketch", "clipart"]))
    assert some.split_name == "domainnet:official-clipart-sketch"
    assert {name.split("/")[0] for name in some.train.ids} == {"clipart", "sketch"}
    assert (len(some.train), len(some.test)) == (2 * 3 * 3, 2 * 3)
    # in whatever order they are named
    swapped = DomainNet.load(config(root, split="official", domains=["clipart", "sketch"]))
    assert swapped.split_hash == some.split_hash

    refuses(
        r"infograph_train\.txt is missing; run: .* --set data\.split=official",
        DomainNet.load,
        config(root, split="official"),
    )
    DomainNet.prepare(config(root, split="official"))
    every = DomainNet.load(config(root, split="official"))
    assert every.split_name == "domainnet:official"
    assert (len(every.train), len(every.test)) == (6 * 3 * 3 - 3, 6 * 3 + 3)
    assert image_of("quickdraw", 1, 0) in every.train.ids
    assert len({some.split_hash, every.split_hash}) == 2


@pytest.mark.usefixtures("served")
def test_domains_without_an_image_of_a_class_are_refused(tmp_path):
    alone = config(tmp_path, split="official", domains=["painting"])
    refuses(
        r"painting of DomainNet has no training image of The Eiffel Tower; name more data\.domains",
        DomainNet.prepare,
        alone,
    )
    DomainNet.prepare(config(tmp_path, split="official", domains=["painting", "real"]))


def test_what_is_lost_is_named_and_unpacked_again(served, tmp_path):
    DomainNet.prepare(config(tmp_path))
    for k in (0, 1):
        (tmp_path / image_of("sketch", 2, k)).unlink()
    refuses(
        rf"lacks images that the coda lists name \({image_of('sketch', 2, 0)} and 1 more\); .*or set data\.split",
        DomainNet.load,
        config(tmp_path),
    )
    served.rename(tmp_path / "offline")
    DomainNet.prepare(config(tmp_path))
    assert len(DomainNet.load(config(tmp_path)).test) == 15
    # once unpacked, the archives are not needed
    for archive in tmp_path.glob("*.zip"):
        archive.unlink()
    DomainNet.prepare(config(tmp_path))


def test_altered_lists_and_other_archives_are_refused(served, tmp_path, monkeypatch):
    other = served / "sketch.zip"
    with zipfile.ZipFile(other, "w") as packed:
        packed.writestr("sketches/x.jpg", b"x")
    monkeypatch.setitem(domainnet.ARCHIVES, "sketch", ("sketch.zip", sha256(other)))
    refuses(r"sketch\.zip has no folder sketch, so it is not DomainNet's", DomainNet.prepare, config(tmp_path))
    (tmp_path / "domainnet_test.yaml").write_text("data: []\n")
    refuses(r"domainnet_test\.yaml is not the coda list \(wrong git\); remove it", DomainNet.load, config(tmp_path))


def test_domainnet_options():
    with pytest.raises(UserError, match=r"data\.split .*did you mean 'official'"):
        DomainNet.Config(split="oficial")
    with pytest.raises(UserError, match=r"leave out quickdraw: set data\.split=official or drop it"):
        DomainNet.Config(domains=["real", "quickdraw"])
    with pytest.raises(UserError, match=r"unknown domain 'sketches' in data\.domains; did you mean 'sketch'"):
        DomainNet.Config(domains=["sketches"])
    for wrong in ([], ["real", "real"]):
        with pytest.raises(UserError, match=r"data\.domains must name domains, each once"):
            DomainNet.Config(domains=wrong)
    assert DomainNet.Config(split="official").chosen == DOMAINS
    assert DomainNet.Config().chosen == CODA_DOMAINS == tuple(d for d in DOMAINS if d != "quickdraw")


def test_the_real_lists_have_a_sum_each():
    assert set(domainnet.OFFICIAL) == {f"{d}_{part}.txt" for d in DOMAINS for part in ("train", "test")}
    sums = [*domainnet.OFFICIAL.values(), *(checksum for _, checksum in ARCHIVES.values())]
    assert len(set(sums)) == 18
    assert all(s.algorithm == "sha256" and len(bytes.fromhex(s.digest)) == 32 for s in sums)
    assert all(len(bytes.fromhex(s.digest)) == 20 for s in domainnet.CODA.values())
