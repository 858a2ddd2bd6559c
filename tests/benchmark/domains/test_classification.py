"""The classification domain: what it learns, its evaluation against a naive one, its identity."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Images, Place
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs.runner import run

WITH_PREFIX = ("l2p", "coda_prompt")


def begun(build, name="linear_probe", tasks=3, *sets):
    domain, method = build(name, *sets)
    for task in range(tasks):
        domain.begin_task(task)
        method.begin_task(task)
    return domain, method


def naive(domain, task):
    """Correct test images of a task, one image at a time, pixels to tensor by hand."""
    test = domain.stream.tasks[task].test
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (domain.view.mean, domain.view.std))
    correct = 0
    for i in range(len(test)):
        pixels = torch.from_numpy(np.asarray(test.load(i), dtype=np.float32)).permute(2, 0, 1) / 255
        logits = domain.predict(((pixels - mean) / std)[None])[0]
        correct += int(logits.argmax()) == int(test.labels[i])
    return correct


def fresh_features(domain, task):
    with torch.no_grad():
        return torch.cat([domain.network.run(b.images) for b in domain._test_loader(task).eval_batches(4)])


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "finetune", "ncm", *WITH_PREFIX])
def test_evaluation_equals_a_naive_one_image_at_a_time(name, build):
    domain, method = begun(build, name, 0)
    for task in range(3):
        head = domain.begin_task(task, method.output_scope)
        method.begin_task(task)
        params = [*head, *(p for g in method.trained() for p in g.params)]
        optimizer = torch.optim.Adam(params, lr=0.01, fused=True)
        for batch in domain.batches(task, 0) if method.takes_steps(task) else ():
            optimizer.zero_grad()
            domain.loss(batch).backward()
            optimizer.step()
        method.end_task(task)
        row = domain.evaluate(range(task + 1))
        assert row["total"] == [9, 6, 6][: task + 1]
        assert row["correct"] == [naive(domain, t) for t in range(task + 1)]
        assert sum(row["correct"]) > 0


def fused_step(domain):
    weights = list(domain.model.parameters())[-8:]
    for p in weights:
        p.requires_grad_(True)
        p.grad = torch.randn(p.shape)
    torch.optim.Adam(weights, lr=0.1, fused=True).step()


def one_bit(domain):
    bits = domain.model.blocks[0].mlp.fc1.weight.detach().view(torch.int32)
    bits[3, 4] ^= 1 << 23


CHANGES = {
    "fused optimiser": fused_step,
    "site": lambda domain: domain.sites()["blocks.1.attn.v"].weight.add_(1.0),
    "data": lambda domain: domain.model.patch_embed.proj.weight.data.mul_(1.5),
    "one bit": one_bit,
    "hook": lambda domain: domain.model.norm.register_forward_hook(lambda module, args, out: out * torch.arange(32.0)),
    "replaced": lambda domain: setattr(domain.model.norm, "weight", torch.nn.Parameter(torch.rand(32), False)),
}


def scores(domain, task):
    """What an evaluation gets to see of a task's test images."""
    found = []
    with torch.no_grad(), domain.network.evaluation():
        for i, batch in enumerate(domain._test_loader(task).eval_batches(4)):
            rows = torch.arange(4 * i, 4 * i + len(batch.labels))
            place = Place("test", task, rows, torch.zeros(len(rows), dtype=torch.bool))
            found.append(domain._scores(Images(batch.images, place=place)))
    return torch.cat(found)


@pytest.mark.parametrize("how", CHANGES)
def test_a_network_that_changes_is_read_afresh_and_one_that_was_promised_to_stay_is_an_error(how, build):
    domain, _ = begun(build, "lora", 3, "head.init=linear")
    domain.evaluate(range(3))
    before = scores(domain, 1)
    CHANGES[how](domain)
    assert not torch.equal(scores(domain, 1), before)
    assert torch.equal(scores(domain, 1), domain.rows(fresh_features(domain, 1)))

    domain, _ = begun(build, "linear_probe", 3, "head.init=linear")
    domain.evaluate(range(3))
    CHANGES[how](domain)
    with pytest.raises(UserError, match="features kept under the key 'plain' are not what the network gives now"):
        domain.evaluate(range(3))


