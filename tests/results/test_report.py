from __future__ import annotations

import base64
import contextlib
import csv
import gc
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import markupsafe
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import UserError
from dualcl.results import plots
from dualcl.results.plots import (
    MAX_LINES,
    MAX_METHODS,
    PLOTS,
    bounds,
    critical_difference_diagram,
    drift_curves,
    heat_maps,
    loss_curves,
    nearest_curves,
    quality_curves,
    quality_forgetting,
    quality_storage,
    save_figure,
    styles,
    unlearning_curves,
    update_norms,
)
from dualcl.results.records import command, find_records, load_record
from dualcl.results.report import build_report, terminal_table
from dualcl.results.statistics import Ranking, rank_methods
from dualcl.results.tables import rare_collections, summarise

WriteRun = Callable[..., Path]

#: plots of what classification records do not hold
ELSEWHERE = {"drift", "nearest", "updates", "unlearning"}
LOG = [{"task": t, "step": s, "loss": 2.0 - s / 10} for t in range(3) for s in (0, 5, 10)]


@pytest.fixture
def runs(write_run: WriteRun, tmp_path: Path) -> Path:
    for seed in range(3):
        write_run([[90], [70, 80 + seed], [60, 50, 100]], seed=seed, log=LOG)
        write_run([[90], [40, 80], [10, 20, 90]], label="lora", method="lora", seed=seed, stored=900, log=LOG)
    write_run([None, None, [95, 95, 95]], label="joint", method="joint", joint=True)
    write_run([[9], None, None], label="ewc", method="ewc", status="failed")
    return tmp_path / "runs"


def test_a_report_is_complete_and_readable(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "deep"
    files = build_report([runs], out)
    assert [p.name for p in files.tables] == ["table.md", "table.csv", "table.tex"]
    drawn = set(PLOTS) - ELSEWHERE
    assert {p.name for p in files.plots} == {f"glyphs-{name}{s}" for name in drawn for s in (".png", ".svg")}
    assert files.samples == []
    for path in files.plots:
        if path.suffix == ".png":
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert files.runs is not None
    assert len(list(csv.DictReader(files.runs.open()))) == 8
    assert files.warnings
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]  # no temporary file stays


def test_the_page_needs_no_network_and_shows_all_runs(runs: Path, tmp_path: Path) -> None:
    page = build_report([runs], tmp_path / "out", ["html"]).html
    assert page is not None
    assert [p.name for p in page.parent.iterdir()] == ["report.html"]
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r'(?:src|href)="([^",]*)', text)) == {"data:image/svg+xml;base64"}
    pictures = re.findall(r'base64,([^"]*)"', text)
    assert len(pictures) == len(set(PLOTS) - ELSEWHERE)
    assert ElementTree.fromstring(base64.b64decode(pictures[0])).tag.endswith("svg")
    assert text.count("<details><summary>clora, seed") == 3
    assert "dualcl run glyphs clora --seed 2 --set method.rank=8" in text
    assert "ewc seed 0: failed, 1 of 3 tasks evaluated (loss is NaN)" in text
    for part in ("00ff", "5b1d", "c0ffee", "1/(N-1)", "fewer than 3 seeds", "width=device-width"):
        assert part in text


def test_names_cannot_inject_anything(write_run: WriteRun, tmp_path: Path) -> None:
    evil = "</td><script>alert('x')</script>&\"$x^"
    write_run(
        label=evil,
        name="evil",
        edit=lambda d: (
            d["run"].update(preset=f"../{evil}", method=evil),
            d["identity"].update(backbone=evil, **{evil: evil}),
            d.update(sources={evil: "--set"}, error=evil),
            d["environment"].update(commit=evil, dirty=evil),
            d["config"].update({evil: evil}),
            d["network"].update(skipped_images=[evil]),
        ),
        log=LOG,
    )
    out = tmp_path / "out"
    files = build_report([tmp_path / "runs"], out)
    assert files.html is not None
    text = files.html.read_text(encoding="utf-8")
    assert "<script" not in text
    assert str(markupsafe.escape(evil)) in text
    assert evil not in text
    assert all(p.resolve().parent == (out / "plots").resolve() for p in files.plots)
    assert files.plots


