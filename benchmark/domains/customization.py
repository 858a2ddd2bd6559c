"""Continual Diffusion: a text-to-image model learns, or unlearns, one concept after another."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualcl.benchmark.core.content import files_digest, settings_digest
from dualcl.benchmark.core.domain import Contents, Domain, ReadOut, Site, Task
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.settings import Resolved, positive
from dualcl.benchmark.domains.concept_batches import ConceptBatch, Entries, square
from dualcl.benchmark.domains.concept_evaluation import ConceptEvaluator, EvalConfig
from dualcl.benchmark.domains.content import data_contents
from dualcl.benchmark.domains.prior import PriorConfig, prior_content, prior_images
from dualcl.benchmark.models.bundled import bundled_diffusion
from dualcl.benchmark.models.families import MODEL_FILES, SETTING_FILES, load, part_files
from dualcl.benchmark.models.image_branch import ImageBranch, ImagePrompts
from dualcl.benchmark.models.row_encoder import UNTRAINED, RowEncoder, fresh_encoder, load_row_encoder
from dualcl.benchmark.models.sampling import sample
from dualcl.benchmark.models.text_to_image import BaseConfig, TextToImage
from dualcl.benchmark.models.tokens import ConceptTokens, card_words, exported_card
from dualcl.datasets import dataset_class
from dualcl.datasets.base import given_order
from dualcl.datasets.concepts import ConceptData, ConceptStream, Request, check_template, make_concept_stream
from dualcl.datasets.reading.captions import as_template
from dualcl.datasets.reading.content import Picture, pictures, repeated


@dataclass(frozen=True)
class ConceptStreamConfig:
    """Which concepts are learnt, in which order."""

    tasks: int | None = field(default=None, metadata={"help": "the first so many concepts of the order; default: all"})
    class_order: str | list[int] | list[str] = field(
        default="shuffle",
        metadata={"help": "shuffle, natural, a list of all concepts by number or name, or a file of names"},
    )
    order_seed: int | None = field(default=None, metadata={"help": "seed of the order; default: the run's seed"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_order", given_order(self.class_order))
        positive("stream.tasks", self.tasks)
        positive("stream.order_seed", self.order_seed, 0)


@dataclass(frozen=True)
class ConceptConfig:
    """How a concept becomes words."""

    n_tokens: int = field(default=1, metadata={"help": "new tokens per concept"})
    init: Literal["random", "word"] = field(
        default="random", metadata={"help": "start of a new token; word: the embedding of the concept's class noun"}
    )
    class_noun: bool = field(
        default=False, metadata={"help": 'keep the class noun in prompts: "a photo of <c1> dog"; C-LoRA leaves it out'}
    )
    prompt: str = field(default="a photo of {token}", metadata={"help": "training prompt; {token} is the concept"})
    placeholder: str = field(default="<c{number}>", metadata={"help": "name of the tokens; {number} counts from 1"})

    def __post_init__(self) -> None:
        positive("concept.n_tokens", self.n_tokens)
        check_template(self.prompt, "concept.prompt")
        if "{number}" not in self.placeholder or any(c.isspace() for c in self.placeholder):
            raise UserError(f"concept.placeholder must hold {{number}} and no space, got {self.placeholder!r}")


@dataclass(frozen=True)
class ConceptInputConfig:
    """How photographs become latents."""

    augment: Literal["none", "flip"] = field(
        default="none", metadata={"help": "flip: each image also mirrored, encoded once as an entry of its own"}
    )
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class Customization(Domain):
    """A frozen text-to-image model, a stream of concepts with new tokens, the denoising error, and generated images.

    Sites are K and V of the layers that read the prompt: of Stable Diffusion's U-Net, the cross-attentions (C-LoRA,
    arXiv 2304.06027). No part ever runs in training mode: there is no dropout to speak of, and an image must not depend
    on its batch. A stream may hold requests to unlearn instead: they have no tokens, and pictures of their anchors.
    """

    name = "customization"
    capabilities = ("network", "prior", "replay", "concept_inputs", "errors", "requests", "token_rows")
    matrix_kind = "mmd"
    sections_config: ClassVar[dict[str, type]] = {
        "stream": ConceptStreamConfig,
        "base": BaseConfig,
        "concept": ConceptConfig,
        "input": ConceptInputConfig,
        "prior": PriorConfig,
        "eval": EvalConfig,
    }

    def __init__(
        self,
        resolved: Resolved,
        device: torch.device,
        data: ConceptData | None = None,
        diffusion: TextToImage | None = None,
    ) -> None:
        self.resolved = resolved
        self.device = device
        self.precision = resolved.general.precision
        self.seed = resolved.general.seed
        self.concept_config = resolved.section("concept", ConceptConfig)
        order_seed = resolved.section("stream", ConceptStreamConfig).order_seed
        self.order_seed = self.seed if order_seed is None else order_seed
        if data is None:
            data = dataset_class(resolved.data_reference, self.name).load(resolved.sections["data"])
        self.stream = self.make_stream(resolved, data, self.order_seed)
        base = resolved.section("base", BaseConfig)
        if base.weights_dtype != "fp32" and resolved.general.precision == "fp32":
            raise UserError(
                f"base.weights_dtype={base.weights_dtype} needs mixed precision; set precision={base.weights_dtype}"
            )
        self.diffusion = diffusion or load(base, device)
        self.model: nn.Module = self.diffusion.network
        self._sites = self.diffusion.sites()
        if not self._sites:
            raise UserError(f"base.model={base.model} has no cross-attention (attn2.to_k, attn2.to_v) to adapt")
        # the projections as loaded: methods may put other modules in their place
        self._projections = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name.removesuffix(".weight") in self._sites
        }
        self._network = dict(self.model.named_parameters())
        self._network_size = sum(p.numel() for p in self._network.values())
        card = exported_card(base.model)
        earlier = [] if card is None else card_words(card)
        if card is not None:
            told = {key: card["run"].get(key) for key in ("preset", "method", "label", "seed", "config_hash")}
            self.extends = {**told, "weights_sha256": self.diffusion.info.weights_sha256}
        self.tokens = ConceptTokens(self.diffusion.vocabularies[0], self.concept_config.n_tokens, earlier)
        #: the word that each concept is to have
        self.words = self.tokens.next_free(self.concept_config.placeholder, len(self.stream.concepts))
        self.tokens.to(device)
        self.tasks = [
            Task(
                index=i,
                name=concept.name,
                size=len(concept.images),
                facts={"concept": concept.name, "noun": concept.noun, "n_train": len(concept.images)},
            )
            for i, concept in enumerate(self.stream.concepts)
        ]
        self.evaluator = ConceptEvaluator(self, resolved.section("eval", EvalConfig))
        self._current: int | None = None
        self._begun = 0
        self._older: dict[int, Tensor] = {}
        self._pixels: dict[int, Tensor] = {}
        self._entries: tuple[int | None, Entries] | None = None
        self._replayed: list[tuple[int, Tensor]] = []
        self._prior_weight = 0.0
        self._prior: dict[str, Entries] = {}
        self._prior_hashes: dict[str, str] = {}
        #: of requests: pictures of the anchor, their prompts, and pictures of the begun task's target where asked for
        self._pictures: dict[int, Tensor] = {}
        self._captions: dict[int, list[tuple[str, ...]]] = {}
        self._of_target: Tensor | None = None
        self.kept = self.stream.data.kept
        #: False: neither prior images nor those of requests are made, the model is for use only
        self.makes_pictures = True
        self._check_prompts()

    def attach(self, method: ReadOut) -> None:
        """Refuses a method that the stream or the model does not suit, and makes the pictures of requests."""
        super().attach(method)
        name, needs = getattr(method, "name", type(method).__name__), method.requires
        mixed = [n for n, site in self._sites.items() if site.module_name not in self.diffusion.text_only]
        if "concept_inputs" in needs and mixed:
            raise UserError(
                f"method {name} needs sites that read the text alone, {mixed[0]} of {self.diffusion.info.name} reads "
                "more; choose another base.model or method"
            )
        if ("requests" in needs) != bool(self.stream.requests):
            verb, held = ("unlearns", "no requests") if "requests" in needs else ("learns", "requests to unlearn")
            raise UserError(f"method {name} {verb}, {self.stream.data.name} holds {held}; choose another of the two")
        if self.makes_pictures:
            self._picture_requests()

    @staticmethod
    def make_stream(resolved: Resolved, data: ConceptData, order_seed: int) -> ConceptStream:
        """The concepts in the order in which they are learnt."""
        config = resolved.section("stream", ConceptStreamConfig)
        return make_concept_stream(data, config.tasks, config.class_order, order_seed)

    @classmethod
    def ordered(cls, resolved: Resolved, data: ConceptData) -> list[tuple[str, ...]]:
        """Name of the concept of each task, in the order in which they are learnt."""
        seed = resolved.section("stream", ConceptStreamConfig).order_seed
        stream = cls.make_stream(resolved, data, resolved.general.seed if seed is None else seed)
        return [(concept.name,) for concept in stream.concepts]

    def check_new(self) -> list[str]:
        """Refuses words that what is exported would not hold, attributes that no judge knows; says which words come."""
        self.evaluator.check()
        if self.stream.requests:
            return []
        self.tokens.check_exports(self.words)
        if not self.tokens.earlier:
            return []
        known = ", ".join(word.placeholder for word in self.tokens.earlier)
        return [f"the model knows {known}; the new words are {', '.join(self.words)}"]

    # --- what is learnt ---------------------------------------------------------------------------------------------

    def sites(self) -> dict[str, Site]:
        """K and V of every cross-attention."""
        return dict(self._sites)

    def full_parameters(self) -> dict[str, nn.Parameter]:
        """K and V of every cross-attention in full: what Custom Diffusion trains."""
        return dict(self._projections)

    def network_parameters(self) -> dict[str, nn.Parameter]:
        """The whole U-Net."""
        return dict(self._network)

    def adapted_parameters(self) -> int:
        """Size of the U-Net as loaded."""
        return self._network_size

    def begin_task(self, task: int | None, scope: Literal["task", "seen"] = "task") -> list[nn.Parameter]:
        """Adds the concept's token rows and returns them. `scope` changes nothing: there are no shared outputs."""
        new = []
        for index in range(len(self.tasks)) if task is None else [task]:
            if index != self._begun:
                raise RuntimeError(f"concept {index} begun when {self._begun} concepts were there")
            self._begun += 1
            if self.stream.requests:
                continue
            concept = self.stream.concepts[index]
            config = self.concept_config
            rows = self.tokens.add(
                self.words[index],
                config.init,
                concept.noun,
                torch_generator(self.seed, "token", index),
                rename=self._renames,
            )
            new.append(rows)
        if task is not None:
            for rows in self.tokens.rows:
                rows.requires_grad_(False)
                rows.grad = None
            for rows in new:
                rows.requires_grad_(True)
        self._current = task
        self._replayed = []
        self._of_target = None
        self._entries = None
        self._remember_older()
        return new

    def _remember_older(self) -> None:
        """Keeps the bits of all earlier concepts' rows, for `check_tokens`."""
        if self._current is not None:
            self._older = {j: r.detach().clone() for j, r in enumerate(self.tokens.rows) if j != self._current}

    def check_tokens(self) -> None:
        """Raises RuntimeError unless the pretrained table and earlier concepts' rows are as they were, bit for bit."""
        self.tokens.check_table()
        for j, kept in self._older.items():
            if not torch.equal(kept, self.tokens.rows[j]):
                raise RuntimeError(f"the token of concept {j + 1} has changed while another one was learnt")

    def stored_parameters(self) -> int:
        """Token rows of all concepts begun."""
        return sum(r.numel() for r in self.tokens.rows)

    def state_dict(self) -> dict[str, Tensor]:
        """Token rows by concept."""
        return self.tokens.rows_state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the token rows of concepts that were begun."""
        self.tokens.load_rows(state)
        self._remember_older()

    # --- prompts ----------------------------------------------------------------------------------------------------

    def placeholder(self, task: int) -> str:
        """The word that stands for a concept, `<c1>` for the first."""
        return self.tokens.placeholders[task]

    def fill(self, template: str, task: int, word: str | None = None) -> str:
        """A prompt template with `word` in the token's place, and the class noun after it when that is asked for.

        By default the concept's placeholder, or the target of a request.
        """
        concept = self.stream.concepts[task]
        if word is None:
            word = self.placeholder(task) if concept.request is None else concept.request.target
        if "{noun}" in template:
            return template.replace("{token}", word).replace("{noun}", concept.noun).strip()
        if self.concept_config.class_noun:
            word = f"{word} {concept.noun}".strip()
        return template.replace("{token}", word)

    def prompts(self, task: int) -> tuple[str, ...]:
        """The prompts a task's images are paired with, tokens expanded; those of the anchor for a request."""
        request = self.stream.concepts[task].request
        return self._filled(task, None if request is None else request.anchor)

    def texts(self, task: int) -> tuple[str, ...]:
        """The task's prompts and the captions of its photographs, tokens expanded, each once."""
        return tuple(dict.fromkeys([*self.prompts(task), *(t for texts in self._texts(task) for t in texts)]))

    def _filled(self, task: int, word: str | None = None) -> tuple[str, ...]:
        templates = self.stream.concepts[task].prompts or (self.concept_config.prompt,)
        return tuple(self.tokens.expand(self.fill(t, task, word)) for t in templates)

    def _check_prompts(self) -> None:
        """Raises UserError for whatever would stop a later concept, before the first one is trained."""
        config, evaluation = self.concept_config, self.resolved.section("eval", EvalConfig)
        timesteps = self.diffusion.info.timesteps
        if evaluation.steps >= timesteps:
            raise UserError(f"eval.steps must be below the {timesteps} steps of the model, got {evaluation.steps}")
        self.diffusion.sampler(evaluation.scheduler, evaluation.steps)
        whole = [prompt for one in self.stream.data.retained for prompt in one.prompts]
        whole += [one.prompt for one in self.stream.data.prior]
        for vocabulary in self.diffusion.vocabularies:
            vocabulary.ids([evaluation.negative_prompt, *whole, *self.stream.data.kept])
        for index, concept in enumerate(self.stream.concepts):
            templates = (*(concept.prompts or (config.prompt,)), *(concept.eval_prompts or (evaluation.prompt,)))
            templates += tuple(t for t in self._caption_templates(index) if t)
            if not concept.noun:
                asking = ["concept.class_noun=true"] if config.class_noun else []
                asking += ["concept.init=word"] if config.init == "word" else []
                asking += [f"the prompt {t!r}" for t in templates if "{noun}" in t]
                if asking:
                    raise UserError(
                        f"{asking[0]} needs a class noun, concept {concept.name!r} has none; name it in the file of "
                        "data.prompts, or one for all with data.noun"
                    )
            if config.init == "word":
                self.tokens.word_id(concept.noun)
            if not self._renames and concept.request is None:
                self.tokens.check_free(self.words[index])
            for template in templates:
                if concept.request is None:
                    self._check_length(template, index)
                else:
                    words = (concept.request.target, concept.request.anchor)
                    self.diffusion.vocabularies[0].ids([self.fill(template, index, word) for word in words])

    def _check_length(self, template: str, task: int) -> None:
        concept, vocabulary = self.stream.concepts[task], self.diffusion.vocabularies[0]
        n_tokens = self.concept_config.n_tokens
        noun = f" {concept.noun} " if self.concept_config.class_noun and "{noun}" not in template else " "
        words = template.replace("{token}", noun).replace("{noun}", concept.noun)
        size = len(vocabulary.tokenizer(words).input_ids) + n_tokens * template.count("{token}")
        if size > vocabulary.length:
            raise UserError(
                f"the prompt {template!r} has {size} tokens for concept {concept.name!r}, the model takes "
                f"{vocabulary.length}; shorten it, or lower concept.n_tokens={n_tokens}"
            )

    @property
    def _renames(self) -> bool:
        """Whether a placeholder that is taken may be changed: only where the user chose none."""
        return self.concept_config.placeholder == ConceptConfig.placeholder

    # --- training data ----------------------------------------------------------------------------------------------

    def pixels(self, task: int) -> Tensor:
        """The concept's photographs, cropped to the centre square, at the model's size: uint8 (n, S, S, 3).

        Of a request, pictures of its anchor.
        """
        if task in self._pictures:
            return self._pictures[task]
        if task not in self._pixels:
            images = self.stream.concepts[task].images
            config = self.resolved.section("input", ConceptInputConfig)
            size = self.diffusion.info.image_size
            self._pixels[task] = torch.stack(
                [square(images.load(i), size, config.interpolation) for i in range(len(images))]
            )
        return self._pixels[task]

    concept_images = pixels

    def _encode(self, pixels: Tensor, prompts: list[tuple[str, ...]], augment: bool) -> Entries:
        """Latents of uint8 images (n, S, S, 3) with the prompts of each; mirrored copies are entries of their own."""
        inputs = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        if augment and self.resolved.section("input", ConceptInputConfig).augment == "flip":
            inputs, prompts = torch.cat([inputs, inputs.flip(3)]), prompts * 2
        parts = [self.diffusion.encode_images(chunk) for chunk in inputs.split(8)]
        return Entries(torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts]), prompts)

    def _training_entries(self, task: int | None) -> Entries:
        """The task's encoded images, made once per task, and what is replayed in it."""
        if self._entries is None or self._entries[0] != task:
            concepts = range(len(self.tasks)) if task is None else [task]
            own = {j: self._captions.get(j) or self._texts(j) for j in concepts}
            pixels = [self.pixels(j) if self._of_target is None else self._of_target for j in concepts]
            parts = [self._encode(images, own[j], True) for j, images in zip(concepts, pixels, strict=True)]
            parts += [self._encode(images, [self.prompts(j)] * len(images), False) for j, images in self._replayed]
            entries = parts[0]
            for part in parts[1:]:
                entries = entries + part
            self._entries = (task, entries)
        return self._entries[1]

    def _texts(self, task: int) -> list[tuple[str, ...]]:
        """The prompts of each of a concept's photographs: its caption, or else those of the concept."""
        prompts = self.prompts(task)
        filled = [self.tokens.expand(self.fill(t, task)) if t else "" for t in self._caption_templates(task)]
        return [(text,) if text else prompts for text in filled] or [prompts] * len(self.pixels(task))

    def _caption_templates(self, task: int) -> list[str]:
        """Captions of a concept's photographs with {token} where it stands; UserError where nothing tells where."""
        concept, wanted = self.stream.concepts[task], self.words[task]
        bare = re.sub(r"^\d+_", "", concept.name)  # 10_sks dog: kohya's folders begin with a number of repeats
        names = list(dict.fromkeys([concept.name, bare, re.sub("[_-]", " ", bare)]))
        other = re.compile(re.escape(self.concept_config.placeholder).replace(re.escape("{number}"), r"\d+"))
        templates = []
        for image, caption in zip(concept.images.ids, concept.captions, strict=False):
            strange = [word for word in other.findall(caption) if word != wanted]
            template = as_template(caption, wanted, concept.noun, names) if caption and not strange else ""
            if strange or template is None:
                why = f"names {strange[0]}, but the concept is {wanted}" if strange else "does not say where it stands"
                raise UserError(
                    f"concept {concept.name!r}: the caption {caption!r} of {image} {why}; write {{token}} for the "
                    f"concept{f', or its noun {concept.noun!r}' if concept.noun else ''}, or set "
                    "data.use_captions=false"
                )
            templates.append(template)
        return templates

    def _size(self, task: int | None) -> int:
        concepts = self.tasks if task is None else [self.tasks[task]]
        copies = 2 if self.resolved.section("input", ConceptInputConfig).augment == "flip" else 1
        return copies * sum(t.size for t in concepts)

    def steps_per_epoch(self, task: int | None) -> int:
        """`train.steps` for each concept, or else the batches in a pass over its images."""
        train = self.resolved.train
        if train.drop_last:
            raise UserError("train.drop_last=true is for classes: a concept's batches are all full; leave it out")
        if train.steps is not None:
            if train.epochs != 1:
                raise UserError(f"train.steps={train.steps} counts steps: set train.epochs=1, got {train.epochs}")
            return train.steps * (len(self.tasks) if task is None else 1)
        return math.ceil(self._size(task) / train.batch_size)

    def batches(self, task: int | None, start_step: int) -> Iterator[ConceptBatch]:
        """Training batches from optimiser step `start_step` on, noise and timesteps by (seed, task, step)."""
        steps = self.steps_per_epoch(task) * self.resolved.train.epochs
        entries = self._training_entries(task)
        number = -1 if task is None else task
        for step in range(start_step, steps):
            generator = torch_generator(self.seed, "batch", number, step)
            chosen = self._chosen(entries, number, step, self.resolved.train.batch_size, "order")
            parts = [(chosen, torch.ones(len(chosen)))]
            if self._prior_weight:
                parts.append(self._prior_part(task, number, step))
            yield self._noised(parts, generator)

    def _chosen(self, entries: Entries, number: int, step: int, batch: int, purpose: str) -> Entries:
        """The step's entries: shuffled passes one after another, batches run across their borders."""
        size, at = len(entries), []
        for position in range(step * batch, (step + 1) * batch):
            turn, place = divmod(position, size)
            order = torch.randperm(size, generator=torch_generator(self.seed, purpose, number, turn))
            at.append(int(order[place]))
        generator = torch_generator(self.seed, purpose, "prompt", number, step)
        prompts: list[tuple[str, ...]] = []
        for i in at:
            options = entries.prompts[i]
            prompts.append((options[int(torch.randint(len(options), (1,), generator=generator))],))
        return Entries(entries.mean[at], entries.std[at], prompts)

    def _noised(self, parts: list[tuple[Entries, Tensor]], generator: torch.Generator) -> ConceptBatch:
        entries = parts[0][0]
        for part, _ in parts[1:]:
            entries = entries + part
        mean, std = entries.mean, entries.std
        clean = mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        timesteps = self.diffusion.draw_times(len(entries), generator).to(mean.device)
        noisy, target = self.diffusion.noised(clean, noise, timesteps)
        return ConceptBatch(
            noisy=noisy,
            target=target,
            timesteps=timesteps,
            prompts=[options[0] for options in entries.prompts],
            # every part is a mean of its own: a part's weight does not depend on its size
            weights=torch.cat([w / len(w) for _, w in parts]).to(mean.device),
        )

    def loss(self, batch: ConceptBatch) -> Tensor:
        """Denoising error: mean squared error of the predicted noise or velocity; prior images by their weight."""
        unique = list(dict.fromkeys(batch.prompts))
        index = torch.tensor([unique.index(p) for p in batch.prompts], device=self.device)
        at = torch.arange(len(index), device=self.device)
        predicted = self._predicted(self.diffusion, batch, at, unique, index)
        error = F.mse_loss(predicted, batch.target.float(), reduction="none").mean(dim=(1, 2, 3))
        return (error * batch.weights).sum()

    def _predicted(
        self, model: TextToImage, batch: ConceptBatch, at: Tensor, prompts: Sequence[str], index: Tensor
    ) -> Tensor:
        """What `model` predicts (R, C, h, w), float32, for samples at[k] of the batch under prompts index[k]."""
        with self.autocast():
            text = model.encode_text(prompts)

        def run(rows: slice) -> Tensor:
            own = at[rows]
            with self.autocast():  # in here: micro-batches are run again in the backward
                return model.predict(batch.noisy[own], batch.timesteps[own], text[index[rows]])

        return self.passed(len(at), run)

    def samples(self, batch: ConceptBatch) -> Iterator[ConceptBatch]:
        """The noised images of a batch one by one, prior images with their weight."""
        for i in range(len(batch.prompts)):
            one = slice(i, i + 1)
            # a batch's weights are those of a mean over `train.batch_size` images
            weight = batch.weights[one] * self.resolved.train.batch_size
            yield ConceptBatch(batch.noisy[one], batch.target[one], batch.timesteps[one], batch.prompts[one], weight)

    # --- capability: prior ------------------------------------------------------------------------------------------

    def use_prior(self, weight: float) -> None:
        """Every later batch also holds images of the class nouns; their error counts `weight` times.

        They are a folder of the user's, or were generated by the frozen model once (`prior.*`), cached and hashed.
        """
        if not self.makes_pictures:
            return
        self._prior_weight = weight
        if weight == 0:
            return
        config = self.resolved.section("prior", PriorConfig)
        for noun in sorted({c.noun for c in self.stream.concepts}):
            prompt = config.text(noun)
            if noun not in self._prior:
                images, digest = prior_images(self.diffusion, config, noun, self.processes)
                self._prior[noun] = self._encode(images, [(prompt,)] * len(images), False)
                self._prior_hashes[prompt] = digest

    def _prior_part(self, task: int | None, number: int, step: int) -> tuple[Entries, Tensor]:
        concept = self.stream.concepts[step % len(self.tasks) if task is None else task]
        batch = self.resolved.train.batch_size
        chosen = self._chosen(self._prior[concept.noun], number, step, batch, "prior")
        return chosen, torch.full((len(chosen),), self._prior_weight)

    # --- capability: replay -----------------------------------------------------------------------------------------

    def replay(self, tasks: Sequence[int], per_task: int) -> None:
        """Generates images of earlier concepts with the model as it stands; they join the begun task's training set."""
        self._entries = None
        for j in tasks:
            prompts = self.prompts(j)
            generators = [torch_generator(self.seed, "replay", self._begun, j, k) for k in range(per_task)]
            self._replayed.append((j, self.sample([prompts[k % len(prompts)] for k in range(per_task)], generators)))

    # --- capability: concept inputs ---------------------------------------------------------------------------------

    @property
    def unconditional(self) -> str:
        """The prompt of guidance's other half."""
        return self.resolved.section("eval", EvalConfig).negative_prompt

    @torch.no_grad()
    def concept_inputs(self, task: int, own: bool = False) -> Tensor:
        """Text features (n, D) float32 of the concept's first training prompt, from the first word to the end token.

        `own`: from the placeholder on. Of a request it is the target's prompt.
        """
        prompt, first = self._filled(task)[0], 1
        if own:
            template = (self.stream.concepts[task].prompts or (self.concept_config.prompt,))[0]
            before = template.partition("{token}")[0].replace("{noun}", self.stream.concepts[task].noun)
            ids = self.diffusion.vocabularies[0].ids([prompt, before])
            first = int((ids[0] == ids[1]).int().cumprod(0).sum())
        return self._features([prompt], first)

    @torch.no_grad()
    def prompt_inputs(self, prompts: Sequence[str]) -> Tensor:
        """Text features (P x positions, D) float32 of all positions of the prompts, tokens expanded."""
        return self.diffusion.encode_text(prompts).states.flatten(0, 1).float()

    @torch.no_grad()
    def common_inputs(self, n: int, whole: bool = False) -> Tensor:
        """Text features (m, D) float32 of "a photo of a WORD" for the n commonest words of the vocabulary.

        Words are its tokens that end one, the commonest first; in a small vocabulary there are fewer than n, and a part
        are ends of rarer words. From the first word to the end token; `whole`: of all positions.
        """
        tokenizer = self.diffusion.vocabularies[0].tokenizer
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = [w.removesuffix("</w>") for w, i in vocabulary if w.endswith("</w>") and i < self.tokens.base_size]
        words = [w for w in words if len(w) > 2 and w.isascii() and w.isalpha()][:n]
        prompts = [f"a photo of a {w}" for w in words]
        read = self.prompt_inputs if whole else self._features
        return torch.cat([read(prompts[i : i + 64]) for i in range(0, len(prompts), 64)])

    def _features(self, prompts: Sequence[str], first: int = 1) -> Tensor:
        """Features of all tokens from `first` (after the start) up to the end token, of all prompts together."""
        vocabulary = self.diffusion.vocabularies[0]
        # the end token may also be the padding; it sums up the prompt, and so does the padding after it
        ends = (vocabulary.ids(prompts) == vocabulary.tokenizer.eos_token_id).int()
        kept = ends.cumsum(1) - ends == 0
        kept[:, :first] = False
        return self.diffusion.encode_text(prompts).states[kept].float()

    # --- capabilities: errors, requests, token rows -----------------------------------------------------------------

    def check_prompt(self, prompt: str) -> None:
        """UserError for a prompt that is too long for a vocabulary."""
        for vocabulary in self.diffusion.vocabularies:
            vocabulary.ids([prompt])

    def predictions(self, batch: ConceptBatch, prompts: Sequence[str]) -> Tensor:
        """What the model predicts (B, P, C, h, w), float32, for each sample under each prompt; tokens expanded."""
        return self._predictions(self.diffusion, batch, prompts)

    def _predictions(self, model: TextToImage, batch: ConceptBatch, prompts: Sequence[str]) -> Tensor:
        samples, texts = (torch.arange(n, device=self.device) for n in (len(batch.prompts), len(prompts)))
        at, index = samples.repeat_interleave(len(texts)), texts.repeat(len(samples))
        return self._predicted(model, batch, at, prompts, index).unflatten(0, (len(samples), len(texts)))

    def paired_predictions(self, batch: ConceptBatch, prompts: Sequence[str]) -> Tensor:
        """What the model predicts (B, C, h, w), float32, for each sample under its own prompt; tokens expanded."""
        unique = list(dict.fromkeys(prompts))
        at, index = torch.arange(len(batch.prompts)), torch.tensor([unique.index(p) for p in prompts])
        if len(at) != len(index):
            raise ValueError(f"{len(index)} prompts for {len(at)} samples")
        return self._predicted(self.diffusion, batch, at.to(self.device), unique, index.to(self.device))

    def noise_weights(self, batch: ConceptBatch) -> Tensor:
        """(B,): what turns squared distances between predictions into those between the noises they amount to."""
        return self.diffusion.noise_weights(batch.timesteps)

    def errors(self, batch: ConceptBatch, prompts: Sequence[str]) -> Tensor:
        """Mean squared error (B, P) of the noise that `predictions` amount to, float32."""
        away = (self.predictions(batch, prompts) - batch.target.float()[:, None]).square().mean((2, 3, 4))
        return away * self.noise_weights(batch)[:, None]

    def frozen(self) -> Callable[[ConceptBatch, Sequence[str]], Tensor]:
        """`predictions` of the model as it stands now, without gradient; whatever stays frozen is not copied."""
        model, learnt = self.diffusion, {id(p) for p in (*self.model.parameters(), *self.tokens.rows)}
        weights = [p for part in vars(model).values() if isinstance(part, nn.Module) for p in part.parameters()]
        kept = [v.tokenizer for v in model.vocabularies] + [p for p in weights if id(p) not in learnt]
        twin = copy.deepcopy(model, {id(x): x for x in kept})
        twin.network.requires_grad_(False)

        @torch.no_grad()
        def predictions(batch: ConceptBatch, prompts: Sequence[str]) -> Tensor:
            return self._predictions(twin, batch, prompts)

        return predictions

    def request(self, task: int) -> Request:
        """What the task is to unlearn."""
        return self.stream.requests[task]

    def targets_of(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """The begun task's anchor prompts, as in a batch, with the target in the anchor's place."""
        if self._current is None:
            raise UserError("requests are unlearnt one after another; choose a method that is not joint")
        pairs = dict(zip(self.prompts(self._current), self._filled(self._current), strict=True))
        return tuple(pairs[prompt] for prompt in prompts)

    def target_prompts(self, task: int) -> tuple[str, ...]:
        """The training prompts of a task with its target."""
        return self._filled(task)

    def picture_targets(self) -> None:
        """Makes pictures of the begun task's target prompts, which its batches hold from now on."""
        if self._current is None or not self.makes_pictures:
            return
        task = self._current
        prompts = self.targets_of([prompt for (prompt,) in self._captions[task]])
        generators = [torch_generator(self.seed, "target", task, k) for k in range(len(prompts))]
        self._of_target, self._entries = self.sample(prompts, generators), None

    @torch.no_grad()
    def word_inputs(self, prompts: Sequence[str]) -> Tensor:
        """Mean text features (P, D) of the words of each prompt from where it leaves the begun task's anchor prompt."""
        vocabulary, anchor = self.diffusion.vocabularies[0], self.prompts(self._current or 0)[0]
        (own,), rows = vocabulary.ids([anchor]), []
        for prompt in prompts:
            (ids,) = vocabulary.ids([prompt])
            end = int((ids == vocabulary.tokenizer.eos_token_id).int().argmax())
            first = int((ids == own).int().cumprod(0).sum())
            first = first if first < end else 1  # it is the anchor's, or begins as it
            rows.append(self.diffusion.encode_text([prompt]).states[0, first : max(end, first + 1)].float().mean(0))
        return torch.stack(rows)

    @torch.no_grad()
    def start_input(self) -> Tensor:
        """Text features (1, D) of the start token."""
        return self.diffusion.encode_text([""]).states[0, :1].float()

    def _picture_requests(self) -> None:
        """Makes the pictures of all anchors with the model, which is as pretrained: `prior.n` for each prompt."""
        config = self.resolved.section("prior", PriorConfig)
        for task, request in zip(self.tasks, self.stream.requests, strict=False):
            found = {}
            for prompt in self.prompts(task.index):
                found[prompt], self._prior_hashes[prompt] = prior_images(
                    self.diffusion, config, request.anchor, self.processes, prompt
                )
            self._pictures[task.index] = torch.cat(list(found.values()))
            self._captions[task.index] = [(prompt,) for prompt, images in found.items() for _ in images]
            task.size = task.facts["n_train"] = len(self._captions[task.index])

    def token_rows(self, task: int) -> tuple[Tensor, ...]:
        """Copies of the task's rows (n_tokens, D), one for each vocabulary."""
        return (self.tokens.rows[task].detach().clone(),)

    @torch.no_grad()
    def set_token_rows(self, task: int, rows: Sequence[Tensor]) -> None:
        """Sets the begun task's rows, as `token_rows` gives them."""
        own = self.tokens.rows[task]
        if task != self._current:
            raise RuntimeError(f"the token of concept {task + 1} may be set in its own task only")
        if [tuple(r.shape) for r in rows] != [tuple(own.shape)]:
            raise ValueError(f"rows of shape {[tuple(r.shape) for r in rows]}, wanted {[tuple(own.shape)]}")
        own.copy_(rows[0])

    def row_encoder(self, weights: str, generator: torch.Generator) -> RowEncoder:
        """An encoder for this model's table, as many rows as a concept has."""
        n_tokens, info = self.concept_config.n_tokens, self.diffusion.info
        if weights == UNTRAINED:
            network = self.model if self.diffusion.takes_images else None
            return fresh_encoder(self.tokens.weight[: self.tokens.base_size], n_tokens, generator, network)
        encoder = load_row_encoder(weights)
        if (of := encoder.card["base_sha256"]) != info.weights_sha256:
            raise UserError(
                f"method.encoder={weights} was trained for {encoder.card['base']} (sha256 {of[:12]}), the model is "
                f"{info.name} (sha256 {info.weights_sha256[:12]}); choose that base.model, or another method"
            )
        if encoder.n_tokens != n_tokens:
            raise UserError(
                f"method.encoder={weights} gives a concept {encoder.n_tokens} tokens, concept.n_tokens is {n_tokens}; "
                f"set concept.n_tokens={encoder.n_tokens}"
            )
        return encoder.to(self.device)

    def read_images(self, branch: ImageBranch, scale: float) -> None:
        """From now on the network reads an encoder's tokens beside the text; UserError for other families."""
        if not self.diffusion.takes_images:
            raise UserError(
                f"{self.diffusion.info.name} ({self.diffusion.title}) reads no tokens of pictures here; choose another "
                "base.model, or set method.image_scale=0"
            )
        self.diffusion.images = ImagePrompts(
            branch, scale, self.tokens.tokenizer, lambda: [self.tokens.words(j) for j in range(len(self.tokens.rows))]
        )

    def set_image_embedding(self, task: int, embedding: Tensor) -> None:
        """Sets what a concept's tokens are made of, (E,)."""
        if not isinstance(self.diffusion.images, ImagePrompts):
            raise RuntimeError("read_images was not called")
        self.diffusion.images.embeddings[task] = embedding

    # --- images -----------------------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        """Images uint8 (N, S, S, 3) of prompts with expanded tokens, by the settings of `eval.*`."""
        config = self.resolved.section("eval", EvalConfig)
        with self.autocast():
            return sample(
                self.diffusion,
                prompts,
                generators,
                scheduler=config.scheduler,
                steps=config.steps,
                guidance=config.guidance,
                batch_size=config.batch_size,
                negative_prompt=config.negative_prompt,
                processes=self.processes,
            )

    def before_tasks(self) -> None:
        """What the pretrained model draws of requests' targets and of what is to be retained."""
        if self.stream.requests:
            self.evaluator.evaluate_pretrained()

    def evaluate(self, seen: Sequence[int]) -> dict[str, Any]:
        """Generates images of the concepts so far and compares them with the photographs; checks all older tokens."""
        self.check_tokens()
        return self.evaluator.evaluate(seen, joint=self._current is None)

    # --- provenance -------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Data, order, base model, evaluation."""
        data = self.stream.data
        info = self.diffusion.info
        order = json.dumps(self.stream.order)
        return {
            "data": data.name,
            "split_name": data.split_name,
            "split_hash": data.split_hash,
            "class_order": list(self.stream.order),
            "class_order_hash": hashlib.sha256(order.encode()).hexdigest()[:16],
            "order_seed": self.order_seed,
            "backbone": info.name,
            "weights": info.weights,
            "weights_sha256": info.weights_sha256,
            "preprocess": {
                "size": info.image_size,
                "crop": "centre square",
                "interpolation": self.resolved.section("input", ConceptInputConfig).interpolation,
            },
            "steps": self.resolved.train.steps,
            **self.evaluator.identity(),
            **({"anchor_pictures": self._anchor_pictures()} if self.stream.requests else {}),
        }

    def _anchor_pictures(self) -> str:
        """How the pictures of the anchors are made, which requests are measured against."""
        prior = self.resolved.section("prior", PriorConfig)
        if prior.images != "generated":
            return "of a folder"
        return f"{prior.n}, {prior.steps} steps, {prior.scheduler}, guidance {prior.guidance:g}, seed {prior.seed}"

    def facts(self) -> dict[str, Any]:
        """What a reader of the record may want to know beyond the identity."""
        data = self.stream.data
        info = self.diffusion.info
        captions = {
            image: template
            for j, concept in enumerate(self.stream.concepts)
            for image, template in zip(concept.images.ids, self._caption_templates(j), strict=False)
            if template
        }
        return {
            "skipped_images": list(data.skipped),
            "concepts": [c.name for c in self.stream.concepts],
            "nouns": [c.noun for c in self.stream.concepts],
            "prompts": [list(c.prompts) for c in self.stream.concepts],
            "parts_sha256": info.parts,
            "prediction_type": info.prediction_type,
            **({"half_precision_files": list(self.diffusion.halves)} if self.diffusion.halves else {}),
            "token_table_sha256": self.tokens.base_hash,
            **({"words": self.words} if self.tokens.earlier else {}),
            "prior": {"weight": self._prior_weight, "images_sha256": dict(self._prior_hashes)},
            **({"requests": [asdict(r) for r in self.stream.requests]} if self.stream.requests else {}),
            **({"retained": [asdict(r) for r in data.retained]} if data.retained else {}),
            **({"kept": list(data.kept)} if data.kept else {}),
            **({"notes": list(data.notes)} if data.notes else {}),
            **({"captions": captions} if captions else {}),
            **data.facts,
        }

    @classmethod
    def contents(cls, resolved: Resolved, data: ConceptData | None = None, known: Iterable[str] = ()) -> Contents:
        """The photographs and their words, a base model and a feature model in directories, a folder of prior images.

        `settings` is what a model's small files say, which its weights do not.
        """
        found = data_contents(resolved, cls.name, data)
        model, features = resolved.section("base", BaseConfig).model, resolved.section("eval", EvalConfig).features
        if model not in bundled_diffusion() and (base := Path(model).expanduser()).is_dir():
            found["base"] = lambda: files_digest(base, part_files(MODEL_FILES))
            found["settings"] = lambda: settings_digest(base, part_files(SETTING_FILES))
        if (tower := Path(features).expanduser()).is_dir():
            found["features"] = lambda: files_digest(tower, MODEL_FILES)
        if (folder := Path(resolved.section("prior", PriorConfig).images).expanduser()).is_dir():
            prior = (name for name in known if name.startswith("prior."))
            found |= {name: partial(prior_content, folder, name.removeprefix("prior.")) for name in prior}
        return found

    def content(self) -> dict[str, str]:
        """See Domain; of prior images those of the stream's nouns, where they are used."""
        used = {*self._prior, *(request.anchor for request in self.stream.requests)}
        found = self.contents(self.resolved, self.stream.data, [f"prior.{noun}" for noun in sorted(used)])
        return {name: made() for name, made in found.items()}

    def pictures(self) -> list[Picture]:
        """See Domain; none of what is drawn."""
        return pictures(self.stream.data)[1] if "data" in self.contents(self.resolved) else []

    def repeated(self) -> list[str]:
        """See Domain."""
        return repeated(self.pictures())

    def summary(self, row: Mapping[str, Any]) -> str:
        """Mean distance to the photographs and drift of the concepts so far."""
        near = [v for v in row["mmd"] if v is not None]
        drift = [v for v in row["drift"][:-1] if v is not None]
        if not near:
            return "no images"
        text = f"MMD x 1e3 to the photographs {1e3 * sum(near) / len(near):.1f} over {len(near)}"
        return text + (f", drift {1e3 * sum(drift) / len(drift):.1f}" if drift else "")


DOMAIN = Customization
