from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import UserError
from dualcl.results.report import TABLE_FORMATS, build_report, render, terminal_table
from dualcl.results.statistics import Ranking
from dualcl.results.tables import summarise
from dualcl.results.writers import csv as csv_writer

WriteRun = Callable[..., Path]

LOW = [[80], [40, 80], [20, 20, 80]]
JOINT = [None, None, [99, 99, 99]]


@pytest.fixture
def runs(write_run: WriteRun, tmp_path: Path) -> Path:
    """clora with A_last 70 and 72, lora with 40 and 40, joint with 99, a failed and a half-done run."""
    write_run()
    write_run([[90], [70, 80], [60, 56, 100]], seed=1)
    for seed in (0, 1):
        write_run(LOW, label="lora", method="lora", seed=seed, stored=100)
    write_run(JOINT, label="joint", method="joint", joint=True)
    write_run([[50], None, None], label="ewc", method="ewc", status="failed")
    write_run([None, None, None], label="l2", method="l2", status="running")
    return tmp_path


def parse(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_mean_and_sample_deviation_over_seeds(runs: Path) -> None:
    clora, lora, joint = parse(render(summarise([runs]), "csv"))
    assert (clora["method"], lora["method"], joint["method"]) == ("clora", "lora", "joint")
    assert float(clora["A_last_mean"]) == pytest.approx(71)
    assert float(clora["A_last_std"]) == pytest.approx(2**0.5)  # of 70 and 72, ddof = 1
    assert clora["A_last_n"] == "2"
    assert float(lora["A_last_std"]) == 0
    assert (joint["A_last_n"], joint["A_last_std"], joint["F_max_mean"], joint["F_max_n"]) == ("1", "", "", "0")


def test_markdown_bolds_the_best_in_its_direction_and_never_the_upper_bound(runs: Path) -> None:
    text = render(summarise([runs]), "md").split("####")[0]
    lines = {line.split(" |")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    head = [cell.strip() for cell in lines["method"].split("|")[1:-1]]
    cells = {k: dict(zip(head, [c.strip() for c in v.split("|")[1:-1]], strict=True)) for k, v in lines.items()}
    assert cells["clora"][r"A\_last ↑ (%)"] == "**71.00 ± 1.41**"
    assert cells["clora"][r"F\_max ↓ (points)"].startswith("**28.50")
    assert cells["lora"][r"N\_store ↓ (%)"] == "**0.100**"
    assert cells["clora"][r"N\_store ↓ (%)"] == "5.000"
    assert cells["clora"]["time ↓ (s)"] == "12.0 ± 0.0"  # equal everywhere: no best
    joint = cells["joint (upper bound)"]
    assert joint[r"A\_last ↑ (%)"] == "99.00"
    assert joint[r"F\_max ↓ (points)"] == "–"
    assert "**" not in lines["joint (upper bound)"]


def test_unfinished_runs_are_listed_and_never_averaged(runs: Path) -> None:
    table = summarise([runs]).tables[0]
    assert {row.label for row in table.rows} == {"clora", "lora", "joint"}
    assert table.unfinished == [
        "ewc seed 0: failed, 1 of 3 tasks evaluated (loss is NaN)",
        "l2 seed 0: running, 0 of 3 tasks evaluated",
    ]
    assert len(parse(csv_writer.runs(summarise([runs]).records))) == 7


def test_only_unfinished_runs_still_make_a_table(write_run: WriteRun, tmp_path: Path) -> None:
    write_run([[50], None, None], status="interrupted")
    for form in ("text", "md", "tex", "csv"):
        assert render(summarise([tmp_path]), form)
    assert "No finished run yet." in terminal_table([tmp_path])


def test_nothing_to_report_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report") as caught:
        summarise([tmp_path])
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda d: d["identity"].update(split_hash="9999"), "split_hash"),
        (lambda d: d["identity"]["preprocess"].update(size=64), "preprocess.size"),
        (lambda d: d["identity"].update(class_order=[9, 1, 2, 0]), "class_order"),
        (lambda d: d["identity"].pop("backbone"), "backbone"),
    ],
)
def test_different_identities_do_not_mix_unless_told_to(
    write_run: WriteRun, tmp_path: Path, edit: Callable[[dict], object], key: str
) -> None:
    write_run()
    write_run(label="lora", edit=edit)
    with pytest.raises(UserError, match="--allow-mixed") as caught:
        summarise([tmp_path])
    message = str(caught.value)
    assert f"{key} is " in message
    assert "clora seed 0" in message
    assert "lora seed 0" in message
    summary = summarise([tmp_path], allow_mixed=True)
    assert len(summary.tables[0].rows) == 2
    assert any(key in line for line in summary.warnings)


