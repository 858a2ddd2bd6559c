"""How the files of an export are called, and how they are used: lines for a terminal, a model card in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dualcl.benchmark.core.text import printable
from dualcl.benchmark.models.tokens import CARD
from dualcl.results.writers.markdown import markdown_code, markdown_text

README = "README.md"
EMBEDDINGS = "learned_embeds"
#: keys of concepts whose LoRAs each prompt weighs anew
ROUTING = "routing.safetensors"
#: of methods that read pictures: the weights, and what is made of each concept's
IP_ADAPTER, IMAGE_EMBEDDINGS = "ip-adapter.safetensors", "image_embeds"
#: weight file of each LoRA format, named as its readers expect
LORA_FILES = {
    "diffusers-lora": "pytorch_lora_weights.safetensors",
    "kohya": "lora.safetensors",
    "peft": "adapter_model.safetensors",
}
NEEDS_PEFT = "diffusers loads LoRAs with peft: pip install peft"
#: our samplers in diffusers
SAMPLERS = {
    "ddim": ("DDIMScheduler", "steps_offset=1, clip_sample=False"),
    "dpm": ("DPMSolverMultistepScheduler", "steps_offset=1"),
}


def embedding_file(placeholder: str) -> str:
    """File name of a concept's embedding, `c1.safetensors` for `<c1>`: some tools call an embedding by its file."""
    return re.sub(r"[^\w.-]+", "", placeholder) + ".safetensors"


def lora_folder(placeholder: str) -> str:
    """Folder of a concept's own LoRA."""
    return Path(embedding_file(placeholder)).stem


def code(card: Mapping[str, Any], base: str, out: str, *imports: str) -> list[str]:
    """Python that draws as the run did with an export in the folder `out`; `base` says in Python where its base is."""
    kind, made_on, sampling, words = card["kind"], card["base"], card["sampling"], card["concepts"]
    sampler, settings = SAMPLERS[sampling["scheduler"]]
    names = ", ".join(sorted((sampler, made_on["pipeline"])))
    options = [f"{k}={v!r}" for k in ("revision", "variant") if (v := made_on[k]) is not None]
    whole = ", ".join([base, *options]) if kind != "merged" else "out"
    lines = ["from pathlib import Path", "import torch", f"from diffusers import {names}", *imports]
    lines += ["from peft import PeftModel"] * (kind == "peft")
    lines += ["from safetensors.torch import load_file"] * (kind == "ip-adapter")
    lines += [
        f"out = Path({out!r})",
        # parts are loaded in the types in which they are stored, and those of two types do not run
        f"pipe = {made_on['pipeline']}.from_pretrained({whole}).to(torch.float32)",
        f"pipe.scheduler = {sampler}.from_config(pipe.scheduler.config, {settings})",
    ]
    given = []
    if kind == "peft":
        lines.append("PeftModel.from_pretrained(pipe.unet, out)  # changes pipe.unet")
    elif kind in LORA_FILES:
        lines.append(f"pipe.load_lora_weights(out, weight_name={LORA_FILES[kind]!r})")
    elif kind == "ip-adapter":
        file = f"{IMAGE_EMBEDDINGS}/{embedding_file(words[0]['placeholder'])}"
        lines += [
            f"pipe.load_ip_adapter(str(out), subfolder='', weight_name={IP_ADAPTER!r}, image_encoder_folder=None)",
            f"pipe.set_ip_adapter_scale({card['image_scale']})",
            f"seen = load_file(out / {file!r})['image_embeds']",
        ]
        both = "torch.cat([torch.zeros_like(seen), seen])" if sampling["guidance"] > 1 else "seen"
        given.append(f"ip_adapter_image_embeds=[{both}]")
    if kind != "merged" and words:
        lines.append(f"pipe.load_textual_inversion(sorted(out.glob('{EMBEDDINGS}/*.safetensors')))")
    prompt = f"a photo of {words[0]['placeholder']}" if words else "a photo"
    if sampling["negative_prompt"]:
        given.append(f"negative_prompt={sampling['negative_prompt']!r}")
    given += [f"num_inference_steps={sampling['steps']}", f"guidance_scale={sampling['guidance']}"]
    given.append("generator=torch.Generator().manual_seed(0)")
    return [*lines, f"image = pipe({', '.join([repr(prompt), *given])}).images[0]"]


