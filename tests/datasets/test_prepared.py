"""CIFAR-100 and ImageNet-R from small archives in the official layout, served on this machine."""

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets import cifar100, imagenet_r
from dualcl.datasets.cifar100 import Cifar100
from dualcl.datasets.imagenet_r import ImageNetR
from dualcl.datasets.reading.download import Checksum


def checksum(path: Path) -> Checksum:
    return Checksum("sha256", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def cifar(site, monkeypatch) -> None:
    """A small CIFAR-100: 4 training and 2 test images of each of 3 classes, with checksums to match."""
    folder, address = site
    made = folder / "made" / "cifar-100-python"
    made.mkdir(parents=True)
    md5 = {}
    for part, n in (("train", 12), ("test", 6)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
        content = {"data": pixels, "fine_labels": [i % 3 for i in range(n)]}
        (made / part).write_bytes(pickle.dumps(content))
    (made / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear", "crab"]}))
    for part in ("train", "test", "meta"):
        md5[part] = hashlib.md5((made / part).read_bytes()).hexdigest()
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as tar:
        tar.add(made, "cifar-100-python")
    monkeypatch.setattr(cifar100, "MD5", md5)
    monkeypatch.setattr(cifar100, "URL", f"{address}/cifar.tar.gz")
    monkeypatch.setattr(cifar100, "ARCHIVE", checksum(folder / "cifar.tar.gz"))


@pytest.mark.usefixtures("cifar")
def test_cifar100_is_prepared_and_loaded(tmp_path):
    config = Cifar100.Config(root=str(tmp_path / "data"))
    with pytest.raises(UserError, match="run: dualcl prepare cifar100-10"):
        Cifar100.load(config)
    Cifar100.prepare(config)
    data = Cifar100.load(config)
    assert data.class_names == ("apple", "bear", "crab")
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.split_name == "cifar100:official"
    # rows are 1024 red, 1024 green, 1024 blue values
    raw = np.random.default_rng(12).integers(0, 256, (12, 3072), dtype=np.uint8)
    assert np.array_equal(np.asarray(data.train.load(5)), raw[5].reshape(3, 32, 32).transpose(1, 2, 0))
    Cifar100.prepare(config)  # nothing to do


@pytest.mark.usefixtures("cifar")
def test_cifar100_parts(tmp_path):
    Cifar100.prepare(Cifar100.Config(root=str(tmp_path)))
    data = Cifar100.load(Cifar100.Config(root=str(tmp_path), classes=2, holdout=0.25, limit=2))
    assert data.split_name == "cifar100:official+classes-2+holdout-25%+limit-2"
    assert data.train.labels.tolist().count(0) == data.train.labels.tolist().count(1) == 2
    assert sorted(data.test.labels.tolist()) == [0, 1]
    assert all(name.startswith("train/") for name in data.test.ids)
    assert not set(data.train.ids) & set(data.test.ids)


@pytest.mark.usefixtures("cifar")
def test_cifar100_changed_after_its_download_is_not_unpickled(tmp_path):
    Cifar100.prepare(Cifar100.Config(root=str(tmp_path)))

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "trapped",)

    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="incomplete or damaged"):
        Cifar100.load(Cifar100.Config(root=str(tmp_path)))
    assert not (tmp_path / "trapped").exists()


WNIDS = [f"n{i:08d}" for i in range(200)]
#: CODA-Prompt's classes are not in alphabetical order
TARGETS = {wnid: (i * 7) % 200 for i, wnid in enumerate(WNIDS)}


@pytest.fixture
def renditions(site, monkeypatch) -> None:
    """A small ImageNet-R: 200 classes of 2 training images and 1 test image, and CODA-Prompt's kind of lists."""
    folder, address = site
    made = folder / "imagenet-r"
    lists: dict[str, dict[str, list]] = {name: {"data": [], "targets": []} for name in imagenet_r.LISTS}
    for wnid in WNIDS:
        (made / wnid).mkdir(parents=True)
        for i, name in enumerate(["imagenet-r_train.yaml", "imagenet-r_train.yaml", "imagenet-r_test.yaml"]):
            Image.new("RGB", (2, 2), (TARGETS[wnid], i, 0)).save(made / wnid / f"art_{i}.jpg", quality=100)
            lists[name]["data"].append(f"data/imagenet-r/{wnid}/art_{i}.jpg")
            lists[name]["targets"].append(TARGETS[wnid])
    (made / "README.txt").write_text("About.\n\nn00000000 goldfish\nn00000001 great_white_shark\n")
    with tarfile.open(folder / "imagenet-r.tar", "w") as tar:
        tar.add(made, "imagenet-r")
    for name, content in lists.items():
        (folder / name).write_text(yaml.safe_dump(content))
    monkeypatch.setattr(imagenet_r, "URL", f"{address}/imagenet-r.tar")
    monkeypatch.setattr(imagenet_r, "ARCHIVE", checksum(folder / "imagenet-r.tar"))
    monkeypatch.setattr(imagenet_r, "LISTS_URL", address)
    monkeypatch.setattr(imagenet_r, "LISTS", {name: checksum(folder / name) for name in lists})


@pytest.mark.usefixtures("renditions")
def test_imagenet_r_is_prepared_and_loaded(tmp_path):
    root = tmp_path / "data" / "imagenet-r"
    config = ImageNetR.Config(root=str(root))
    with pytest.raises(UserError, match="0 of 200 class folders; run: dualcl prepare imagenet-r-10"):
        ImageNetR.load(config)
    ImageNetR.prepare(config)
    assert sorted(p.name for p in root.parent.iterdir()) == ["imagenet-r", "imagenet-r.tar"]

    coda = ImageNetR.load(config)
    assert coda.split_name == "imagenet-r:coda"
    assert (len(coda.train), len(coda.test)) == (400, 200)
    assert coda.class_names[0] == "goldfish"
    assert coda.class_names[7] == "great white shark"
    assert coda.class_names[14] == "n00000002"
    for images in (coda.train, coda.test):
        assert all(images.labels[i] == TARGETS[name.split("/")[0]] for i, name in enumerate(images.ids))
    assert coda.train.load(2).getpixel((0, 0))[0] == pytest.approx(7, abs=3)

    by_hash = ImageNetR.load(ImageNetR.Config(root=str(root), split="hash"))
    assert by_hash.split_name == "imagenet-r:hash"
    assert by_hash.split_hash != coda.split_hash
    assert by_hash.class_names[1] == "great white shark"
    assert np.bincount(by_hash.test.labels).tolist() == [1] * 200
    assert set(by_hash.train.ids) | set(by_hash.test.ids) == set(coda.train.ids) | set(coda.test.ids)


@pytest.mark.usefixtures("renditions")
def test_what_is_missing_of_imagenet_r_is_named(tmp_path):
    root = tmp_path / "imagenet-r"
    config = ImageNetR.Config(root=str(root))
    ImageNetR.prepare(ImageNetR.Config(root=str(root), split="hash"))
    with pytest.raises(UserError, match=r"list .*imagenet-r_train\.yaml is missing; .*or set data\.split=hash"):
        ImageNetR.load(config)
    ImageNetR.prepare(config)
    (root / WNIDS[3] / "art_1.jpg").unlink()
    with pytest.raises(UserError, match=rf"lacks images .*\({WNIDS[3]}/art_1\.jpg\)"):
        ImageNetR.load(config)
    (root / "imagenet-r_train.yaml").write_text("data: []")
    with pytest.raises(UserError, match=r"imagenet-r_train\.yaml is not CODA-Prompt's list"):
        ImageNetR.load(config)
    (root / WNIDS[5]).rename(root / "elsewhere")
    with pytest.raises(UserError, match="199 of 200 class folders"):
        ImageNetR.load(config)


@pytest.mark.usefixtures("renditions")
def test_an_unfinished_unpacking_is_repaired_here(tmp_path, monkeypatch):
    root = tmp_path / "my-renditions"
    (root / WNIDS[0]).mkdir(parents=True)
    monkeypatch.chdir(root)
    ImageNetR.prepare(ImageNetR.Config(root="."))
    assert len(list((root / WNIDS[0]).iterdir())) == 3


def test_imagenet_r_options():
    with pytest.raises(UserError, match=r"data\.split .*did you mean 'coda'"):
        ImageNetR.Config(split="codas")