def test_class_order_may_differ_between_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    for label in ("clora", "lora"):
        for seed in (0, 1):
            write_run(label=label, seed=seed)
    assert [row.seeds for row in summarise([tmp_path]).tables[0].rows] == [(0, 1), (0, 1)]


def test_random_weights_may_differ_between_seeds_only(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(seed=seed, edit=lambda d, s=seed: d["identity"].update(weights="random", weights_sha256=str(s)))
    assert any("not pretrained" in line for line in summarise([tmp_path]).warnings)
    write_run(label="lora", edit=lambda d: d["identity"].update(weights="random", weights_sha256="9"))
    with pytest.raises(UserError, match="weights_sha256 is '0' in clora seed 0 and '9' in lora seed 0"):
        summarise([tmp_path])


def test_unfinished_runs_of_another_split_do_not_stop_a_report(write_run: WriteRun, tmp_path: Path) -> None:
    write_run()
    write_run(label="lora", status="failed", edit=lambda d: d["identity"].update(split_hash="9999"))
    assert len(summarise([tmp_path]).tables[0].rows) == 1


def test_a_run_without_a_later_key_shares_a_row_with_one_where_it_is_not_set(
    write_run: WriteRun, tmp_path: Path
) -> None:
    method = ({"rank": 8}, {"rank": 8, "quirks": []}, {"rank": 8, "quirks": False}, {"rank": 8, "quirks": ["a", "b"]})
    for seed, values in enumerate(method):
        write_run(seed=seed, edit=lambda d, values=values: d["config"].update(method=values))
    (table,) = summarise([tmp_path]).tables
    assert [(row.label, row.seeds) for row in table.rows] == [("clora", (0, 1, 2)), ("clora (quirks=a,b)", (3,))]


def test_a_sweep_gets_a_row_per_setting(write_run: WriteRun, tmp_path: Path) -> None:
    for rank in (4, 8):
        for seed in (0, 1):
            write_run(
                seed=seed,
                name=f"{rank}-{seed}",
                edit=lambda d, rank=rank: d["config"].update(method={"rank": rank}, device="cpu", threads=rank),
            )
    rows = summarise([tmp_path]).tables[0].rows
    assert [(row.label, row.seeds) for row in rows] == [("clora (rank=4)", (0, 1)), ("clora (rank=8)", (0, 1))]


def test_a_file_of_weights_is_the_same_wherever_it_lies(write_run: WriteRun, tmp_path: Path) -> None:
    def run(seed: int, place: str, sha: str) -> None:
        def edit(d: dict[str, Any]) -> None:
            d["identity"]["weights_sha256"] = sha
            d["config"]["backbone"] = {"weights": place}
            d["config_hash"] = place

        write_run(seed=seed, name=f"{seed}-{place.strip('/')}", edit=edit)

    run(0, "a/vit.safetensors", "1")
    run(1, "/b/vit.safetensors", "1")
    assert [(row.label, row.seeds) for row in summarise([tmp_path]).tables[0].rows] == [("clora", (0, 1))]
    run(1, "c/vit.safetensors", "1")  # the same run again, with the file elsewhere
    summary = summarise([tmp_path])
    assert [(row.label, row.seeds) for row in summary.tables[0].rows] == [("clora", (0, 1))]
    assert any("is there twice, with equal results" in line for line in summary.warnings)
    run(2, "a/vit.safetensors", "2")  # another file at a place known
    with pytest.raises(UserError, match="weights_sha256 is '1'"):
        summarise([tmp_path])
    mixed = summarise([tmp_path], allow_mixed=True).tables[0].rows
    assert [row.seeds for row in mixed] == [(0, 1), (2,)]
    labels = [f"clora (backbone.weights=a/vit.safetensors {sha})" for sha in ("1", "2")]
    assert [row.label for row in mixed] == labels


def test_the_same_run_twice_counts_once_and_a_contradiction_is_an_error(write_run: WriteRun, tmp_path: Path) -> None:
    write_run()
    write_run(name="copy", seconds=99.0)
    summary = summarise([tmp_path])
    assert summary.tables[0].rows[0].seeds == (0,)
    assert any("there twice" in line for line in summary.warnings)
    write_run(LOW, name="other")
    with pytest.raises(UserError, match="there twice with different results") as caught:
        summarise([tmp_path])
    assert "other" in str(caught.value)


def test_streams_get_their_own_tables(write_run: WriteRun, tmp_path: Path) -> None:
    write_run()
    write_run(preset="cifar", edit=lambda d: d["identity"].update(data="cifar"))
    summary = summarise([tmp_path])
    assert [table.preset for table in summary.tables] == ["cifar", "glyphs"]
    assert [row["preset"] for row in parse(render(summary, "csv"))] == ["cifar", "glyphs"]


def test_warnings_name_what_weakens_a_comparison(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(edit=lambda d: d["network"].update(skipped_images=["a.jpg"]))
    write_run(label="lora", seed=1, edit=lambda d: d["environment"].update(commit="badcafe", dirty=True, device="cuda"))
    text = "\n".join(summarise([tmp_path]).warnings)
    for part in ("fewer than 3 seeds", "not the same seeds", "a.jpg", "mixed commits", "uncommitted", "mixed devices"):
        assert part in text


def test_three_clean_seeds_need_no_warning(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(seed=seed)
    assert summarise([tmp_path]).warnings == []


def test_one_seed_shows_no_deviation(write_run: WriteRun, tmp_path: Path) -> None:
    write_run()
    text = terminal_table([tmp_path], ascii_only=False)
    assert "±" not in text
    assert "One seed" in text


def test_terminal_table_is_aligned_marks_the_best_and_fits(runs: Path) -> None:
    text = terminal_table([runs], ascii_only=False, width=10_000)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("method"))
    clora = next(line for line in lines if line.startswith("clora"))
    lora = next(line for line in lines if line.startswith("lora"))
    assert clora.index("71.00 ± 1.41*") == lora.index("40.00 ± 0.00")
    assert clora.index("71.00") + len("71.00 ± 1.41") == head.index("A_last ↑") + len("A_last ↑")
    narrow, differences = terminal_table([runs], ascii_only=False, width=60).split("Differences to")
    assert max(map(len, differences.splitlines())) <= 60
    assert max(map(len, narrow.splitlines()[2:])) <= 60
    starts = [line.split(" ")[0] for line in narrow.splitlines()]
    assert starts.count("clora") == starts.count("method") > 1
    terminal_table([runs], ascii_only=True).encode("ascii")


def test_latex_escapes_names_and_uses_booktabs(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(label=r"a_b & 50% {x} \y $z", preset="p#1")
    text = render(summarise([tmp_path]), "tex")
    assert r"a\_b \& 50\% \{x\} \textbackslash{}y \$z & 1 &" in text
    assert r"p\#1" in text
    assert r"\toprule" in text
    body = text[text.index(r"\begin{tabular}") : text.index(r"\end{tabular}")]
    columns = body.split("{")[2].split("}")[0]
    assert all(line.replace(r"\&", "").count("&") == len(columns) - 1 for line in body.splitlines() if " & " in line)


def test_markdown_escapes_names(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(label="a|b*c<script>")
    text = render(summarise([tmp_path]), "md")
    assert r"| a\|b\*c\<script\> | 1 |" in text


def test_an_unknown_format_names_the_known_ones(runs: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'csv'"):
        render(summarise([runs]), "cvs")


def test_long_runs_are_shown_in_larger_units(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(seconds=7200.0)
    write_run(label="lora", seconds=3600.0)
    text = render(summarise([tmp_path]), "md")
    assert "time ↓ (h)" in text
    assert "| **1.00** |" in text
    assert float(parse(render(summarise([tmp_path]), "csv"))[0]["time_s_mean"]) == 7200


def test_customization_tables_mark_directions_and_name_what_was_measured(
    write_concept_run: WriteRun, tmp_path: Path
) -> None:
    write_concept_run()
    write_concept_run([[0.03], [0.02, 0.02], [0.01, 0.02, 0.03]], label="lora", method="lora")
    write_concept_run([None, None, [0.01, 0.01, 0.01]], None, label="joint", method="joint", joint=True)
    text = render(summarise([tmp_path]), "md")
    lines = {line.split(" |")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    head = [cell.strip() for cell in lines["method"].split("|")[1:-1]]
    cells = {k: dict(zip(head, [c.strip() for c in v.split("|")[1:-1]], strict=True)) for k, v in lines.items()}
    assert cells["lora"][r"A\_mmd ↓ (×10³)"] == "**20.00**"
    assert cells["clora"][r"A\_mmd ↓ (×10³)"] == "50.00"
    assert cells["lora"]["image sim. ↑ (cosine)"] == "**0.780**"
    joint = cells["joint (upper bound)"]
    assert (joint[r"F\_mmd ↓ (×10³)"], joint["concept acc. ↑ (%)"], joint["concept acc. last ↑ (%)"]) == (
        "–",
        "–",
        "70.8",
    )
    for part in (
        "3 concepts, data glyph-concepts",
        "kernel poly2 (a·b + 1)², biased estimator",
        "features of glyph-vit",
    ):
        assert part in text
    assert "8 generated images per concept (15 steps, ddim, guidance 4); 8 real ones." in text
    terminal_table([tmp_path], ascii_only=True).encode("ascii")
    assert r"[$\times$10\textsuperscript{3}] $\downarrow$" in render(summarise([tmp_path]), "tex")


def test_an_option_that_earlier_records_did_not_know_tells_rows_apart_where_it_is_set(
    write_run: WriteRun, tmp_path: Path
) -> None:
    def knows(value: str, source: str) -> Callable[[dict[str, Any]], object]:
        return lambda d: (
            d["config"]["method"].update(style=value),
            d.setdefault("sources", {}).update({"method.style": source}),
        )

    write_run(seed=0)
    write_run(seed=1, edit=knows("plain", "default"))
    labels = [row.label for row in summarise([tmp_path]).tables[0].rows]
    assert len(labels) == 1
    assert "style" not in labels[0]
    write_run(seed=2, edit=knows("new", "given"))
    labels = [row.label for row in summarise([tmp_path]).tables[0].rows]
    assert sorted("style=new" in label for label in labels) == [False, True]


def test_ablations_have_rows_under_their_own_labels(write_concept_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_concept_run(seed=seed)
        write_concept_run(
            label="clora, word",
            seed=seed,
            preset="glyph-concepts-word",
            edit=lambda d: (d["run"].update(table="glyph-concepts"), d["config"].update(concept={"init": "word"})),
        )
    write_concept_run(label="other", preset="a")
    tables = {table.preset: table for table in summarise([tmp_path]).tables}
    assert set(tables) == {"a", "glyph-concepts"}
    assert [(row.label, row.seeds) for row in tables["glyph-concepts"].rows] == [
        ("clora", (0, 1)),
        ("clora, word", (0, 1)),
    ]
    assert {row["table"] for row in parse(csv_writer.runs(tables["glyph-concepts"].records))} == {"glyph-concepts"}


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda d: d["identity"].update(kernel="rbf"), "kernel"),
        (lambda d: d["identity"].update(features="clip"), "features"),
        (lambda d: d["identity"]["eval"].update(n=9), "eval.n"),
        (lambda d: d["identity"].update(class_order=[2, 1, 0]), "class_order"),
        (lambda d: d["config"]["train"].update(steps=7), "train.steps"),
    ],
)
def test_images_measured_differently_do_not_share_a_table(
    write_concept_run: WriteRun, tmp_path: Path, edit: Callable[[dict], object], key: str
) -> None:
    write_concept_run()
    write_concept_run(label="lora", edit=edit)
    with pytest.raises(UserError, match=f"do not compare: {key} is "):
        summarise([tmp_path])


def test_what_not_every_run_measured_is_a_dash_and_must_be_the_same_where_it_was(
    write_concept_run: WriteRun, tmp_path: Path
) -> None:
    def measured(share: float, asked: str) -> Callable[[dict], object]:
        def edit(data: dict) -> None:
            data["identity"]["prior_hash"] = asked
            data["config"].setdefault("data", {})["prior_captions"] = 48
            data["matrix"]["rows"][-1]["prior_share"] = [None, None, share]

        return edit

    write_concept_run()
    write_concept_run(label="lora", method="lora")
    write_concept_run(label="lora", method="lora", seed=1, edit=measured(0.75, "a1"))
    (table,) = summarise([tmp_path]).tables
    assert [(row.label, row.seeds) for row in table.rows] == [("clora", (0,)), ("lora", (0, 1))]  # not another variant
    clora, lora = (row.stats["prior_accuracy"] for row in table.rows)
    assert clora is None
    assert lora is not None
    assert (lora.mean, lora.n) == (75.0, 1)
    write_concept_run(label="ewc", method="ewc", edit=measured(0.5, "b2"))
    with pytest.raises(UserError, match="do not compare: prior_hash is "):
        summarise([tmp_path])


def test_both_domains_are_kept_apart_even_under_one_name(
    write_run: WriteRun, write_concept_run: WriteRun, tmp_path: Path
) -> None:
    write_concept_run(preset="a", name="generated")
    write_run(preset="a", name="classified")
    summary = summarise([tmp_path])
    assert [(table.preset, table.kind.heading) for table in summary.tables] == [
        ("a", "Classification"),
        ("a", "Customization"),
    ]
    text = render(summary, "md")
    assert text.index("## Classification") < text.index("A\\_last") < text.index("## Customization")
    assert text.index("## Customization") < text.index("A\\_mmd")
    one, two = parse(render(summary, "csv"))
    assert (one["A_mmd_n"], two["A_mmd_n"], two["A_last_mean"]) == ("0", "1", "")
    terminal_table([tmp_path])
    assert "## " not in render(summarise([tmp_path / "runs" / "classified"]), "md").replace("###", "")


def shared(write_run: WriteRun, last: dict[str, list[int]], **keywords: object) -> None:
    """Runs of two tasks with these accuracies after the last, one per seed; the first row is 90 everywhere."""
    for label, values in last.items():
        for seed, value in enumerate(values):
            write_run([[90], [value, value]], label=label, method=label, seed=seed, **keywords)


def test_differences_are_paired_by_seed(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"clora": [60, 70, 80], "lora": [58, 69, 77], "ncm": [50, 50, 50]})
    table = summarise([tmp_path]).tables[0]
    assert table.differences is not None
    assert table.differences.baseline == "clora"
    lora = table.differences.by_metric["A_last"]["lora"]
    assert (lora.mean, lora.std, lora.seeds) == (-2, 1, (0, 1, 2))  # the seeds' own spread of 10 drops out
    assert lora.p == pytest.approx(stats.ttest_rel([58, 69, 77], [60, 70, 80]).pvalue)
    assert list(table.differences.by_metric) == ["A_last", "A_avg", "F_step", "F_max"]
    rows = [row for row in parse(csv_writer.differences(summarise([tmp_path]).tables)) if row["metric"] == "A_last"]
    assert [(row["method"], row["baseline"], row["seeds"], row["comparisons"]) for row in rows] == [
        ("lora", "clora", "0 1 2", "2"),
        ("ncm", "clora", "0 1 2", "2"),
    ]
    assert float(rows[0]["p"]) == lora.p  # not rounded
    assert rows[0]["significant"] == "False"


def test_differences_appear_in_every_format(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"clora": [60, 70, 80], "lora": [40, 49, 61]})
    write_run([None, [95, 95]], label="joint", method="joint", joint=True)
    summary = summarise([tmp_path])
    assert summary.tables[0].differences is not None
    found = summary.tables[0].differences.by_metric["A_last"]["lora"]
    assert found.significant
    text = terminal_table([tmp_path], ascii_only=False)
    cell = f"-20.00 [{found.low:+.2f}, {found.high:+.2f}]*"
    assert cell in text
    assert "Differences to clora, paired over shared seeds" in text
    assert "* significant: corrected p < 0.05." in text
    assert "Fewer than 3 shared seeds, which is hardly evidence: joint (1)." in text
    terminal_table([tmp_path], ascii_only=True).encode("ascii")
    md = render(summary, "md")
    whole = f"-20.00 ± 1.00 \\[{found.low:+.2f}, {found.high:+.2f}\\], p {found.p_holm:.3f}\\*"
    assert f"| lora | 3 | {whole} |" in md
    assert "| joint (upper bound) | 1 | +35.00 \\[–\\] | – | – | – |" in md
    heads = [line for line in md.splitlines() if line.startswith("| method − clora")]
    assert heads == [
        r"| method − clora | seeds | A\_last ↑ (points) | A\_avg ↑ (points) | F\_step ↓ (points) | F\_max ↓ (points) |"
    ]
    tex = render(summary, "tex")
    assert r"lora & 3 & $-$20.00 $\pm$ 1.00 &" in tex
    assert r"\,* \\" in tex
    assert tex.isascii()


def test_a_baseline_can_be_named_by_label_or_method(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"clora": [60, 70], "lora": [58, 69]})
    table = summarise([tmp_path], baseline="lora").tables[0]
    assert table.differences is not None
    assert table.differences.by_metric["A_last"]["clora"].mean == pytest.approx(1.5)
    for rank in (4, 8):
        for seed in (0, 1):
            write_run(
                [[90], [rank, rank]], label="l2", method="l2", seed=seed, name=f"{rank}-{seed}",
                edit=lambda d, rank=rank: d["config"].update(method={"rank": rank}),
            )  # fmt: skip
    with pytest.raises(UserError, match=r"several rows on glyphs: l2 \(rank=4\); l2 \(rank=8\); name one"):
        summarise([tmp_path], baseline="l2")
    table = summarise([tmp_path], baseline="l2 (rank=4)").tables[0]
    assert table.differences is not None
    assert table.differences.baseline == "l2 (rank=4)"
    with pytest.raises(UserError, match="no run of the baseline 'loro'; did you mean 'lora'"):
        summarise([tmp_path], baseline="loro")


def test_a_baseline_without_a_result_gives_way_and_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"clora": [60, 70], "lora": [58, 69]})
    write_run([[50], None], label="ewc", method="ewc", status="failed")
    text = render(summarise([tmp_path], baseline="ewc"), "md")
    assert "Differences to clora" in text
    assert "ewc has no finished run here." in text