def test_features_are_kept_while_nothing_changes(build):
    domain, _ = begun(build)
    domain.evaluate(range(3))
    kept = domain.network._tests["test", 1, "plain"].values
    assert torch.equal(kept, fresh_features(domain, 1))
    for p in domain.heads.parameters():
        p.data.add_(1)
    domain.evaluate(range(3))
    assert domain.network._tests["test", 1, "plain"].values is kept


def test_features_go_when_an_evaluation_does_not_ask_for_them_and_when_a_state_is_restored(build):
    domain, method = begun(build)
    domain.evaluate(range(3))
    domain.evaluate([1])
    assert set(domain.network._tests) == {("test", 1, "plain")}
    domain.load_state_dict(domain.state_dict())
    assert domain.network._tests == {}
    other = dict.fromkeys(range(3), "other")
    method.features = lambda images, network: network(images, key=other[images.place.task])
    domain.evaluate(range(3))
    other[0] = "newer"
    domain.evaluate(range(3))
    assert set(domain.network._tests) == {("test", 0, "newer"), ("test", 1, "other"), ("test", 2, "other")}


def test_what_learns_is_never_kept_whatever_key_it_is_given(build):
    domain, _ = begun(build, "linear_probe", 1, "train.epochs=4")
    scale = torch.nn.Parameter(torch.ones(32))
    domain.model.norm.register_forward_hook(lambda module, args, out: out * scale)
    for step, batch in enumerate(domain.batches(0, 0)):
        scale.grad = None
        scale.data.fill_(1.0 + step)
        domain.heads[0].weight.data.fill_(0.01).mul_(torch.arange(32.0))
        loss = domain.loss(batch)
        loss.backward()
        assert scale.grad.abs().max() > 0
        assert torch.equal(loss, domain.loss(dataclasses.replace(batch)))
    with torch.no_grad():
        domain.evaluate([0])


@pytest.mark.parametrize("name", ["linear_probe", *WITH_PREFIX])
@pytest.mark.parametrize("augment", ["none", "flip"])
def test_features_of_training_images_are_kept_across_epochs(name, augment, build):
    domain, _ = begun(build, name, 2, f"input.augment={augment}", "train.epochs=4", "head.init=linear")
    passes = []
    domain.model.patch_embed.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    domain.begin_task(2)
    n, ways = len(domain.stream.tasks[2].train), 1 + (augment == "flip")
    kept, flipped = [], 0
    for batch in domain.batches(2, 0):
        kept.append(domain.loss(batch).item())
        flipped += int(batch.flipped.sum())
    assert (flipped > 0) == (augment == "flip")
    # one image tells whether the network learns
    assert sum(passes) == ways * n + (1 if name == "linear_probe" else 4 * n)
    # a batch that is not the domain's own, and one of a model that is trained, are computed from their images
    copies = [dataclasses.replace(batch) for batch in domain.batches(2, 0)]
    torch.testing.assert_close(kept, [domain.loss(batch).item() for batch in copies], rtol=1e-5, atol=0)
    changed = dataclasses.replace(copies[0], images=-copies[0].images)
    assert abs(domain.loss(changed).item() - kept[0]) > 1e-4


@pytest.mark.parametrize(
    ("name", "epochs", "augment"), [("lora", 4, "flip"), ("l2p", 2, "flip"), ("l2p", 4, "crop_flip")]
)
def test_features_that_change_or_never_come_again_are_not_kept(name, epochs, augment, build):
    domain, _ = begun(build, name, 1, f"train.epochs={epochs}", f"input.augment={augment}")
    for batch in domain.batches(0, 0):
        domain.loss(batch)
    assert not any(views is not None for views in domain.network._views.values())


