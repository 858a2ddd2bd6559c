"""Requests of a user's own, in words: what a text-to-image model is to unlearn, and what stands in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import is_file, read_names
from dualcl.benchmark.core.settings import positive
from dualcl.datasets.base import register_dataset
from dualcl.datasets.concepts import Concept, ConceptData, Request, Retained, concepts_hash


def _lines(key: str, given: list[str]) -> list[str]:
    """What is given, or the lines of the file that it names: as they are recorded."""
    return read_names(Path(given[0]), key) if len(given) == 1 and is_file(given[0]) else given


@register_dataset(
    "unlearn-prompts", domain="customization", summary='requests of your own in words (data.requests=["cat = animal"])'
)
class UnlearnPrompts:
    """One request a line, TARGET = ANCHOR: whoever asks for the target is to get what the anchor gives."""

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config:
        """Keys below `data.`."""

        requests: list[str] = field(
            default_factory=list, metadata={"help": 'what to unlearn, ["grumpy cat = cat"], or a file with one a line'}
        )
        kind: str = field(default="object", metadata={"help": "of all requests: object, style, person, ..."})
        prompts: list[str] = field(
            default_factory=list, metadata={"help": "training prompts with {token}, or a file; default: concept.prompt"}
        )
        eval_prompts: list[str] = field(
            default_factory=list, metadata={"help": "prompts of the images that are made; default: eval.prompt"}
        )
        keep: list[str] = field(
            default_factory=list, metadata={"help": "whole prompts that methods may keep as they are, or a file"}
        )
        retained: list[str] = field(
            default_factory=list, metadata={"help": "other whole prompts, whose images are made after every request"}
        )
        validation: int = field(default=0, metadata={"help": "keep the last so many requests for sweeps"})
        tuning: bool = field(
            default=False, metadata={"help": "the requests that are kept for sweeps (a sweep sets it)"}
        )

        def __post_init__(self) -> None:
            positive("data.validation", self.validation, 0)
            for key in ("requests", "prompts", "eval_prompts", "keep", "retained"):
                object.__setattr__(self, key, _lines(f"data.{key}", getattr(self, key)))

    @classmethod
    def load(cls, config: Config) -> ConceptData:
        """Reads the requests; UserError names the line that is none."""
        if not config.requests:
            raise UserError(
                "data.requests is not set; say what to unlearn: --set 'data.requests=[\"grumpy cat = cat\"]'"
            )
        listed = [_request(line, config.kind) for line in config.requests]
        if config.validation >= len(listed):
            raise UserError(f"data.validation={config.validation} leaves none of {len(listed)} requests; lower it")
        if config.tuning and not config.validation:
            raise UserError("data.tuning=true needs data.validation=N, the number of requests that are kept for sweeps")
        first = len(listed) - config.validation
        chosen = listed[first:] if config.tuning else listed[:first]
        prompts, asked = tuple(config.prompts), tuple(config.eval_prompts)
        concepts = tuple(Concept(r.target, "", prompts=prompts, eval_prompts=asked, request=r) for r in chosen)
        return ConceptData(
            name=cls.name,
            concepts=concepts,
            split_name=f"unlearn-prompts:{len(concepts)}" + ("-tuning" if config.tuning else ""),
            split_hash=concepts_hash(concepts),
            retained=tuple(Retained(prompt, (prompt,)) for prompt in config.retained),
            kept=tuple(config.keep),
        )


def _request(line: str, kind: str) -> Request:
    target, sign, anchor = (part.strip() for part in line.partition("="))
    if not (sign and target and anchor):
        raise UserError(f"data.requests: {line!r} is no request; write TARGET = ANCHOR, such as grumpy cat = cat")
    return Request(target, anchor, kind)