def _drawn(card: Mapping[str, Any]) -> str:
    sampling = card["sampling"]
    return (
        f"the run's pictures: scheduler {sampling['scheduler']} ({SAMPLERS[sampling['scheduler']][0]}), "
        f"{sampling['steps']} steps, guidance {sampling['guidance']}; others draw other pictures from the same seed"
    )


def _notes(card: Mapping[str, Any]) -> list[str]:
    """What the format asks for, and what it does not hold."""
    notes = [NEEDS_PEFT] * (card["kind"] in LORA_FILES)
    if routing := card.get("routing"):
        each = lora_folder(card["concepts"][0]["placeholder"])
        notes.append(
            f"a LoRA for each concept, as {each}; prompts weigh them by {routing['file']}: generate from the run"
        )
    if card["kind"] == "textual-inversion" and card["weights_changed"]:
        notes.append("note: the run also changed weights of the U-Net, which embeddings do not hold")
    return notes


def describe(card: Mapping[str, Any], out: str | Path) -> list[str]:
    """What was exported, and the Python that draws with it, a line each; `card` as `export` returns it."""
    lora, kind, base = card["lora"], card["kind"], card["base"]
    lines = [f"{kind}: {', '.join(c['placeholder'] + ' ' + c['name'] for c in card['concepts'])}"]
    if lora is not None:
        cut = f", relative error {lora['relative_error']:.2e}" if lora["relative_error"] else ", exact"
        lines.append(f"rank {lora['rank']}{cut}")
    lines.append(f"made on {base['name']} (sha256 {base['weights_sha256'][:12]}): {card['model']}")
    lines = [printable(line) for line in (*lines, _drawn(card), *_notes(card))]
    if card.get("routing"):
        return lines
    return [*lines, "in Python:", *code(card, repr(card["model"]), str(out))]


def model_card(card: Mapping[str, Any]) -> str:
    """The README.md of an export, as model hubs read it; it names no place of this machine."""
    kind, base, run = card["kind"], card["base"], card["run"]
    bundled, hub = base["weights"] == "bundled", base["weights"].startswith("hub: ")
    about = {
        "library_name": "peft" if kind == "peft" else "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["dualcl", "lora" if kind in LORA_FILES else kind],
        # hubs take it for an id of theirs
        **({"base_model": base["name"]} if hub else {}),
    }
    where = "bundled with dualcl" if bundled else "a hub's id" if hub else "a directory; say where it is"
    words = [f"- {markdown_code(c['placeholder'])}: {markdown_text(c['name'])}" for c in card["concepts"]]
    place, imports = repr(base["name"]), []
    if bundled:
        place = f"bundled_diffusion()[{place}]"
        imports.append("from dualcl.benchmark.models.bundled import bundled_diffusion")
    block = [] if card.get("routing") else ["", "```python", *code(card, place, ".", *imports), "```"]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(about, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {markdown_text(run['label'])}, {markdown_text(run['preset'])}, seed {run['seed']}: {kind}",
            "",
            f"What `dualcl {card['dualcl']}` exported. Base model: {markdown_text(base['name'])} ({where}; sha256 "
            f"`{base['weights_sha256']}`). In prompts:",
            "",
            *(words or ["- no new words"]),
            "",
            *(f"{line[0].upper()}{line[1:]}." for line in (_drawn(card), *_notes(card))),
            *block,
            "",
            f"[{CARD}]({CARD}) says the rest.",
            "",
        ]
    )
