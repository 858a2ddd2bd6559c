"""What is fuzzed: functions of bytes that feed the places where dualcl reads what others wrote.

A target returns, or raises UserError with one line that names the file; anything else is a crash. Seeds are valid
inputs, made from the presets, records and images of the project itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries that ask for it

import dualcl.benchmark.core.compat  # noqa: F401

# isort: split
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dualcl.benchmark import cli
from dualcl.benchmark.cli.options import build_parser, expand_sets
from dualcl.benchmark.config.presets import PRESET_DIR, bundled_presets, load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core import files
from dualcl.benchmark.core.errors import EXIT_USER, UserError
from dualcl.benchmark.domains.customization import ConceptConfig
from dualcl.benchmark.exports.generate import CARD, Word, expand_prompt, open_model
from dualcl.benchmark.grids.ledger import ledger
from dualcl.benchmark.models.bundled import bundled_diffusion
from dualcl.benchmark.models.image_features import plain_prompt
from dualcl.benchmark.models.text_to_image import Vocabulary
from dualcl.benchmark.models.tokens import ConceptTokens
from dualcl.benchmark.models.weights import read_safetensors
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.restore import recorded_config
from dualcl.datasets import celeba_hq, landmarks
from dualcl.datasets.image_folder import ImageFolder
from dualcl.datasets.reading import photos, views
from dualcl.datasets.reading.folders import FolderImages
from dualcl.datasets.reading.unpack import extract_tar, extract_zip
from dualcl.methods import available_methods, method_info
from dualcl.results import plots, report
from dualcl.results.published.render import blocks_for
from dualcl.results.records import comparable, load_record, run_row
from dualcl.results.tables import summarise
from dualcl.results.writers import html
from dualcl.results.writers.pictures import Pictures, Samples

ROOT = Path(__file__).parents[2]
METHODS = sorted(available_methods())
#: fuzzed images are small, so that their decoding is quick
views.MAX_PIXELS = 1 << 20
#: drawing is not fuzzed, but the page names the plots, and their import takes as long as many pages
assert plots.PLOTS


class Target(NamedTuple):
    """A function of bytes, and inputs that it takes."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


@functools.cache
def _place() -> Path:
    """A folder for the files of this process, removed at its end; also its cache and working directory."""
    folder = tempfile.TemporaryDirectory(prefix="dualcl-fuzz-")
    _KEPT.append(folder)
    path = Path(folder.name).resolve()
    os.environ["DUALCL_CACHE"] = str(path / "cache")
    return path


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _file(name: str, data: bytes) -> Path:
    path = _place() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def _naming(*words: object) -> Iterator[None]:
    """Checks that a UserError is one line with one of these words."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if len(text.splitlines()) != 1:
            raise AssertionError(f"no single line: {text!r}") from error
        if not any(str(word) in text for word in words):
            raise AssertionError(f"names none of {[*map(str, words)]}: {text!r}") from error
        raise


# --- configuration ----------------------------------------------------------------------------------------------------


def config(data: bytes) -> None:
    """A method's number, a preset file, and `--set` assignments, between zero bytes."""
    number, text, *sets = (data + b"\0").split(b"\0")
    path = _file("preset.yaml", text)
    method = METHODS[sum(number) % len(METHODS)]
    given = [os.fsdecode(s) for s in sets if s]
    with _naming("preset", "--set", "unknown", "must ", "give", "lower", "wants", "set ", method):
        resolved = resolve(str(path), method, given)
        tree = files.as_json(resolved.tree())
        json.dumps(tree, allow_nan=False).encode()
        resolved.hash()
        restored = recorded_config({"config": tree, "run": {}})
        assert restored.flat() == resolved.flat(), "a recorded configuration comes back as another one"


def _config_seeds() -> list[bytes]:
    seeds = []
    for number, (name, path) in enumerate(bundled_presets().items()):
        domain = load_preset(name).domain
        # from 1 on, as a zero byte ends it
        method = next(i for i in range(number + 1, 99) if domain in method_info(METHODS[i % len(METHODS)]).domains)
        sets = [b"train.epochs=2", b"seed=3", b"stream.class_order=[1,0]", b"label='a b'"][: number % 5]
        seeds.append(b"\0".join([bytes([method]), path.read_bytes(), *sets]))
    return seeds


# --- records ----------------------------------------------------------------------------------------------------------