@pytest.mark.parametrize("name", ["clora", "coda_prompt"])
def test_checkpointing_changes_no_bit(name, build):
    def gradients(checkpointing):
        domain, method = begun(build, name, 1, f"backbone.gradient_checkpointing={checkpointing}")
        params = [p for g in method.trained() for p in g.params]
        for p in params:
            p.grad = None
        domain.heads[0].weight.data.fill_(0.01).mul_(torch.arange(32.0))
        domain.loss(next(iter(domain.batches(0, 0)))).backward()
        return [p.grad for p in params]

    found, expected = gradients("true"), gradients("false")
    assert any(g.abs().max() > 0 for g in expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_predictions_are_over_all_classes_seen_so_far(build):
    domain, _ = begun(build, tasks=2)
    assert domain.predict(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    domain.heads[0].bias.data.fill_(1e4)
    assert domain.evaluate([0, 1])["correct"][1] == 0


def test_summary_is_the_mean_over_tasks(build):
    domain, _ = begun(build)
    assert domain.summary({"correct": [9, 3], "total": [9, 6]}) == "accuracy over 2 tasks so far 75.0 %"
    assert domain.summary({"correct": [9], "total": [9]}) == "accuracy over 1 task so far 100.0 %"


# --- learning -------------------------------------------------------------------------------------------------------


def test_loss_is_cross_entropy_over_the_tasks_or_all_seen_classes(build):
    domain, _ = build("linear_probe")
    domain.begin_task(0)
    own = domain.begin_task(1)
    assert {id(p) for p in own} == {id(p) for p in domain.heads[1].parameters()}
    batch = next(domain.batches(1, 0))
    assert set(batch.labels.tolist()) <= {3, 4}
    logits = domain.predict(batch.images)
    loss = domain.loss(batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, 3:], batch.labels - 3))
    loss.backward()
    assert domain.heads[0].weight.grad is None
    every = domain.begin_task(2, "seen")
    assert len(every) == 6
    batch = next(domain.batches(2, 0))
    torch.testing.assert_close(domain.loss(batch), F.cross_entropy(domain.predict(batch.images), batch.labels))


def test_rows_start_as_a_function_of_seed_and_task(build):
    one, two, other = (
        begun(build, "linear_probe", 3, f"seed={s}", "head.init=linear")[0].state_dict() for s in (0, 0, 1)
    )
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert not any(torch.equal(v, other[k]) for k, v in one.items())
    assert not torch.equal(one["heads.1.weight"], one["heads.2.weight"])
    assert one["heads.0.weight"].abs().max() <= 32**-0.5


def test_rows_start_at_zero_by_default(build):
    state = begun(build, "linear_probe", 2)[0].state_dict()
    assert len(state) == 4
    assert not any(v.any() for v in state.values())


def test_tasks_begin_in_order(build):
    domain, _ = begun(build, tasks=1)
    with pytest.raises(RuntimeError, match="task 2 begun when 1 tasks were there"):
        domain.begin_task(2)


