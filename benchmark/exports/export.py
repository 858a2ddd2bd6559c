"""What a customization run learnt, in the formats of other tools: LoRA files, token embeddings, a whole model.

A run's update of a projection is W_now - W_init, whatever method made it. It is factorised by a singular value
decomposition in float64 into as many rank-one terms as are above the rounding of the float32 weights, so the sum of t
tasks' rank-r updates becomes one LoRA of rank r t at most, without loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.files import atomic_write, write_json
from dualcl.benchmark.core.machine import package_version
from dualcl.benchmark.domains.concept_evaluation import EvalConfig
from dualcl.benchmark.domains.customization import Customization
from dualcl.benchmark.exports.usage import (
    EMBEDDINGS,
    IMAGE_EMBEDDINGS,
    IP_ADAPTER,
    LORA_FILES,
    README,
    ROUTING,
    embedding_file,
    lora_folder,
    model_card,
)
from dualcl.benchmark.models.bundled import bundled_diffusion
from dualcl.benchmark.models.image_branch import ImagePrompts
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.models.tokens import CARD, exported_card
from dualcl.benchmark.runs.restore import restore
from dualcl.benchmark.runs.runner import Run

FORMAT, VERSION = "dualcl-export", 1


# --- the update -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """before + up @ down = after: up (d_out, r), down (r, d_in), float64, singular values shared evenly."""

    up: Tensor
    down: Tensor
    #: squared Frobenius norms of the update and of what a limit on the rank cut off
    total: float
    lost: float

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.up.shape[1]

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """(up, down) in float32 with zero terms up to `rank`."""
        up = torch.zeros(self.up.shape[0], rank)
        down = torch.zeros(rank, self.down.shape[1])
        up[:, : self.rank], down[: self.rank] = self.up, self.down
        return up, down


def factorise(before: Tensor, after: Tensor, rank: int | None = None) -> Factors:
    """The update of a float32 weight (d_out, d_in) as a product of factors, of at most `rank` terms when given.

    Singular values up to eps ||after||_F are the rounding of the weights, not learnt: each entry of a float32 weight is
    right to eps / 2 of itself (eps = 2^-23), and the rest allows for the sum over tasks.
    """
    after = after.detach().cpu().double()
    update = after - before.detach().cpu().double()
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    found = int((values > torch.finfo(torch.float32).eps * after.norm()).sum())
    kept = found if rank is None else min(rank, found)
    root = values[:kept].sqrt()
    squares = values[:found].square()
    return Factors(
        left[:, :kept] * root, root[:, None] * right[:kept], float(squares.sum()), float(squares[kept:].sum())
    )


def _bits(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


class Pretrained:
    """The base model as it was loaded: the sites' weights, and a hash of every other weight of the U-Net."""

    def __init__(self, domain: Customization) -> None:
        modules = {s.module_name: s.module for s in domain.sites().values()}
        self.weights = {name: module.weight.detach().cpu().clone() for name, module in modules.items()}
        sites = {f"{name}.weight" for name in modules}
        self.others = {n: _bits(t) for n, t in domain.model.state_dict().items() if n not in sites}

    def changed(self, state: Mapping[str, Tensor]) -> list[str]:
        """Weights of the U-Net, sites aside, that are not as they were."""
        return [name for name, bits in self.others.items() if _bits(state[name]) != bits]


def plain_state(domain: Customization) -> dict[str, Tensor]:
    """The U-Net's weights under their names of the pretrained model, whatever modules a method put in its place."""
    modules = {s.module_name: s.module for s in domain.sites().values()}
    state = {
        name: tensor
        for name, tensor in domain.model.state_dict().items()
        if not any(name.startswith(f"{module}.") for module in modules)
    }
    for name, module in modules.items():
        state.update({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()})
    return state


# --- what is exported -------------------------------------------------------------------------------------------------


