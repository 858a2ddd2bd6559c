"""What every registered method must keep to; a new method is tested by being registered."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import dualcl.methods
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.methods import available_methods, method_class, method_info
from dualcl.methods.base import Method, MethodConfig

CLASSIFICATION = sorted(n for n, i in available_methods().items() if "classification" in i.domains)
CUSTOMIZATION = sorted(n for n, i in available_methods().items() if "customization" in i.domains)
#: what is the same for all methods of a comparison, and so never a method's
NOT_A_METHODS = {
    *("backbone", "weights", "data", "dataset", "root", "tasks", "classes", "class_order", "order", "order_seed"),
    *("epochs", "batch_size", "optimizer", "schedule", "drop_last", "preprocess", "augment", "resize", "seed"),
    *("precision", "device", "threads", "workers"),
}
#: two steps from a classifier of zeros move the model, but not yet the old outputs that lwf_mc holds at their start
SETS = {"lwf_mc": ("head.init=linear",)}


class WatchedRun(Run):
    """The real run; notes which tensors change during the optimiser steps and during a whole stage."""

    def __init__(self, *args):
        super().__init__(*args)
        self.undeclared: list[str] = []
        self.moved: list[int] = []
        self.changed_old_rows: list[str] = []
        self.needless_gradients: list[str] = []

    def domain_parts(self):
        """The domain's modules beside the model; the first holds what it adds for each task."""
        return {"heads": self.domain.heads}

    def everything(self):
        """Every floating-point tensor of the domain's parts and the method by name, each once."""
        parts = {"model": self.domain.model, "method": self.method, **self.domain_parts()}
        named = {f"{k}.{n}": t for k, m in parts.items() for n, t in (*m.named_parameters(), *m.named_buffers())}
        return {n: t for n, t in {id(t): (n, t) for n, t in named.items()}.values() if t.is_floating_point()}

    def _fit(self, task, groups, steps, partial):
        before = {n: (t, t.detach().clone()) for n, t in self.everything().items()}
        result = super()._fit(task, groups, steps, partial)
        declared = {id(p) for g in groups for p in g.params}
        changed = {n for n, (t, old) in before.items() if not torch.equal(t, old)}
        self.undeclared += [n for n in changed if id(before[n][0]) not in declared]
        self.moved.append(len(changed))
        # a gradient in front of frozen weights is computed for nothing
        held = [n for n, (t, _) in before.items() if t.is_leaf and t.grad is not None]
        self.needless_gradients += [n for n in held if id(before[n][0]) not in declared]
        return result

    def _stage(self, record, task, stages, partial):
        rows = next(iter(self.domain_parts().values()))
        old = {n: (p, p.detach().clone()) for n, p in rows.named_parameters()}
        super()._stage(record, task, stages, partial)
        self.changed_old_rows += [n for n, (p, before) in old.items() if not torch.equal(p, before)]


class WatchedConcepts(WatchedRun):
    """The same in the domain customization."""

    def domain_parts(self):
        diffusion = self.domain.diffusion
        return {"tokens": self.domain.tokens.rows, "text": diffusion.text_encoder, "vae": diffusion.vae}


class KilledRun(Run):
    """Is interrupted in its second step of the last stage, after a checkpoint of the first."""

    def step(self, batch, optimizer, factor, where):
        last = 1 if self.joint else self.n_tasks
        if where == f"task {last}, step 1":
            raise KeyboardInterrupt
        return super().step(batch, optimizer, factor, where)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """finished(method) -> (its finished run, its record), run once."""
    runs = {}

    def get(name):
        if name not in runs:
            resolved = tiny(name, *SETS.get(name, ()))
            work = WatchedRun(resolved, RunFolder(tmp_path_factory.mktemp(name)), Reporter(quiet=True))
            record = {"tasks": [], "matrix": {"rows": []}, "measured": {"tasks": []}}
            runs[name] = work, work.execute(record)
        return runs[name]

    return get


