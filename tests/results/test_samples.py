from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dualcl.results import samples
from dualcl.results.records import find_records, load_record
from dualcl.results.report import build_report
from dualcl.results.samples import (
    TILE,
    RunSamples,
    contact_sheet,
    draw_samples,
    method_strip,
    requests_sheet,
    stages_strip,
)

WriteRun = Callable[..., Path]


def places(sheet: Image.Image, path: Path) -> list[tuple[int, int]]:
    """Where on the sheet a file's image is shown, three times its size: left and top edges."""
    with Image.open(path) as image:
        wanted = np.asarray(image.convert("RGB").resize((96, 96), Image.Resampling.NEAREST))
    pixels = np.asarray(sheet)
    corner = (pixels == wanted[0, 0]).all(axis=2)
    corner[1:] &= ~corner[:-1].copy()
    corner[:, 1:] &= ~(pixels[:, :-1] == wanted[0, 0]).all(axis=2)
    spots = [(int(x), int(y)) for y, x in np.argwhere(corner)]
    return [(x, y) for x, y in spots if np.array_equal(pixels[y : y + 96, x : x + 96], wanted)]


def test_a_contact_sheet_has_rows_of_concepts_and_columns_of_time(write_concept_run: WriteRun) -> None:
    run = write_concept_run(samples=True)
    sheet = contact_sheet(RunSamples(load_record(run)))
    assert sheet is not None
    shown = {
        (stage, concept): places(sheet, run / f"samples/{stage}/{concept}/0.png")
        for stage, concept in (
            ("real", "1_grinning-face"),
            ("after_1", "1_grinning-face"),
            ("after_3", "1_grinning-face"),
            ("after_3", "3_rocket"),
        )
    }
    (real,), (then,), (now,) = (shown[stage, "1_grinning-face"] for stage in ("real", "after_1", "after_3"))
    assert real[0] < then[0] < now[0]
    assert real[1] == then[1] == now[1]
    rockets = shown["after_3", "3_rocket"]  # right after learning is after the last one: twice in a row
    assert [x for x, _ in rockets] == [then[0], now[0]]
    assert {y - now[1] for _, y in rockets} == {2 * (TILE + 2)}
    assert places(sheet, run / "samples/after_2/1_grinning-face/0.png") == []
    assert not places(sheet, run / "samples/after_1/1_grinning-face/4.png")  # four are enough


def asked(data: dict[str, Any]) -> None:
    """Makes requests of the record's three concepts, and retains two things."""
    data["network"]["requests"] = [{"target": n, "anchor": "face", "kind": "x"} for n in data["network"]["concepts"]]
    data["network"]["retained"] = [{"name": "sun", "side": "inside"}, {"name": "red", "side": "across"}]


def test_a_sheet_of_requests_has_a_row_after_each_and_columns_of_what_must_go_and_stay(
    write_concept_run: WriteRun,
) -> None:
    run = write_concept_run(samples=True, edit=asked)
    shutil.copytree(run / "samples/after_1", run / "samples/after_0")
    for after in range(4):
        for at, name in ((4, "sun"), (5, "red")):
            text = PngInfo()
            text.add_text("shown", "no" if after else "")
            file = run / f"samples/after_{after}/{at}_{name}/0.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng((at, after)).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, pnginfo=text)
    read = RunSamples(load_record(run))
    sheet = requests_sheet(read)
    assert sheet is not None
    kept = [places(sheet, run / f"samples/after_0/{at}/0.png") for at in ("4_sun", "5_red")]
    ((inside, top),), ((across, same),) = kept
    assert inside < across
    assert top == same
    targets = places(sheet, run / "samples/after_1/1_grinning-face/0.png")  # "before" is a copy of it here
    assert [y - top for _, y in targets][:2] == [0, TILE + 2]
    (left,) = {x for x, _ in targets}
    assert left < inside
    rockets = places(sheet, run / "samples/after_3/3_rocket/0.png")
    assert [y - top for _, y in rockets] == [3 * (TILE + 2)]  # after its own request alone
    assert places(sheet, run / "samples/after_1/4_sun/0.png") == []  # a bar says that it is not seen any more
    assert requests_sheet(RunSamples(load_record(write_concept_run(samples=True, name="taught")))) is None
    names = [sheet.name for sheet in draw_samples([load_record(run)], "x")[0]]
    assert "x-requests-clora-seed0" in names


