"""Published numbers: every cell has a source, stands in the text it was taken from, and stays apart from ours."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import UserError
from dualcl.methods import available_methods
from dualcl.results.metrics import METRICS
from dualcl.results.published import (
    BENCHMARKS,
    CONCEPTS,
    FOLDER,
    SCENARIOS,
    SEEN,
    WEIGHTS,
    Number,
    backbone_weights,
    definitions,
    groups,
    numbers_for,
    our_metric,
    protocols,
    published_numbers,
    stream,
    streams,
)
from dualcl.results.published.differences import compare_number, compare_protocol, is_of
from dualcl.results.published.render import NONE, TITLE
from dualcl.results.records import load_record
from dualcl.results.report import build_report, terminal_table

WriteRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
COLLECTED = ROOT.parent / "shared" / "design" / "published.md"
#: sections of the collected text that a benchmark's numbers may stand in: 1e holds CIFAR-100 too
PLACES = {"imagenet-r": "1", "cifar100": "12", "domainnet": "3", "domainnet-domains": "3"}
#: a line of the collected text on customization, which a benchmark's numbers stand in
BULLETS = {
    "cifc": "CIDM, Tables 1-3",
    "merged-faces": "Orthogonal Adaptation, Table 2",
    "t2i-conbench-items": "T2I-ConBench, table picture",
    "conceptguard": "ConceptGuard",
    "unlearncanvas-objects": "CUIG, plots",
    "unlearncanvas-styles": "CUIG, plots",
}


def where(number: Number) -> str:
    return f"{number.benchmark} {number.tasks} {number.method} {number.metric} ({number.source})"


def test_every_cell_says_where_it_comes_from() -> None:
    for n in published_numbers():
        assert n.source, where(n)
        assert n.seen_words, where(n)
        assert n.seen in SEEN, where(n)
        assert (n.protocol, n.benchmark) in protocols(), where(n)
        assert (n.metric_definition, n.metric) in definitions(), where(n)
        assert n.scenario in SCENARIOS, where(n)
        assert n.weights_reading in (*WEIGHTS, ""), where(n)
        assert bool(n.weights) == bool(n.weights_reading), where(n)
    for (name, benchmark), protocol in protocols().items():
        assert protocol.source, (name, benchmark)
        assert protocol.seen in SEEN, (name, benchmark)
        assert any((n.protocol, n.benchmark) == (name, benchmark) for n in published_numbers()), (name, benchmark)


def test_what_is_derived_says_so() -> None:
    derived = [n for n in published_numbers() if n.seen == "D"]
    assert derived
    for n in published_numbers():
        assert (n.seen == "D") == bool(re.search(r"derived|read off", n.seen_words)), where(n)


def test_values_are_plausible_and_none_is_there_twice() -> None:
    seen: set[tuple[object, ...]] = set()
    for n in published_numbers():
        assert 0 < float(n.value) < 100, where(n)
        assert not n.std or 0 <= float(n.std) < 5, where(n)
        assert n.runs is None or n.runs >= 1, where(n)
        key = (n.benchmark, n.tasks, n.method, n.metric, n.protocol, n.source, n.weights)
        assert key not in seen, where(n)
        seen.add(key)


def test_streams_have_as_many_classes_as_their_benchmark() -> None:
    for n in published_numbers():
        assert (n.tasks is None) == (n.classes_per_task is None), where(n)
        if n.tasks is not None and n.classes_per_task is not None:
            assert n.tasks * n.classes_per_task == BENCHMARKS[n.benchmark], where(n)
        if n.scenario in CONCEPTS:
            assert (n.benchmark in BULLETS, n.classes_per_task in (1, None)) == (True, True), where(n)


def test_our_names_are_registered_and_settings_are_keys_of_theirs() -> None:
    from dualcl.methods import method_class

    for n in published_numbers():
        assert n.dualcl_method in (*available_methods(), ""), where(n)
        if n.settings:
            assert set(n.settings) <= set(method_class(n.dualcl_method).Config.__dataclass_fields__), where(n)
    for protocol in protocols().values():
        assert set(protocol.lr_methods) <= set(available_methods())


def test_metrics_of_ours_are_metrics_and_forgetting_of_unknown_definition_has_none() -> None:
    assert {our_metric(n) for n in published_numbers()} <= {*METRICS, ""}
    for n in published_numbers():
        if n.metric == "F_N" or n.metric_definition == "not-seen":
            assert our_metric(n) == "", where(n)


def test_averages_over_images_and_tasks_agree_only_where_tasks_are_equal() -> None:
    total = [n for n in published_numbers() if n.metric_definition == "total" and n.metric == "A_last"]
    assert {our_metric(n) for n in total if n.benchmark == "imagenet-r"} == {"A_last_weighted"}
    assert {our_metric(n) for n in total if n.benchmark == "cifar100"} == {"A_last"}


def test_no_number_of_the_papers_that_nobody_saw() -> None:
    for n in published_numbers():
        assert not re.search("2304.06027|2311.18763|2410.00700|2411.00623|2502.17920", n.source), where(n)
        if n.method == "C-LoRA":
            others = {"cifc": "CIDM", "t2i-conbench-items": "T2I-ConBench", "conceptguard": "ConceptGuard"}
            assert n.source.startswith(others.get(n.benchmark, "InfLoRA")), where(n)


def test_numbers_of_customization_stand_beside_no_run_and_mean_none_of_our_metrics() -> None:
    found = [n for n in published_numbers() if n.scenario in CONCEPTS]
    assert {n.benchmark for n in found} == set(BULLETS)
    for n in found:
        assert our_metric(n) == "", where(n)
        assert numbers_for(n.benchmark, n.tasks or 0) == [], where(n)


def test_rows_known_to_be_a_copying_slip_are_left_out() -> None:
    of_vq = {(n.method, n.value) for n in published_numbers() if "VQ-Prompt" in n.source and n.benchmark == "cifar100"}
    assert of_vq
    assert not {method for method, _ in of_vq} & {"DualPrompt", "CODA-P", "FT"}


#: what was collected later, of the methods of 2023 to 2025
RIVALS = COLLECTED.with_name("rivals-classification.md")
CUSTOMIZATION = COLLECTED.with_name("rivals-customization.md")


def _collected() -> dict[str, str]:
    """The sections of the collected text by number."""
    text = COLLECTED.read_text(encoding="utf-8")
    parts = re.split(r"^## (\d)\. .*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


needs_collected = pytest.mark.skipif(not COLLECTED.is_file(), reason="the collected text is not beside the project")


@needs_collected
def test_each_value_stands_in_the_section_of_its_benchmark() -> None:
    sections, rivals = _collected(), RIVALS.read_text(encoding="utf-8").replace(" ± ", "±")
    bullets = re.split(r"\n- (?=\*\*)", CUSTOMIZATION.read_text(encoding="utf-8").split("## Published numbers")[1])
    for n in published_numbers():
        later = n.protocol in ("ranpac", "mos", "ease-log", "mos-log", "tuna-log", "moal", "aper-log")
        if n.scenario in CONCEPTS:
            (text,) = [b for b in bullets if b.startswith(f"**{BULLETS[n.benchmark]}")]
        else:
            text = rivals if later else "".join(sections[place] for place in PLACES[n.benchmark])
        wanted = [n.value] if not n.std else [f"{n.value}±{n.std}", f"{n.value}({n.std})"]
        assert any(re.search(rf"(?<![\d.]){re.escape(w)}(?![\d])", text) for w in wanted), where(n)


@needs_collected
@pytest.mark.parametrize("heading", ["### 1a.", "### 1c.", "### 1d."])
def test_the_tables_by_task_count_are_complete_and_in_their_columns(heading: str) -> None:
    """Parses a Markdown table with a column per number of tasks, and asks for exactly its cells."""
    text = _collected()["1"]
    body = text[text.index(heading) :].split("\n###")[0]
    rows = [[c.strip().strip("*") for c in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
    found = 0
    for row in rows:
        pairs = [re.findall(r"(\d+\.\d+)(?:±(\d+\.\d+)|\((\d+\.\d+)\))?", cell) for cell in row[1:4]]
        # C-LoRA with other weights and SLCA stand in a row of their own, without a column per number of tasks
        if len(row) != 6 or not all(pairs) or "weights" in row[0]:
            continue
        method = re.sub(r" \((VQ-Prompt's own|full|rerun)\)$", "", row[0])
        for tasks, cell in zip((5, 10, 20), pairs, strict=True):
            for metric, (value, a, b) in zip(("A_last", "A_avg"), cell, strict=False):
                hits = [
                    n
                    for n in numbers_for("imagenet-r", tasks)
                    if (n.method, n.metric, n.value, n.std) == (method, metric, value, a or b)
                ]
                assert hits, (method, tasks, metric, value)
                found += 1
    assert found >= 42


def test_the_readme_holds_every_number() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"**{mark}** {what}" in text for mark, what in SEEN.items())
    for name, numbers in streams().items():
        part = re.split(rf"\n## {re.escape(name)}[:,]", text)[1].split("\n## ")[0]
        for n in numbers:
            assert n.text in part, where(n)


@pytest.mark.parametrize(
    ("backbone", "reading"),
    [
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", "in21k_ft_in1k"),
        ("vit_base_patch16_224.augreg_in21k", "in21k"),
        ("vit_base_patch16_224.dino", "dino"),
        ("vit_base_patch16_224.augreg_in1k", ""),
        ("vit_base_patch16_224", ""),
    ],
)
def test_the_tag_of_a_backbone_says_how_it_was_trained(backbone: str, reading: str) -> None:
    assert backbone_weights(backbone) == reading


# --- beside ours ------------------------------------------------------------------------------------------------------

N = 10
MATRIX = [[80 - i - j for j in range(i + 1)] for i in range(N)]


def coda(data: dict[str, object], **changes: object) -> None:
    """Makes a record one of CODA-Prompt's protocol on ImageNet-R, but for `changes` of dotted keys."""
    data["identity"].update(  # type: ignore[attr-defined]
        data="imagenet-r",
        split_name="imagenet-r:coda",
        class_order=list(range(200)),
        backbone="vit_base_patch16_224.augreg2_in21k_ft_in1k",
        weights="timm:vit_base_patch16_224.augreg2_in21k_ft_in1k",
        preprocess={"mean": [0.0] * 3, "std": [1.0] * 3, "size": 224},
        epochs=50,
        batch_size=128,
    )
    data["config"].update(  # type: ignore[attr-defined]
        train={"optimizer": "adam", "schedule": "coda", "epochs": 50},
        stream={"class_order": "coda"},
        backbone={"kwargs": {}},
        method={"lr": 1e-3, "head_lr": 1e-3},
    )
    for key, value in changes.items():
        *path, last = key.split("__")
        place: dict[str, object] = data
        for part in path:
            place = place[part]  # type: ignore[assignment]
        place[last] = value


