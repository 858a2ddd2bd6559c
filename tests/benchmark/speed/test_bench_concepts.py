"""`dualcl bench concepts` on the bundled model, and the sizes of the full one without its weights."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.speed import concepts as bench_concepts

#: width of the bundled model's text encoder
DIM = 128


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_concepts.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--threads", "1", *words])


def job(*words: str) -> tuple[bench_concepts.ConceptJob, Any]:
    """The one job of a command and its configuration."""
    (only,) = bench_concepts.plan(arguments(*words))
    return only, resolve(only.preset, only.method, only.sets)


def grown(method: str, concepts: str, *words: str) -> list[dict[str, Any]]:
    """The points of a growing run, measured in this process."""
    from dualcl.benchmark.speed.concepts_work import measure_growth

    only, resolved = job("--grow", concepts, "--methods", method, "--repeats", "2", *words)
    points: list[dict[str, Any]] = measure_growth(resolved, only)["points"]
    return points


@pytest.mark.parametrize("method", ["clora", "finetune"])
def test_a_run_grows_by_a_token_row_per_concept_and_by_nothing_else(method: str) -> None:
    early, late = grown(method, "2,4")
    assert (early["concept"], late["concept"]) == (2, 4)
    assert early["tensors"] == late["tensors"] > 0
    assert early["numbers"] == late["numbers"] > 0
    assert len(early["seconds"]) == len(late["seconds"]) == 2
    assert min(early["seconds"] + late["seconds"]) > 0
    # two rows, each with its entry in the file's header, which is padded to eight bytes
    growth = late["checkpoint_bytes"] - early["checkpoint_bytes"]
    assert 2 * DIM * 4 < growth < 2 * (DIM * 4 + 128)
    # in memory two rows and the copies that are compared after each concept, and four images of 32 px per concept
    rows, photographs = 2 * 2 * DIM * 4, 2 * 4 * 32 * 32 * 3
    assert late["live_mib"] - early["live_mib"] == pytest.approx((rows + photographs) / 2**20, abs=4 / 1024)


def test_three_tokens_per_concept_are_seen_in_what_grows() -> None:
    early, late = grown("textual_inversion", "1,3", "--set", "concept.n_tokens=3")
    assert late["checkpoint_bytes"] - early["checkpoint_bytes"] > 2 * 3 * DIM * 4
    # nothing but the rows of the concept and the two moments that Adam keeps of them, with its count of steps
    assert early["numbers"] == late["numbers"] == 2 * 3 * DIM + 1


def test_penalty_of_clora_is_paid_at_the_second_concept() -> None:
    from dualcl.benchmark.speed.concepts_work import PER_CONCEPT, concept_run
    from dualcl.benchmark.speed.step_work import TaskSteps

    _, resolved = job("--grow", "2", "--methods", "clora", "--set", "methods.clora.rank=2")
    with concept_run(resolved, torch.device("cpu"), PER_CONCEPT) as run:
        for index, wanted in ((0, False), (1, True)):
            task = TaskSteps(run, index)
            task.step()
            task.step()
            penalty = run.method.penalty()
            assert (penalty is not None and penalty.item() > 0) is wanted
            task.end()
    assert not run.folder.path.exists()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_step_and_one_image_of_a_model_with_random_weights(checkpointing: bool) -> None:
    from dualcl.benchmark.models.text_to_image import BaseConfig
    from dualcl.benchmark.speed.concepts_work import STABLE_DIFFUSION_1, measure_once, random_diffusion

    words = ["--full-size", "--methods", "clora", "--set", "methods.clora.rank=4", "--repeats", "2"]
    only, resolved = job(*words, *(["--gradient-checkpointing"] if checkpointing else []))
    base = resolved.section("base", BaseConfig)
    assert base.gradient_checkpointing is checkpointing
    result = measure_once(
        resolved, only, random_diffusion(small(STABLE_DIFFUSION_1), base, torch.device("cpu"), "small")
    )
    # K and V of ten cross-attentions: two of width 32 down, three up, and one in the middle
    assert result["parameters_trained"] == 2 * 4 * (2 * (32 + 24) + 3 * (32 + 24) + (64 + 24))
    assert result["token_parameters"] == 24
    assert result["image_size"] == 64
    assert len(result["losses"]) == len(result["step_seconds"]) == len(result["sample_seconds"]) == 2
    assert all(
        math.isfinite(v) and v > 0 for v in [*result["losses"], *result["step_seconds"], result["encode_seconds"]]
    )
    assert result["losses"][0] != result["losses"][1]


def small(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A few channels and blocks of each part of the full model."""
    own: dict[str, dict[str, Any]] = {
        "unet": {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "down_block_types": parts["unet"]["down_block_types"][2:],
            "up_block_types": parts["unet"]["up_block_types"][:2],
            "cross_attention_dim": 24,
        },
        "vae": {"sample_size": 64, "block_out_channels": (32,) * 4, "layers_per_block": 1},
        "text_encoder": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        "scheduler": {},
    }
    return {part: {**config, **own[part]} for part, config in parts.items()}


