"""What a customization data set hands to the benchmark: concepts with a few photos each, or requests to unlearn."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import check_name
from dualcl.datasets.base import ImageSet, make_class_order

#: what a prompt template may hold: the concept's token(s), and its class noun
TOKEN, NOUN = "{token}", "{noun}"


@dataclass(frozen=True)
class Request:
    """Something to be unlearnt: whoever asks for `target` is to get what `anchor` gives. Both are words of a prompt."""

    target: str
    anchor: str
    #: object, style, ...: for methods and measures that tell them apart
    kind: str = "object"

    def __post_init__(self) -> None:
        for word in (self.target, self.anchor, self.kind):
            check_name(word, "a request's word")
        if not (self.target.strip() and self.anchor.strip() and self.target != self.anchor):
            raise UserError(f"a request of {self.target!r} for {self.anchor!r} instead; give two different things")


@dataclass(frozen=True)
class Retained:
    """What must not suffer under requests: prompts whose images are made, and measured, before and after each of them.

    `attributes` are what all of the images are to show, which a judge of generated images, if there is one, must know.
    """

    name: str
    prompts: tuple[str, ...]
    #: inside: of an attribute, or a kind, of which requests unlearn other values; across: of another
    side: Literal["inside", "across"] = "across"
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for word in (self.name, *self.prompts):
            check_name(word, "what is to be retained")
        if not self.prompts:
            raise UserError(f"{self.name!r} is to be retained and has no prompts; give at least one")


@dataclass(frozen=True)
class Captioned:
    """A whole prompt for nothing that is taught, and what its image is to show, by attribute of a judge of images."""

    prompt: str
    attributes: Mapping[str, str]


def _none(index: int) -> Image.Image:
    raise RuntimeError("a request has no photographs")


NO_IMAGES = ImageSet((), np.zeros(0, dtype=np.int64), _none, "")


@dataclass(frozen=True)
class Concept:
    """One thing to be taught from a few images, or with `request` to be unlearnt, from images that the model makes.

    `noun` is its class noun ("dog"), "" when unknown. Templates hold "{token}" and may hold "{noun}"; without any, the
    domain's `concept.prompt` and `eval.prompt` are used. Labels of `images` are all 0. `attributes` are what all its
    images, or those of a request's target, show: attribute by value, which a judge of images, if any, must know.
    """

    name: str
    noun: str
    images: ImageSet = NO_IMAGES
    prompts: tuple[str, ...] = ()
    eval_prompts: tuple[str, ...] = ()
    request: Request | None = None
    #: of each image, "" where it has none; empty without any
    captions: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ConceptData:
    """A customization data set, concepts in natural order; either all of them are requests or none.

    Raises UserError when there is no concept, two have one name, one has no image, or a template is wrong.
    """

    name: str
    concepts: tuple[Concept, ...]
    split_name: str
    split_hash: str
    #: ids of images left out because they could not be read (data.on_bad_image=skip)
    skipped: tuple[str, ...] = ()
    #: what the files leave open, and how it was taken: said at the start of a run
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    #: beside requests: what is measured, and whole prompts that methods may keep as they are, none of them measured
    retained: tuple[Retained, ...] = ()
    kept: tuple[str, ...] = ()
    #: what tells how much of the pretrained model is left after the last task
    prior: tuple[Captioned, ...] = ()

    def __post_init__(self) -> None:
        if not self.concepts:
            raise UserError(f"{self.name} has no concepts; give at least one")
        names = [concept.name for concept in self.concepts]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{self.name} has two concepts called {name!r}; rename one")
        for concept in self.concepts:
            if concept.request is None and len(concept.images) == 0:
                raise UserError(f"concept {concept.name!r} of {self.name} has no images; give at least one")
            for template in (*concept.prompts, *concept.eval_prompts):
                check_template(template, f"concept {concept.name!r}")
        if len({concept.request is None for concept in self.concepts}) > 1:
            raise UserError(f"{self.name} mixes concepts to learn with requests to unlearn; make two data sets of them")
        if (self.retained or self.kept) and self.concepts[0].request is None:
            raise UserError(f"{self.name} names what is to be retained or kept, and no requests; leave that out")
        names = [one.name for one in self.retained]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{self.name} is to retain two things called {name!r}; rename one")
        measured = {prompt for one in self.retained for prompt in one.prompts}
        for prompt in self.kept:
            if prompt in measured:
                raise UserError(f"{self.name} keeps {prompt!r} and measures it; take it out of one of the two")


@dataclass(frozen=True)
class ConceptStream:
    """Concepts in the order in which they are learnt, one a task; `order` are their positions in `data.concepts`."""

    data: ConceptData
    order: tuple[int, ...]
    concepts: tuple[Concept, ...]

    @property
    def requests(self) -> tuple[Request, ...]:
        """What is to be unlearnt, a task each; empty for a stream of concepts."""
        return tuple(c.request for c in self.concepts if c.request is not None)


def check_template(template: str, where: str) -> None:
    """UserError naming `where` unless the template holds "{token}" and no other placeholder but "{noun}"."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{where}: the prompt {template!r} is no template ({error}); write it with {TOKEN}") from None
    if "token" not in fields:
        raise UserError(f"{where}: the prompt {template!r} lacks {TOKEN}, which stands for the concept; put it there")
    unknown = sorted(set(fields) - {"token", "noun"})
    if unknown:
        field = repr(f"{{{unknown[0]}}}")[1:-1]  # on one line, whatever it holds
        raise UserError(f"{where}: the prompt {template!r} has {field}; only {TOKEN} and {NOUN} are known")


def concepts_hash(concepts: Iterable[Concept]) -> str:
    """sha256 (16 hex digits) over the sorted (concept, image id) pairs; of a request, over (its name, all it says)."""
    digest, concepts = hashlib.sha256(), list(concepts)
    listed = [(c.name, c.images.ids if c.request is None else (repr(c.request),)) for c in concepts]
    for name, image in sorted((name, image) for name, images in listed for image in images):
        digest.update(f"{name}\t{image}\n".encode())
    for c in sorted((c for c in concepts if c.captions), key=lambda c: c.name):
        for image, caption in zip(c.images.ids, c.captions, strict=True):
            digest.update(f"{c.name}\t{image}\t{caption}\n".encode())
    return digest.hexdigest()[:16]


def make_concept_stream(
    data: ConceptData, tasks: int | None, order: str | Sequence[int] | Sequence[str] = "shuffle", seed: int = 0
) -> ConceptStream:
    """The first `tasks` concepts (None: all) in the asked order; see `make_class_order` for `order` and `seed`."""
    n_concepts = len(data.concepts)
    if tasks is not None and tasks < 1:
        raise UserError(f"stream.tasks must be at least 1, got {tasks}")
    if tasks is not None and tasks > n_concepts:
        raise UserError(
            f"stream.tasks is {tasks} but {data.name} has only {n_concepts} concepts; give at most {n_concepts}"
        )
    chosen = make_class_order(n_concepts, order, seed, [c.name for c in data.concepts], "concept")[:tasks]
    return ConceptStream(data, chosen, tuple(data.concepts[i] for i in chosen))