def test_a_bar_says_whose_photographs_a_picture_is_nearest_to(write_concept_run: WriteRun) -> None:
    run = write_concept_run(samples=True)
    plain = contact_sheet(RunSamples(load_record(run)))
    assert plain is not None
    for stage, nearest in (("after_1", "grinning face"), ("after_3", "rocket")):
        for file in (run / "samples" / stage / "1_grinning-face").glob("*.png"):
            text = PngInfo()
            text.add_text("concept", "grinning face")
            text.add_text("nearest", nearest)
            with Image.open(file) as image:
                image.copy().save(file, pnginfo=text)
    sheet = contact_sheet(RunSamples(load_record(run)))
    assert sheet is not None
    assert sheet.height > plain.height  # a line says what the bars mean
    pixels = np.asarray(sheet).reshape(-1, 3).tolist()
    right, wrong = (pixels.count(list(bytes.fromhex(c[1:]))) for c in (samples._RIGHT, samples._WRONG))
    # four whole bars of the first concept, four broken ones; nothing below what says nothing
    assert right == 4 * samples._BAR * TILE
    assert wrong == right * 7 / 12


def test_methods_are_compared_at_a_seed_they_share(write_concept_run: WriteRun, tmp_path: Path) -> None:
    write_concept_run(samples=True, seed=0)
    for label in ("clora", "lora"):
        write_concept_run(samples=True, label=label, seed=1)
    sheets, notes = draw_samples(find_records([tmp_path]), "glyph")
    assert notes == []
    assert [sheet.title for sheet in sheets] == [
        "Concept 1 grinning face after every concept, seed 1",
        "Concept 1 grinning face, seed 1",
        "Concept 2 ghost, seed 1",
        "Concept 3 rocket, seed 1",
        "clora, seed 0",
        "clora, seed 1",
        "lora, seed 1",
    ]
    assert [sheet.shown for sheet in sheets] == [True] * 5 + [False, True]  # one sheet per method on the page
    assert len({sheet.name for sheet in sheets}) == len(sheets)
    assert all(sheet.name.startswith("glyph-") for sheet in sheets)


def test_a_strip_has_a_row_per_method_and_joint_training_no_before(write_concept_run: WriteRun, tmp_path: Path) -> None:
    clora = write_concept_run(samples=True)
    calm = [[0.0], [0.001, 0.0], [0.002, 0.001, 0.0]]
    other = write_concept_run([[0.02], [0.02, 0.02], [0.02] * 3], calm, label="lora", samples=True)
    joint = write_concept_run([None, None, [0.01] * 3], None, label="zjoint", joint=True, samples=True)
    runs = [RunSamples(load_record(run)) for run in (clora, other, joint)]
    strip = method_strip(runs, 0)
    assert strip is not None
    (first,) = places(strip, clora / "samples/after_3/1_grinning-face/0.png")
    (second,) = places(strip, other / "samples/after_3/1_grinning-face/0.png")
    assert first[0] == second[0]
    assert second[1] - first[1] == TILE + 2
    before = {at for at in places(strip, clora / "samples/after_1/1_grinning-face/0.png") if at[0] < first[0]}
    assert {y for _, y in before} == {first[1], second[1]}  # both before; none in the row of joint training
    stages = stages_strip(runs, 0)
    assert stages is not None
    steps = [places(stages, clora / f"samples/after_{i}/1_grinning-face/0.png")[0][0] for i in (1, 2, 3)]
    assert steps == [steps[0], steps[0] + TILE + 2, steps[0] + 2 * (TILE + 2)]
    assert stages_strip(runs, 1) is None  # nothing between concept 2 and the last


def test_runs_without_samples_are_passed_over_in_silence(write_concept_run: WriteRun, tmp_path: Path) -> None:
    write_concept_run()
    assert draw_samples(find_records([tmp_path]), "glyph") == ([], [])
    write_concept_run(label="lora", samples=True)
    sheets, notes = draw_samples(find_records([tmp_path]), "glyph")
    assert [sheet.title for sheet in sheets if sheet.kind == "contact"] == ["lora, seed 0"]
    assert notes == []


def test_damaged_and_missing_images_are_noted_in_a_line_and_leave_a_gap(write_concept_run: WriteRun) -> None:
    run = write_concept_run(samples=True)
    (run / "samples/after_1/1_grinning-face/0.png").write_bytes(b"no picture")
    cut = run / "samples/after_3/2_ghost/1.png"
    cut.write_bytes(cut.read_bytes()[:90])
    (run / "samples/after_3/3_rocket/3.png").unlink()
    (run / "samples/real/notes.txt").write_text("")
    (run / "samples/real/x_y").mkdir()
    whole = contact_sheet(RunSamples(load_record(write_concept_run(label="whole", samples=True))))
    sheets, notes = draw_samples([load_record(run)], "glyph")
    assert len(notes) == 1
    assert "\n" not in notes[0]
    for part in ("clora seed 0", "after_1/1_grinning-face/0.png", "after_3/2_ghost/1.png", "after_3/3_* (7 of 8)"):
        assert part in notes[0]
    contact = next(sheet.image for sheet in sheets if sheet.kind == "contact")
    assert whole is not None
    assert contact.size == whole.size
    (at,) = places(contact, run / "samples/after_3/1_grinning-face/0.png")  # still in its column
    assert at == places(whole, run / "samples/after_3/1_grinning-face/0.png")[0]