@dataclass
class Learnt:
    """A run's state, ready to be written in any format."""

    run: Run
    domain: Customization
    state: dict[str, Tensor]
    factors: dict[str, Factors]
    #: weights of the U-Net that changed outside the sites
    changed: list[str]
    #: of a method whose updates each prompt weighs anew: the factors of every concept
    apart: list[dict[str, Factors]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """Largest rank of all sites: the one of the file. 0 when no site changed."""
        return max(f.rank for factors in (self.factors, *self.apart) for f in factors.values())

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what a limit on the rank cut off, relative to that of the update, all sites together."""
        every = [f for factors in (self.factors, *self.apart) for f in factors.values()]
        total = sum(f.total for f in every)
        return float((sum(f.lost for f in every) / total) ** 0.5) if total else 0.0

    def embeddings(self) -> dict[str, Tensor]:
        """Rows (n_tokens, D) float32 by placeholder."""
        tokens = self.domain.tokens
        return {name: r.detach().float().cpu() for name, r in zip(tokens.placeholders, tokens.rows, strict=True)}

    def card(self, kind: str) -> dict[str, Any]:
        """What the exported files are and come from."""
        resolved, info, tokens = self.run.resolved, self.domain.diffusion.info, self.domain.tokens
        base, shown = resolved.section("base", BaseConfig), resolved.section("eval", EvalConfig)
        routed, images = self.run.method.routed(), self.domain.diffusion.images
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "dualcl": package_version("dualcl"),
            "base": {
                "name": info.name,
                "weights": info.weights,
                "weights_sha256": info.weights_sha256,
                "parts_sha256": info.parts,
                "revision": base.revision,
                "variant": base.variant,
                "weights_dtype": base.weights_dtype,
                "prediction_type": info.prediction_type,
                "pipeline": self.domain.diffusion.pipeline,
            },
            "run": {
                "preset": resolved.preset,
                "method": resolved.method,
                "label": resolved.general.label or resolved.method,
                "seed": resolved.general.seed,
                "precision": resolved.general.precision,
                "tasks": len(tokens.placeholders),
                "joint": self.run.joint,
                "config_hash": (self.run.folder.read_record() or {}).get("config_hash"),
                **({"extends": self.domain.extends} if self.domain.extends else {}),
            },
            # an export that is put on the base finds its words there
            "concepts": ((exported_card(base.model) or {}).get("concepts", []) if kind == "merged" else [])
            + [
                {"name": c.name, "noun": c.noun, "placeholder": name, "words": tokens.words(i)}
                for i, (c, name) in enumerate(zip(self.domain.stream.concepts, tokens.placeholders, strict=False))
            ],
            "weights_changed": bool(self.rank or self.changed),
            "lora": {"rank": self.rank, "alpha": self.rank, "relative_error": self.relative_error}
            if kind in LORA_FILES
            else None,
            **({"routing": {**routed.rule, "file": ROUTING}} if routed and kind in LORA_FILES else {}),
            **({"image_scale": images.scale} if isinstance(images, ImagePrompts) else {}),
            "sampling": {
                "scheduler": shown.scheduler,
                "steps": shown.steps,
                "guidance": shown.guidance,
                "negative_prompt": shown.negative_prompt,
            },
        }


def header(card: Mapping[str, Any]) -> dict[str, str]:
    """The card in a few strings, for the header of a safetensors file."""
    return {
        "format": "pt",
        "dualcl_version": str(card["dualcl"]),
        "dualcl_kind": str(card["kind"]),
        "dualcl_base": str(card["base"]["name"]),
        "dualcl_base_sha256": str(card["base"]["weights_sha256"]),
        "dualcl_method": str(card["run"]["method"]),
        "dualcl_placeholders": json.dumps([c["placeholder"] for c in card["concepts"]]),
    }


def learnt(
    run_dir: str | Path,
    rank: int | None = None,
    *,
    method: str | None = None,
    data: str | None = None,
    base: str | None = None,
) -> Learnt:
    """Restores a run, see `restore`, and finds what it changed; `rank` limits the rank of the factors."""
    before: list[Pretrained] = []

    def loaded(domain: Any) -> None:
        if not isinstance(domain, Customization):
            raise UserError(f"{run_dir} is a run of the domain {domain.name}; only customization runs can be exported")
        before.append(Pretrained(domain))

    run = restore(run_dir, loaded=loaded, method=method, data=data, base=base)
    domain: Any = run.domain
    state = plain_state(domain)
    factors = {name: factorise(w, state[f"{name}.weight"], rank) for name, w in before[0].weights.items()}
    apart = []
    if (routed := run.method.routed()) is not None:
        modules = {name: site.module_name for name, site in domain.sites().items()}
        for update in routed.updates:
            own = {modules[name]: a.double().cpu() @ b.double().cpu() for name, (a, b) in update.items()}
            weights = {name: before[0].weights[name].double() for name in own}
            apart.append({name: factorise(w, w + own[name], rank) for name, w in weights.items()})
    return Learnt(run, domain, state, factors, before[0].changed(state), apart)


# --- the formats ------------------------------------------------------------------------------------------------------


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    with atomic_write(path) as handle:
        handle.write(save({k: v.contiguous() for k, v in tensors.items()}, metadata=dict(metadata)))


def write_embeddings(found: Learnt, out: Path, card: Mapping[str, Any]) -> None:
    """learned_embeds/<concept>.safetensors: diffusers' `load_textual_inversion` takes one concept from a file."""
    for name, rows in found.embeddings().items():
        _write_tensors(out / EMBEDDINGS / embedding_file(name), {name: rows}, header(card))


def lora_tensors(found: Learnt, kind: str) -> dict[str, Tensor]:
    """The factors under the key names of a LoRA format.

    All sites have the file's rank, filled up with zeros, and alpha = rank: readers that take one rank or one alpha
    for the whole file then scale none of them.
    """
    out: dict[str, Tensor] = {}
    for module, factors in found.factors.items():
        up, down = factors.padded(found.rank)
        name = found.domain.diffusion.lora_key(module, kind)
        if kind == "kohya":
            out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = down, up
            out[f"{name}.alpha"] = torch.tensor(float(found.rank))
        else:
            out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = down, up
    return out


def write_lora(found: Learnt, out: Path, card: Mapping[str, Any]) -> None:
    """One LoRA of the U-Net for all concepts, or a folder of its own for each, and their embeddings."""
    method = found.run.resolved.method
    if found.changed:
        raise UserError(
            f"{method} changed {len(found.changed)} weights of the U-Net outside K and V of its cross-attentions, "
            f"which a LoRA of these cannot hold ({found.changed[0]}, ...); use --to merged"
        )
    if found.rank == 0:
        raise UserError(f"{method} changed no weight of the U-Net, so there is no LoRA; use --to textual-inversion")
    routed = found.run.method.routed()
    if routed is None:
        _write_lora(found, out, card)
    else:
        _write_tensors(out / ROUTING, {"keys": routed.keys.cpu()}, header(card))
        for name, factors in zip(found.embeddings(), found.apart, strict=True):
            _write_lora(replace(found, factors=factors), out / lora_folder(name), card)
    write_embeddings(found, out, card)


def _write_lora(found: Learnt, out: Path, card: Mapping[str, Any]) -> None:
    kind, metadata = str(card["kind"]), header(card)
    if kind == "kohya":
        rank = str(found.rank)
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": f"{rank}.0"}
    if kind == "peft":
        write_json(
            out / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": None,
                "base_model_name_or_path": card["base"]["name"],
                "inference_mode": True,
                "r": found.rank,
                "lora_alpha": found.rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "target_modules": list(found.factors),
            },
        )
    _write_tensors(out / LORA_FILES[kind], lora_tensors(found, kind), metadata)


