"""Configuration: precedence, types, messages, sources and hashes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest

from dualcl.benchmark.config.presets import bundled_presets, load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.config.tuned import Tuned
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.settings import coerce, flatten, parse_assignment, read_yaml
from dualcl.benchmark.domains import DOMAINS
from dualcl.methods import available_methods, method_class
from dualcl.methods.base import MethodConfig


@pytest.fixture
def write(tmp_path):
    """write(name, text) -> path of a preset file; `glyphs` data unless the text says otherwise."""

    def make(name: str, text: str, head: str = "domain: classification\ndata: {name: glyphs}\n") -> str:
        file = tmp_path / f"{name}.yaml"
        file.write_text(head + text)
        return str(file)

    return make


def one_line(call, *words):
    """Asserts a UserError of one line that holds all `words`; returns it."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


# --- precedence -----------------------------------------------------------------------------------------------------


def test_default_then_base_then_preset_then_set(write):
    base = write("base", "train: {epochs: 2, batch_size: 7, log_every: 3}\nbackbone: {kwargs: {depth: 4}}\n")
    child = write(
        "child", f"extends: {base}\ntrain: {{batch_size: 8}}\nbackbone: {{kwargs: {{img_size: 64}}}}\n", head=""
    )
    resolved = resolve(child, "lora", ["train.log_every=4", "method.lr=1e-4"])
    train = resolved.train
    assert (train.optimizer, train.epochs, train.batch_size, train.log_every) == ("adam", 2, 8, 4)
    assert resolved.sections["backbone"].kwargs == {"depth": 4, "img_size": 64}
    keys = ("train.optimizer", "train.epochs", "train.batch_size", "train.log_every", "backbone.kwargs.img_size")
    assert [resolved.sources[k] for k in keys] == ["default", "preset base", "preset child", "--set", "preset child"]
    assert (resolved.preset, resolved.domain, resolved.data_name) == ("child", "classification", "glyphs")


def test_methods_sections_count_for_their_method_only_and_below_set(write):
    preset = write("p", "method: {lr: 0.5}\nmethods:\n  lora: {rank: 3, lr: 0.25}\n  clora: {rank: 5}\n")
    lora, clora = resolve(preset, "lora").sections["method"], resolve(preset, "clora")
    assert (lora.rank, lora.lr) == (3, 0.25)
    assert (clora.sections["method"].rank, clora.sections["method"].lr) == (5, 0.5)
    assert clora.sources["method.rank"] == "preset p (methods.clora)"
    assert clora.sources["method.lr"] == "preset p"
    assert resolve(preset, "lora", ["method.rank=9"]).sections["method"].rank == 9
    both = resolve(preset, "lora", ["method.rank=9", "methods.lora.rank=8"])
    assert both.sections["method"].rank == 9
    other = resolve(preset, "lora", ["methods.clora.rank=8"])
    assert other.sections["method"].rank == 3


def test_seed_argument_and_the_last_set_win(write):
    preset = write("p", "seed: 3\n")
    assert resolve(preset, "ncm").general.seed == 3
    resolved = resolve(preset, "ncm", ["seed=4", "train.epochs=6", "train.epochs=7"], seed=5)
    assert (resolved.general.seed, resolved.sources["seed"], resolved.train.epochs) == (5, "--seed", 7)


def test_every_key_has_a_source(write):
    preset = write("p", "backbone: {kwargs: {img_size: 64}}\n")
    resolved = resolve(preset, "clora", ["backbone.kwargs.depth=3"])
    assert set(resolved.sources) == set(flatten(resolved.tree()))
    assert set(resolved.sources.values()) == {"default", "preset p", "--set", "command line"}
    assert resolved.sources["data.name"] == "preset p"


def test_the_data_set_can_be_set(write):
    resolved = resolve(write("p", ""), "ncm", ["data.name=image-folder", "data.root=images"])
    assert resolved.data_name == "image-folder"
    assert resolved.sources["data.name"] == "--set"


def test_an_assignment_of_a_mapping_sets_each_key(write):
    preset = write("p", "backbone: {kwargs: {img_size: 64}}\n")
    resolved = resolve(preset, "ncm", ["backbone.kwargs={depth: 3, qk_norm: true}", "train={epochs: 4}"])
    assert resolved.sections["backbone"].kwargs == {"img_size": 64, "depth": 3, "qk_norm": True}
    assert resolved.train.epochs == 4


