"""Custom Diffusion and textual inversion against the example scripts of huggingface/diffusers.

The scripts run unchanged on a tiny random Stable Diffusion; `diffusion_recorder.py` notes what they drew, computed and
learnt. Our domain and methods then get the same photographs, draws, timesteps and prompts. The plain tests do so with
the stored notes, the live ones (marker `reference`) run the scripts anew: set DUALCL_REFERENCE_DIFFUSERS to the folder
`examples` of a checkout of commit 58eb52c080, and install accelerate.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.domains.concept_batches import ConceptBatch, Entries
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.benchmark.runs.step import make_optimizer

VARIABLE, REPOSITORY = "DUALCL_REFERENCE_DIFFUSERS", "huggingface/diffusers (its folder examples)"
VALUES, TRAJECTORY = 1e-5, 1e-4
STEPS, BATCH, SIDE, IMAGES, NOUN = 20, 2, 32, 4, "red"
#: AdamW's in both scripts
DECAY = 1e-2
LR = {"custom": 1e-3, "inversion": 5e-3}
SCRIPTS = {
    "custom": "custom_diffusion/train_custom_diffusion.py",
    "inversion": "textual_inversion/textual_inversion.py",
}
HELD = "[hold_start_token]"
Difference = Callable[[Any, Any], float]
Notes = dict[str, Tensor]


# --- a model and photographs that any machine can make again ----------------------------------------------------------


def draw_weights(module: Any) -> None:
    """Sets every parameter by numpy from its name, so that no version of torch matters."""
    for name, parameter in module.named_parameters():
        rng = np.random.default_rng(zlib.crc32(name.removeprefix("text_model.").encode()))
        values = rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
        if parameter.ndim > 1:
            values *= 0.5 if "embedding" in name else parameter[0].numel() ** -0.5
        else:
            values = 0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.asarray(values, dtype=np.float32)))


@pytest.fixture(scope="module")
def model_folder(save_tiny_sd: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of 32 px with four narrow cross-attention layers, as diffusers saves it."""
    return save_tiny_sd(tmp_path_factory.mktemp("reference") / "tiny-sd", (8, 8, 16), draw_weights)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """concepts/thing/ and class/, four images of smoothed noise each."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for folder in ("concepts/thing", "class"):
        (root / folder).mkdir(parents=True)
        for i in range(IMAGES):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(root / folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def preset(model_folder: Path, photographs: Path) -> str:
    """Two tokens for the concept, both begun as its class noun, and the scripts' optimiser."""
    file = photographs / "preset.yaml"
    file.write_text(
        f"""
domain: customization
data: {{name: concept-folder, root: "{photographs / "concepts"}", noun: {NOUN}}}
base: {{model: "{model_folder}"}}
concept: {{n_tokens: 2, init: word, prompt: "photo of a {{token}}"}}
prior: {{images: "{photographs / "class"}", prompt: "photo of a {{noun}}"}}
train: {{epochs: 1, steps: {STEPS}, batch_size: {BATCH}, optimizer: adamw, grad_clip: 1.0, checkpoint_seconds: 0}}
eval: {{n: 1, steps: 1, guidance: 1.0, features: glyph-vit}}
threads: 1
methods:
  custom_diffusion: {{lr: {LR["custom"]}, head_lr: {LR["custom"]}, weight_decay: {DECAY}, prior_weight: 1.0}}
  textual_inversion: {{head_lr: {LR["inversion"]}}}
"""
    )
    return str(file)


# --- the scripts ------------------------------------------------------------------------------------------------------


def arguments(kind: str, model: Path, photographs: Path, out: Path) -> list[str]:
    concept, other = photographs / "concepts" / "thing", photographs / "class"
    common = [
        f"--pretrained_model_name_or_path={model}",
        f"--output_dir={out}",
        f"--resolution={SIDE}",
        f"--train_batch_size={BATCH}",
        f"--max_train_steps={STEPS}",
        f"--learning_rate={LR[kind]}",
        f"--adam_weight_decay={DECAY}",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        "--dataloader_num_workers=0",
        "--seed=0",
    ]
    if kind == "inversion":
        return [
            *common,
            f"--train_data_dir={concept}",
            "--placeholder_token=<c1>",
            "--num_vectors=2",
            f"--initializer_token={NOUN}",
        ]
    return [
        *common,
        f"--instance_data_dir={concept}",
        f"--class_data_dir={other}",
        "--instance_prompt=photo of a <c1> <c1>_1",
        f"--class_prompt=photo of a {NOUN}",
        "--with_prior_preservation",
        "--prior_loss_weight=1.0",
        f"--num_class_images={IMAGES}",
        "--center_crop",
        "--noaug",
        "--modifier_token=<c1>+<c1>_1",
        f"--initializer_token={NOUN}+{NOUN}",
    ]


