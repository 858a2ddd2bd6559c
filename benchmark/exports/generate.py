"""Images from what a run learnt: of a run's folder, or of an exported one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from torch import Tensor

from dualcl.benchmark.core.devices import pick_device
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import atomic_write
from dualcl.benchmark.core.reading import check_text, read_json
from dualcl.benchmark.domains.concept_evaluation import EvalConfig
from dualcl.benchmark.exports.export import FORMAT, VERSION
from dualcl.benchmark.exports.usage import EMBEDDINGS, IMAGE_EMBEDDINGS, IP_ADAPTER, LORA_FILES, embedding_file
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.image_branch import ImageBranch, ImagePrompts, cross_attentions
from dualcl.benchmark.models.sampling import sample
from dualcl.benchmark.models.text_to_image import DTYPES, BaseConfig, SchedulerName, TextToImage
from dualcl.benchmark.models.tokens import CARD, ConceptTokens, Word, as_read, card_words, expand, exported_card
from dualcl.benchmark.runs.folder import RECORD
from dualcl.benchmark.runs.restore import restore
from dualcl.datasets.reading.views import open_image

Say = Callable[[str], None]
#: a concept in a prompt: <c1>, <its name>, or <#1>, its number; not a special token such as <|endoftext|>
TAG = re.compile(r"<[^<>|]+>")
NUMBER = re.compile(r"<#([1-9][0-9]{0,8})>")
#: kinds of exports without a LoRA
OTHER_KINDS = ("textual-inversion", "ip-adapter", "merged")
#: what is read of a card, and of each of its concepts
_CARD: dict[str, Any] = {
    "kind": str,
    **{f"base.{key}": str for key in ("name", "weights", "weights_dtype", "weights_sha256")},
    **{f"base.{key}": str | None for key in ("revision", "variant")},
    **{f"run.{key}": str for key in ("method", "precision")},
    **{f"sampling.{key}": str for key in ("scheduler", "negative_prompt")},
    "sampling.steps": int,
    "sampling.guidance": int | float,
    "concepts": list,
}
_WORD = {"placeholder": str, "words": list, "name": str}


@dataclass
class Model:
    """A diffusion model that knows concepts, and how its images are made unless told otherwise."""

    diffusion: TextToImage
    words: list[Word]
    precision: str
    scheduler: SchedulerName
    steps: int
    guidance: float
    negative_prompt: str
    #: what images are made from, for their PNG text
    source: str
    #: keeps a restored run's modules, in which parts of the model live
    owner: Any = field(default=None, repr=False)

    def autocast(self) -> torch.autocast:
        """The precision of the run."""
        enabled = self.precision != "fp32"
        return torch.autocast(
            self.diffusion.device.type, dtype=DTYPES[self.precision] if enabled else None, enabled=enabled
        )


def _slug(text: str) -> str:
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


def expand_prompt(prompt: str, words: Sequence[Word], tokenizer: Any) -> tuple[str, list[Word]]:
    """The prompt with every concept's tokens in place of its tag, and the concepts it holds, as `tokenizer` finds them.

    A tag is a placeholder (`<c1>`), a concept's name (`<cat>`), or its number among `words` (`<#1>`). Raises UserError
    for a tag that is none of these, or may mean several concepts.
    """

    def replace(match: re.Match[str]) -> str:
        tag = match.group()
        wanted, read = _slug(tag), as_read(tokenizer, tag)
        written = [w for w in words if as_read(tokenizer, w.placeholder) == read]
        if not written and (number := NUMBER.fullmatch(tag)):
            found = [w for i, w in enumerate(words, 1) if i == int(number[1])]
        else:
            found = [w for w in words if w in written or (wanted and _slug(w.name) == wanted)]
        if len(found) > 1:
            numbers = [f"<#{words.index(w) + 1}>" for w in found]
            meant = (f"{n} ({w.name}, placeholder {w.placeholder})" for n, w in zip(numbers, found, strict=True))
            raise UserError(f"{tag} may be {' or '.join(meant)}; write the number, such as {numbers[0]}")
        if not found:
            known = ", ".join(f"{w.placeholder} ({w.name})" for w in words)
            raise UserError(f"unknown placeholder {tag} in {prompt!r}; this model knows: {known or 'none'}")
        if written:
            return tag
        beside = prompt[: match.start()][-1:], prompt[match.end() :][:1]
        before, after = (" " if c.strip() else "" for c in beside)  # a word may have to stand alone
        return f"{before}{found[0].placeholder}{after}"

    check_text(prompt, "a prompt")
    text, held = expand(tokenizer, TAG.sub(replace, prompt), [w.tokens for w in words])
    return text, [words[i] for i in held]


# --- models -----------------------------------------------------------------------------------------------------------


def open_model(
    folder: str | Path,
    device: str = "auto",
    *,
    base: str | None = None,
    after: int | None = None,
    method: str | None = None,
    data: str | None = None,
    say: Say = print,
) -> Model:
    """The model of a run's folder or of an exported one.

    `base` names the model that an exported LoRA or embedding is put on (default: the one it was made on); `say` is told
    when that is another one. Of a run it is where its own base is now. `method`, `data`: files of plug-ins, see
    `restore`. Raises UserError when the folder is neither, or does not fit the base.
    """
    path = Path(folder)
    if (path / CARD).is_file():
        if after is not None:
            raise UserError(f"{path} is an exported model with one state; leave out --after")
        if method is not None or data is not None:
            raise UserError(f"{path} is an exported model and needs neither --method nor --data; leave them out")
        return _open_export(path, device, base, say)
    if not (path / RECORD).is_file():
        raise UserError(f"{path} is neither a run (no {RECORD}) nor an exported model (no {CARD})")
    return _open_run(path, device, after, method=method, data=data, base=base)


def _open_run(path: Path, device: str, after: int | None, **files: str | None) -> Model:
    run = restore(path, device, after=after, loaded=lambda domain: _check_domain(domain, path), **files)
    domain: Any = run.domain
    shown = run.resolved.section("eval", EvalConfig)
    tokens = domain.tokens
    return Model(
        diffusion=domain.diffusion,
        words=[
            *tokens.earlier,
            *(
                Word(name, tuple(tokens.words(i)), domain.stream.concepts[i].name)
                for i, name in enumerate(tokens.placeholders)
            ),
        ],
        precision=run.resolved.general.precision,
        scheduler=shown.scheduler,
        steps=shown.steps,
        guidance=shown.guidance,
        negative_prompt=shown.negative_prompt,
        source=f"{run.resolved.method} after task {len(tokens.placeholders)}",
        owner=run,
    )


def _check_domain(domain: Any, path: Path) -> None:
    if domain.name != "customization":
        raise UserError(f"{path} is a run of the domain {domain.name}; only customization runs make images")


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card: Any = read_json(path / CARD)
    except (OSError, ValueError) as error:
        raise UserError(f"{path / CARD} cannot be read ({error}); export again") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise UserError(f"{path / CARD} is not the card of an exported model; export again")
    if card.get("version") != VERSION:
        raise UserError(f"{path / CARD} has version {card.get('version')}, this dualcl reads {VERSION}; export again")
    wrong = [key for key, kind in _CARD.items() if not isinstance(_at(card, key), kind)]
    concepts = () if "concepts" in wrong else card["concepts"]
    wrong += [
        f"concepts[].{key}" for key, kind in _WORD.items() if not all(isinstance(_at(c, key), kind) for c in concepts)
    ]
    choices = {"kind": (*LORA_FILES, *OTHER_KINDS), "run.precision": DTYPES, "base.weights_dtype": DTYPES}
    wrong += [key for key, known in choices.items() if key not in wrong and _at(card, key) not in known]
    if wrong:
        raise UserError(f"{path / CARD} is damaged ({', '.join(wrong)}); export again")
    return card


def _at(tree: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _open_export(path: Path, device: str, base: str | None, say: Say) -> Model:
    card = _read_card(path)
    made_on, kind = card["base"], str(card["kind"])
    if card.get("routing"):
        method = card["run"]["method"]
        raise UserError(
            f"{path} holds a LoRA for each concept, which {method} weighs anew for each prompt; give the run's folder"
        )
    if kind == "merged":
        if base is not None:
            raise UserError(f"{path} is a whole model; leave out --base")
        # float32, for half precision would round the learnt projections
        config = BaseConfig(model=str(path))
    elif base is not None or made_on["weights"] == "local directory":
        if base is None:
            raise UserError(
                f"{path} was made on the model directory {made_on['name']}; say where it is with --base DIR"
            )
        config = BaseConfig(model=base, weights_dtype=made_on["weights_dtype"])
    else:
        config = BaseConfig(made_on["name"], made_on.get("revision"), made_on.get("variant"), made_on["weights_dtype"])
    diffusion = load(config, pick_device(device))
    words = [tuple(concept["words"]) for concept in card["concepts"]]
    earlier: list[Word] = []
    if kind != "merged":
        earlier = card_words(exported_card(config.model) or {"concepts": []})
        if diffusion.info.weights_sha256 != made_on["weights_sha256"]:
            say(
                f"note: {diffusion.info.name} (sha256 {diffusion.info.weights_sha256[:12]}) is not the model this was "
                f"made on, {made_on['name']} (sha256 {made_on['weights_sha256'][:12]}): expect other images"
            )
        words = _add_words(diffusion, card["concepts"], path)
        if kind in LORA_FILES:
            _add_lora(diffusion, _read_tensors(path / LORA_FILES[kind]), kind, path)
        if kind == "ip-adapter":
            _add_images(diffusion, words, card, path)
    return Model(
        diffusion=diffusion,
        words=earlier + [Word(own[0], own, c["name"]) for own, c in zip(words, card["concepts"], strict=True)],
        precision=card["run"]["precision"],
        **{key: card["sampling"][key] for key in ("scheduler", "steps", "guidance", "negative_prompt")},
        source=f"{card['run']['method']}, exported as {kind}",
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors has errors of its own beside OSError
        raise UserError(f"{path} cannot be read ({error}); export again") from None


def _add_words(diffusion: TextToImage, concepts: Sequence[Mapping[str, Any]], path: Path) -> list[tuple[str, ...]]:
    """Puts the exported embeddings in the text encoder; the tokens of each concept."""
    if not concepts:
        return []
    tokens = ConceptTokens(diffusion.vocabularies[0], len(concepts[0]["words"]))
    for concept in concepts:
        placeholder = concept["placeholder"]
        rows = _read_tensors(path / EMBEDDINGS / embedding_file(placeholder)).get(placeholder, torch.empty(0))
        width = tokens.base.weight.shape[1]
        if rows.shape != (tokens.n_tokens, width):
            has = "no rows" if rows.ndim < 2 else f"width {rows.shape[-1]}"
            raise UserError(
                f"the embedding of {placeholder} has {has}, the base model's text encoder width {width}; "
                "give the base model that it was made on"
            )
        tokens.add(placeholder, "random", "", torch.Generator(), rename=False)
        with torch.no_grad():
            tokens.rows[-1].copy_(rows)
    tokens.requires_grad_(False)
    tokens.to(diffusion.device)
    return [tuple(tokens.words(i)) for i in range(len(concepts))]


@torch.no_grad()
def _add_lora(diffusion: TextToImage, tensors: Mapping[str, Tensor], kind: str, path: Path) -> None:
    """Adds up @ down of every module to its weight (alpha is the rank: the scale is one)."""
    down, up = ("lora_down", "lora_up") if kind == "kohya" else ("lora_A", "lora_B")
    modules = {diffusion.lora_key(name, kind): m for name, m in diffusion.network.named_modules()}
    for key in [k for k in tensors if k.endswith(f".{down}.weight")]:
        name = key.removesuffix(f".{down}.weight")
        weight = getattr(modules.get(name), "weight", None)
        factors = tensors.get(f"{name}.{up}.weight", torch.empty(0)).double(), tensors[key].double()
        fits = factors[0].ndim == factors[1].ndim == 2 and factors[0].shape[1] == factors[1].shape[0]
        if not fits or weight is None or weight.shape != (factors[0].shape[0], factors[1].shape[1]):
            raise UserError(
                f"the base model {diffusion.info.name} has no projection that fits {name} of {path}; "
                "give the base model that it was made on"
            )
        weight.copy_(weight.double() + (factors[0] @ factors[1]).to(weight.device))


def _add_images(diffusion: TextToImage, words: list[tuple[str, ...]], card: Mapping[str, Any], path: Path) -> None:
    """Has the network read what an encoder made of each concept's pictures."""
    try:
        branch = ImageBranch.of_ip_adapter(_read_tensors(path / IP_ADAPTER))
        scale = float(card["image_scale"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path / IP_ADAPTER} is no IP-Adapter as dualcl exports it ({error}); export again") from None
    if branch.sizes != [a.to_k.out_features for a in cross_attentions(diffusion.network)]:
        raise UserError(
            f"the base model {diffusion.info.name} has no attentions that fit {path / IP_ADAPTER}; give the base model "
            "that it was made on"
        )
    tokenizer, known = diffusion.vocabularies[0].tokenizer, [list(own) for own in words]
    images = ImagePrompts(branch.to(diffusion.device), scale, tokenizer, lambda: known)
    for i, concept in enumerate(card["concepts"]):
        given = _read_tensors(path / IMAGE_EMBEDDINGS / embedding_file(concept["placeholder"])).get("image_embeds")
        if given is None or given.shape != (1, 1, branch.embedding):
            raise UserError(
                f"{path / IMAGE_EMBEDDINGS} does not hold {concept['placeholder']} as exported; export again"
            )
        images.embeddings[i] = given[0, 0].to(diffusion.device)
    diffusion.images = images


# --- images -----------------------------------------------------------------------------------------------------------


def generate(
    model: Model,
    prompts: Sequence[str],
    out: str | Path,
    *,
    n: int = 8,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: SchedulerName | None = None,
    negative_prompt: str | None = None,
    batch_size: int = 8,
    say: Say = print,
) -> list[Path]:
    """Writes `n` images of every prompt to `out` and returns their paths.

    Image k has the seed `seed` + k and is a function of model, prompt, settings and that seed alone; its PNG text says
    all of them. A file of the same name and the same text is written again, any other is left alone. `say` is told of
    prompts without a concept. Raises UserError for a wrong prompt or setting before any image is made.
    """
    most = model.diffusion.info.timesteps
    steps = model.steps if steps is None else steps
    if not 1 <= steps <= most:
        raise UserError(f"--steps must be from 1 to {most}, got {steps}")
    guidance = model.guidance if guidance is None else guidance
    if not 0 <= guidance < float("inf"):
        raise UserError(f"--guidance must be a number from 0 on, got {guidance}")
    if seed + n > 2**63:
        raise UserError(f"--seed must be less than 2^63 - n, got {seed}")
    negative = model.negative_prompt if negative_prompt is None else negative_prompt
    tokenizer = model.diffusion.vocabularies[0].tokenizer
    expanded, unlike = [], expand_prompt(negative, model.words, tokenizer)[0]
    for prompt in prompts:
        text, used = expand_prompt(prompt, model.words, tokenizer)
        if not used:
            known = ", ".join(w.placeholder for w in model.words)
            say(f"note: the prompt {prompt!r} holds no concept; this model knows: {known or 'none'}")
        expanded.append(text)
    for vocabulary in model.diffusion.vocabularies:  # too long a prompt is found here
        vocabulary.ids([*expanded, unlike])

    folder, paths = Path(out), []
    for prompt, text in zip(prompts, expanded, strict=True):
        facts = {
            "prompt": prompt,
            "scheduler": str(scheduler or model.scheduler),
            "steps": str(steps),
            "guidance": str(guidance),
            "negative_prompt": negative,
            "model": model.source,
        }
        for start in range(seed, seed + n, batch_size):
            seeds = range(start, min(start + batch_size, seed + n))
            with model.autocast():
                images = sample(
                    model.diffusion,
                    [text] * len(seeds),
                    [torch.Generator().manual_seed(s) for s in seeds],
                    scheduler=scheduler or model.scheduler,
                    steps=steps,
                    guidance=guidance,
                    batch_size=batch_size,
                    negative_prompt=unlike,
                )
            paths += [_save(folder, image, {**facts, "seed": str(s)}) for image, s in zip(images, seeds, strict=True)]
    return paths


def _save(folder: Path, image: Tensor, facts: Mapping[str, str]) -> Path:
    stem, number = f"{_slug(facts['prompt'])[:60].strip('-') or 'image'}-{facts['seed']}", 1
    path = folder / f"{stem}.png"
    while path.exists() and _png_text(path) != facts:
        number += 1
        path = folder / f"{stem}_{number}.png"
    text = PngInfo()
    for key, value in facts.items():
        text.add_itxt(key, value)
    with atomic_write(path) as handle:
        Image.fromarray(image.numpy()).save(handle, format="PNG", pnginfo=text)
    return path


def _png_text(path: Path) -> dict[str, str] | None:
    try:
        with open_image(path) as image:
            return {k: str(v) for k, v in getattr(image, "text", {}).items()}
    except Exception:  # `text` reads on, and Pillow raises many kinds on damaged files
        return None