def test_nothing_differs_from_the_protocol_that_a_record_follows(write_run: WriteRun) -> None:
    record = load_record(write_run(MATRIX, edit=coda, method="coda_prompt", label="coda_prompt", preset="x"))
    group = next(g for g in groups(numbers_for("imagenet-r", 10)) if g.protocol.protocol == "coda")
    found = compare_protocol(group, [record])
    assert found.differs == ()
    assert {"weights", "preprocessing", "epochs", "batch", "learning rate", "split"} <= set(found.same)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"identity__preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3}}, ("preprocessing", "none")),
        ({"identity__epochs": 5}, ("epochs", "50")),
        ({"identity__batch_size": 16}, ("batch", "128")),
        ({"identity__weights": "mine.safetensors"}, ("weights", "ImageNet-1K")),
        (
            {
                "identity__weights": "timm:vit_base_patch16_224.augreg_in21k",
                "identity__backbone": "vit_base_patch16_224.augreg_in21k",
            },
            ("weights", "ImageNet-1K"),
        ),
        ({"config__backbone": {"kwargs": {"img_size": 64}}}, ("backbone", "ViT-B/16")),
        ({"config__stream": {"class_order": "shuffle"}}, ("class order", "coda")),
        ({"config__train": {"optimizer": "sgd", "schedule": "coda"}}, ("optimizer", "adam")),
        ({"config__method": {"lr": 1e-3, "head_lr": 1e-2}}, ("learning rate", "0.001")),
        ({"identity__class_order": list(range(20))}, ("classes", "200")),
        ({"identity__split_name": "imagenet-r:coda+limit-5"}, ("split", "imagenet-r:coda")),
    ],
)
def test_each_point_that_differs_is_told(
    changes: dict[str, object], wanted: tuple[str, str], write_run: WriteRun
) -> None:
    run = write_run(MATRIX, edit=lambda d: coda(d, **changes), method="coda_prompt", label="coda_prompt", preset="x")
    group = next(g for g in groups(numbers_for("imagenet-r", 10)) if g.protocol.protocol == "coda")
    number = next(n for n in group.numbers if n.method == "CODA-P")
    differs = compare_number(group, number, load_record(run)).differs
    assert len(differs) == 1
    assert differs[0][0] == wanted[0]
    assert wanted[1] in differs[0][1]


