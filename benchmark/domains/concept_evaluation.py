"""Evaluation of the customization domain: generated images against the photographs, and against earlier ones."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.files import atomic_write
from dualcl.benchmark.core.processes import Processes
from dualcl.benchmark.core.seeding import derive_seed
from dualcl.benchmark.core.settings import positive
from dualcl.benchmark.models.image_features import ImageFeatures, load_features, mmd, plain_prompt
from dualcl.benchmark.models.text_to_image import TextToImage
from dualcl.benchmark.models.tokens import ConceptTokens
from dualcl.datasets.concepts import ConceptStream, check_template
from dualcl.datasets.reading.views import check_blocks, decode_image

KERNEL: Literal["poly2"] = "poly2"
#: real images of a concept that are kept as thumbnails
THUMBNAILS = 8


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation: which images are made, and how they are compared.

    What a method draws to train on (generative replay, ESD) is drawn by `steps`, `scheduler`, `guidance` and
    `negative_prompt` too.
    """

    n: int = field(default=8, metadata={"help": "images per concept and evaluation"})
    every: int = field(
        default=1, metadata={"help": "tasks between evaluations of all concepts seen; 0: after the last task only"}
    )
    steps: int = field(default=15, metadata={"help": "denoising steps"})
    scheduler: Literal["ddim", "dpm"] = field(default="ddim", metadata={"help": "dpm: DPM-Solver++, second order"})
    guidance: float = field(default=7.5, metadata={"help": "classifier-free guidance scale; 1 or less: none"})
    batch_size: int = field(default=32, metadata={"help": "images generated at once"})
    features: str = field(
        default="auto",
        metadata={"help": "a bundled or timm backbone, or a CLIP directory or hub id; auto: by the base model"},
    )
    estimator: Literal["biased", "unbiased"] = field(default="biased", metadata={"help": "of the squared MMD"})
    prompt: str = field(default="a photo of {token}", metadata={"help": "for concepts without prompts of their own"})
    negative_prompt: str = field(default="", metadata={"help": "prompt of the unconditional pass"})
    save: Literal["all", "needed"] = field(
        default="all",
        metadata={"help": "images kept; needed: each concept's right after its task, and all after the last task"},
    )

    def __post_init__(self) -> None:
        positive("eval.n", self.n)
        if self.estimator == "unbiased" and self.n < 2:
            raise UserError(f"eval.estimator=unbiased needs eval.n of at least 2, got {self.n}")
        positive("eval.every", self.every, 0)
        positive("eval.steps", self.steps)
        positive("eval.guidance", self.guidance, 0)
        positive("eval.batch_size", self.batch_size)
        check_template(self.prompt, "eval.prompt")


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _mean(shown: Sequence[bool] | None) -> float | None:
    return float(np.mean(shown)) if shown else None


