"""The domains and the configuration sections each one adds."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.imports import import_large
from dualcl.datasets import dataset_class, dataset_info

if TYPE_CHECKING:
    from dualcl.benchmark.core.domain import Domain

DOMAINS = {
    "classification": "dualcl.benchmark.domains.classification",
    "customization": "dualcl.benchmark.domains.customization",
}


def domain_class(name: str) -> type[Domain]:
    """The domain called `name`; UserError when unknown."""
    if name not in DOMAINS:
        raise UserError(f"unknown domain {name!r}; {nearest(name, DOMAINS, 'domains')}")
    cls: type[Domain] = import_large(DOMAINS[name]).DOMAIN
    return cls


@functools.lru_cache(maxsize=32)
def _data_config(domain: str, reference: str) -> type:
    config: type = dataset_class(reference, domain).Config
    named = dataclasses.make_dataclass(config.__name__, [], bases=(config,), frozen=True)
    named.dataset_name = dataset_info(reference, domain).name  # type: ignore[attr-defined]
    return named


def domain_sections(domain: str, data: str) -> dict[str, type]:
    """Section name -> config class for this domain and data set, a reference of the registry."""
    sections: dict[str, type] = domain_class(domain).sections_config  # type: ignore[attr-defined]
    return {"data": _data_config(domain, data), **sections}