def run_script(kind: str, examples: Path, model: Path, photographs: Path, out: Path) -> Notes:
    """All that the recorder noted of a run of the script."""
    file = out / f"{kind}.safetensors"
    recorder = Path(__file__).with_name("diffusion_recorder.py")
    command = [str(examples / SCRIPTS[kind]), str(file), *arguments(kind, model, photographs, out / kind)]
    done = subprocess.run(
        [sys.executable, str(recorder), *command],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert file.exists(), done.stderr[-2000:]
    return load_file(file)


def shorten(kind: str, notes: Notes, run: Run) -> Notes:
    """What the comparison needs of the notes, photographs named by their place among our entries."""
    domain: Any = run.domain
    pixels = candidates(domain, kind)
    steps = [{k.split(".", 2)[2]: v for k, v in notes.items() if k.startswith(f"step.{i}.")} for i in range(STEPS)]
    assert f"step.{STEPS}.loss" not in notes
    n_weights = sum(k.startswith("after.") for k in notes) - 1
    rows = slice(domain.tokens.base_size, domain.tokens.base_size + 2)
    image = [torch.cdist(s["pixels"].flatten(1), pixels.flatten(1)).min(1) for s in steps]
    assert max(float(i.values.max()) for i in image) < 1e-4, "a photograph that we do not have"
    out = {name: torch.stack([s[name] for s in steps]) for name in ("draw", "noise", "loss")}
    out["timesteps"] = torch.stack([s["timesteps"] for s in steps]).short()
    out["ids"] = torch.stack([s["ids"] for s in steps]).short()
    out["image"] = torch.stack([i.indices for i in image]).to(torch.uint8)
    for name in ("mean", "std"):
        values = torch.zeros(len(pixels), *steps[0][name].shape[1:])
        for i, step in zip(image, steps, strict=True):
            values[i.indices] = step[name]
        out[name] = values
    out["predicted.first"] = steps[0]["predicted"]
    out["gradient.rows"] = torch.stack([s["gradient.0"][rows] for s in steps])
    out["gradient.elsewhere"] = steps[0]["gradient.0"][: domain.tokens.base_size].abs().max()
    out["before.rows"], out["after.rows"] = notes["before.0"][rows], notes["after.0"][rows]
    old = [notes[f"{when}.0"][: domain.tokens.base_size] for when in ("before", "after")]
    out["table"] = torch.stack([t.double().norm() for t in old])
    for i in range(1, n_weights + 1):
        out[f"gradient.weight.{i - 1}"] = steps[0][f"gradient.{i}"]
        out[f"before.weight.{i - 1}"], out[f"after.weight.{i - 1}"] = notes[f"before.{i}"], notes[f"after.{i}"]
    return out


# --- ours -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(preset: str, tmp_path: Path) -> Callable[..., tuple[Run, list[torch.nn.Parameter]]]:
    """begun(kind, *assignments) -> a run in its first task, not a step taken, and the token rows."""

    def make(kind: str, *sets: str) -> tuple[Run, list[torch.nn.Parameter]]:
        if kind == "inversion":
            resolved = resolve(preset, "textual_inversion", ["input.augment=flip", "train.grad_clip=null", *sets])
        else:
            resolved = resolve(preset, "custom_diffusion", [f"method.reference_quirks={HELD}", *sets])
        run = Run(resolved, RunFolder(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"), Reporter(quiet=True))
        return run, run.begin(0)

    return make


def candidates(domain: Any, kind: str) -> Tensor:
    """Pixels of our entries in their order: the concept's, mirrored or followed by those of the class."""
    images = domain.pixels(0)
    inputs = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    if kind == "inversion":
        return torch.cat([inputs, inputs.flip(3)])
    from dualcl.benchmark.domains.prior import PriorConfig, prior_images

    other, _ = prior_images(domain.diffusion, domain.resolved.section("prior", PriorConfig), NOUN)
    return torch.cat([inputs, other.permute(0, 3, 1, 2).float() / 127.5 - 1])


def entries(domain: Any, kind: str) -> Entries:
    """Our encoded images, in the order of `candidates`."""
    found: Entries = domain._training_entries(0)
    return found if kind == "inversion" else found + domain._prior[NOUN]


def batch_of(domain: Any, kind: str, notes: Notes, step: int) -> ConceptBatch:
    """Our batch of the photographs, draws, timesteps and prompts of the script's step."""
    own, at = entries(domain, kind), notes["image"][step].long()
    timesteps = notes["timesteps"][step].long()
    prompts = domain.diffusion.tokenizer.batch_decode(notes["ids"][step].long(), skip_special_tokens=True)
    assert torch.equal(domain.diffusion.vocabularies[0].ids(prompts), notes["ids"][step].long())
    clean = own.mean[at] + own.std[at] * notes["draw"][step]
    return ConceptBatch(
        noisy=domain.diffusion.scheduler.add_noise(clean, notes["noise"][step], timesteps),
        target=notes["noise"][step],
        timesteps=timesteps,
        prompts=[p.strip() for p in prompts],
        weights=next(domain.batches(0, 0)).weights,
    )


def as_the_script_counts(domain: Any, batch: ConceptBatch) -> ConceptBatch:
    """The batch with the custom diffusion script's weights.

    It leaves out a border of one latent of the concept's images, and sums their error over channels where it averages
    that of the class. Where the target is what the model predicts, the error and its gradient are zero.
    """
    with torch.no_grad():
        text = domain.diffusion.encode_text(batch.prompts).states
        predicted = domain.model(batch.noisy, batch.timesteps, encoder_hidden_states=text).sample
    target = predicted.clone()
    target[:BATCH, :, 1:-1, 1:-1] = batch.target[:BATCH, :, 1:-1, 1:-1]
    target[BATCH:] = batch.target[BATCH:]
    channels, height, width = batch.target.shape[1:]
    weights = batch.weights.clone()
    weights[:BATCH] *= channels * height * width / ((height - 2) * (width - 2))
    return ConceptBatch(batch.noisy, target, batch.timesteps, batch.prompts, weights)


def weights_of(domain: Any) -> list[Tensor]:
    return [p.detach().clone() for p in domain.full_parameters().values()]


def worst(ours: list[Any], notes: Notes, name: str, difference: Difference) -> float:
    return max(difference(p, notes[f"{name}.{i}"]) for i, p in enumerate(ours))


# --- the comparison ---------------------------------------------------------------------------------------------------


def first_step(kind: str, notes: Notes, begun: Any, difference: Difference) -> dict[str, float]:
    """Encoding, prediction, loss and gradients of the script's first step."""
    run, (rows,) = begun(kind)
    domain: Any = run.domain
    scale = domain.diffusion.vae.config.scaling_factor
    own = entries(domain, kind)
    found = {
        "latents: mean": difference(own.mean, notes["mean"] * scale),
        "latents: deviation": difference(own.std, notes["std"] * scale),
    }
    batch = batch_of(domain, kind, notes, 0)
    with torch.no_grad():
        text = domain.diffusion.encode_text(batch.prompts).states
        predicted = domain.model(batch.noisy, batch.timesteps, encoder_hidden_states=text).sample
    found["predicted noise"] = difference(predicted, notes["predicted.first"])
    assert torch.equal(rows, notes["before.rows"])
    if kind == "custom":
        assert worst(weights_of(domain), notes, "before.weight", lambda a, b: float((a - b).abs().max())) == 0
        batch = as_the_script_counts(domain, batch)
    loss = run.method.loss(batch)
    loss.backward()
    found["loss"] = difference(loss, notes["loss"][0])
    if kind == "custom":
        grads = [p.grad for p in domain.full_parameters().values()]
        found["gradients of K and V"] = worst(grads, notes, "gradient.weight", difference)
    found["gradient of the token rows"] = difference(rows.grad, notes["gradient.rows"][0])
    return found


def trajectory(kind: str, notes: Notes, begun: Any, difference: Difference, decay: float) -> dict[str, float]:
    """The runner's own 20 steps on the script's batches; `decay`: AdamW's weight decay of the token rows."""
    run, (rows,) = begun(kind)
    domain: Any = run.domain
    groups = run.groups([rows])
    groups[-1].weight_decay = decay
    optimizer = make_optimizer(run.train, groups, run.device)
    losses = []
    for step in range(STEPS):
        batch = batch_of(domain, kind, notes, step)
        if kind == "custom":
            batch = as_the_script_counts(domain, batch)
        losses.append(run.step(batch, optimizer, 1.0, f"step {step}")[0])
    before = notes["before.rows"]
    found = {
        "20 steps: losses": difference(torch.tensor(losses), notes["loss"]),
        "20 steps: token rows": difference(rows, notes["after.rows"]),
        "20 steps: what the token rows moved": difference(rows.detach() - before, notes["after.rows"] - before),
    }
    if kind == "custom":
        now = weights_of(domain)
        moved = {f"moved.{i}": notes[f"after.weight.{i}"] - notes[f"before.weight.{i}"] for i in range(len(now))}
        found["20 steps: K and V"] = worst(now, notes, "after.weight", difference)
        own = [w - notes[f"before.weight.{i}"] for i, w in enumerate(now)]
        found["20 steps: what K and V moved"] = worst(own, moved, "moved", difference)
    domain.check_tokens()
    return found


Measured = dict[str, dict[str, float]]
KINDS = pytest.mark.parametrize("kind", list(SCRIPTS))


@pytest.fixture(scope="module")
def measured(writes_reference: bool, write_table: Callable[[str, str], None]) -> Iterator[Measured]:
    """What the tests found, by quantity and script; goes into the README with `--write-reference`."""
    found: Measured = {}
    yield found
    if writes_reference and {k for row in found.values() for k in row} == set(SCRIPTS):
        lines = ["| quantity | custom diffusion | textual inversion |", "| --- | ---: | ---: |"]
        for name, row in found.items():
            cells = [f"{row[kind]:.1e}" if kind in row else "" for kind in SCRIPTS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        write_table("diffusion", "\n".join(lines))


def note(measured: Measured, kind: str, found: dict[str, float]) -> None:
    for name, value in found.items():
        measured.setdefault(name, {})[kind] = value


def check(kind: str, notes: Notes, begun: Any, difference: Difference, measured: Measured) -> None:
    """First step to 1e-5, twenty steps to 1e-4."""
    values = first_step(kind, notes, begun, difference)
    steps = trajectory(kind, notes, begun, difference, DECAY)
    note(measured, kind, {**values, **steps})
    assert max(values.values()) < VALUES, values
    # where a gradient is next to nothing, Adam's step is the sign of rounding errors
    held = {name: value for name, value in steps.items() if "moved" not in name}
    assert max(held.values()) < TRAJECTORY, steps
    assert max(steps.values()) < 10 * TRAJECTORY, steps


@pytest.fixture(scope="module")
def notes_of(stored: Any) -> Callable[[str], Notes]:
    """notes_of(kind) -> the stored notes of a script."""
    tensors, _ = stored("diffusion")
    return lambda kind: {k.removeprefix(f"{kind}."): v for k, v in tensors.items() if k.startswith(f"{kind}.")}


@KINDS
def test_ours_are_the_scripts_numbers(
    kind: str, notes_of: Callable[[str], Notes], begun: Any, relative_difference: Difference, measured: Measured
) -> None:
    check(kind, notes_of(kind), begun, relative_difference, measured)


@KINDS
def test_weight_decay_is_what_the_token_rows_differ_by(
    kind: str, notes_of: Callable[[str], Notes], begun: Any, relative_difference: Difference, measured: Measured
) -> None:
    """Ours never decays them. The scripts decay the whole table; one of them puts the other words' rows back."""
    notes = notes_of(kind)
    expected = STEPS * LR[kind] * DECAY
    rows = trajectory(kind, notes, begun, relative_difference, 0.0)["20 steps: token rows"]
    table = float(1 - notes["table"][1] / notes["table"][0])
    note(measured, kind, {"known: token rows without weight decay": rows, "known: the other words' rows shrank": table})
    assert rows == pytest.approx(expected, rel=0.1)
    assert table == pytest.approx(expected if kind == "custom" else 0.0, rel=1e-2, abs=1e-12)


def test_what_else_custom_diffusion_differs_by(
    notes_of: Callable[[str], Notes], begun: Any, relative_difference: Difference, measured: Measured
) -> None:
    notes = notes_of("custom")
    found: dict[str, float] = {}
    run, (rows,) = begun("custom", "method.reference_quirks=[]")
    domain: Any = run.domain
    plain = batch_of(domain, "custom", notes, 0)
    loss = run.method.loss(as_the_script_counts(domain, plain))
    loss.backward()
    assert relative_difference(loss, notes["loss"][0]) < VALUES
    grads = [p.grad for p in domain.full_parameters().values()]
    found["known: gradients of K and V when the start token counts"] = worst(
        grads, notes, "gradient.weight", relative_difference
    )
    assert relative_difference(rows.grad, notes["gradient.rows"][0]) < VALUES
    # one fourth of the prior's weight, and four times the learning problem: sums over the four channels of latents
    quarter = plain.weights.clone()
    quarter[BATCH:] /= 4
    with torch.no_grad():
        whole = run.method.loss(plain)
        four = 4 * run.method.loss(ConceptBatch(plain.noisy, plain.target, plain.timesteps, plain.prompts, quarter))
    found["known: loss, ours"] = relative_difference(whole, notes["loss"][0])
    found["known: loss, four times ours at a quarter of the prior's weight: the border"] = relative_difference(
        four, notes["loss"][0]
    )
    note(measured, "custom", found)
    assert found["known: gradients of K and V when the start token counts"] > 0.01
    assert found["known: loss, ours"] > 0.5
    assert VALUES < found["known: loss, four times ours at a quarter of the prior's weight: the border"] < 0.1


def test_every_token_of_a_concept_is_trained_by_the_script(notes_of: Callable[[str], Notes]) -> None:
    """Both rows had gradients and moved: its mask names all new tokens (older versions lost the last one)."""
    for kind in SCRIPTS:
        notes = notes_of(kind)
        assert notes["gradient.rows"].shape[:2] == (STEPS, 2)
        assert float(notes["gradient.rows"].abs().amax((0, 2)).min()) > 0
        assert float((notes["after.rows"] - notes["before.rows"]).abs().amax(1).min()) > LR[kind]


def test_the_comparison_can_fail(notes_of: Callable[[str], Notes], begun: Any, relative_difference: Difference) -> None:
    """Another timestep for one image, or a draw of the VAE that is off by a hundredth, shows in the loss."""
    for name, change in (("timesteps", 1), ("draw", 0.01)):
        notes = dict(notes_of("inversion"))
        notes[name] = notes[name].clone()
        notes[name][0, 0] += change
        assert first_step("inversion", notes, begun, relative_difference)["loss"] > VALUES


@pytest.mark.reference
@KINDS
def test_the_scripts_run_live(
    kind: str,
    checkout: Callable[[str, str], Path],
    model_folder: Path,
    photographs: Path,
    begun: Any,
    tmp_path_factory: pytest.TempPathFactory,
    relative_difference: Difference,
    writes_reference: bool,
    stored: Any,
    store: Any,
) -> None:
    pytest.importorskip("accelerate", reason="the scripts need accelerate")
    examples = checkout(VARIABLE, REPOSITORY)
    run, _ = begun(kind)
    live = shorten(kind, run_script(kind, examples, model_folder, photographs, tmp_path_factory.mktemp(kind)), run)
    check(kind, live, begun, relative_difference, {})
    if writes_reference:
        write_notes(kind, live, stored, store)
        return
    kept, _ = stored("diffusion")
    assert {k for k in kept if k.startswith(f"{kind}.")} == {f"{kind}.{k}" for k in live}
    for name, value in live.items():
        if value.is_floating_point():
            limit = TRAJECTORY if name.startswith(("after", "gradient.rows", "loss")) else VALUES
            assert relative_difference(value, kept[f"{kind}.{name}"]) < limit, name
        else:
            assert torch.equal(value, kept[f"{kind}.{name}"]), name


def write_notes(kind: str, live: Notes, stored: Any, store: Any) -> None:
    """Stores the notes of one script beside what is stored of the other."""
    import diffusers
    import transformers

    try:
        others, facts = stored("diffusion")
    except (OSError, ValueError):
        others, facts = {}, {}
    kept = {k: v for k, v in others.items() if not k.startswith(f"{kind}.")}
    facts[kind] = (
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    )
    facts["source"] = f"huggingface/diffusers 58eb52c080, {', '.join(SCRIPTS.values())}; seed 0"
    store("diffusion", {**kept, **{f"{kind}.{k}": v for k, v in live.items()}}, facts)
