"""A run on disk as live objects: the domain and the method as they stood after the last finished task."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from dualcl.benchmark.config.resolve import section_classes
from dualcl.benchmark.core.devices import pick_device
from dualcl.benchmark.core.domain import Domain
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.machine import package_version
from dualcl.benchmark.core.registry import Registered, check_plugins, is_file
from dualcl.benchmark.core.seeding import derive_seed
from dualcl.benchmark.core.settings import Resolved, coerce
from dualcl.benchmark.domains import domain_class
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.runs.content import WEIGHTS, located, placed
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.datasets import dataset_info
from dualcl.datasets.base import ImageSet
from dualcl.datasets.concepts import Concept, ConceptData, Request
from dualcl.methods import method_class, method_info

Found = TypeVar("Found", bound=Registered)


def recorded_config(
    record: Mapping[str, Any], method: str | None = None, data_file: str | None = None, **general: Any
) -> Resolved:
    """The configuration that a record holds, with the top-level keys `general` in place of the recorded ones.

    A record can make nothing run: files of plug-ins are imported only where `method` and `data_file` name them, and any
    plug-in only if it has the recorded hash. Keys that the record lacks take their defaults. Raises UserError for keys
    this version of the suite does not know.
    """
    config = record["config"]
    try:
        domain, name = str(config["domain"]), str(config["method_name"])
        data = dict(config["data"])
        data_name, preset = str(data.pop("name")), str(config["preset"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the record's config is not one that dualcl wrote ({error!r}); run it again") from None
    info = _found(record, "method", name, method, lambda r: method_info(r, domain))
    data_info = _found(record, "data", data_name, data_file, lambda r: dataset_info(r, domain))
    plugins = {k: i.plugin for k, i in (("method", info), ("data", data_info)) if i.plugin is not None}
    check_plugins(record["run"], plugins, "the run", "name the files that it was made with (--method, --data)")
    classes = section_classes(domain, data_info.reference, method_class(info.reference).Config)
    top = {k: v for k, v in config.items() if k not in (*classes, "preset", "domain", "method_name")}
    given: dict[str, Any] = {**config, "data": data, "general": {**top, **general}}
    sections: dict[str, Any] = {}
    for section, cls in classes.items():
        hints = typing.get_type_hints(cls)
        fields = {f.name for f in dataclasses.fields(cls)}
        values = given.get(section, {})
        if not isinstance(values, Mapping):
            raise UserError(f"the record's config.{section} is no mapping; run it again")
        unknown = sorted(values.keys() - fields)
        if unknown:
            key = unknown[0] if section == "general" else f"{section}.{unknown[0]}"
            raise UserError(
                f"the record has the key {key}, which dualcl {package_version('dualcl')} does not know; "
                "use the version that made the run (environment.dualcl in its record.json)"
            )
        sections[section] = cls(**{k: coerce(v, hints[k], f"{section}.{k}") for k, v in values.items()})
    return Resolved(preset, domain, name, sections, sources={}, volatile=frozenset(), plugins=plugins)


def _found(record: Mapping[str, Any], part: str, name: str, given: str | None, find: Callable[[str], Found]) -> Found:
    """The method or data set of a record: the one that `given` names, or else by its name what is registered."""
    source = record["run"].get(f"{part}_source")
    file = source.get("file") if isinstance(source, Mapping) else None
    if is_file(name):
        raise UserError(f"the record names the file {name!r} as its {part}, which dualcl never writes; run it again")
    if given is None and file is not None:
        sha256 = str(source.get("sha256"))[:12]
        raise UserError(f"the run is of the {part} {name!r} in {file} (sha256 {sha256}): name it, --{part} FILE")
    info = find(given or name)
    if info.name != name:
        raise UserError(f"--{part} {given} is {info.name!r}, but the run is of the {part} {name!r}; give that file")
    return info


def restore(
    run_dir: str | Path,
    device: str = "cpu",
    *,
    after: int | None = None,
    loaded: Callable[[Any], None] | None = None,
    method: str | None = None,
    data: str | None = None,
    base: str | None = None,
) -> Run:
    """Rebuilds a finished or partial run as it stood after its last finished task, for use, not to train on.

    A customization run needs its base model but neither its photographs nor its prior images. `after` (1, 2, ...) asks
    for the state after that task. `loaded` is called with the domain before the method attaches to it: the pretrained
    model as it was found. `method` and `data` name the files of plug-ins, which no record can; `base` is where the
    pretrained weights are now. Raises UserError when there is no such run or checkpoint, or when the pretrained weights
    are not those of the run.
    """
    folder = RunFolder(Path(run_dir))
    record = folder.read_record() if folder.path.is_dir() else None
    if record is None:
        raise UserError(f"{run_dir} holds no record.json; give the folder of a run")
    done = folder.finished_tasks()
    if not done:
        raise UserError(f"{run_dir} has no finished task yet (status: {record['status']}); call its dualcl run again")
    last = int(record["run"]["n_tasks"]) if record["run"]["joint"] else done[-1] + 1
    if after is not None and after != last:
        raise UserError(f"{run_dir} keeps the state after task {last} only, not after task {after}; leave out --after")
    checkpoint = folder.load_checkpoint(f"task_{done[-1]}")
    if checkpoint is None:
        raise UserError(f"the checkpoint of task {last} in {run_dir} is gone; call its dualcl run again")

    resolved = recorded_config(record, method, data, device=device, threads=None)
    resolved = located(resolved, folder.path, record, here=False)
    if base is not None:
        resolved = placed(resolved, WEIGHTS[resolved.domain], base)
    elif record["identity"].get("weights") == "local directory":
        place = Path(resolved.section("base", BaseConfig).model).expanduser()
        if not place.is_dir():
            raise UserError(f"{run_dir} was made on a model in {place}, which is not there; say where: --base DIR")
    domain = _domain(resolved, record, pick_device(device))
    _check_weights(domain, record, folder.path)
    if loaded is not None:
        loaded(domain)
    run = Run(resolved, folder, Reporter(quiet=True), domain=domain)
    for task in range(done[-1] + 1):
        run.begin(task)
    try:
        run.restore(checkpoint[0], done[-1] + 1)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the checkpoint of task {last} in {run_dir} does not fit its record ({type(error).__name__}: {why}); "
            "delete the folder and call its dualcl run again"
        ) from error
    return run


def _domain(resolved: Resolved, record: Mapping[str, Any], device: torch.device) -> Domain:
    torch.manual_seed(derive_seed(resolved.general.seed, "build"))
    cls: Any = domain_class(resolved.domain)
    network = record["network"]
    domain: Domain
    if not {"concepts", "nouns", "prompts"} <= network.keys():
        domain = cls(resolved, device)
        return domain
    identity = record["identity"]
    image = ImageSet(("not loaded",), np.zeros(1, dtype=np.int64), _no_photograph, "")
    try:
        count = len(network["concepts"])
        requests = [Request(**r) for r in network["requests"]] if "requests" in network else [None] * count
        listed = zip(network["concepts"], network["nouns"], network["prompts"], requests, strict=True)
        concepts = tuple(
            Concept(str(name), str(noun), image, tuple(map(str, prompts)), request=request)
            for name, noun, prompts, request in listed
        )
        data = ConceptData(identity["data"], concepts, identity["split_name"], identity["split_hash"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the record's network or identity is damaged ({error!r}); run it again") from None
    # the concepts are listed in the order of the stream already
    stream = dataclasses.replace(resolved.sections["stream"], tasks=None, class_order="natural")
    ordered = dataclasses.replace(resolved, sections={**resolved.sections, "stream": stream})
    domain = cls(ordered, device, data=data)
    domain.makes_pictures = False  # type: ignore[attr-defined]  # they serve training only, and would take minutes
    template = resolved.sections["concept"].placeholder
    counted = [template.replace("{number}", str(i + 1)) for i in range(count)]  # as all were before words were recorded
    domain.words = list(map(str, network.get("words") or counted))  # type: ignore[attr-defined]
    return domain


def _no_photograph(index: int) -> Image.Image:
    raise RuntimeError("a restored run has no photographs")


def _check_weights(domain: Any, record: Mapping[str, Any], path: Path) -> None:
    known, now = (record.get("content") or {}).get("settings"), domain.contents(domain.resolved).get("settings")
    if known and now and (digest := now()) != known:
        raise UserError(
            f"the pretrained model's scheduler, tokenizer or sizes are not those of {path} (sha256 {digest}, there "
            f"{known}); put back {record['identity'].get('backbone', 'the model')} as it was"
        )
    # not the whole identity of a customization domain: it loads the feature network of the evaluation
    info = domain.diffusion.info if domain.name == "customization" else None
    found = info.weights_sha256 if info is not None else domain.identity().get("weights_sha256")
    wanted = record["identity"].get("weights_sha256")
    if found != wanted:
        raise UserError(
            f"the pretrained weights are not those of {path} (sha256 {str(found)[:12]}, there {str(wanted)[:12]}); "
            f"put back {record['identity'].get('backbone', 'the model')} as it was, or say where it is: --base DIR"
        )