# --- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", "+1e-3", "1.0e-03"])
def test_numbers_with_exponents_are_floats(text, write):
    assert parse_assignment(f"x={text}") == ("x", 0.001)
    assert resolve(write("p", f"method: {{lr: {text}}}\n"), "lora").sections["method"].lr == 0.001


@pytest.mark.parametrize("text", ["1e-3x", "v1.2", "1-2", "e5", "'1e-3'"])
def test_what_only_looks_like_a_number_is_text(text):
    assert parse_assignment(f"x={text}")[1] == text.strip("'")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, float, 3.0),
        (3.0, int, 3),
        ("none", int | None, None),
        (None, float | None, None),
        (2, int | Literal["auto"], 2),
        ("auto", int | Literal["auto"], "auto"),
        (7, str, "7"),
        ("7", str | list[int], "7"),
        ([3, 1], str | list[int], [3, 1]),
        ("0,1", tuple[int, ...], (0, 1)),
        (4, tuple[int, ...], (4,)),
        ([0.5, 1], tuple[float, ...], (0.5, 1.0)),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        (True, bool, True),
    ],
)
def test_values_become_the_declared_type(value, annotation, expected):
    made = coerce(value, annotation, "x")
    assert made == expected
    assert type(made) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "wanted"),
    [
        ("fast", float, "x must be a number, got 'fast'"),
        (float("nan"), float, "x must be a number, got nan"),
        (1.5, int, "x must be an integer, got 1.5"),
        (True, int, "x must be an integer, got True"),
        (1, bool, "x must be true or false, got 1"),
        ("fp8", Literal["fp32", "bf16"], "x must be one of fp32, bf16, got 'fp8'"),
        ("many", int | None, "x must be an integer or none, got 'many'"),
        ("0,b", tuple[int, ...], "x must be tuple of an integer, got '0,b'"),
        (3, dict[str, Any], "x must be dict of .*, got 3"),
    ],
)
def test_what_is_no_such_value_is_named(value, annotation, wanted):
    with pytest.raises(UserError, match=wanted):
        coerce(value, annotation, "x")


@dataclass(frozen=True)
class Odd(MethodConfig):
    """A method with a field of each further kind."""

    blocks: tuple[int, ...] = (0,)
    lambda_: float = 1.0


def test_fields_of_a_method(write):
    preset = write("p", "")
    config = resolve(preset, "ncm", ["method.blocks=1,2", "method.lambda_=1e7"], method_config=Odd).sections["method"]
    assert (config.blocks, config.lambda_) == ((1, 2), 1e7)
    plain = resolve(preset, "clora", ["method.lambda=1e3"])  # `lambda` itself cannot be a field's name
    assert plain.sections["method"].lambda_ == 1e3
    assert plain.sources["method.lambda_"] == "--set"
    assert resolve(preset, "ncm", ["method.blocks=[3]"], method_config=Odd).sections["method"].blocks == (3,)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.epoch=3", ["unknown key 'train.epoch'", "did you mean 'train.epochs'"]),
        ("sed=3", ["unknown key 'sed'", "'seed'"]),
        ("method.rnk=3", ["unknown key 'method.rnk'", "'method.rank'"]),
        ("data.nam=glyphs", ["unknown key 'data.nam'", "'data.name'"]),
        ("train.epochs.x=3", ["unknown key 'train.epochs.x'"]),
        ("methods.clorra.rank=3", ["unknown method in 'methods.clorra.rank'", "'clora'"]),
        ("methods.clora.rnk=3", ["unknown key 'methods.clora.rnk'", "'methods.clora.rank'"]),
        ("methods.lora.rnk=3", ["unknown key 'method.rnk'", "'method.rank'"]),
        ("train.epochs=0", ["train.epochs must be at least 1, got 0"]),
        ("train.grad_clip=0", ["train.grad_clip must be positive"]),
        ("method.rank=0", ["method.rank must be at least 1, got 0"]),
        ("method.lr=", ["method.lr must be a number, got None"]),
        ("stream.order_seed=-1", ["stream.order_seed must be at least 0, got -1"]),
        ("seed=1000000000000001", ["seed must be a whole number from 0 to 10^15, got 1000000000000001"]),
        ("seed=99999999999999999999", ["seed must be an integer", "integers are smaller than 2^64"]),
        ("precision=fp8", ["precision must be one of fp32, bf16, fp16, got 'fp8'"]),
        ("train.epochs", ["--set wants key=value, got 'train.epochs'"]),
        ("data.name=glyfs", ["unknown data set data.name='glyfs'", "'glyphs'"]),
    ],
)
def test_a_mistake_is_one_line_with_the_mend(write, assignment, words):
    one_line(lambda: resolve(write("p", ""), "lora", [assignment]), *words)


