"""DomainNet (Peng et al., 2019): 345 classes in six domains, about 600,000 images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.datasets.base import ClassData, register_dataset
from dualcl.datasets.reading.download import Checksum, download
from dualcl.datasets.reading.folders import class_folders, folder_set
from dualcl.datasets.reading.split import SelectConfig, select
from dualcl.datasets.reading.unpack import extract_zip

URL = "http://csr.bu.edu/ftp/visda/2019/multi-source"
#: the cleaned version, which the publishers recommend; sums as the catalogue of TensorFlow Datasets has them
ARCHIVES = {
    "clipart": (
        "groundtruth/clipart.zip",
        Checksum("sha256", "f8f248a3e8bbc9868c523ae24e6601b4c2ad102afc60c0efeb4f3255df22354d"),
    ),
    "infograph": (
        "infograph.zip",
        Checksum("sha256", "891e14f476317e97b6f06d6498c11d0a5b8d0c8b57210765ed9beb072da611fa"),
    ),
    "painting": (
        "groundtruth/painting.zip",
        Checksum("sha256", "fa47e6d405503ea0286cabd767f176bd30e988b63ddd7b9db16cf030c9770015"),
    ),
    "quickdraw": (
        "quickdraw.zip",
        Checksum("sha256", "9f37df2a8c3733703dbb35ad9964202a65f675ca30137756457537536b485d84"),
    ),
    "real": ("real.zip", Checksum("sha256", "d7fe010b430c5b510f85d657d38c4a1924822695fabea4fef57bd00dba251d63")),
    "sketch": ("sketch.zip", Checksum("sha256", "23a7dbae7016b343e934399beaa8a68728fb5e570ebe2c71df9b75cf91c499fc")),
}
#: the publishers' lists below URL, with sums from the same catalogue
OFFICIAL_FOLDER = "domainnet/txt"
OFFICIAL = {
    f"{domain}_{part}.txt": Checksum("sha256", digest)
    for domain, part, digest in (
        ("clipart", "train", "affdadf5f95a7583e6b98030a3d35007e2613ee4dd942393c5a705ec2b429312"),
        ("clipart", "test", "62c8e36aaba1c41ad9e249099739707220a44c08f167b37ef420f34a31628a6b"),
        ("infograph", "train", "36b44cbd41a2915e0dc73b4f4be8862a6f3c220f93c8d63fb2439beeae3aefda"),
        ("infograph", "test", "413cfa54ac92e7e6b242f4f09fbd9c8ace85c4deaf3cb6c81ff6b68264460136"),
        ("painting", "train", "f1da38d50a702fddf1329f85bc607d7a2abcae7e6aec75e1fd49cc1bd340d47b"),
        ("painting", "test", "11472b13b5188e09f06918b12eebb660588c97a20e43e268d9b02e3e37eb8f97"),
        ("quickdraw", "train", "3a5edd3bc215772010eebc87f158707703dd7e48091d13b816af81326a9d1c0f"),
        ("quickdraw", "test", "2a00a60650a453c65c356da748fec54084a197272137c440e7d52d08947357bf"),
        ("real", "train", "19d483256d24aef19e581b65eda8333fd918aef3eb733fe499ff384120e3a289"),
        ("real", "test", "2b3f75bcde309aeb5931292084b2162e936b5f189e3bb1ad716f0f74c460864c"),
        ("sketch", "train", "72f4bc6afa5702a1ccba800d0053c1427de87439dfaf246dbc9a2e71abfec54f"),
        ("sketch", "test", "3fb48fca18c507c4321f007c3f62b308ec232ff6928cbfe2af64e76ec366e840"),
    )
}
#: CODA-Prompt's lists (Smith et al., 2023), at a fixed commit, by the ids that git has for them there
CODA_URL = (
    "https://raw.githubusercontent.com/GT-RIPL/CODA-Prompt/6417d4f68754be68b697c7ca2323ee61e791e1a3/dataloaders/splits"
)
CODA = {
    "domainnet_train.yaml": Checksum("git", "bf86d2fb6a4cafaa8dc413bc25998e9ec9728809"),
    "domainnet_test.yaml": Checksum("git", "3c5407918567c97203c85b074ccc323ed4643a7e"),
}
CODA_DOMAINS = ("clipart", "infograph", "painting", "real", "sketch")
N_CLASSES = 345
#: no archive comes near these
MAX_BYTES, MAX_FILES = 32 * 2**30, 400_000
PREPARE = "run: dualcl prepare domainnet-5"
Split = Literal["coda", "official"]


class _Entry(NamedTuple):
    """A line of a list: `<domain>/<class>/<file>` and the class."""

    name: str
    label: int

    @property
    def domain(self) -> str:
        return self.name.split("/", 1)[0]


@register_dataset(
    "domainnet",
    domain="classification",
    summary="DomainNet: 345 classes in five or six domains (CODA-Prompt's lists without quickdraw, or the official)",
    needs_prepare=True,
)
class DomainNet:
    """All chosen domains together: classes are learnt one after another, each in all its domains.

    "coda": CODA-Prompt's own split of five domains, quickdraw left out. "official": the publishers' lists, 70/30 within
    each domain, of all six domains unless `data.domains` names fewer. Natural class order: that of both kinds of lists.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config(SelectConfig):
        """Keys below `data.`."""

        root: str = field(
            default="data/domainnet", metadata={"help": "the folder with the domains' folders", "volatile": True}
        )
        split: Split = field(
            default="coda", metadata={"help": "coda: CODA-Prompt's lists, without quickdraw; official: the publishers'"}
        )
        domains: list[str] | None = field(
            default=None, metadata={"help": "only these domains; default: all that the split has"}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.split not in get_args(Split):
                raise UserError(f"unknown data.split {self.split!r}; {nearest(str(self.split), get_args(Split))}")
            if self.domains is None:
                return
            if not self.domains or len(set(self.domains)) != len(self.domains):
                raise UserError(f"data.domains must name domains, each once, got {self.domains}")
            for domain in self.domains:
                if domain not in ARCHIVES:
                    raise UserError(f"unknown domain {domain!r} in data.domains; {nearest(domain, ARCHIVES)}")
                if domain not in self.of_split:
                    raise UserError(f"CODA-Prompt's lists leave out {domain}: set data.split=official or drop it")

        @property
        def of_split(self) -> tuple[str, ...]:
            """The domains that the split's lists cover."""
            return CODA_DOMAINS if self.split == "coda" else tuple(ARCHIVES)

        @property
        def chosen(self) -> tuple[str, ...]:
            """The domains whose images are used, by name."""
            return self.of_split if self.domains is None else tuple(sorted(self.domains))

    @classmethod
    def load(cls, config: Config) -> ClassData:
        """Finds the listed images; UserError when images or lists are missing or altered."""
        root = Path(config.root).expanduser()
        parts = [_entries(root, config, part) for part in ("train", "test")]
        lacking = _missing(root, config.chosen, parts)
        if lacking:
            more = f"{lacking[0]} and {len(lacking) - 1} more" if len(lacking) > 1 else lacking[0]
            raise UserError(
                f"data.root={root} lacks images that the {config.split} lists name ({more}); {_mend(root, config)}"
            )
        classes = _class_names(parts, config)
        train, test = (folder_set(root, [e.name for e in part], [e.label for e in part]) for part in parts)
        split_name = f"domainnet:{config.split}"
        if config.chosen != config.of_split:
            split_name += f"-{'-'.join(config.chosen)}"
        return select(cls.name, classes, train, test, split_name, config)

    @classmethod
    def prepare(cls, config: Config) -> None:
        """Downloads and unpacks the chosen domains (18 GB, 0.4 GB more with quickdraw) and the lists; checksummed.

        The archives stay beside the folders and may be removed afterwards.
        """
        root = Path(config.root).expanduser().resolve()
        for part in ("train", "test"):
            for name, (url, checksum) in _lists(config, part).items():
                download(f"{url}/{name}", root / name, checksum)
        parts = [_entries(root, config, part) for part in ("train", "test")]
        for domain in config.chosen:
            if (root / domain).is_dir() and not _missing(root, (domain,), parts):
                continue
            place, checksum = ARCHIVES[domain]
            archive = download(f"{URL}/{place}", root / f"{domain}.zip", checksum)
            unpacked = root / f"{domain}.unpacked"
            shutil.rmtree(unpacked, ignore_errors=True)
            extract_zip(archive, unpacked, max_bytes=MAX_BYTES, max_files=MAX_FILES)
            if not (unpacked / domain).is_dir():
                raise UserError(f"{archive} has no folder {domain}, so it is not DomainNet's; remove it and run again")
            # a folder from which images were lost
            shutil.rmtree(root / domain, ignore_errors=True)
            (unpacked / domain).replace(root / domain)
            shutil.rmtree(unpacked)
        cls.load(config)


def _mend(root: Path, config: DomainNet.Config) -> str:
    if config.split == "coda":
        return f"{PREPARE} --root {root}, or set data.split=official"
    return f"{PREPARE} --root {root} --set data.split={config.split}"


def _lists(config: DomainNet.Config, part: str) -> dict[str, tuple[str, Checksum]]:
    """The lists of "train" or "test": where each comes from, and its checksum."""
    if config.split == "coda":
        name = f"domainnet_{part}.yaml"
        return {name: (CODA_URL, CODA[name])}
    names = [f"{domain}_{part}.txt" for domain in config.chosen]
    return {name: (f"{URL}/{OFFICIAL_FOLDER}", OFFICIAL[name]) for name in names}


def _entries(root: Path, config: DomainNet.Config, part: str) -> list[_Entry]:
    """What the lists of "train" or "test" say of the chosen domains."""
    out = []
    for name, (_, checksum) in _lists(config, part).items():
        path = root / name
        if not path.is_file():
            raise UserError(f"the list {path} is missing; {_mend(root, config)}")
        if not checksum.matches(path):
            raise UserError(
                f"{path} is not the {config.split} list (wrong {checksum.algorithm}); remove it and "
                f"{_mend(root, config)}"
            )
        read = _read_coda if config.split == "coda" else _read_official
        out += [entry for entry in read(path) if entry.domain in config.chosen]
    return out


def _read_official(path: Path) -> Iterator[_Entry]:
    """Lines such as `clipart/aircraft_carrier/clipart_001_000018.jpg 0`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, label = line.rpartition(" ")
        yield _Entry(name, int(label))


def _read_coda(path: Path) -> Iterator[_Entry]:
    """The images and classes of a YAML file of two long lists, `data` and `targets`.

    Read by the line, as half a million entries take a YAML reader minutes; the checksum says that the lines are so.
    """
    columns: dict[str, list[str]] = {"data": [], "targets": []}
    column: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("- "):
            column.append(line.removeprefix("- "))
        else:
            column = columns[line.removesuffix(":")]
    for name, label in zip(columns["data"], columns["targets"], strict=True):
        yield _Entry("/".join(name.split("/")[-3:]), int(label))


def _missing(root: Path, domains: Sequence[str], parts: Sequence[Sequence[_Entry]]) -> list[str]:
    """The listed images of these domains that are not there."""
    there = {
        f"{domain}/{folder}/{file}"
        for domain in domains
        if (root / domain).is_dir()
        for folder in class_folders(root / domain)
        for file in os.listdir(root / domain / folder)
    }
    return [e.name for part in parts for e in part if e.domain in domains and e.name not in there]


def _class_names(parts: Sequence[Sequence[_Entry]], config: DomainNet.Config) -> list[str]:
    """Names by class, from the folders; UserError for a class without images in a part."""
    names = {e.label: e.name.split("/")[1].replace("_", " ") for part in parts for e in part}
    for what, part in zip(("training", "test"), parts, strict=True):
        empty = np.flatnonzero(np.bincount([e.label for e in part], minlength=N_CLASSES) == 0)
        if len(empty):
            first = names.get(int(empty[0]), f"class {empty[0]}")
            raise UserError(
                f"{', '.join(config.chosen)} of DomainNet has no {what} image of {first}; name more data.domains"
            )
    return [names[label] for label in sorted(names)]