def records(data: bytes) -> None:
    """record.json, and at the same time log.jsonl, of a run: loading, then every text of a report."""
    path = _file("run/record.json", data)
    _file("run/log.jsonl", data)
    with _naming(path, path.parent, "record"):
        found = load_record(path)
        found.log()
        json.dumps(run_row(found))
        comparable(found)
        with contextlib.suppress(UserError):
            recorded_config(found.data)
        summary = summarise([path.parent])
        for form in ("text", "md", "csv", "tex"):
            report.terminal_table(summary, form, ascii_only=form == "text", width=80)
        pictures = Pictures(samples=[Samples()] * len(summary.tables))
        page = html.page(summary, pictures, summary.records, blocks_for(summary))
        assert "<script" not in page, "a record gets a script into the page"
        ledger([path.parent], path.parent / "LEDGER.md")


def _record_seeds() -> list[bytes]:
    places = sorted(ROOT.glob("results/recorded/*/records/*/record.json"))
    first = {path.parents[2]: path for path in reversed(places)}.values()  # of every stream: all kinds of matrices
    return [path.read_bytes() for path in sorted({*first, *places[:: max(1, len(places) // 5)]})]


# --- lists ------------------------------------------------------------------------------------------------------------


def _class_names(path: Path) -> None:
    ImageFolder.load(ImageFolder.Config(root=str(path.parent)))


def _words(path: Path) -> None:
    photos.read_words(path, ("dog", "cat"), {})


def _classes(path: Path) -> None:
    photos.read_classes(path, scenes=True)


def _landmarks(path: Path) -> None:
    landmarks.Landmarks.load(landmarks.Landmarks.Config(root=str(path.parent), min_images=1, concepts=1))


def _table(path: Path) -> None:
    list(landmarks._table(path))


def _identities(path: Path) -> None:
    celeba_hq._rows(path, r"(\d+)\.\w+\s+(\d+)", "a line is such as `000001.jpg 2880`")


#: file -> who reads it
LISTS: dict[str, Callable[[Path], None]] = {
    "class_names.json": _class_names,
    "prompts.yaml": _words,
    photos.CLASSES_FILE: _classes,
    landmarks.CHOICE: _landmarks,
    landmarks.CATEGORIES: _table,
    celeba_hq.IDENTITIES: _identities,
}


#: beside which images a list lies
IMAGES = {"class_names.json": ("a/0.png", "a/1.png"), landmarks.CHOICE: ("train/0/1/2/0123456789abcdef.jpg",)}


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def lists(data: bytes) -> None:
    """A byte that says which, and a list file."""
    name = list(LISTS)[(data[0] if data else 0) % len(LISTS)]
    path = _file(f"lists/{name.partition('.')[0]}/{name}", data[1:])
    for image in IMAGES.get(name, ()):
        if not (path.parent / image).exists():
            _file(str((path.parent / image).relative_to(_place())), _png())
    with _naming(path, path.parent):
        LISTS[name](path)


def _list_seeds() -> list[bytes]:
    texts = [
        '{"a": "an apple", "b": "pear"}',
        "dog: {noun: dog, prompts: ['a photo of {token}']}\ncat:\n  noun: cat\n  eval_prompts: ['my {token}']\n",
        "Classes\nsubject_name,class\ndog,dog\ncan,can\n\nPrompts\n\nObject Prompts\nprompt_list = [\n"
        "'a {0} {1} in the snow'.format(unique_token, class_token),\n]\n\nLive Subject Prompts\nprompt_list = [\n"
        "'a {0} {1} wearing a hat'.format(unique_token, class_token),\n]\n",
        '{"by_rule": [7], "landmarks": {"7": {"category": "Some Falls", "images": ["0123456789abcdef"]}}}',
        "landmark_id,category\n7,http://commons.wikimedia.org/wiki/Category:Some_Falls\n",
        "000001.jpg 2880\n000002.jpg 2937\n",
    ]
    return [bytes([i]) + text.encode() for i, text in enumerate(texts)]


# --- images -----------------------------------------------------------------------------------------------------------


def images(data: bytes) -> None:
    """An image file, as a data set opens, crops and resizes it."""
    path = _file("image.jpg", data)
    view = views.View(size=8)
    with _naming(path):
        image = FolderImages(path.parent, (path.name,))(0)
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= views.MAX_PIXELS
        assert views.evaluation_view(image, view).size == (8, 8)
        assert views.random_resized_crop(image, view, np.random.default_rng(0)).size == (8, 8)


def _image_seeds() -> list[bytes]:
    colours = Image.effect_noise((12, 9), 90)
    exif = Image.Exif()
    exif[0x0112] = 6
    made: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "PNG", {}),
        ("I;16", "PNG", {}),
        ("P", "PNG", {"transparency": 3}),
        ("RGBA", "PNG", {"exif": exif}),
        ("RGB", "JPEG", {"exif": exif}),
        ("CMYK", "JPEG", {}),
        ("P", "GIF", {"save_all": True, "append_images": [Image.new("P", (12, 9), 5)]}),
        ("RGB", "BMP", {}),
        ("RGB", "WEBP", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("F", "TIFF", {}),
        ("RGB", "PPM", {}),
    ]
    out = []
    for mode, form, options in made:
        buffer = io.BytesIO()
        colours.convert("I" if mode == "I;16" else mode).convert(mode).save(buffer, form, **options)
        out.append(buffer.getvalue())
    return out


# --- tokens -----------------------------------------------------------------------------------------------------------


@functools.cache
def _clip() -> tuple[Any, Any]:
    tokenizer: Any = CLIPTokenizer.from_pretrained(str(bundled_diffusion()["glyph-diffusion"]), subfolder="tokenizer")
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return tokenizer, CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **size, **ids))


def tokens(data: bytes) -> None:
    """Tokens per concept, placeholder, word and prompt, between zero bytes: the new words of a text encoder."""
    count, placeholder, word, prompt, *_ = (*(os.fsdecode(part) for part in data.split(b"\0")), "", "", "", "")
    tokenizer, encoder = map(copy.deepcopy, _clip())
    with _naming("placeholder", "concept.init", "word", "noun", "prompt"):
        wanted = ConceptConfig(placeholder=placeholder).placeholder
        read = Vocabulary(tokenizer, encoder, 24)
        added = ConceptTokens(read, 1 + len(count) % 3)
        for number in ("1", "2"):
            name = wanted.replace("{number}", number)
            added.check_free(name)
            added.add(name, "word" if word else "random", word, torch.Generator(), rename=False)
        names = [name for i in range(2) for name in added.words(i)]
        ids = [tokenizer(name, add_special_tokens=False).input_ids for name in names]
        assert ids == [[added.base_size + i] for i in range(len(names))], f"{names} are the tokens {ids}"
        text = added.expand(prompt)
        added.used(prompt)
        plain_prompt(text, added.words(0), word)
        assert torch.isfinite(added(read.ids([text]))).all()
    with contextlib.suppress(UserError):
        expand_prompt(prompt, [Word(name, (name,), word) for name in added.placeholders], tokenizer)


def _token_seeds() -> list[bytes]:
    texts = ["\0<c{number}>\0\0a photo of <c1> by <c2>", "aa\0sks{number}\0star\0sks1 sks10", "a\0*{number}*\0\0*1*"]
    return [text.encode() for text in texts]


# --- checkpoints and other weights ------------------------------------------------------------------------------------


def checkpoints(data: bytes) -> None:
    """The length of state.json (2 bytes, little endian), it, and safetensors; with the checksum that fits them."""
    length = int.from_bytes(data[:2], "little")
    state, blob = data[2 : 2 + length], data[2 + length :]
    try:
        parsed = json.loads(state)
        parsed.pop("sha256", None)
        state = json.dumps({**parsed, "sha256": files._checksum(blob, parsed)}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass  # no object: written as it is
    folder = _file("run/checkpoints/task_0/state.json", state).parent
    weights = _file("run/checkpoints/task_0/state.safetensors", blob)
    with _naming(folder):
        with contextlib.suppress(UserError):
            read_safetensors(weights)
        RunFolder(_place() / "run").load_checkpoint("task_0")


def _checkpoint_seeds() -> list[bytes]:
    state = json.dumps({"step": 3, "tasks": [], "matrix": {"rows": []}}).encode()
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    blobs = [save({"a.b": torch.ones(2, 3, dtype=kind), "c": torch.zeros(())}) for kind in kinds]
    return [struct.pack("<H", len(state)) + state + blob for blob in blobs]


def cards(data: bytes) -> None:
    """The card of an exported model, up to where its base model would be loaded."""
    path = _file(f"export/{CARD}", data)
    with _naming(path, path.parent, "base.model", "model"):
        open_model(path.parent, "cpu", say=lambda text: None)


def _card_seeds() -> list[bytes]:
    base = {"name": "none", "weights": "local directory", "weights_sha256": "0", "weights_dtype": "fp32"}
    card: dict[str, Any] = {
        "format": "dualcl-export",
        "version": 1,
        "kind": "diffusers-lora",
        "base": {**base, "revision": None, "variant": None},
        "run": {"method": "clora", "precision": "fp32"},
        "concepts": [{"name": "dog", "noun": "dog", "placeholder": "<c1>", "words": ["<c1>"]}],
        "sampling": {"scheduler": "ddim", "steps": 5, "guidance": 6.0, "negative_prompt": ""},
    }
    hub = {**card, "base": {**card["base"], "name": "nobody/nothing", "weights": "hub: nobody/nothing"}}
    return [json.dumps(c).encode() for c in (card, {**card, "kind": "merged"}, hub)]


# --- archives ---------------------------------------------------------------------------------------------------------


def archives(data: bytes) -> None:
    """A tar, tar.gz or zip archive: nothing appears outside its folder, and nothing at all when it is refused."""
    place = _place() / "archives"
    path = _file("archives/data.archive", data)
    target = place / "inner" / "out"
    before = {p.name for p in place.iterdir()} | {"inner"}
    unpack = extract_zip if data[:2] == b"PK" else extract_tar
    try:
        with _naming(path):
            unpack(path, target, max_bytes=1 << 16, max_files=20)
        found = [p for p in target.rglob("*") if not p.is_dir()]
        assert all(p.is_file() and not p.is_symlink() for p in found)
        assert sum(p.stat().st_size for p in found) <= 1 << 16
    finally:
        left = [*(place / "inner").iterdir()]
        assert {p.name for p in place.iterdir()} <= before, "something was written outside"
        assert left in ([], [target])
        for folder in left:
            shutil.rmtree(folder)


def _archive_seeds() -> list[bytes]:
    out = []
    for mode in ("w", "w:gz"):
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode=mode, format=form) as tar:
                folder = tarfile.TarInfo("d")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
                for name in ("d/x", "d/ü" + "n" * (90 if form == tarfile.USTAR_FORMAT else 200)):
                    info = tarfile.TarInfo(name)
                    info.size = 5
                    tar.addfile(info, io.BytesIO(b"hello"))
            out.append(buffer.getvalue())
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as packed:
            packed.writestr("d/", "")
            packed.writestr("d/x", "hello" * 10)
        out.append(buffer.getvalue())
    return out


# --- command line -----------------------------------------------------------------------------------------------------


def command(data: bytes) -> None:
    """A command line, its words between zero bytes: `show` and `list` in full, of all others the parsing."""
    words = [os.fsdecode(word) for word in data.split(b"\0")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(_place()):
        if words[0] in ("show", "list"):
            code = cli.main(words)
        else:
            parser = build_parser()
            try:
                parser.parse_args(expand_sets(words))
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
    lines = [line for line in err.getvalue().splitlines() if "--debug" not in words and line.startswith("dualcl: ")]
    assert code == 0 or (code == EXIT_USER and ("--debug" in words or len(lines) == 1)), f"code {code}: {lines}"
    out.getvalue().encode("utf-8", "surrogateescape")


def _command_seeds() -> list[bytes]:
    lines = [
        "show glyphs clora --set train.epochs=2 method.lr=1e-3",
        "show glyph-concepts --set stream.tasks=2",
        "show glyphs",
        f"show {PRESET_DIR / 'glyphs-10.yaml'} ewc --set seed=1 --set label=x",
        "list methods",
        "list published imagenet-r-10",
        "run glyphs lora --seed 1 --set method.rank=4 --out x --quiet",
        "compare glyphs --methods clora,lora --seeds 0,1 --jobs 2 --format md,csv --confidence 0.9",
        "sweep glyphs clora --over method.lr=1,2 --select A_last",
        "report a b --out c --with-published --baseline lora",
        "generate d --prompt x -n 3 --guidance 2.5 --steps 4",
    ]
    return [b"\0".join(word.encode() for word in line.split()) for line in lines]


TARGETS = {
    "config": Target(config, _config_seeds),
    "record": Target(records, _record_seeds),
    "lists": Target(lists, _list_seeds),
    "images": Target(images, _image_seeds),
    "tokens": Target(tokens, _token_seeds),
    "checkpoint": Target(checkpoints, _checkpoint_seeds),
    "card": Target(cards, _card_seeds),
    "archive": Target(archives, _archive_seeds),
    "command": Target(command, _command_seeds),
}


def run_one(name: str, data: bytes) -> bool:
    """Feeds `data` to a target: True when it was taken, False when it was refused as it should; else the crash."""
    try:
        TARGETS[name].run(data)
    except UserError:
        return False
    return True