def test_batches_go_on_from_any_step(build):
    domain, _ = build("linear_probe", "train.epochs=3", "input.augment=flip")
    whole = list(domain.batches(1, 0))
    assert len(whole) == 3 * domain.steps_per_epoch(1)
    for start in (1, 3, 5):
        rest = list(domain.batches(1, start))
        assert len(rest) == len(whole) - start
        for a, b in zip(rest, whole[start:], strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
    assert not torch.equal(whole[0].indices, whole[2].indices)  # another epoch, another order
    assert list(domain.batches(1, len(whole))) == []


def test_a_batch_larger_than_a_task_is_refused_when_short_ones_are_dropped(build):
    domain, _ = build("linear_probe", "train.drop_last=true", "train.batch_size=12")
    assert domain.steps_per_epoch(0) == 1
    with pytest.raises(
        UserError, match=r"train\.batch_size=12 with train\.drop_last=true .*task of 10 images; lower it"
    ):
        domain.steps_per_epoch(1)


def test_joint_training_is_one_stage_over_all_tasks(tiny, build, tmp_path):
    record = run(tiny("joint"), tmp_path / "joint")
    assert [r["after_task"] for r in record["matrix"]["rows"]] == [2]
    assert record["matrix"]["rows"][0]["total"] == [9, 6, 6]
    (stage,) = record["tasks"]
    assert (stage["task"], stage["name"], stage["steps"]) == (None, "all tasks", 6)
    domain, _ = build("joint")
    assert len(domain.begin_task(None)) == 6
    labels = torch.cat([b.labels for b in domain.batches(None, 0)])
    assert labels.bincount().tolist() == [5] * 7
    by_task = [set(np.asarray(t.train.ids)) for t in domain.stream.tasks]
    train = domain._train_images(None)
    for name, label in zip(train.ids, train.labels, strict=True):
        task = next(i for i, t in enumerate(domain.stream.tasks) if int(label) in t.outputs)
        assert name in by_task[task]


# --- the capability `features` --------------------------------------------------------------------------------------


def test_output_rows_are_set_for_one_task(build):
    domain, _ = begun(build)
    before = {k: v.clone() for k, v in domain.state_dict().items()}
    weight, bias = torch.arange(64.0).view(2, 32), torch.tensor([1.0, 2.0])
    domain.set_output_rows(1, weight, bias)
    state = domain.state_dict()
    assert torch.equal(state["heads.1.weight"], weight)
    assert torch.equal(state["heads.1.bias"], bias)
    assert all(torch.equal(state[k], v) for k, v in before.items() if ".1." not in k)
    assert [domain.outputs(t) for t in range(3)] == [range(3), range(3, 5), range(5, 7)]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = domain.network.run(images) @ weight.T + bias
    torch.testing.assert_close(domain.predict(images)[:, 3:5], expected)


def test_training_features_are_each_image_once_without_augmentation(build):
    domain, _ = build("ncm", "input.augment=crop_flip")
    pairs = list(domain.training_features(0))
    features, labels = torch.cat([f for f, _ in pairs]), torch.cat([y for _, y in pairs])
    assert features.shape == (15, 32)
    assert labels.bincount().tolist() == [5, 5, 5]
    again = torch.cat([f for f, _ in domain.training_features(0)])
    assert torch.equal(again, features)
    assert not features.requires_grad


# --- provenance -----------------------------------------------------------------------------------------------------


def test_identity_is_the_same_for_all_methods_and_says_what_differs(build, image_tree, tmp_path):
    same, _ = build("lora")
    identity = build("ncm", "seed=0")[0].identity()
    assert same.identity() == identity
    assert (identity["data"], identity["split_name"], identity["order_seed"]) == ("image-folder", "folder:train/val", 0)
    assert sorted(identity["class_order"]) == list(range(7))

    def differ(*sets):
        other = build("ncm", *sets)[0].identity()
        return {k for k in identity if identity[k] != other[k]}

    assert differ("stream.order_seed=5") == {"class_order", "class_order_hash", "order_seed"}
    assert differ("seed=5", "stream.order_seed=0") == set()
    assert differ("input.preprocess=none") == {"preprocess"}
    assert differ("input.workers=1", "input.cache_mib=0") == set()
    assert differ("backbone.name=vit_small_patch16_224") == {"backbone"}
    assert differ("backbone.kwargs.depth=6") == {"weights_sha256"}
    tree = tmp_path / "more"
    shutil.copytree(image_tree, tree)
    Image.new("RGB", (32, 32)).save(tree / "train" / "shade0" / "extra.png")
    assert differ(f'data.root="{tree}"') == {"split_hash"}


def test_facts_name_the_classes(build):
    domain, _ = build("ncm")
    assert domain.facts()["class_names"] == [f"shade{i}" for i in range(7)]
    assert domain.facts()["skipped_images"] == []
    assert [t.facts["n_train"] for t in domain.tasks] == [15, 10, 10]
    assert [t.facts["n_test"] for t in domain.tasks] == [9, 6, 6]


def test_the_network_is_counted_as_loaded(build):
    domain, _ = build("lora")
    plain, _ = build("ncm")
    assert domain.adapted_parameters() == sum(p.numel() for p in plain.model.parameters())
    domain.begin_task(0)
    assert domain.stored_parameters() == 3 * 32 + 3


@pytest.mark.parametrize(("choice", "mean", "std"), [("none", 0.0, 1.0), ("half", 0.5, 0.5), ("backbone", 0.5, 0.5)])
def test_preprocessing_is_chosen_for_all_methods(choice, mean, std, build):
    view = build("ncm", f"input.preprocess={choice}")[0].view
    assert (view.mean, view.std) == ((mean,) * 3, (std,) * 3)


def test_a_model_without_sites_is_named(build):
    domain, _ = build("ncm")
    domain._sites = {}
    with pytest.raises(UserError, match="vit_tiny_patch16_224 has no qkv or q_proj/k_proj/v_proj Linear to adapt"):
        domain.sites()


def test_scores_that_are_no_numbers_are_no_accuracy(build):
    domain, method = build("ncm")
    domain.attach(method)
    domain.begin_task(0)
    method.begin_task(0)
    method.end_task(0)
    with torch.no_grad():
        next(domain.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="scores of test images of task 1 are NaN or infinite"):
        domain.evaluate([0])