def test_random_weights_are_finite_and_all_set() -> None:
    from dualcl.benchmark.models.stable_diffusion import cross_attention_sites
    from dualcl.benchmark.models.text_to_image import BaseConfig
    from dualcl.benchmark.speed.concepts_work import STABLE_DIFFUSION_1, random_diffusion

    config = BaseConfig(weights_dtype="bf16")
    model = random_diffusion(small(STABLE_DIFFUSION_1), config, torch.device("cpu"), "small")
    sites = {f"{name}.weight" for name in cross_attention_sites(model.unet)}
    assert sites
    for name, tensor in model.unet.state_dict().items():
        assert tensor.dtype == (torch.float32 if name in sites else torch.bfloat16), name
    for part in (model.unet, model.vae, model.text_encoder):
        for name, tensor in part.state_dict().items():
            assert bool(torch.isfinite(tensor).all()), name
            if tensor.dim() > 1:
                fan_in = tensor[0].numel()
                assert tensor.float().std().item() * fan_in**0.5 == pytest.approx(1, abs=0.25), name
    assert model.vocabularies[0].ids(["a photo of <c1>"]).shape == (1, 77)
    again = random_diffusion(small(STABLE_DIFFUSION_1), config, torch.device("cpu"), "small")
    assert again.info.weights_sha256 == model.info.weights_sha256


def test_full_configuration_has_the_sizes_of_stable_diffusion_1() -> None:
    from dualcl.benchmark.models.stable_diffusion import cross_attention_sites
    from dualcl.benchmark.speed.concepts_work import STABLE_DIFFUSION_1

    # isort: split
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**STABLE_DIFFUSION_1["unet"])
        vae = AutoencoderKL(**STABLE_DIFFUSION_1["vae"])
        text = CLIPTextModel(CLIPTextConfig(**STABLE_DIFFUSION_1["text_encoder"]))
    assert [sum(p.numel() for p in m.parameters()) for m in (unet, vae, text)] == [859_520_964, 83_653_863, 123_060_480]
    # nothing that `fill` would leave unset
    assert not [*unet.buffers(), *vae.buffers()]
    sites = cross_attention_sites(unet).values()
    assert len(sites) == 32
    assert sum(s.d_out * s.d_in for s in sites) == 19_169_280
    assert sum(16 * (s.d_out + s.d_in) for s in sites) == 792_576