def write_ip_adapter(found: Learnt, out: Path, card: Mapping[str, Any]) -> None:
    """ip-adapter.safetensors for diffusers' `load_ip_adapter`, image_embeds/<concept>.safetensors, and the words."""
    images, method = found.domain.diffusion.images, found.run.resolved.method
    if not isinstance(images, ImagePrompts):
        raise UserError(f"{method} reads no tokens of pictures, so there is no IP-Adapter; use another --to")
    branch = images.branch
    if branch.n_tokens != 4:
        raise UserError(f"an IP-Adapter has 4 tokens, this encoder gives {branch.n_tokens}; generate from the run")
    _write_tensors(out / IP_ADAPTER, branch.ip_adapter(), header(card))
    for i, name in enumerate(found.embeddings()):
        given = {"image_embeds": images.embeddings[i].detach().cpu()[None, None]}
        _write_tensors(out / IMAGE_EMBEDDINGS / embedding_file(name), given, header(card))
    write_embeddings(found, out, card)


def write_merged(found: Learnt, out: Path, card: Mapping[str, Any]) -> None:
    """A whole model in diffusers layout: the tokenizer knows the concepts, the network holds the updates."""
    if found.apart:
        raise UserError(
            f"{found.run.resolved.method} weighs its updates anew for each prompt, so no one model holds them; use "
            "--to diffusers-lora, which writes a LoRA for each concept"
        )
    found.domain.diffusion.save(out, found.state, [found.domain.tokens.table()])


WRITERS: dict[str, Callable[[Learnt, Path, Mapping[str, Any]], None]] = {
    "diffusers-lora": write_lora,
    "kohya": write_lora,
    "peft": write_lora,
    "textual-inversion": write_embeddings,
    "ip-adapter": write_ip_adapter,
    "merged": write_merged,
}


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to that takes the name `path` when all is written; UserError when `path` holds anything."""
    path = path.expanduser().resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder; choose another OUT")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export(
    run_dir: str | Path,
    kind: str,
    out: str | Path,
    rank: int | None = None,
    *,
    method: str | None = None,
    data: str | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Writes the run's state after its last finished task as `kind` to the folder `out`; returns its card.

    What is returned says besides, as `model`, where the base model is here. `rank` limits the rank of a LoRA; the card
    then says the relative error. `method`, `data`, `base`: see `restore`. Raises UserError for an unknown format, a run
    that the format cannot hold, or an `out` that is not empty.
    """
    if kind not in WRITERS:
        raise UserError(f"unknown --to {kind!r}; {nearest(kind, WRITERS, 'formats')}")
    if rank is not None and kind not in LORA_FILES:
        raise UserError(f"--rank is for LoRA formats ({', '.join(LORA_FILES)}), not for {kind}")
    with new_folder(Path(out)) as folder:
        found = learnt(run_dir, rank, method=method, data=data, base=base)
        if found.domain.diffusion.images is not None and kind != "ip-adapter":
            raise UserError(
                f"{found.run.resolved.method} also reads tokens of pictures, which {kind} does not hold; use --to "
                "ip-adapter, or a run with method.image_scale=0"
            )
        card = found.card(kind)
        WRITERS[kind](found, folder, card)
        write_json(folder / CARD, card)
        with atomic_write(folder / README) as handle:
            handle.write(model_card(card).encode())
    return {**card, "model": _place(found)}


def _place(found: Learnt) -> str:
    """Where the base model is here: a directory, or a hub's id."""
    model = found.run.resolved.section("base", BaseConfig).model
    if found.domain.diffusion.info.weights == "local directory":
        return os.path.abspath(os.path.expanduser(model))
    return str(bundled_diffusion().get(model, model))