def test_full_finetuning_has_a_learning_rate_of_its_own(write_run: WriteRun) -> None:
    group = next(g for g in groups(numbers_for("imagenet-r", 10)) if g.protocol.protocol == "coda")
    number = next(n for n in group.numbers if n.method == "FT++")
    for rate, same in ((5e-5, True), (1e-3, False)):
        method = {"lr": rate, "head_lr": rate}
        run = write_run(
            MATRIX,
            edit=lambda d, method=method: coda(d, config__method=method),
            method="finetune_pp",
            label="finetune_pp",
            name=f"rate-{rate}",
        )
        assert ("learning rate" in compare_number(group, number, load_record(run)).same) is same


def test_deep_l2p_is_not_l2p() -> None:
    numbers = [n for n in numbers_for("imagenet-r", 10) if n.protocol == "coda"]
    assert [n.method for n in numbers if is_of(n, "l2p", {}) and n.metric == "A_last"] == ["L2P++"]
    assert [n.method for n in numbers if is_of(n, "l2p", {"deep": True}) and n.metric == "A_last"] == ["Deep L2P++"]


def test_ranpac_without_its_phase_or_its_layer_and_lora_with_alignment_are_others() -> None:
    numbers = [n for n in numbers_for("imagenet-r", 10) if n.metric == "A_last"]
    for settings, wanted in (
        ({"adapt": "none", "width": 5000}, ["71.8"]),
        ({}, ["71.8"]),
        ({"width": 0}, ["67.6"]),
        ({"adapt": "adapter", "width": 10000}, ["77.9", "75.28"]),
        ({"adapt": "adapter", "width": 0}, ["73.9"]),
    ):
        found = [n.value for n in numbers if is_of(n, "ranpac", settings)]
        assert sorted(found) == sorted(wanted), settings
    assert [n.method for n in numbers if is_of(n, "lora", {"align": False})] == ["SeqLoRA"]
    assert [n.method for n in numbers if is_of(n, "lora", {"align": True})] == []


