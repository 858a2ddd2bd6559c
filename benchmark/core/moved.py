"""Modules that went elsewhere: importing one by its former name says in one line where it is."""

from __future__ import annotations

import sys

#: package -> the modules that are in it now and were in the package above all rooms (benchmark, methods, datasets)
_ROOMS = {
    "benchmark.core": "compat domain errors processes reading registry safe_yaml",
    "benchmark.models": "image_features lean sampling tokens",
    "benchmark.domains": "concept_evaluation prior",
    "benchmark.runs": "mirror progress restore runner stopping trackers",
    "benchmark.exports": "export generate",
    "benchmark.grids": "child slurm status sweep",
    "benchmark.speed": "peers",
    "benchmark.cli": "doctor",
    "methods.shared": "low_rank prompting site_weights",
    "datasets.reading": "cache split verify",
}
_BENCH = "classification concepts concepts_work customization customization_work input input_work pairs worker"
#: former name -> where its parts are; `-` and a file: what it measured is there, and nothing measures it any more
MOVED = {
    **{f"{new.split('.')[0]}.{name}": f"{new}.{name}" for new, names in _ROOMS.items() for name in names.split()},
    **{f"benchmark.bench_{name}": f"benchmark.speed.{name}" for name in _BENCH.split()},
    **{f"benchmark.bench_{name}": "- results/SPEED.md" for name in ("growth", "page")},
    **{f"benchmark.bench_{name}": "- results/SCALE.md" for name in ("report", "scale")},
    "benchmark.backbones": "benchmark.models.bundled",
    "benchmark.bench": "benchmark.speed.common",
    "benchmark.bench_step": "benchmark.speed.step_work",
    "benchmark.compare": "benchmark.grids.plan benchmark.grids.execute",
    "benchmark.diffusion": "benchmark.models.stable_diffusion",
    "benchmark.engines": "benchmark.grids.plan benchmark.grids.execute benchmark.grids.local",
    "benchmark.environment": "benchmark.core.machine benchmark.core.devices",
    "benchmark.grid": "benchmark.grids.survey",
    "benchmark.lease": "benchmark.core.lock",
    "benchmark.memory": "benchmark.core.devices",
    "benchmark.pretrain": "benchmark.pretraining.recipes benchmark.pretraining.glyph_vit",
    "benchmark.pretrain_diffusion": "benchmark.pretraining.glyph_diffusion",
    "benchmark.ray_engine": "benchmark.grids.ray",
    "benchmark.record": "benchmark.runs.folder benchmark.core.files",
    "benchmark.seeding": "benchmark.core.seeding benchmark.core.generators",
    "benchmark.simulate": "- results/SCALE.md",
    "benchmark.stopwatch": "benchmark.core.machine",
    "benchmark.vit": "benchmark.models.vit benchmark.models.vit_blocks",
    "datasets.download": "datasets.reading.download datasets.reading.unpack",
    "datasets.glyph_captions": "datasets.drawing.captions",
    "datasets.glyph_drawing": "datasets.drawing.glyphs",
    "datasets.loader": "datasets.reading.loader datasets.reading.views datasets.reading.kept",
    "datasets.registry": "datasets.base",
    "results.cost": "- results/SCALE.md",
    "results.ledger": "benchmark.grids.ledger",
    "results.shape": "results.record_type",
    "results.speed_page": "- results/SPEED.md",
}


class _Signpost:
    """Asked last for a module that nothing else finds."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """ModuleNotFoundError for a former name; without `name`, as `from package import it` would swallow that one."""
        mark, _, module = name.partition(".")
        if mark == "dualcl" and module in MOVED:
            gone, *now = MOVED[module].split()
            if gone == "-":
                raise ModuleNotFoundError(f"{name} is gone; its last figures are in {now[0]}")
            raise ModuleNotFoundError(f"{name} is now {' and '.join(f'dualcl.{new}' for new in (gone, *now))}")


sys.meta_path.append(_Signpost)