def test_images_that_do_not_share_their_seeds_are_noted(write_concept_run: WriteRun) -> None:
    run = write_concept_run(samples=True)
    path = run / "samples/after_3/1_grinning-face/0.png"
    with Image.open(path) as image:
        image.copy().save(path)  # its texts are gone
    _, notes = draw_samples([load_record(run)], "glyph")
    assert len(notes) == 1
    assert notes[0].endswith("images before and after do not share their seeds for concept 1")


def test_photographs_are_reduced_and_go_into_the_page_as_jpeg(write_concept_run: WriteRun, tmp_path: Path) -> None:
    run = write_concept_run(
        [[0.02], [0.02, 0.02]], [[0.0], [0.01, 0.0]], [[1], [1, 1]], generated=1, samples=True, size=160
    )
    pictures = RunSamples(load_record(run)).pairs(0, 1)[0]
    assert [p.tile.size for p in pictures if p] == [(TILE, TILE)] * 2
    sheets, _ = draw_samples([load_record(run)], "glyph")
    kind, data = sheets[0].for_page()
    assert kind == "image/jpeg"
    with Image.open(io.BytesIO(data)) as page, Image.open(io.BytesIO(sheets[0].png)) as file:
        assert (page.format, file.format) == ("JPEG", "PNG")
        assert page.size == file.size


@pytest.mark.parametrize("size", [(16, 16), (40, 20), (100, 300), (96, 96)])
def test_every_tile_fits_its_place(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("L", size, 7).save(tmp_path / "1.png")
    tile = samples._read(tmp_path / "1.png").tile
    assert max(tile.size) <= TILE
    assert max(tile.size) > TILE * 0.8
    assert tile.mode == "RGB"


def test_labels_are_wrapped_into_their_room() -> None:
    font = samples._font(13)
    text = "clora (lambda_=100000000.0, concept.init=word) " + "w" * 300 + "\ud800\n\t end"
    lines = samples._lines(text, font, 120, 4)
    assert len(lines) == 4
    assert lines[0] == "clora"
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 120 for line in lines)
    assert samples._lines("", font, 120, 4) == []
    assert samples._lines("two words", font, 500, 1) == ["two words"]
    assert samples._lines("two words", font, 500, 0) == []


def test_the_report_writes_shows_and_links_the_sheets(write_concept_run: WriteRun, tmp_path: Path) -> None:
    evil = "../</a><script>x"
    write_concept_run(samples=True)
    write_concept_run(samples=True, label=evil, edit=lambda d: d["network"].update(concepts=[evil] * 3), name="evil")
    out = tmp_path / "out"
    files = build_report([tmp_path / "runs"], out, ["md", "html", "png"])
    assert len(files.samples) == 6  # the first concept through the stream, three strips, two sheets
    assert {p.resolve().parent for p in files.samples} == {(out / "samples").resolve()}
    assert files.html is not None
    text = files.html.read_text(encoding="utf-8")
    assert "<script" not in text
    links = set(re.findall(r'href="([^"#]+)"', text))
    assert links == {p.relative_to(out).as_posix() for p in files.samples}
    found = [base64.b64decode(data) for data in re.findall(r'image/png;base64,([^"]*)"', text)]
    assert found == [p.read_bytes() for p in files.samples]
    table = files.tables[0].read_text(encoding="utf-8")
    assert all(f"]({link})" in table for link in links)


def test_a_page_alone_holds_the_sheets_and_writes_no_files(write_concept_run: WriteRun, tmp_path: Path) -> None:
    run = write_concept_run(samples=True)
    (run / "samples/after_1/1_grinning-face/0.png").write_bytes(b"")
    files = build_report([run], tmp_path / "out", ["html"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]
    assert files.html is not None
    text = files.html.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64") == 5
    assert "after_1/1_grinning-face/0.png" in text
    assert any("after_1/1_grinning-face/0.png" in line for line in files.warnings)
    assert 'href="samples' not in text
