"""What every registered method must keep to; a new method is tested by being registered."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import dualcl.methods
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs import method_check as check
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
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


def maker(resolved):
    """make(folder, kind) -> a fresh run of the configuration."""
    return lambda folder, kind: kind(resolved, RunFolder(folder), Reporter(quiet=True))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """finished(method) -> (its finished run, its record, what makes a fresh one), run once."""
    runs = {}

    def get(name):
        if name not in runs:
            make = maker(tiny(name, "train.checkpoint_seconds=0", *SETS.get(name, ())))
            work = make(tmp_path_factory.mktemp(name), check.Watched)
            runs[name] = work, work.execute(check.empty_record()), make
        return runs[name]

    return get


def test_there_are_methods_to_test():
    assert {"clora", "lora", "finetune", "joint", "ncm", "l2p", "dualprompt", "coda_prompt"} <= set(CLASSIFICATION)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_runs_a_stream_of_uneven_tasks(name, finished):
    work, record, _ = finished(name)
    rows = record["matrix"]["rows"]
    assert record["status"] == "finished"
    totals = [[9], [9, 6], [9, 6, 6]]
    assert [r["total"] for r in rows] == (totals[-1:] if work.joint else totals)
    assert [len(h.bias) for h in work.domain.heads] == [3, 2, 2]
    assert all(0 <= c <= t for r in rows for c, t in zip(r["correct"], r["total"], strict=True))
    steps = [6] if work.joint else [3, 2, 2]  # 35 images, or 15, 10 and 10, in batches of 6
    assert [t["steps"] for t in record["tasks"]] == [n * work.method.takes_steps(t) for t, n in enumerate(steps)]
    assert all(t["parameters_stored"] > 0 for t in record["tasks"])


@pytest.mark.parametrize("name", CLASSIFICATION)
@pytest.mark.parametrize("holds", check.PROPERTIES, ids=lambda holds: holds.__name__)
def test_a_method_keeps_its_promises(name, holds, finished):
    work, _, make = finished(name)
    strict = {"tolerance": 1e-5} if holds is check.neighbours else {}
    assert "remark" not in (holds(work, make, **strict) or "")


def test_most_methods_promise_that_old_rows_stay(finished):
    promised = [n for n in CLASSIFICATION if method_class(n).output_scope == "task" or not method_class(n).trains_rows]
    assert len(promised) >= 10
    for name in promised:
        assert not method_class(name).rewrites_rows
        assert finished(name)[0].noted["old_rows"] == []


@pytest.mark.parametrize(
    "name", [n for n in CLASSIFICATION if method_class(n).output_scope == "seen" and method_class(n).trains_rows]
)
def test_scope_seen_trains_old_rows_too(name, finished):
    assert {"0.weight", "0.bias", "1.weight", "1.bias"} <= set(finished(name)[0].noted["old_rows"])


# --- the domain customization -----------------------------------------------------------------------------------------


def _concepts(concepts, name, folder, kind):
    return concepts(name, folder, kind=kind)


@pytest.fixture(scope="module")
def taught(concepts, tmp_path_factory):
    """taught(method) -> (its finished run on two concepts, its record, what makes a fresh one), run once."""
    runs = {}

    def get(name):
        if name not in runs:
            work = concepts(name, tmp_path_factory.mktemp(name), kind=check.Watched)
            make = functools.partial(_concepts, concepts, name)
            runs[name] = work, work.execute(check.empty_record()), make
        return runs[name]

    return get


def test_there_are_concept_methods_to_test():
    assert {"clora", "lora", "textual_inversion", "dreambooth", "custom_diffusion", "ewc", "l2"} <= set(CUSTOMIZATION)


@pytest.mark.parametrize("name", CUSTOMIZATION)
def test_runs_a_stream_of_concepts(name, taught):
    work, record, _ = taught(name)
    assert record["status"] == "finished"
    rows = record["matrix"]["rows"]
    assert [r["after_task"] for r in rows] == ([1] if work.joint else [0, 1])
    assert [len(r["mmd"]) for r in rows] == ([2] if work.joint else [1, 2])
    assert all(v > 0 for r in rows for v in r["mmd"])
    steps = [4] if work.joint else [2, 2]
    assert [t["steps"] for t in record["tasks"]] == [n * work.method.takes_steps(i) for i, n in enumerate(steps)]
    assert all(t["parameters_stored"] >= t["parameters_trained"] for t in record["tasks"])
    assert all((t["parameters_trained"] > 0) == (t["steps"] > 0) for t in record["tasks"])


@pytest.mark.parametrize("name", CUSTOMIZATION)
@pytest.mark.parametrize("holds", check.PROPERTIES, ids=lambda holds: holds.__name__)
def test_a_concept_method_keeps_its_promises(name, holds, taught):
    work, _, make = taught(name)
    assert "remark" not in (holds(work, make) or "")


@pytest.mark.parametrize("name", CUSTOMIZATION)
def test_token_table_old_token_rows_and_frozen_parts_stay_bit_equal(name, taught, small_diffusion):
    work, _, _ = taught(name)
    assert work.noted["old_rows"] == []
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
    with pytest.raises(UserError, match=r"'first' is registered in dualcl\.methods\.a and in dualcl\.methods\.b"):
        available_methods.__wrapped__()


def test_unknown_methods_and_domains_are_named():
    with pytest.raises(UserError, match=r"unknown method 'clorra'; did you mean 'clora'"):
        method_info("clorra")
    with pytest.raises(UserError, match="'ncm' does not work in the domain 'customization'; it serves: classification"):
        method_info("ncm", "customization")