def test_all_mistakes_are_told_together(write):
    preset = write("p", "train: {epoch: 3}\n")
    text = one_line(lambda: resolve(preset, "lora", ["method.rank=two", "train.batch_size=0", "seed=-1"]))
    for part in ("'train.epoch'", "method.rank must be an integer, got 'two'", "train.batch_size must", "seed must"):
        assert text.count(part) == 1


def test_unknown_methods_and_presets_are_named(write):
    one_line(lambda: resolve(write("p", ""), "lorra"), "unknown method 'lorra'", "did you mean 'lora'")
    one_line(lambda: resolve("glyfs", "lora"), "unknown preset 'glyfs'", "'glyphs'", "or give a .yaml file")
    one_line(lambda: resolve("nowhere.yaml", "lora"), "nowhere.yaml does not exist")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("domain: classification\ntrain:\n  epochs: 1\n  epochs: 2\n", ["line 3", "'epochs' is given twice"]),
        ("domain: classification\ntrain: {epochs: [1\n", ["is not valid YAML", "line"]),
        ("- a\n- b\n", ["must be a mapping of sections"]),
        ("train: {epochs: 1}\n", ["must say `domain: classification`"]),
        ("domain: classification\n", ["must name its data set: data.name"]),
        ("domain: classification\ncompare: lora\n", ["compare must be a list of method names, got 'lora'"]),
        ("domain: clasification\ndata: {name: glyphs}\n", ["'clasification'"]),
        ("domain: classification\na: !!python/object/apply:os.getcwd []\n", ["is not valid YAML"]),
    ],
)
def test_bad_preset_files_are_named(write, text, words):
    preset = write("bad", text, head="")
    one_line(lambda: resolve(preset, "lora"), *words)


def test_a_preset_cannot_extend_itself(write, tmp_path):
    first = write("first", f"extends: {tmp_path / 'second.yaml'}\n", head="")
    write("second", f"extends: {first}\n", head="")
    one_line(lambda: load_preset(first), "extends itself")


def test_duplicate_keys_of_an_assignment_are_refused():
    one_line(lambda: read_yaml("{a: 1, a: 2}", "here"), "here: line 1: key 'a' is given twice")


# --- hash and tree --------------------------------------------------------------------------------------------------


def test_hash_ignores_what_cannot_change_a_result(write):
    preset = write("p", "")
    plain = resolve(preset, "lora").hash()
    volatile = ["device=cpu", "threads=1", "input.workers=0", "input.cache_mib=0", "train.checkpoint_seconds=1"]
    assert resolve(preset, "lora", volatile).hash() == plain
    changes = ["seed=1", "precision=bf16", "method.lr=0.5", "train.epochs=9", "stream.tasks=2", "eval.batch_size=3"]
    changes += ["backbone.kwargs.depth=3", "data.name=image-folder", "input.augment=none"]
    hashes = {resolve(preset, "lora", [c]).hash() for c in changes} | {plain, resolve(preset, "clora").hash()}
    assert len(hashes) == len(changes) + 2


def test_the_same_values_have_the_same_hash_wherever_they_come_from(write):
    first = resolve(write("p", "train: {epochs: 4}\n"), "lora")
    second = resolve(write("p", "train: {epochs: 5}\n"), "lora", ["train.epochs=4.0"])
    assert first.hash() == second.hash()
    assert first.sources["train.epochs"] != second.sources["train.epochs"]


def test_a_section_is_checked(write):
    resolved = resolve(write("p", ""), "lora")
    with pytest.raises(TypeError, match="section train is a TrainConfig, not a Odd"):
        resolved.section("train", Odd)


