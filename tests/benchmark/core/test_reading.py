"""Files that others wrote: JSON, YAML and weights that are made to harm."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import dualcl.benchmark.core.compat  # noqa: F401

# isort: split
import timm

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import _checksum
from dualcl.benchmark.core.reading import MOST_SEED, natural, parse_json
from dualcl.benchmark.core.safe_yaml import read_yaml
from dualcl.benchmark.core.settings import coerce, parse_assignment
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.models.vit import BackboneConfig, load_backbone
from dualcl.benchmark.models.weights import no_pickles, read_safetensors
from dualcl.benchmark.runs.folder import DamagedCheckpoint, RunFolder
from dualcl.results.record_type import LARGEST


class Trap:
    """What touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


# --- YAML and JSON ----------------------------------------------------------------------------------------------------


def laughs(levels: int) -> str:
    """A list that names the one before it nine times, again and again."""
    lines = ["a0: &a0 [lol]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (laughs(10), "more than 1000000 values"),
        ("a: " + "[" * 500 + "]" * 500, r"\(line 1\): nested deeper than 100 levels"),
        ("a: " + "{b: " * 50_000, "nested deeper than 100 levels"),
        ("a: &x [*x]", "an alias holds itself"),
        ("a: &x {<<: *x}", "an alias holds itself"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: " + "9" * 5000, "is too large"),
        ("a: 0x" + "f" * 5000, "is too large"),
        ("a: 2001-99-99", "month must be in"),
        ("a: !!int x", "invalid literal"),
        ("a: !!timestamp x", "a tag such as"),
        ("a: !!bool x", "a tag such as"),
        ("a: \0", "unacceptable character"),
        ('a: "\\ud800"', "half a character"),
    ],
)
def test_yaml_that_would_not_end_or_runs_code_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"^f\.yaml is not valid YAML.*{why}") as caught:
        read_yaml(text, "f.yaml")
    assert "\n" not in str(caught.value)


def test_aliases_and_merges_of_a_sane_size_are_read() -> None:
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]", "f") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
        "c": [{"x": 1, "y": 2}] * 2,
    }
    assert len(read_yaml(laughs(5), "f")["a4"]) == 9


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "nested deeper"),
        ("[" * 101 + "]" * 101, "nested deeper"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested deeper"),
        ("NaN", "no JSON"),
        ('{"a": -Infinity}', "no JSON"),
        ('{"a": 1e999}', "too large"),
        ('{"a":12345678901234567890123}', "too large"),
        ("[1," + "9" * 5000 + "]", "too large|limit"),
    ],
)
def test_json_beyond_limits_is_a_value_error(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_json_within_limits_is_that_of_the_standard_library() -> None:
    text = json.dumps({"a": [1, 2.5e-300, 1e300, 2**64 - 1, "1" * 40, None, True, "😀"], "b": [[[[]]]]})
    assert parse_json(text) == json.loads(text)
    assert parse_json("[" * 100 + "]" * 100) == json.loads("[" * 100 + "]" * 100)


def test_seeds_are_numbers_that_readers_of_records_take() -> None:
    assert MOST_SEED == LARGEST
    assert [natural(text) for text in ("0", "007", "1000000000000000", "0" * 50)] == [0, 7, MOST_SEED, 0]
    for text in ("", "-1", "1.0", "x", "\u0663", "\u00b2", "1000000000000001", "9" * 5000):
        with pytest.raises(ValueError, match="from 0 to"):
            natural(text)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [(10**400, float), (float("inf"), float), (2**64, int), (1e300, int), ({"a": float("nan")}, dict[str, Any])],
)
def test_values_that_no_record_can_hold(value: Any, annotation: Any) -> None:
    with pytest.raises(UserError, match=r"^x\.y must be "):
        coerce(value, annotation, "x.y")


def test_assignments_that_are_no_text() -> None:
    with pytest.raises(UserError, match=r"^--set 'label' is .*no text in UTF-8"):
        parse_assignment("label=\udcff")
    with pytest.raises(UserError, match=r"^label is .* control characters"):
        resolve("glyphs", "clora", ['label="a\\nb"'])


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_with_a_header_of_any_length_are_refused(tmp_path: Path) -> None:
    whole = save({"a": torch.ones(3)})
    for name, blob in {
        "long": (2**63).to_bytes(8, "little") + whole[8:],
        "billions": (2**32).to_bytes(8, "little") + b"{" * 100,
        "nested": (9).to_bytes(8, "little") + b'{"a":' + b"[" * 4,
        "cut": whole[:-5],
        "empty": b"",
    }.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(blob)
        with pytest.raises(UserError, match=rf"{name}\.safetensors is no valid safetensors file"):
            read_safetensors(file)