@pytest.fixture(scope="module")
def images():
    return torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_there_are_methods_to_test():
    assert {"clora", "lora", "finetune", "joint", "ncm", "l2p", "dualprompt", "coda_prompt"} <= set(CLASSIFICATION)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_runs_a_stream_of_uneven_tasks(name, finished):
    work, record = finished(name)
    rows = record["matrix"]["rows"]
    assert record["status"] == "finished"
    totals = [[9], [9, 6], [9, 6, 6]]
    assert [r["total"] for r in rows] == (totals[-1:] if work.joint else totals)
    assert [len(h.bias) for h in work.domain.heads] == [3, 2, 2]
    assert all(0 <= c <= t for r in rows for c, t in zip(r["correct"], r["total"], strict=True))
    steps = [6] if work.joint else [3, 2, 2]  # 35 images, or 15, 10 and 10, in batches of 6
    assert [t["steps"] for t in record["tasks"]] == (steps if work.method.takes_steps(0) else [0] * len(steps))
    assert all(t["parameters_stored"] > 0 for t in record["tasks"])


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_steps_change_declared_parameters_only(name, finished):
    work, _ = finished(name)
    assert work.undeclared == []
    assert work.needless_gradients == []
    assert all(n > 0 for n in work.moved)
    assert bool(work.moved) == work.method.takes_steps(0)


@pytest.mark.parametrize("name", [n for n in CLASSIFICATION if method_class(n).output_scope == "task"])
def test_old_classifier_rows_stay_bit_equal(name, finished):
    work, _ = finished(name)
    assert work.changed_old_rows == []


@pytest.mark.parametrize("name", [n for n in CLASSIFICATION if method_class(n).output_scope == "seen"])
def test_scope_seen_trains_old_rows_too(name, finished):
    assert {"0.weight", "0.bias", "1.weight", "1.bias"} <= set(finished(name)[0].changed_old_rows)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_state_round_trip_through_safetensors_gives_equal_logits(name, finished, images, tmp_path):
    work, _ = finished(name)
    stages = 1 if work.joint else 3
    again = Run(work.resolved, RunFolder(tmp_path), Reporter(quiet=True))
    for task in range(stages):
        again.begin(task)
    fresh = again.domain.predict(images)
    work.folder.save_checkpoint("copy", work.tensors(), {})
    tensors, _ = work.folder.load_checkpoint("copy")
    again.restore(tensors, stages)
    assert torch.equal(again.domain.predict(images), work.domain.predict(images))
    assert not torch.equal(fresh, work.domain.predict(images))
    assert again.method.stored_parameters() == work.method.stored_parameters()


# --- the domain customization -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(concepts, empty_record, tmp_path_factory):
    """taught(method) -> (its finished run on two concepts, its record), run once."""
    runs = {}

    def get(name):
        if name not in runs:
            work = concepts(name, tmp_path_factory.mktemp(name), kind=WatchedConcepts)
            runs[name] = work, work.execute(empty_record())
        return runs[name]

    return get


def test_there_are_concept_methods_to_test():
    assert {"clora", "lora", "textual_inversion", "dreambooth", "custom_diffusion", "ewc", "l2"} <= set(CUSTOMIZATION)


@pytest.mark.parametrize("name", CUSTOMIZATION)
def test_runs_a_stream_of_concepts(name, taught):
    work, record = taught(name)
    assert record["status"] == "finished"
    rows = record["matrix"]["rows"]
    assert [r["after_task"] for r in rows] == ([1] if work.joint else [0, 1])
    assert [len(r["mmd"]) for r in rows] == ([2] if work.joint else [1, 2])
    assert all(v > 0 for r in rows for v in r["mmd"])
    assert [t["steps"] for t in record["tasks"]] == ([4] if work.joint else [2, 2])
    assert all(t["parameters_stored"] >= t["parameters_trained"] > 0 for t in record["tasks"])


@pytest.mark.parametrize("name", CUSTOMIZATION)
def test_concept_steps_change_declared_parameters_only(name, taught):
    work, _ = taught(name)
    assert work.undeclared == []
    assert work.needless_gradients == []
    assert len(work.moved) == (1 if work.joint else 2)
    assert all(n > 0 for n in work.moved)