def test_rivals_have_their_numbers_and_their_variants_do_not() -> None:
    found = {name: {n.method for n in published_numbers() if n.dualcl_method == name} for name in RIVAL_ROWS}
    assert found == RIVAL_ROWS


RIVAL_ROWS = {
    "ranpac": {
        "RanPAC",
        "RanPAC (Algorithm 1)",
        "RanPAC, no Phase 1",
        "RanPAC, no RPs",
        "RanPAC, no RPs or Phase 1",
    },
    "slca": {"SLCA"},
    "inflora": {"InfLoRA"},
    "sdlora": {"SD-LoRA"},
    "fecam": set(),
    "aper": {"APER/ADAM adapter", "APER-adapter"},
    "ease": {"EASE"},
    "tuna": {"TUNA"},
    "moal": {"MoAL"},
    "mos": {"MOS"},
}


@pytest.fixture
def mixed(write_run: WriteRun, tmp_path: Path) -> Path:
    """Runs on ImageNet-R in ten tasks and on a stream without published numbers."""
    for method in ("coda_prompt", "clora"):
        write_run(MATRIX, edit=coda, method=method, label=method, preset="imagenet-r-10")
    write_run()
    return tmp_path / "runs"


def test_a_report_keeps_published_numbers_in_sections_of_their_own(mixed: Path, tmp_path: Path) -> None:
    plain = build_report([mixed], tmp_path / "plain", ("md", "csv", "tex"))
    files = build_report([mixed], tmp_path / "out", ("md", "csv", "tex"), with_published=True)
    for before, after in zip(plain.tables, files.tables, strict=True):
        ours = before.read_text(encoding="utf-8")
        both = after.read_text(encoding="utf-8")
        assert both.startswith(ours)
        published = both[len(ours) :]
        if before.suffix == ".csv":
            assert published == ""
            continue
        assert TITLE in published
        for text in ("75.45", "InfLoRA", NONE[1:]):
            assert text in published
        for mark in ("**7", r"\textbf"):
            assert mark not in published