def test_without_clora_the_best_row_is_the_baseline(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"lora": [58, 69], "ncm": [90, 90], "l2": [99]})
    write_run([None, [99, 99]], label="joint", method="joint", joint=True)
    text = render(summarise([tmp_path]), "md")
    assert "Differences to ncm, paired over shared seeds" in text  # l2 has one seed, joint is no method
    assert "chosen by its result" in text


def test_one_seed_makes_no_table_of_differences(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"clora": [60], "lora": [58]})
    summary = summarise([tmp_path])
    for form in ("md", "text", "tex"):
        assert "Differences to" not in render(summary, form)
    (row,) = [row for row in parse(csv_writer.differences(summary.tables)) if row["metric"] == "A_last"]
    assert (float(row["difference"]), row["std"], row["low"], row["p"], row["significant"]) == (-2, "", "", "", "")


def test_identical_runs_get_no_test(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"clora": [60, 70], "twin": [60, 70], "lora": [58, 69]})
    text = render(summarise([tmp_path]), "md")
    assert "| twin | 2 | 0.00 ± 0.00 \\[–\\] |" in text
    assert "The same difference at every seed, so no interval and no test: twin (A\\_last), twin (A\\_avg)" in text


def test_mixed_runs_make_no_pairs_have_no_best_and_are_said_to_be_so(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"clora": [60, 70]})
    shared(write_run, {"lora": [58, 69]}, edit=lambda d: d["identity"].update(split_hash="9999"))
    summary = summarise([tmp_path], allow_mixed=True)
    assert summary.tables[0].differences is None
    assert not any(summary.tables[0].best.values())
    assert csv_writer.differences(summary.tables).count("\n") == 1
    assert "Differences to" not in render(summary, "md")
    assert all("split_hash is" in render(summary, form).replace("\\", "") for form in TABLE_FORMATS)