def test_repeating_a_report_gives_the_same_page(runs: Path, tmp_path: Path) -> None:
    one, two = build_report([runs], tmp_path / "one", ["html"]), build_report([runs], tmp_path / "two", ["html"])
    assert one.html is not None
    assert two.html is not None
    assert one.html.read_bytes() == two.html.read_bytes()


def test_formats_are_checked_before_any_work(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown report format 'pdf'"):
        build_report([runs], tmp_path / "out", ["md", "pdf"])
    assert not (tmp_path / "out").exists()


def test_an_unwritable_place_is_a_user_error(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        build_report([runs], tmp_path / "file", ["md"])


def test_presets_whose_names_collide_keep_their_plots(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(preset="a b", name="1")
    write_run(preset="a/b", name="2")
    names = [p.name for p in build_report([tmp_path], tmp_path / "out", ["png"]).plots]
    assert len(names) == len(set(names))
    assert {n.split("-curve")[0] for n in names if "-curve" in n} == {"a-b", "a-b-1"}


def test_the_command_to_repeat_quotes_what_was_set(write_run: WriteRun) -> None:
    run = write_run(
        edit=lambda d: (
            d["config"].update(data={"root": "my files"}, train={"epochs": [1, 2]}),
            d.update(sources={"data.root": "--set", "train.epochs": "--set (methods.clora)", "seed": "--seed"}),
        )
    )
    shown = command(load_record(run))
    assert shown == "dualcl run glyphs clora --seed 0 --set 'data.root=my files' --set 'train.epochs=[1, 2]'"


def test_the_command_to_repeat_gives_what_a_sweep_found(write_run: WriteRun) -> None:
    run = write_run(
        edit=lambda d: (
            d["config"].update(method={"lr": 3e-5, "head_lr": 1e-2}),
            d.update(sources={"method.lr": "sweep on glyphs-tune", "method.head_lr": "preset glyphs"}),
        )
    )
    assert command(load_record(run)) == "dualcl run glyphs clora --seed 0 --set method.lr=3e-05"


def test_plots_show_the_recorded_numbers(runs: Path) -> None:
    records = find_records([runs])
    curve = quality_curves(records)
    assert curve is not None
    lines = {line.get_label(): line for line in curve.axes[0].lines}
    assert list(lines["lora"].get_ydata()) == pytest.approx([90, 60, 40])
    assert list(lines["clora"].get_ydata()) == pytest.approx([90, 75.5, 70])
    assert lines["joint (upper bound)"].get_ydata()[0] == pytest.approx(95)
    maps = heat_maps(records)
    assert maps is not None
    assert [axes.get_title(loc="left") for axes in maps.axes[:2]] == ["clora", "lora"]
    assert [text.get_text() for text in maps.axes[1].texts] == ["90", "40", "80", "10", "20", "90"]
    scatter = quality_forgetting(records)
    assert scatter is not None
    points = {line.get_label(): line for line in scatter.axes[0].lines}
    assert float(points["lora"].get_xdata()[0]) == pytest.approx(70)  # (90 - 10 + 80 - 20) / 2
    storage = quality_storage(records)
    assert storage is not None
    assert storage.axes[0].get_xscale() == "log"
    losses = loss_curves(records)
    assert losses is not None
    assert max(losses.axes[0].lines[0].get_xdata()) == 110  # two tasks of 50 steps before step 10 of the third


def test_methods_stand_between_the_bounds_of_the_stream(runs: Path, write_run: WriteRun) -> None:
    write_run([[80], [60, 62], [50, 52, 54]], label="ncm", method="ncm")
    write_run([[80], [70, 72], [60, 62, 64]], label="fecam", method="fecam")
    records = find_records([runs])
    figure = bounds(records)
    assert figure is not None
    axes = figure.axes[0]
    said = [text.get_text() for text in axes.texts]
    # four classes in the order: chance is a quarter
    frozen = ["ncm: class means, frozen  52.0", "fecam: covariances too, frozen  62.0"]
    assert said[:4] == ["chance  25.0", *frozen, "joint: all tasks at once  95.0"]
    assert said[4:] == ["40.0", "70.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lora", "clora"]
    strokes = [sorted(map(float, line.get_xdata())) for line in axes.lines if line.get_marker() == "|"]
    assert strokes == [
        sorted(r.metrics["A_last"] or 0.0 for r in records if r.label == label) for label in ("lora", "clora")
    ]
    assert bounds([r for r in records if not r.joint]) is None


def test_concepts_stand_between_two_bounds_where_a_judge_sees_attributes(
    write_concept_run: WriteRun, tmp_path: Path
) -> None:
    def judged(share: float) -> Callable[[dict[str, Any]], object]:
        return lambda data: [row.update(attribute_share=[share] * len(row["mmd"])) for row in data["matrix"]["rows"]]

    write_concept_run(edit=judged(0.75))
    write_concept_run(label="lora", method="lora")
    last = [None, None, [0.01, 0.02, 0.03]]
    write_concept_run(last, None, label="joint", method="joint", joint=True, edit=judged(0.9))
    figure = bounds(find_records([tmp_path]))
    assert figure is not None
    nearest, attributes = figure.axes
    assert [text.get_text() for text in nearest.texts] == [
        "chance  33.3", "joint: all tasks at once  70.8", "70.8", "70.8",
    ]  # fmt: skip
    # LoRA's attributes were not judged
    assert [text.get_text() for text in attributes.texts] == ["joint  90.0", "75.0"]
    assert [len(axes.get_yticks()) for axes in figure.axes] == [2, 2]
    assert nearest.get_ylim() == attributes.get_ylim()


@pytest.mark.parametrize("name", sorted(set(PLOTS) - ELSEWHERE))
def test_pictures_are_those_of_savefig(runs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = find_records([runs])
    figure = PLOTS[name].draw(records)
    assert figure is not None
    for suffix in (".svg", ".png"):  # the second finds the layout made
        save_figure(figure, tmp_path / f"ours{suffix}")
    # what spares matplotlib work is left out
    rc = {key: value for key, value in plots._RC.items() if key != "axes.titley"}
    monkeypatch.setattr(plots, "_RC", rc)
    monkeypatch.setattr(plots, "_unlabelled", lambda axes: None)
    figure = PLOTS[name].draw(records)
    assert figure is not None
    buffer = io.BytesIO()
    with matplotlib.rc_context(rc):
        figure.savefig(buffer, dpi=200)
    ours, theirs = (np.asarray(Image.open(file).convert("RGB")) for file in (tmp_path / "ours.png", buffer))
    assert np.array_equal(ours, theirs)


def test_a_crowded_plot_shows_the_best_and_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    for i in range(MAX_METHODS + 6):
        write_run([[90], [50, 60 + i]], label=f"m{i:02}", log=LOG)
    write_run([None, [99, 99]], label="joint", method="joint", joint=True)
    records = find_records([tmp_path])
    best = [f"m{i:02}" for i in range(6, MAX_METHODS + 6)]
    maps, curve = heat_maps(records), quality_curves(records)
    assert maps is not None
    assert curve is not None
    assert [t for axes in maps.axes if (t := axes.get_title(loc="left"))] == best
    assert {line.get_label() for line in curve.axes[0].lines} == {*best, "joint (upper bound)"}
    for title in (maps.get_suptitle(), curve.axes[0].get_title(loc="left")):
        assert title.endswith(f"(1 seed, best {MAX_METHODS} of {MAX_METHODS + 6} methods)")
    assert curve.legends[0].get_window_extent().y0 >= 0  # none of its entries is cut off
    look = styles(records)
    assert [*look] == best
    assert len({(s.colour, s.marker) for s in look.values()}) == MAX_METHODS  # a scatter has no dashes


def test_a_panel_of_losses_shows_the_first_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(MAX_LINES + 2):
        log = [{"task": 0, "step": s, "loss": 1.0 + seed} for s in (0, 5)]
        write_run([[90]], seed=seed, log=log)
    losses = loss_curves(find_records([tmp_path]))
    assert losses is not None
    assert [line.get_ydata()[0] for line in losses.axes[0].lines] == [1.0 + seed for seed in range(MAX_LINES)]
    assert f"training loss of the first {MAX_LINES} seeds ({MAX_LINES + 2} seeds)" in losses.get_suptitle()


def test_plots_with_nothing_to_draw_are_left_out(write_run: WriteRun, tmp_path: Path) -> None:
    write_run([[80]], stored=0)
    records = find_records([tmp_path])
    assert quality_forgetting(records) is None  # one task
    assert quality_storage(records) is None  # zero has no logarithm
    assert loss_curves(records) is None  # no log
    assert heat_maps(records) is not None
    write_run([None, [80, 80]], label="joint", joint=True, preset="other")
    assert quality_curves([r for r in find_records([tmp_path]) if r.joint]) is None


def test_sixteen_methods_are_told_apart_without_colour(write_run: WriteRun, tmp_path: Path) -> None:
    for i in range(16):
        write_run(label=f"m{i}")
    look = styles(find_records([tmp_path]))
    assert len({(s.marker, str(s.line)) for s in look.values()}) == 16
    assert len({(s.colour, str(s.line)) for s in look.values()}) == 16


def test_plots_of_concepts_show_the_recorded_numbers(write_concept_run: WriteRun, tmp_path: Path) -> None:
    write_concept_run()
    sparse = [[0.02], [None, 0.03], [0.09, 0.04, 0.02]], [[0.0], [None, 0.0], [0.06, 0.02, 0.0]]
    for seed in (0, 1):
        write_concept_run(*sparse, label="lora", method="lora", seed=seed)
    write_concept_run([None, None, [0.01, 0.02, 0.03]], None, label="joint", method="joint", joint=True)
    records = find_records([tmp_path])
    curve = quality_curves(records)
    assert curve is not None
    lines = {line.get_label(): line for line in curve.axes[0].lines}
    assert list(lines["clora"].get_ydata()) == pytest.approx([20, 40, 50])
    assert list(lines["lora"].get_xdata()) == [1, 3]  # after concept 2 not all were evaluated
    assert list(lines["joint (upper bound)"].get_ydata()) == pytest.approx([20, 20])
    drift = drift_curves(records)
    assert drift is not None
    lines = {line.get_label(): line for line in drift.axes[0].lines}
    assert list(lines["clora"].get_xdata()) == [2, 3]
    assert list(lines["clora"].get_ydata()) == pytest.approx([40, 45])
    assert list(lines["lora"].get_ydata()) == pytest.approx([40])
    nearest = nearest_curves(records)
    assert nearest is not None
    lines = {line.get_label(): line for line in nearest.axes[0].lines}
    after = next(r for r in records if r.label == "clora").data["matrix"]["rows"]
    shares = [[100 * n / g for n, g in zip(row["nearest_correct"], row["generated"], strict=True)] for row in after]
    assert list(lines["clora"].get_ydata()) == pytest.approx([sum(row) / len(row) for row in shares])
    maps = heat_maps(records)
    assert maps is not None
    assert [text.get_text() for text in maps.axes[1].texts] == ["20.0", "30.0", "90.0", "40.0", "20.0"]
    mesh = maps.axes[0].collections[0]
    assert mesh.get_clim() == (0, pytest.approx(90))
    near, far = mesh.get_cmap()(0.0), mesh.get_cmap()(1.0)
    assert sum(near[:3]) > sum(far[:3])  # bright is better
    scatter = quality_forgetting(records)
    assert scatter is not None
    points = {line.get_label(): line for line in scatter.axes[0].lines}
    assert (points["clora"].get_xdata()[0], points["clora"].get_ydata()[0]) == pytest.approx((45, 50))
    assert scatter.axes[0].patches[0].get_center() == (0, 0)  # both lower: the corner of the better is down left
    sizes = update_norms(records)
    assert sizes is not None
    lines = {line.get_label(): line for line in sizes.axes[0].lines}
    assert list(lines["clora"].get_ydata()) == [1, 2, 3]
    assert [line.get_ydata()[-1] for line in sizes.axes[1].lines] == [4, 4]
    assert unlearning_curves(records) is None


def test_what_is_gone_and_what_stays_after_every_request(write_concept_run: WriteRun, tmp_path: Path) -> None:
    def measured(data: dict[str, Any]) -> None:
        for i, row in enumerate(data["matrix"]["rows"]):
            row["target_shown"] = [0.1 * i] * (i + 1)
            row["retained_inside"] = [*[None] * i, 0.9 - 0.2 * i]

    for label in ("esd", "other"):
        write_concept_run(label=label, method="lora", edit=measured if label == "esd" else None)
    figure = unlearning_curves(find_records([tmp_path]))
    assert figure is not None
    gone, inside = figure.axes  # nothing is told of other attributes
    assert (gone.get_title(loc="left"), inside.get_title(loc="left")) == ("targets gone", "retained, inside")
    for axes, wanted in ((gone, [100, 90, 80]), (inside, [90, 70, 50])):
        (line,) = axes.lines
        assert line.get_label() == "esd"
        assert list(line.get_ydata()) == pytest.approx(wanted)


def test_the_better_corner_of_classification_is_up_left(runs: Path) -> None:
    scatter = quality_forgetting(find_records([runs]))
    assert scatter is not None
    assert scatter.axes[0].patches[0].get_center() == (0, 1)


def test_a_page_with_both_domains_has_a_part_for_each(
    write_run: WriteRun, write_concept_run: WriteRun, tmp_path: Path
) -> None:
    write_run()
    write_concept_run(log=LOG)
    page = build_report([tmp_path / "runs"], tmp_path / "out", ["html"]).html
    assert page is not None
    text = page.read_text(encoding="utf-8")
    first, second = text.index('<section id="classification">'), text.index('<section id="customization">')
    sources = text.index("Where every number comes from")
    assert first < second < sources
    for part, (start, end) in {
        "no task id given": (first, second),
        "BWT": (first, second),
        "squared maximum mean discrepancy": (second, sources),
        "concept acc. last": (second, sources),
        "Squared MMD with kernel poly2": (second, sources),
        "Drift since learning": (second, sources),
    }.items():
        assert text.find(part, start, end) > 0, part
    assert text.count("no task id given") == 1
    assert "Generated images" not in text  # no samples, no heading
    assert "concept order</dt><dd>0 1 2" in text


def test_a_page_shows_differences_caveats_and_ranks(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualcl.results.plots.PLOTS", {})  # those of single streams take long
    caveats = {"er": ["stores <40> images"]}
    for preset in ("one", "two", "three"):
        for seed in range(3):
            for label, last in {"clora": 80, "lora": 60 + seed, "er": 70 + 2 * seed}.items():
                write_run(
                    [[90], [last, last]], label=label, method=label, seed=seed, preset=preset,
                    edit=lambda d, label=label: d["run"].update(caveats=caveats.get(label, [])),
                )  # fmt: skip
    files = build_report([tmp_path / "runs"], tmp_path / "out")
    names = {p.name for p in files.plots if p.name.startswith("critical")}
    assert names == {"critical-difference-classification.png", "critical-difference-classification.svg"}
    assert files.differences == tmp_path / "out" / "differences.csv"
    assert len(list(csv.DictReader(files.differences.open()))) == 3 * 4 * 2
    assert files.html is not None
    text = files.html.read_text(encoding="utf-8")
    assert text.count("<h4>Differences to clora, paired over seeds 0, 1, 2</h4>") == 3
    assert "<td class=sig>-19.00 ± 1.00*<span>[" in text
    assert text.count("er †: stores &lt;40&gt; images") == 3
    assert text.count("All metrics of the matrix</summary>") == 3
    assert "Ranks over streams" in text
    assert "clora 1.00, er † 2.00, lora 3.00" in text
    alone = build_report([tmp_path / "runs"], tmp_path / "html", ["html"])
    assert alone.html is not None
    assert [p.name for p in alone.html.parent.iterdir()] == ["report.html"]
    assert "Critical difference diagram" in alone.html.read_text(encoding="utf-8")


def test_two_streams_have_no_diagram_and_one_says_nothing(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualcl.results.plots.PLOTS", {})
    for preset, count in {"one": 0, "two": 1}.items():
        for label in ("clora", "lora", "ncm"):
            write_run(label=label, method=label, preset=preset)
        files = build_report([tmp_path / "runs"], tmp_path / preset, ["html"])
        assert files.html is not None
        text = files.html.read_text(encoding="utf-8")
        assert text.count("No ranks over streams") == count
        assert "Critical difference diagram" not in text


def test_the_critical_difference_diagram_shows_the_ranks(tmp_path: Path) -> None:
    # eight methods on six streams: a steady order, but for the two first, which take turns
    labels = ["clora", "lora", "ewc", "l2p", "dualprompt", "coda_prompt", "er", "_x$y"]
    streams = {
        f"s{i}": {label: {0: float(-place if place > 1 or i % 2 else place - 1)} for place, label in enumerate(labels)}
        for i in range(6)
    }
    ranking = rank_methods(streams, True)
    assert isinstance(ranking, Ranking)
    figure = critical_difference_diagram(ranking, "eight methods", {label: f"{label} †" for label in ["er"]})
    axes = figure.axes[0]
    texts = [text.get_text().strip() for text in axes.texts]
    for label in labels[2:6]:
        assert f"{label}  ({ranking.ranks[label]:.2f})" in texts or f"({ranking.ranks[label]:.2f})  {label}" in texts
    assert "(7.00)  er †" in texts
    assert "critical difference 4.29" in texts  # 3.031 sqrt(8 * 9 / 36)
    bars = [line.get_xdata() for line in axes.lines if line.get_linewidth() > 4]
    assert len(bars) == len(ranking.groups) > 1
    for (low, high), group in zip(bars, ranking.groups, strict=True):
        inside = {label for label, rank in ranking.ranks.items() if low <= rank <= high}
        assert inside == set(group)
    drops = {line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 3}
    assert drops == set(ranking.ranks.values())
    for suffix in (".png", ".svg"):
        assert save_figure(figure, tmp_path / f"cd{suffix}").stat().st_size > 5000
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    page = figure.bbox
    assert all(box.x0 >= page.x0 and box.x1 <= page.x1 for box in boxes)


def test_a_summary_gives_the_report_of_its_directories(runs: Path, tmp_path: Path) -> None:
    tables = ["md", "csv", "tex"]
    one = build_report([runs], tmp_path / "one", tables, baseline="lora", confidence=0.9)
    summary = summarise([runs], baseline="lora", confidence=0.9)
    two = build_report(summary, tmp_path / "two", tables)
    assert [p.read_bytes() for p in one.tables] == [p.read_bytes() for p in two.tables]
    assert one.warnings == two.warnings
    assert terminal_table(summary) == terminal_table([runs], baseline="lora", confidence=0.9)


def test_the_command_prints_the_table_before_it_can_draw(runs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'matplotlib', 'pandas', 'PIL']));"
        "from dualcl.benchmark.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "report", str(runs), "--out", str(tmp_path / "out"), "--format", "png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1
    assert "import of matplotlib halted" in done.stderr
    assert done.stdout == terminal_table([runs])


def test_collections_are_as_rare_as_before_afterwards() -> None:
    usual = gc.get_threshold()
    with contextlib.suppress(KeyError), rare_collections():
        assert gc.get_threshold()[0] > usual[0]
        raise KeyError
    assert gc.get_threshold() == usual


def test_the_command_takes_a_baseline_and_a_confidence(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        write_run([[90], [80 + seed, 80]], seed=seed)
        write_run([[90], [70 + 3 * seed, 70]], label="lora", method="lora", seed=seed)
    command = ["report", str(tmp_path / "runs"), "--format", "md"]
    assert main([*command, "--baseline", "lora"]) == 0
    default = capsys.readouterr().out
    assert "Differences to lora, paired over seeds 0, 1, 2" in default
    assert "corrected p \\< 0.05" in default
    assert main([*command, "--baseline", "lora", "--confidence", "0.9"]) == 0
    assert "corrected p \\< 0.1" in capsys.readouterr().out
    assert main([*command, "--baseline", "lara"]) == 2
    assert "no run of the baseline 'lara'; did you mean 'lora'" in capsys.readouterr().err
    for wrong in ("95", "0.5", "nan", "x"):
        assert main([*command, "--confidence", wrong]) == 2
        assert "argument --confidence: wants a" in capsys.readouterr().err
    assert main(["compare", "glyphs", "--methods", "ncm", "--baseline", "nmc", "--out", str(tmp_path / "o")]) == 2
    assert "the baseline 'nmc' is not compared; did you mean 'ncm'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("n", "most", "shown"),
    [
        (1, 20, [1]),
        (20, 20, list(range(1, 21))),
        (21, 20, [1, *range(2, 21, 2)]),
        (50, 20, [1, *range(5, 51, 5)]),
        (50, 10, [1, *range(5, 51, 5)]),
        (200, 20, [1, *range(10, 201, 10)]),
    ],
)
def test_axes_of_long_streams_show_round_numbers(n: int, most: int, shown: list[int]) -> None:
    assert plots._numbers(n, most) == shown