class EvaluatedDomain(Protocol):
    """What an evaluator asks of its domain."""

    diffusion: TextToImage
    stream: ConceptStream
    tokens: ConceptTokens
    seed: int
    device: torch.device
    folder: Path | None
    processes: Processes

    def pixels(self, task: int) -> Tensor:
        """The concept's photographs at the model's size: uint8 (n, S, S, 3)."""

    def fill(self, template: str, task: int) -> str:
        """A prompt template with the concept's placeholder, or the target of a request."""

    def sample(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        """Images uint8 (N, S, S, 3) of prompts with expanded tokens, by the settings of `eval.*`."""


def slug(name: str) -> str:
    """A concept's name for a folder: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "concept"


def sample_folder(run: Path, after: int | Literal["real"], concept: int, name: str) -> Path:
    """Folder of a concept's images in a run folder; `after` and `concept` count from 1, "real" holds photographs."""
    part = after if after == "real" else f"after_{after}"
    return run / "samples" / part / f"{concept}_{slug(name)}"


def write_image(file: Path, image: Tensor, text: dict[str, str]) -> None:
    """Writes a uint8 image (H, W, 3) as PNG with text entries, atomically."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    with atomic_write(file) as handle:
        Image.fromarray(image.numpy()).save(handle, format="PNG", pnginfo=info)


class ConceptEvaluator:
    """Generates images of the concepts seen so far and measures them against photographs.

    Of a request to unlearn: images of its target's prompts, against pictures of its anchor by the pretrained model.
    Image k of concept j starts from noise that is a function of (seed, j, k), and a concept's images never share a
    batch with another's: as long as the weights stay, so do the images, bit for bit.
    """

    def __init__(self, domain: EvaluatedDomain, config: EvalConfig) -> None:
        self.domain = domain
        self.config = config
        self._real: dict[int, Tensor] = {}
        #: features of each concept's images right after it was learnt
        self._own: dict[int, Tensor] = {}
        #: concepts whose thumbnails this process has written
        self._shown: set[int] = set()
        #: of requests: what the pretrained model showed of each target, and of what is to be retained, by side
        self._before: tuple[dict[int, float | None], dict[str, float | None]] = {}, {}
        for concept in domain.stream.concepts:
            if config.estimator == "unbiased" and concept.request is None and len(concept.images) < 2:
                raise UserError(
                    f"eval.estimator=unbiased needs two images of every concept, {concept.name!r} has one; "
                    "set eval.estimator=biased"
                )

    @functools.cached_property
    def features(self) -> ImageFeatures:
        """The feature model, loaded when it is first needed."""
        with torch.random.fork_rng(devices=[]):  # a model draws random weights before it loads its own
            return load_features(self.config.features, self.domain.device, self.domain.diffusion.info.name)

    def check(self) -> None:
        """Raises UserError for what the data say of an image that the feature model, if it judges any, cannot see."""
        data = self.domain.stream.data
        told = [(concept.name, concept.attributes) for concept in self.domain.stream.concepts]
        told += [(thing.name, thing.attributes) for thing in data.retained]
        told += [(one.prompt, one.attributes) for one in data.prior]
        pairs = [(owner, name, value) for owner, wanted in told for name, value in wanted.items()]
        if not pairs or not (judged := self.features.judged):
            return
        for owner, name, value in pairs:
            if name not in judged:
                hint = nearest(name, judged, "it judges")
            elif value not in judged[name]:
                hint = nearest(value, judged[name], "it knows")
            else:
                continue
            raise UserError(
                f"the data say {name}={value} of {owner!r}, which {self.features.name} cannot judge; {hint}; leave "
                "it out of the data, or choose another eval.features"
            )

    @torch.no_grad()
    def evaluate(self, seen: Sequence[int], joint: bool = False) -> dict[str, list[float | int | None]]:
        """Lists with one entry per concept of `seen`, the last of which was just learnt; None where not evaluated.

        mmd: squared MMD of generated and real images; drift: of the images now and right after learning (0 for the
        concept just learnt; None for joint training, or where those images are not known); image_similarity,
        text_similarity: mean cosines over all pairs, over images and their own prompts (None without a text tower);
        nearest_correct of `generated` images are nearest to their own concept's mean real feature, of the stream's;
        requests with one anchor count as one concept; attribute_share: what of the concept's attributes the images
        show, where the data set tells them and the feature model judges them. Of requests, likewise, and no
        text_similarity, for their prompts ask for what is to be gone: target_shown, the share of images on which the
        target is seen (None where no judge knows); retained_inside, retained_across: the share of the images of what
        is to be retained on which it is, in the last entry; *_before: the same of the pretrained model. prior_share, in
        the last entry after the last task: of the attributes that captions of other things name, the share shown.
        Raises UserError when images right after learning are missing from the run folder or cannot be read.
        """
        last = seen[-1]
        row: dict[str, list[float | int | None]] = {
            key: [None] * len(seen)
            for key in ("mmd", "drift", "image_similarity", "text_similarity", "nearest_correct", "generated")
        }
        concepts = self.domain.stream.concepts
        labels = [c.name if c.request is None else c.request.anchor for c in concepts]
        means = F.normalize(torch.stack([self._real_features(j).double().mean(0) for j in self._concepts()]), dim=1)
        for at, j in enumerate(seen):
            if not (joint or j == last or self._evaluates_all(last)):
                continue
            prompts = self._prompts(j)
            made = self._generate(j, prompts)
            found, real = self.features.images(made), self._real_features(j)
            row["mmd"][at] = self._mmd(real, found)
            if not joint and j == last:
                self._own[j] = found
                row["drift"][at] = 0.0
            elif not joint and (own := self._own_features(j)) is not None:
                row["drift"][at] = self._mmd(own, found)
            row["image_similarity"][at] = float((found.double() @ real.double().T).mean())
            nearest = [j if labels[i] == labels[j] else i for i in (found.double() @ means.T).argmax(1).tolist()]
            request = concepts[j].request is not None
            if not request:
                row["text_similarity"][at] = self._text_similarity(j, prompts, found)
            shown = self._seen(made, concepts[j].attributes) if request else None
            self._save(j, last, joint, prompts, made, [concepts[i].name for i in nearest], shown)
            row["nearest_correct"][at] = nearest.count(j)
            row["generated"][at] = len(found)
            if request:
                row.setdefault("target_shown", [None] * len(seen))[at] = _mean(shown)
            if shown is not None:
                row.setdefault("target_shown_before", [None] * len(seen))[at] = self._before[0].get(j)
            if not request and (share := self._attribute_share(j, made)) is not None:
                row.setdefault("attribute_share", [None] * len(seen))[at] = share
        if self.domain.stream.data.retained and (joint or self._evaluates_all(last)):
            for side, share in self._retained(last + 1).items():
                if share is not None:
                    row[f"retained_{side}"] = [*[None] * (len(seen) - 1), share]
                    row[f"retained_{side}_before"] = [*[None] * (len(seen) - 1), self._before[1].get(side)]
        if self._final(last, joint) and (share := self._prior_share()) is not None:
            row["prior_share"] = [*[None] * (len(seen) - 1), share]
        return row

    @torch.no_grad()
    def evaluate_pretrained(self) -> None:
        """Measures requests' targets and what is to be retained before any of them is unlearnt.

        The images are kept as after task 0; a run that goes on reads them there.
        """
        for j, concept in enumerate(self.domain.stream.concepts):
            prompts = self._prompts(j)
            made = self._earlier(j, concept.name, len(prompts))
            known, made = made is not None, self._generate(j, prompts) if made is None else made
            self._before[0][j] = _mean(shown := self._seen(made, concept.attributes))
            if not known:
                self._write(0, j, concept.name, prompts, made, shown)
        self._before[1].update(self._retained(0))

    def _retained(self, after: int) -> dict[str, float | None]:
        """By side, on what share of the images of what is to be retained it is seen; None where no judge knows.

        Every thing counts the same. `after`: requests unlearnt so far.
        """
        things, first = self.domain.stream.data.retained, len(self.domain.stream.concepts)
        parts = [self._earlier(first + r, one.name, len(one.prompts)) for r, one in enumerate(things) if after == 0]
        known = bool(parts) and all(part is not None for part in parts)
        if not known:
            numbered = [(first + r, k, prompt) for r, one in enumerate(things) for k, prompt in enumerate(one.prompts)]
            made_all = self._sample([prompt for *_, prompt in numbered], [self._seed(at, k) for at, k, _ in numbered])
            parts = list(made_all.split([len(one.prompts) for one in things]))
        shares: dict[str, list[float | None]] = {"inside": [], "across": []}
        for r, (one, made) in enumerate(zip(things, parts, strict=True)):
            assert made is not None
            shares[one.side].append(_mean(shown := self._seen(made, one.attributes)))
            final = after == first
            if not known and (after == 0 or final or self.config.save == "all"):
                self._write(after, first + r, one.name, list(one.prompts), made, shown)
        told = {side: [s for s in found if s is not None] for side, found in shares.items()}
        whole = {side: bool(found) and len(told[side]) == len(found) for side, found in shares.items()}
        return {side: float(np.mean(found)) if whole[side] else None for side, found in told.items()}

    def _prior_share(self) -> float | None:
        """Share of the attributes named by the data's captions that their images show; None without them or a judge."""
        asked = self.domain.stream.data.prior
        if not asked or not self.features.judged:
            return None
        seeds = [derive_seed(self.domain.seed, "eval", "prior", k) for k in range(len(asked))]
        made = self._sample([one.prompt for one in asked], seeds)
        return self._share_of_attributes(made, [one.attributes for one in asked])

    def _seen(self, images: Tensor, wanted: Mapping[str, str]) -> list[bool] | None:
        """Whether each image shows what it should; None where nothing is told, or the feature model judges it not."""
        read = self.features.attributes(images) if wanted else None
        if not read or not wanted.keys() <= read[0].keys():
            return None
        return [all(one[name] == value for name, value in wanted.items()) for one in read]

    def _earlier(self, at: int, name: str, count: int) -> Tensor | None:
        """The pretrained model's images in the run's folder; None where they are not all there, and made again then."""
        run = self.domain.folder

        def read() -> Tensor | None:
            folder = None if run is None else sample_folder(run, 0, at + 1, name)
            if folder is None or not all((folder / f"{k}.png").is_file() for k in range(count)):
                return None
            with contextlib.suppress(UserError):  # a damaged one
                return self._read(folder, count)
            return None

        return self.domain.processes.from_main(read)

    def _write(
        self, after: int, at: int, name: str, prompts: list[str], images: Tensor, shown: list[bool] | None
    ) -> None:
        """Writes images of a target, or of what is to be retained, whose numbers come after those of the targets."""
        if self.domain.folder is None:
            return
        folder = sample_folder(self.domain.folder, after, at + 1, name)
        for k, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            text = {"prompt": prompt, "seed": str(self._seed(at, k)), "concept": name, "after_task": str(after)}
            told = {} if shown is None else {"shown": "yes" if shown[k] else "no"}
            write_image(folder / f"{k}.png", image, {**text, **told})

    def identity(self) -> dict[str, object]:
        """What must be equal for two runs to share a table: features, kernel, estimator, how images are made."""
        config = self.config
        templates = {c.name: self._templates(j) for j, c in enumerate(self.domain.stream.concepts)}
        data = self.domain.stream.data
        return {
            "features": self.features.name,
            "features_sha256": self.features.sha256,
            "kernel": KERNEL,
            "estimator": config.estimator,
            **({"reference": "pictures of the anchors"} if self.domain.stream.requests else {}),
            **({"retained_hash": _hash([*map(repr, data.retained), *data.kept])} if data.retained or data.kept else {}),
            **({"prior_hash": _hash([*map(repr, data.prior)])} if data.prior else {}),
            "eval": {
                "n": config.n,
                "steps": config.steps,
                "scheduler": config.scheduler,
                "guidance": config.guidance,
                "prompt": config.prompt,
                "negative_prompt": config.negative_prompt,
                "prompts_hash": _hash(sorted(templates.items())),
            },
        }

    # --- images -----------------------------------------------------------------------------------------------------

    def _concepts(self) -> range:
        return range(len(self.domain.stream.concepts))

    def _final(self, last: int, joint: bool = False) -> bool:
        return joint or last == len(self.domain.stream.concepts) - 1

    def _evaluates_all(self, last: int) -> bool:
        every = self.config.every
        return self._final(last) or (every > 0 and (last + 1) % every == 0)

    def _templates(self, j: int) -> tuple[str, ...]:
        return self.domain.stream.concepts[j].eval_prompts or (self.config.prompt,)

    def _prompts(self, j: int) -> list[str]:
        """The prompt of each of the concept's n images, placeholders not expanded."""
        filled = [self.domain.fill(template, j) for template in self._templates(j)]
        return [filled[k % len(filled)] for k in range(self.config.n)]

    def _seed(self, j: int, k: int) -> int:
        return derive_seed(self.domain.seed, "eval", j, k)

    def _generate(self, j: int, prompts: list[str]) -> Tensor:
        return self._sample(prompts, [self._seed(j, k) for k in range(len(prompts))])

    def _sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """An image of each prompt, placeholders not expanded, from the noise of its seed."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.domain.sample([self.domain.tokens.expand(prompt) for prompt in prompts], generators)

    def _folder(self, after: int | Literal["real"], j: int) -> Path | None:
        run = self.domain.folder
        return None if run is None else sample_folder(run, after, j + 1, self.domain.stream.concepts[j].name)

    def _save(
        self,
        j: int,
        last: int,
        joint: bool,
        prompts: list[str],
        images: Tensor,
        nearest: list[str],
        shown: list[bool] | None = None,
    ) -> None:
        """Writes the images as far as `eval.save` wants them, and thumbnails of the photographs once.

        Each says which concept's photographs it is `nearest` to, and whether a request's target is `shown`.
        """
        folder, real = self._folder(last + 1, j), self._folder("real", j)
        if folder is None or real is None:
            return
        concept = self.domain.stream.concepts[j].name
        final = self._final(last, joint)
        if self.config.save == "all" or final or j == last:
            for k, (image, prompt, near) in enumerate(zip(images, prompts, nearest, strict=True)):
                text = {
                    "prompt": prompt,
                    "seed": str(self._seed(j, k)),
                    "concept": concept,
                    "after_task": str(last + 1),
                    "nearest": near,
                    **({} if shown is None else {"shown": "yes" if shown[k] else "no"}),
                }
                write_image(folder / f"{k}.png", image, text)
        if j not in self._shown:  # those that are there may be damaged
            for k, image in enumerate(self.domain.pixels(j)[:THUMBNAILS]):
                write_image(real / f"{k}.png", image, {"concept": concept})
            self._shown.add(j)

    # --- measures ---------------------------------------------------------------------------------------------------

    def _mmd(self, x: Tensor, y: Tensor) -> float:
        return mmd(x, y, estimator=self.config.estimator, kernel=KERNEL)

    def _real_features(self, j: int) -> Tensor:
        if j not in self._real:
            self._real[j] = self.features.images(self.domain.pixels(j))
        return self._real[j]

    def _own_features(self, j: int) -> Tensor | None:
        """Features of the concept's images right after it was learnt; from the run folder in a resumed run."""
        if j not in self._own:
            folder = self._folder(j + 1, j)
            if folder is None:
                return None
            self._own[j] = self.features.images(self._read(folder, self.config.n))
        return self._own[j]

    def _read(self, folder: Path, count: int) -> Tensor:
        size = self.domain.diffusion.info.image_size
        images = []
        for k in range(count):
            file = folder / f"{k}.png"
            try:
                check_blocks(file)
                pixels = np.array(decode_image(file))
            except OSError as error:
                what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
                raise UserError(
                    f"{file} {what}: drift is measured from it; put it back, or delete {self.domain.folder} to start "
                    "afresh"
                ) from None
            if pixels.shape != (size, size, 3):
                raise UserError(
                    f"{file} has {pixels.shape[1]} x {pixels.shape[0]} pixels, the run made {size} x {size}; put the "
                    f"original back, or delete {self.domain.folder} to start afresh"
                )
            images.append(torch.from_numpy(pixels))
        return torch.stack(images)

    def _attribute_share(self, j: int, images: Tensor) -> float | None:
        """Share of the concept's attributes that the judge sees on the images; None without them or a judge."""
        wanted = self.domain.stream.concepts[j].attributes
        return self._share_of_attributes(images, [wanted] * len(images)) if wanted else None

    def _share_of_attributes(self, images: Tensor, wanted: Sequence[Mapping[str, str]]) -> float | None:
        """Share of all that the images are to show, each its own, that the judge sees; None without a judge."""
        read = self.features.attributes(images)
        if read is None:
            return None
        pairs = zip(read, wanted, strict=True)
        return float(np.mean([seen.get(name) == value for seen, one in pairs for name, value in one.items()]))

    def _text_similarity(self, j: int, prompts: list[str], found: Tensor) -> float | None:
        concept = self.domain.stream.concepts[j]
        words, noun = self.domain.tokens.words(j) if concept.request is None else [], concept.noun
        unique = list(dict.fromkeys(plain_prompt(prompt, words, noun) for prompt in prompts))
        texts = self.features.texts(unique)
        if texts is None:
            return None
        index = [unique.index(plain_prompt(prompt, words, noun)) for prompt in prompts]
        return float((found.double() * texts[index].double()).sum(1).mean())