@pytest.mark.parametrize("text", ["method.map_ridge=2", "methods.moal.map_ridge=2", "method.map_ridge=1"])
def test_an_option_that_does_nothing_is_refused_where_it_is_set(write, text):
    preset = write("p", "methods: {moal: {}}\n")
    assert resolve(preset, "moal", [text]).sections["method"].ruminate
    words = "method.map_ridge does nothing without method.ruminate=true: set that too, or leave it out (--set"
    one_line(lambda: resolve(preset, "moal", [text, "method.ruminate=false"]), words)
    assert not resolve(preset, "moal", ["method.ruminate=false"]).sections["method"].ruminate


def test_what_a_preset_sets_may_become_idle_by_what_is_set_on_top(write):
    preset = write("p", "methods: {moal: {map_ridge: 2}}\n")
    assert resolve(preset, "moal", ["method.ruminate=false"]).sections["method"].map_ridge == 2
    tuned = Tuned("other", ("method.ruminate=false",), "tuned on other", "photos", frozenset())
    assert resolve(preset, "moal", tuned=tuned).sections["method"].map_ridge == 2
    words = "method.map_ridge does nothing without method.ruminate=true: set that too, or leave it out (preset q"
    own = write("q", "methods: {moal: {map_ridge: 2, ruminate: false}}\n")
    one_line(lambda: resolve(own, "moal"), words)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, {}) for name in sorted(available_methods())),
        ("clora_carry", {"carry": "none"}),
        ("clora_null", {"common": 0.0}),
        ("dsc", {"consolidation_steps": 0}),
        ("ewc", {"lambda_": 0.0}),
        ("ewc_dc", {"lambda_": 0.0}),
        ("l2", {"lambda_": 0.0}),
        ("moal", {"ruminate": False}),
        ("mos", {"align_epochs": 0}),
        ("slca", {"align_epochs": 0}),
        ("tuna", {"align_epochs": 0}),
    ],
)
def test_what_would_give_an_idle_option_something_to_do_does(name, values):
    config = method_class(name).Config
    found = config(**values).idle()
    assert found or not values
    for option, mend in found.items():
        assert option in {f.name for f in fields(config)}
        key, value = re.fullmatch(r"method\.(\w+)(?: or method\.\w+)?(=\w+| above 0| below 1)", mend).groups()
        value = {" above 0": 1, " below 1": 0.5, "=true": True}.get(value, value[1:])
        try:
            assert option not in config(**{**values, key: value}).idle()
        except UserError:
            assert key == "align"  # an option of LoRA's that the method inherits and refuses


@pytest.mark.parametrize("name", sorted(bundled_presets()))
def test_bundled_presets_load(name):
    preset = load_preset(name)
    assert preset.domain in DOMAINS
    assert preset.summary
    assert preset.table in bundled_presets()
    for method in preset.compare:
        resolve(name, method)


def test_presets_are_read_without_torch():
    code = (
        "import sys; from dualcl.benchmark.config.presets import load_preset, bundled_presets; "
        "[load_preset(n) for n in bundled_presets()]; from dualcl.methods import available_methods; "
        "available_methods(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("backbone.kwargs={img_size:64,patch_size:8}", "img_size"),
        ("backbone.kwargs={img_size: 64, patch_size:8}", "patch_size"),
        ("backbone.kwargs={a: [{img_size:64}]}", "img_size"),
        ("backbone={kwargs: {img_size: }}", "img_size"),
        ("backbone.kwargs=img_size:", "img_size"),
    ],
)
def test_a_mapping_without_a_value_is_refused(text: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"--set backbone.*'{key}.*has no value: .*blank after the colon"):
        parse_assignment(text)
    assert parse_assignment("backbone.kwargs={a: null, b: '', c: ~}")[1] == {"a": None, "b": "", "c": None}


def test_numbers_that_are_names_stay_as_written() -> None:
    names = coerce(parse_assignment("a=[001, 010, 1e3, 7, 0x1F]")[1], list[str], "a")
    assert names == ["001", "010", "1e3", "7", "0x1F"]
    assert coerce(parse_assignment("a=007")[1], str | None, "a") == "007"
    for wanted in (float, float | None, Any):
        value = coerce(parse_assignment("a=1e-3")[1], wanted, "a")
        assert (value, type(value)) == (0.001, float)
    assert coerce(parse_assignment("a={x: 010}")[1], dict[str, Any], "a") == {"x": 8}
    for text in ("[yes]", "[null]", "[2024-01-01]"):
        with pytest.raises(UserError, match="wants quotes"):
            coerce(parse_assignment(f"a={text}")[1], list[str], "a")
