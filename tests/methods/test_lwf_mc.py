"""LwF.MC: the loss against its formula, the distillation term at zero drift, and a resumed run."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs.runner import Run
from dualcl.methods.lwf_mc import LwFMCConfig, distillation_loss


def begin(domain, method, task):
    domain.begin_task(task, method.output_scope)
    method.begin_task(task)
    method.prepare(task)


def move(method, size=0.02):
    """Stands for training: weights away from where they were."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in method.weights:
            weight.add_(size * torch.randn(weight.shape, generator=generator))


@pytest.fixture
def begun(build):
    """begun(*assignments) -> (domain, method, a batch) in the second task of a classifier with random rows."""

    def make(*sets):
        domain, method = build("lwf_mc", "head.init=linear", *sets)
        begin(domain, method, 0)
        method.end_task(0)
        move(method)
        begin(domain, method, 1)
        return domain, method, next(domain.batches(1, 0))

    return make


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_one_sample_by_hand():
    logits, old = torch.tensor([[math.log(3.0), 0.0, -math.log(4.0)]]), torch.tensor([[0.0]])
    # sigmoids 3/4, 1/2 and 1/5; wanted 1/2, 0 and 1
    first = -(0.5 * math.log(0.75) + 0.5 * math.log(0.25))
    rest = -math.log(0.5) - math.log(0.2)
    loss = distillation_loss(logits, old, torch.tensor([2]))
    assert loss.item() == pytest.approx(first + rest, rel=1e-6)
    assert distillation_loss(logits, old, torch.tensor([2]), 3.0).item() == pytest.approx(3 * first + rest, rel=1e-6)


def test_the_mean_is_over_samples_and_the_sum_over_classes():
    generator = torch.Generator().manual_seed(0)
    logits, old = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    targets = torch.tensor([3, 4, 3, 3, 4, 4, 3, 4])
    total = 0.0
    for x, q, y in zip(logits.sigmoid(), old.sigmoid(), targets.tolist(), strict=True):
        wanted = torch.cat([q, torch.eye(5)[y][3:]])
        total += binary_cross_entropy(x, wanted, reduction="sum").item()
    assert distillation_loss(logits, old, targets).item() == pytest.approx(total / 8, rel=1e-5)


def test_in_the_first_task_it_is_binary_cross_entropy_of_one_hot_targets(build):
    domain, method = build("lwf_mc")
    begin(domain, method, 0)
    assert method.teacher is None
    batch = next(domain.batches(0, 0))
    assert method.loss(batch).item() == pytest.approx(3 * math.log(2), rel=1e-6)  # three rows of zeros
    move(method)
    with torch.no_grad():
        domain.heads[0].weight.normal_(generator=torch.Generator().manual_seed(1))
    one_hot = torch.eye(3)[batch.labels]
    direct = binary_cross_entropy(domain.predict(batch.images).sigmoid(), one_hot, reduction="sum") / len(one_hot)
    assert direct > 0.5
    torch.testing.assert_close(method.loss(batch), direct, rtol=1e-5, atol=0)


# --- zero drift -------------------------------------------------------------------------------------------------------


def test_at_zero_drift_the_term_is_the_entropy_of_the_old_outputs(begun):
    domain, method, batch = begun()
    share = domain.predict(batch.images)[:, :3].double().sigmoid()
    entropy = -(share * share.log() + (1 - share) * (1 - share).log()).sum(1).mean().item()
    assert 0.1 < entropy < 3 * math.log(2)
    new = domain.predict(batch.images)[:, 3:]
    one_hot = torch.eye(2)[batch.labels - 3]
    rest = binary_cross_entropy(new.sigmoid(), one_hot, reduction="sum").item() / len(one_hot)
    assert method.loss(batch).item() == pytest.approx(entropy + rest, rel=1e-5)


def test_at_zero_drift_the_term_has_no_gradient(begun):
    domain, method, batch = begun()
    logits = domain.logits(batch)
    loss = distillation_loss(logits, method.teacher(batch)[:, :3], batch.labels)
    (gradient,) = torch.autograd.grad(loss, [logits], retain_graph=True)
    assert torch.equal(gradient[:, :3], torch.zeros(len(logits), 3))
    assert gradient[:, 3:].abs().min() > 0
    # so the weights are pulled by the new classes alone
    with_old = torch.autograd.grad(loss, list(method.weights), retain_graph=True)
    without = torch.autograd.grad(
        distillation_loss(logits, method.teacher(batch)[:, :3], batch.labels, 0.0), list(method.weights)
    )
    assert max(g.abs().max() for g in with_old) > 1e-4
    for a, b in zip(with_old, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_after_drift_it_pulls_the_old_outputs_back(begun):
    domain, method, batch = begun()
    before = method.teacher(batch)[:, :3].sigmoid()
    move(method, 0.05)
    with torch.no_grad():
        domain.heads[0].bias.add_(0.5)
    assert torch.equal(method.teacher(batch)[:, :3].sigmoid(), before)
    drift = domain.predict(batch.images)[:, :3].sigmoid() - before
    assert drift.abs().max() > 0.05
    (gradient,) = torch.autograd.grad(method.loss(batch), [domain.heads[0].bias])
    torch.testing.assert_close(gradient, drift.mean(0), rtol=1e-4, atol=1e-6)


def test_without_weight_there_is_no_copy_and_old_rows_are_left_alone(begun):
    domain, method, batch = begun("method.distill_weight=0")
    assert method.teacher is None
    gradients = torch.autograd.grad(method.loss(batch), list(domain.heads.parameters()))
    assert [bool(g.any()) for g in gradients] == [False, False, True, True]


# --- the copy ---------------------------------------------------------------------------------------------------------


def test_the_copy_is_neither_trained_nor_saved_nor_kept(begun):
    domain, method, batch = begun()
    batch.images.requires_grad_(True)
    assert not method.teacher(batch).requires_grad
    names = {n.split(".")[0] for n in method.state_dict()}
    assert names == {"weights"}
    assert method.stored_parameters() == domain.adapted_parameters()
    method.end_task(1)
    assert method.teacher is None


def test_what_it_remembers_stays_nearer_with_the_term(tiny, executed, tmp_path):
    """Rows of old classes answer the images of a new task as before, at the price of the weight."""
    drift = []
    for weight in (0, 1):
        sets = ("train.epochs=6", "method.lr=1e-3", "head.init=linear", f"method.distill_weight={weight}")

        class Watched(Run):
            def _stage(self, record, task, stages, partial):
                images = self.domain._train_images(1)
                batch = next(self.domain._loader(images).eval_batches(len(images)))
                before = None if task == 0 else self.domain.predict(batch.images)[:, :3].sigmoid()
                super()._stage(record, task, stages, partial)
                if task == 1:
                    drift.append((self.domain.predict(batch.images)[:, :3].sigmoid() - before).abs().mean().item())

        executed(tiny("lwf_mc", *sets), tmp_path / str(weight), Watched)
    assert drift[1] < 0.5 * drift[0]


def test_an_interrupted_run_ends_as_an_undisturbed_one(tiny, resumed):
    sets = ("train.checkpoint_seconds=0", "train.batch_size=3", "method.lr=1e-3", "head.init=linear")
    resumed(tiny("lwf_mc", *sets), "task 3, step 2")


def test_a_negative_weight_is_refused():
    with pytest.raises(UserError, match=r"method\.distill_weight must not be negative, got -1"):
        LwFMCConfig(distill_weight=-1.0)