@pytest.mark.parametrize("name", CUSTOMIZATION)
def test_token_table_old_token_rows_and_frozen_parts_stay_bit_equal(name, taught, small_diffusion):
    work, _ = taught(name)
    assert work.changed_old_rows == []
    work.domain.check_tokens()
    fresh = small_diffusion.text_encoder.get_input_embeddings().weight
    assert torch.equal(work.domain.tokens.base.weight, fresh)
    weights = dict(work.domain.diffusion.vae.named_parameters())
    assert all(torch.equal(weights[n], p) for n, p in small_diffusion.vae.named_parameters())
    may_move = {id(p) for p in work.domain.full_parameters().values()}
    if "network" in work.method.requires:
        return
    ours = dict(work.domain.network_parameters())
    frozen = [n for n, p in small_diffusion.unet.named_parameters() if id(ours[n]) not in may_move]
    assert len(frozen) > 50
    before = dict(small_diffusion.unet.named_parameters())
    assert [n for n in frozen if not torch.equal(before[n], ours[n])] == []


@pytest.mark.parametrize("name", CUSTOMIZATION)
def test_an_interrupted_run_ends_as_an_undisturbed_one(name, taught, concepts, empty_record, tmp_path):
    work, record = taught(name)
    killed = concepts(name, tmp_path, kind=KilledRun)
    with pytest.raises(KeyboardInterrupt):
        killed.execute(empty_record())
    again = concepts(name, tmp_path)
    after = again.execute(empty_record())
    assert after["matrix"] == record["matrix"]
    assert after["tasks"] == record["tasks"]
    wanted = work.tensors()
    assert again.tensors().keys() == wanted.keys()
    assert [n for n, t in again.tensors().items() if not torch.equal(t, wanted[n])] == []
    images = [
        {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*.png")} for f in (work.folder.path, tmp_path)
    ]
    assert images[0]
    assert images[0] == images[1]


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(available_methods()))
def test_config_holds_hyper_parameters_of_the_method_only(name):
    cls = method_class(name)
    assert issubclass(cls, Method)
    assert issubclass(cls.Config, MethodConfig)
    assert {f.name for f in dataclasses.fields(cls.Config)}.isdisjoint(NOT_A_METHODS)
    assert cls.Config() == cls.Config()


@pytest.mark.parametrize("name", sorted(available_methods()))
def test_index_and_class_agree(name):
    info, cls = method_info(name), method_class(name)
    assert (info.name, info.module) == (cls.name, cls.__module__)
    assert info.summary
    assert info.source
    assert info.domains


@pytest.mark.parametrize("name", sorted(available_methods()))
def test_a_negative_rate_is_refused(name):
    for key in ("lr", "head_lr", "weight_decay"):
        with pytest.raises(UserError, match=rf"method\.{key} must not be negative, got -1"):
            method_class(name).Config(**{key: -1.0})


ONE = '''
@register_method("{name}", domains=("classification",), summary="s", source="x")
class Some(Method):
    """A method."""
'''


def test_a_new_file_is_enough_and_a_name_given_twice_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(dualcl.methods, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "a.py").write_text(ONE.format(name="first"))
    found = available_methods.__wrapped__()
    assert {n: (i.module, i.domains) for n, i in found.items()} == {"first": ("dualcl.methods.a", ("classification",))}
    (tmp_path / "b.py").write_text(ONE.format(name="first"))
    with pytest.raises(ValueError, match=r"'first' is registered in a\.py and in b\.py"):
        available_methods.__wrapped__()


def test_unknown_methods_and_domains_are_named():
    with pytest.raises(UserError, match=r"unknown method 'clorra'; did you mean 'clora'"):
        method_info("clorra")
    with pytest.raises(UserError, match="'ncm' does not work in the domain 'customization'; it serves: classification"):
        method_info("ncm", "customization")