def test_damaged_records_are_named_in_every_format_that_has_room(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"clora": [60, 70]})
    place = write_run(seed=2) / "record.json"
    place.write_text(place.read_text()[:-20])
    summary = summarise([tmp_path])
    assert all("left out" in render(summary, form) for form in ("text", "md", "tex"))


def test_a_method_s_own_setting_tells_rows_apart_whatever_its_name(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, workers in enumerate((1, 50)):
        write_run(seed=seed, edit=lambda d, w=workers: d["config"]["method"].update(workers=w))
    assert len(summarise([tmp_path]).tables[0].rows) == 2


def test_caveats_are_marked_and_explained_in_every_format(write_run: WriteRun, tmp_path: Path) -> None:
    shared(write_run, {"clora": [60, 70], "lora": [58, 69]})
    plain = {form: render(summarise([tmp_path]), form) for form in ("text", "md", "tex", "csv")}
    assert all("†" not in text and "caveats" not in text for text in plain.values())
    say = "stores 200 images of earlier tasks"
    shared(write_run, {"er": [65, 71]}, edit=lambda d: d["run"].update(caveats=[say]))
    summary = summarise([tmp_path])
    text = terminal_table([tmp_path], ascii_only=False)
    assert f"er †: {say}" in text
    assert "er + " in terminal_table([tmp_path], ascii_only=True)
    md = render(summary, "md")
    assert md.count("| er † |") == 3  # the table, all metrics, differences
    assert f"er †: {say}" in md
    tex = render(summary, "tex")
    assert r"er $^\dagger$ & 2 &" in tex
    assert rf"\footnotesize er $^\dagger$: {say}" in tex
    before, after = plain["csv"].splitlines(), render(summary, "csv").splitlines()
    assert after[0] == before[0] + ",caveats"
    assert [line for line in after if line.endswith(f",{say}")] == [line for line in after if ",er," in line]
    assert after[1] == before[1] + ","
    assert {row["caveats"] for row in parse(csv_writer.runs(summary.records)) if row["label"] == "er"} == {say}


def test_all_metrics_of_the_matrix_have_a_table(runs: Path, write_concept_run: WriteRun) -> None:
    md = render(summarise([runs]), "md")
    part = md[md.index("#### All metrics") : md.index("#### Differences")]
    head = [c.strip() for c in next(line for line in part.splitlines() if line.startswith("| method")).split("|")[1:-1]]
    row = [c.strip() for c in next(line for line in part.splitlines() if line.startswith("| clora")).split("|")[1:-1]]
    cells = dict(zip(head, row, strict=True))
    assert [name.split(" ↑")[0].split(" ↓")[0].replace("\\", "") for name in head[1:]] == [
        "A_last", "A_last over images", "A_avg", "A_avg over images", "F_step", "F_max", "BWT", "plasticity",
    ]  # fmt: skip
    assert cells["BWT ↑ (points)"].startswith("**-28.50")
    write_concept_run()
    customization = render(summarise([runs]), "md").split("## Customization")[1]
    assert "All metrics" not in customization  # its table has them all


@pytest.mark.parametrize("sizes", [(100, 100, 100), (100, 200, 400)])
def test_accuracy_over_images_has_columns_where_tasks_are_unequal(
    sizes: tuple[int, ...], write_run: WriteRun, tmp_path: Path
) -> None:
    def resize(data: dict[str, Any]) -> None:
        for row in data["matrix"]["rows"]:
            row["total"] = list(sizes[: len(row["total"])])

    write_run(edit=resize)
    summary = summarise([tmp_path])
    row = summary.tables[0].rows[0]
    last, average = 100 * 210 / sum(sizes), (90 + 100 * 150 / sum(sizes[:2]) + 100 * 210 / sum(sizes)) / 3
    for key, value in {"A_last_weighted": last, "A_avg_weighted": average}.items():
        assert (stat := row.stats[key])
        assert stat.mean == pytest.approx(value)
    shown = {m.title for m in summary.tables[0].metrics if m.title.endswith("over images")}
    assert shown == (set() if len(set(sizes)) == 1 else {"A_last over images", "A_avg over images"})
    page = (build_report([tmp_path], tmp_path / "out", ["html"]).html or tmp_path).read_text(encoding="utf-8")
    md, tex, text = (render(summary, form) for form in ("md", "tex", "text"))
    firsts = (page.split("All metrics")[0], md.split("#### All")[0], tex.split(r"\end{table}")[0], text)
    for first, word in zip(firsts, ("over images", "over images", r"^{\mathrm{images}}", "over images"), strict=True):
        assert first.count(word) >= 2 if shown else word not in first


def test_ranks_need_three_streams_and_then_appear(write_run: WriteRun, tmp_path: Path) -> None:
    last = {"clora": [80, 81], "lora": [60, 62], "ncm": [70, 50]}
    shared(write_run, last, preset="one")
    assert "anks over" not in render(summarise([tmp_path]), "md")
    shared(write_run, last, preset="two")
    for form in ("md", "text"):
        assert "No ranks over streams: 2 streams have 3 methods in common" in render(summarise([tmp_path]), form)
    shared(write_run, {**last, "lora": [99, 99]}, preset="three")
    summary = summarise([tmp_path])
    ranking = summary.rankings["Classification"]
    assert isinstance(ranking, Ranking)
    assert ranking.ranks == pytest.approx({"clora": 4 / 3, "lora": 5 / 3, "ncm": 3.0})
    for form in ("md", "text", "tex"):
        assert "clora 1.33, lora 1.67, ncm 3.00" in render(summary, form)


RECORDED = Path(__file__).parents[2] / "results" / "recorded"


@pytest.mark.parametrize("page", sorted(p.parent.name for p in RECORDED.glob("*/table.md")))
def test_a_committed_table_is_that_of_its_records(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """When this fails: dualcl report results/recorded/PAGE/records --out results/recorded/PAGE"""
    assert main(["report", str(RECORDED / page / "records"), "--format", "md"]) == 0
    written = (RECORDED / page / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == written.strip()
    shown = (RECORDED / page / "README.md").read_text(encoding="utf-8").splitlines()
    rows = written.partition("\n| method")[2].partition("\n\n")[0].splitlines()[2:]
    assert [row for row in rows if row not in shown] == []