def test_the_page_keeps_them_in_a_section_without_marks(mixed: Path, tmp_path: Path) -> None:
    files = build_report([mixed], tmp_path / "out", ("html",), with_published=True)
    assert files.html is not None
    page = files.html.read_text(encoding="utf-8")
    section = page[page.index('<section id="published">') :].split("</section>")[0]
    assert "75.45 ± 0.56" in section
    assert "class=best" not in section
    assert page.count("75.45") == section.count("75.45")
    assert section.count(NONE[1:]) == 1  # glyphs


def test_the_csv_has_a_row_per_number_with_what_differs(mixed: Path, tmp_path: Path) -> None:
    files = build_report([mixed], tmp_path / "out", ("csv",), with_published=True)
    assert files.published is not None
    rows = list(csv.DictReader(files.published.open(encoding="utf-8")))
    assert len(rows) == len(numbers_for("imagenet-r", 10))
    clora = next(r for r in rows if r["method"] == "C-LoRA" and r["weights"] == "" and r["metric"] == "A_last")
    assert (clora["value"], clora["std"], clora["our_metric"]) == ("71.89", "0.45", "A_last_weighted")
    assert "rank (clora) 64" in clora["differs"]
    assert "weights" in clora["not_seen_there"]


def test_the_terminal_shows_them_below_ours(mixed: Path) -> None:
    ours = terminal_table([mixed], ascii_only=True)
    both = terminal_table([mixed], ascii_only=True, with_published=True)
    assert both.startswith(ours)
    below = both[len(ours) :]
    assert below.isascii()
    assert "glyphs: no published numbers for this stream" in below
    assert re.search(r"CODA-P +coda_prompt +75\.45 \+- 0\.56 +81\.59 \+- 0\.82 +5 +P", below)
    assert "*" not in below.replace("reproduce/*", "")


def test_lines_fit_a_terminal(mixed: Path) -> None:
    text = terminal_table([mixed], with_published=True, width=100)
    below = text[text.index(TITLE) :]
    assert max(map(len, below.splitlines())) <= 100


def test_streams_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "published"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(streams())
    for name in names:
        assert main(["list", "published", name]) == 0
        shown = capsys.readouterr().out
        for n in stream(name):
            assert n.value in shown


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["list", "published", "imagenet-r-11"], "imagenet-r-10"),
        (["list", "methods", "clora"], "'clora'"),
        (["report", "{runs}", "--with-published", "--format", "csv"], "--out"),
        (["report", "{runs}", "--ledger", "x.md", "--out", "y"], "--out"),
        (["report", "{runs}", "--ledger", "{runs}/no/where.md"], "another --ledger"),
        (["report", "{runs}/nothing", "--ledger", "x.md"], "does not exist"),
    ],
)
def test_wrong_input_ends_in_one_line(
    args: list[str], hint: str, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([arg.format(runs=mixed) for arg in args]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("dualcl: error: ")
    assert hint in lines[0]


def test_an_unknown_stream_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'cifar100-10'"):
        stream("cifar-10")