def test_command_measures_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "growth.csv"
    words = ["bench", "concepts", "--grow", "1,2", "--methods", "clora", "--repeats", "3", "--threads", "1"]
    assert main([*words, "--device", "cpu", "--format", "csv", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.read_text(encoding="utf-8") == text
    early, late = csv.DictReader(io.StringIO(text))
    assert (early["method"], early["concept"], late["method"], late["concept"]) == ("clora", "1", "clora", "2")
    assert [float(early[f"step_seconds_to_first{end}"]) for end in ("", "_min", "_max")] == [1, 1, 1]
    least, middle, most = (float(late[f"step_seconds_to_first{end}"]) for end in ("_min", "", "_max"))
    assert 0 < least <= middle <= most
    assert DIM * 4 < float(late["bytes_per_concept"]) < DIM * 4 + 128
    assert float(late["peak_process_mib"]) > 10
    assert (late["device"], late["threads"], late["precision"], late["image_size"]) == ("cpu", "1", "fp32", "32")
    assert late["torch"]
    assert late["diffusers"]


def test_growth_rows_compare_steps_of_one_round() -> None:
    def point(concept: int, seconds: list[float], size: int) -> dict[str, Any]:
        peaks = {"process": 100.0 * concept, "cuda": None}
        held = {"live_mib": 8.0, "tensors": 3, "numbers": 10, "checkpoint_bytes": size}
        return {"concept": concept, "seconds": seconds, "peak_mib": peaks, **held}

    # the machine was ten times slower in the last round
    results = [("a", {"points": [point(2, [1.0, 2.0, 10.0], 1000), point(30, [1.1, 2.0, 9.0], 3800)]})]
    first, last = bench_concepts.grow_rows(results)
    assert (first["step_seconds_to_first"], last["step_seconds_to_first"]) == (1, 1)
    assert last["step_seconds_to_first_min"] == pytest.approx(0.9)
    assert last["step_seconds_to_first_max"] == pytest.approx(1.1)
    assert last["checkpoint_bytes_to_first"] == pytest.approx(3.8)
    assert last["bytes_per_concept"] == 100
    assert last["peak_process_mib_to_first"] == 15
    assert last["peak_cuda_mib_to_first"] is None


def about(**more: Any) -> dict[str, Any]:
    setup = {"image_size": 32, "repeats": 1, "device": "cpu", "threads": 1, "settings": {}}
    return {**setup, "diffusers": "1", "transformers": "1", "environment": {"torch": "2", "dualcl": "0"}, **more}


def test_tables_have_a_cell_for_every_column() -> None:
    peaks = {"process": 300.0, "cuda": None}
    full = about(
        network_parameters=1000, parameters_trained=25, token_parameters=4, encode_seconds=0.5, losses=[2.0, 1.0]
    )
    full.update(step_seconds=[1.0, 3.0, 2.0], sample_seconds=[4.0], train_peak_mib=peaks, sample_peak_mib=peaks)
    point = {"seconds": [1.0], "peak_mib": peaks, "live_mib": 8.0, "tensors": 3, "numbers": 10, "checkpoint_bytes": 900}
    growth = about(points=[{"concept": 2, **point}, {"concept": 30, **point}])
    for words, results, wanted in (
        (
            ["--full-size"],
            [("finetune", full)],
            ["finetune", "25", "2.500", "4", "0.50", "2.00", "4.00", "300", "300", "1.0000"],
        ),
        (["--grow", "2,30"], [("lora", growth)] * 2, ["lora", "2", "1000.0", "1", "300.0", "1.000", "8.00", "1.000"]),
    ):
        text = bench_concepts.render(arguments(*words, "--format", "md"), results)
        table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
        assert len({len(cells) for cells in table}) == 1
        assert table[2][: len(wanted)] == wanted
        assert "device cpu" in text
        assert bench_concepts.render(arguments(*words), results).splitlines()[0].split()[0] == "method"
        value = json.loads(bench_concepts.render(arguments(*words, "--format", "json"), results))
        assert value["setup"]["threads"] == 1
        assert value["rows"][0]["method"] == results[0][0]


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--methods", "clra"], "clora"),
        (["--methods", "l2p"], "customization"),
        (["--methods", "joint"], "joint"),
        (["--methods", "dreambooth"], "prior images"),
        (["--methods", "generative_replay"], "replay images"),
        (["--set", "stream.tasks=3"], "stream.tasks"),
        (["--set", "methods.clora.rnk=3"], r"clora\.rank|method\.rank"),
        (["--out", "no/such/folder/x.csv"], "no/such/folder"),
    ],
)
@pytest.mark.parametrize("what", [["--full-size"], ["--grow", "2,3"]])
def test_mistakes_are_named_before_anything_is_measured(
    what: list[str], words: list[str], culprit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_concepts, "measure", lambda job: pytest.fail("measured"))
    with pytest.raises(UserError, match=culprit):
        bench_concepts.main(arguments(*what, *words))


@pytest.mark.parametrize("words", [[], ["--full-size", "--grow", "2,30"], ["--grow", "30,2"]])
def test_one_of_the_two_measurements_must_be_chosen(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "concepts", *words]) == 2
    assert "--grow" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from dualcl.benchmark.cli import main; code = main(['bench', 'concepts', '--help']); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'diffusers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--full-size" in done.stdout