def test_a_checkpoint_with_the_right_checksum_and_no_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "task_0"
    folder.mkdir(parents=True)
    blob, state = b"\xff" * 100, {"tasks": []}
    (folder / "state.safetensors").write_bytes(blob)
    (folder / "state.json").write_text(json.dumps({**state, "sha256": _checksum(blob, state)}))
    with pytest.raises(DamagedCheckpoint, match=r"task_0 holds no safetensors .*; delete"):
        RunFolder(tmp_path).load_checkpoint("task_0")
    (folder / "state.json").write_text("[" * 10_000)
    with pytest.raises(DamagedCheckpoint, match=r"task_0 cannot be read \(it is nested deeper"):
        RunFolder(tmp_path).load_checkpoint("task_0")


def test_timm_cannot_unpickle_a_checkpoint(tmp_path: Path) -> None:
    """Whatever way timm comes to a .pth: here a file of its own configuration, as the hub's would be after a fetch."""
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": Trap(tmp_path / "trapped")}, file)
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    with (
        pytest.raises(UserError, match=r"backbone\.name=x: .*weights\.pth is a pickle file.*safetensors\.torch\.save_"),
        no_pickles("backbone.name=x"),
    ):
        timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **small)
    assert not (tmp_path / "trapped").exists()
    torch.save({"a": torch.ones(2)}, file)
    assert torch.load(file)["a"].tolist() == [1, 1]  # outside it torch is itself again


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_where_weights_come_from_is_no_argument_of_the_user(key: str) -> None:
    with pytest.raises(UserError, match=rf"backbone\.kwargs\.{key} is set by the suite itself"):
        load_backbone(BackboneConfig("vit_tiny_patch16_224", pretrained=False, kwargs={key: "x.pth"}))


@pytest.mark.parametrize("name", ["hf-hub:somebody/vit", "local-dir:/tmp/vit", "hf_hub:somebody/vit"])
def test_names_that_make_timm_fetch_are_unknown(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown backbone\.name"):
        load_backbone(BackboneConfig(name))


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
@pytest.mark.parametrize("way", ["alone", "index"])
def test_a_diffusion_model_is_not_unpickled(
    save_tiny_sd: Callable[..., Path], tmp_path: Path, part: str, way: str
) -> None:
    """A folder with pickled weights alone, or with an index of safetensors that leads to them."""
    model = save_tiny_sd(tmp_path / "model", (8, 16))
    stem, pickled = ("model", "pytorch_model.bin")
    if part == "unet":
        stem, pickled = "diffusion_pytorch_model", "diffusion_pytorch_model.bin"
    weights = model / part / f"{stem}.safetensors"
    names = list(read_safetensors(weights))
    weights.unlink()
    torch.save({"a": Trap(tmp_path / "trapped")}, model / part / pickled)
    if way == "index":
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, pickled)}
        (model / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{part}|pickle") as caught:
        load(BaseConfig(str(model)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()
    shutil.rmtree(model)


# --- what no module may do --------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]
#: calls that unpickle, run text, or read images and YAML without the limits; where the last two have their one place
FORBIDDEN = {
    "os.system": "",
    "os.popen": "",
    "eval": "",
    "exec": "benchmark/core/registry.py",  # a file that the user names, of the recorded hash
    "pickle.load": "",
    "pickle.loads": "",
    "torch.load": "",
    "joblib.load": "",
    "yaml.load": "benchmark/core/safe_yaml.py datasets/imagenet_r.py",  # a safe loader, after the checksum
    "yaml.unsafe_load": "",
    "shutil.unpack_archive": "",
    "tar.extractall": "",
    "Image.open": "datasets/reading/views.py results/samples.py",  # which takes PNG alone, of MAX_SIDE
}


def test_no_module_unpickles_or_runs_text() -> None:
    found = []
    for package in ("benchmark", "datasets", "methods", "results"):
        for path in sorted((ROOT / package).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                allowed = place in FORBIDDEN.get(name, place).split()
                if not allowed or keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
                    found.append(f"{place}:{node.lineno} {name}")
    assert found == []
