"""L2 and EWC against their formulas computed directly, and what they train, keep and change."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dualcl.benchmark.core.domain import Domain, Site, Task
from dualcl.benchmark.core.errors import UserError
from dualcl.methods.ewc import EWC, EWCConfig
from dualcl.methods.l2 import L2Config
from dualcl.methods.shared.site_weights import whole_weights


def move(method, seed=0, size=0.01):
    """Stands for training: weights away from where they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in method.weights:
            weight.add_(size * torch.randn(weight.shape, generator=generator))


def begin(domain, method, task):
    domain.begin_task(task, method.output_scope)
    method.begin_task(task)


# --- the weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l2", "ewc"])
def test_all_of_q_k_and_v_is_trained_and_nothing_else(build, name):
    domain, method = build(name)
    names = dict(domain.model.named_parameters())
    trained = {n for n, p in names.items() if p.requires_grad}
    assert trained == {f"blocks.{i}.attn.qkv.weight" for i in range(5)}
    (group,) = method.trained()
    assert [id(p) for p in group.params] == [id(names[f"blocks.{i}.attn.qkv.weight"]) for i in range(5)]
    assert method.flat().shape == (5 * 96 * 32,)


def test_flat_weights_are_set_as_they_are_read(build):
    _, method = build("l2")
    values = torch.arange(5.0 * 96 * 32)
    method.set_flat(values)
    assert torch.equal(method.flat(), values)
    assert torch.equal(method.weights[1][2], values[96 * 32 + 64 : 96 * 32 + 96])


def test_sites_that_leave_rows_out_are_refused(build):
    domain, _ = build("l2")
    sites = domain.sites()
    del sites[next(iter(sites))]
    with pytest.raises(RuntimeError, match=r"some rows of blocks\.0\.attn\.qkv only"):
        whole_weights(sites)


# --- L2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["previous", "pretrained"])
def test_l2_charges_the_squared_distance(build, reference):
    domain, method = build("l2", "method.lambda_=3", f"method.reference={reference}")
    anchor = [w.detach().clone() for w in method.weights]
    for task in range(2):
        begin(domain, method, task)
        move(method, task)
        direct = 3 * sum(((w - a) ** 2).sum() for w, a in zip(method.weights, anchor, strict=True))
        assert direct > 0.1
        torch.testing.assert_close(method.penalty(), direct)
        gradients = torch.autograd.grad(method.penalty(), list(method.weights))
        for g, w, a in zip(gradients, method.weights, anchor, strict=True):
            torch.testing.assert_close(g, 6 * (w - a), atol=1e-6, rtol=1e-5)
        method.end_task(task)
        if reference == "previous":
            anchor = [w.detach().clone() for w in method.weights]
    assert method.penalty().item() == (0 if reference == "previous" else pytest.approx(direct.item(), rel=1e-5))
    key = "update_norm" if reference == "previous" else "summed_norm"
    assert method.diagnostics() == {key: pytest.approx((direct.item() / 3) ** 0.5, rel=1e-5)}


def test_l2_keeps_the_reference_only_where_it_changes(build):
    assert "reference" in build("l2")[1].state_dict()
    assert "reference" not in build("l2", "method.reference=pretrained")[1].state_dict()
    assert build("l2")[1].stored_parameters() == 5 * 96 * 32


# --- EWC --------------------------------------------------------------------------------------------------------------


def direct_fisher(domain, weights, task, batches):
    """The mean squared gradient, image by image with `backward`."""
    total, count = [torch.zeros_like(w) for w in weights], 0
    for batch in itertools.islice(domain.batches(task, 0), batches):
        for i in range(len(batch.labels)):
            logits = domain.heads[task](domain.network.run(batch.images[i : i + 1]))
            label = batch.labels[i : i + 1] - domain.stream.tasks[task].outputs.start
            for w in weights:
                w.grad = None
            torch.nn.functional.cross_entropy(logits, label).backward()
            for t, w in zip(total, weights, strict=True):
                t += w.grad**2
            count += 1
    return torch.cat([(t / count).reshape(-1) for t in total]), count


SETS = ("head.init=linear", "method.fisher_batches=2")  # a head of zeros sends no gradient


def test_fisher_is_the_mean_squared_gradient_of_single_images(build):
    domain, method = build("ewc", *SETS)
    begin(domain, method, 0)
    wanted, count = direct_fisher(domain, method.weights, 0, 2)
    method.end_task(0)
    assert count == 12
    assert wanted.max() > 1e-6
    torch.testing.assert_close(method.fisher, wanted, rtol=1e-4, atol=1e-12)
    assert method.diagnostics()["fisher_samples"] == 12
    assert method.diagnostics()["fisher_trace"] == pytest.approx(wanted.sum().item(), rel=1e-4)


def test_fisher_takes_at_most_the_batches_there_are(build):
    domain, method = build("ewc", "head.init=linear", "method.fisher_batches=99")
    begin(domain, method, 0)
    method.end_task(0)
    assert method.diagnostics()["fisher_samples"] == 15


@pytest.mark.parametrize("decay", [1.0, 0.25])
def test_fisher_adds_up_over_tasks(build, decay):
    domain, method = build("ewc", *SETS, f"method.decay={decay}")
    begin(domain, method, 0)
    method.end_task(0)
    first = method.fisher.clone()
    begin(domain, method, 1)
    move(method)
    alone, _ = method.task_fisher(1)
    method.end_task(1)
    assert torch.equal(method.fisher, decay * first + alone)


def test_ewc_charges_important_weights(build):
    domain, method = build("ewc", *SETS, "method.lambda_=1e4")
    begin(domain, method, 0)
    assert method.penalty() is None
    move(method)
    method.end_task(0)
    anchor = method.flat().detach().clone()
    begin(domain, method, 1)
    assert method.penalty().item() == 0
    move(method, 1)
    direct = 1e4 / 2 * sum(f * (w - a) ** 2 for f, w, a in zip(method.fisher, method.flat(), anchor, strict=True))
    assert direct > 1e-3
    torch.testing.assert_close(method.penalty(), direct, rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(method.penalty(), [method.weights[2]])
    part = slice(2 * 96 * 32, 3 * 96 * 32)
    wanted = 1e4 * method.fisher[part] * (method.flat() - anchor)[part]
    torch.testing.assert_close(gradient.reshape(-1), wanted.detach(), rtol=1e-4, atol=1e-9)


def test_the_fisher_pass_leaves_no_trace_but_the_fisher(build):
    domain, method = build("ewc", *SETS)
    begin(domain, method, 0)
    weights, rng = method.flat().detach().clone(), torch.get_rng_state()
    twice = [method.task_fisher(0)[0] for _ in range(2)]
    assert torch.equal(*twice)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(method.flat(), weights)
    assert all(p.grad is None for p in (*domain.model.parameters(), *domain.heads.parameters()))
    with torch.no_grad():  # an evaluation loop's mode does not matter
        assert torch.equal(method.task_fisher(0)[0], twice[0])


def test_a_bfloat16_run_has_nearly_the_same_fisher_in_float32(build):
    domain, method = build("ewc", *SETS)
    begin(domain, method, 0)
    exact, _ = method.task_fisher(0)
    domain.precision = "bf16"
    coarse, _ = method.task_fisher(0)
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, exact)
    assert torch.corrcoef(torch.stack([coarse, exact]))[0, 1] > 0.99


def test_ewc_stores_weights_and_fisher(build):
    _, method = build("ewc")
    assert method.stored_parameters() == 2 * 5 * 96 * 32


# --- EWC where the answer is known ------------------------------------------------------------------------------------

#: its columns are orthogonal and hold +-1: as inputs and as noise they give least squares round answers
HADAMARD = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(8)] for i in range(8)], dtype=torch.float32)
SCALES = torch.tensor([0.5, 1.0, 3.0])


class Regression(Domain):
    """One linear map of 3 inputs, one output; squared error / 2, the Gaussian with unit variance, or logistic loss."""

    name = "regression"

    def __init__(self, data, loss):
        self.data = data
        self.kind = loss
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False)).requires_grad_(False)
        self.model[0].weight.zero_()
        self.tasks = [Task(i, str(i), len(x), {}) for i, (x, _) in enumerate(data)]
        self.device = torch.device("cpu")

    def sites(self):
        return {"0": Site("0", "0", self.model[0], 0, 1)}

    def full_parameters(self):
        return dict(self.model.named_parameters())

    def begin_task(self, task, scope="task"):
        return []

    def steps_per_epoch(self, task):
        return 2

    def batches(self, task, start_step):
        x, y = self.data[task]
        yield from list(zip(x.split(4), y.split(4), strict=True))[start_step:]

    def loss(self, batch):
        x, y = batch
        out = self.model(x).squeeze(1)
        if self.kind == "squared":
            return (out - y).square().mean() / 2
        return torch.nn.functional.binary_cross_entropy_with_logits(out, y)

    def samples(self, batch):
        return zip(*(part.split(1) for part in batch), strict=True)

    def evaluate(self, seen):
        return {}

    def identity(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert not state

    def stored_parameters(self):
        return 0

    def facts(self):
        return {}

    def summary(self, row):
        return ""


def regression(*solutions):
    """Tasks whose least-squares solutions are `solutions`, each with residuals of exactly +-1 there."""
    tasks = []
    for task, solution in enumerate(solutions):
        x = HADAMARD[:, 1:4] * SCALES
        tasks.append((x, x @ torch.tensor(solution) + HADAMARD[:, 4 + task]))
    return Regression(tasks, "squared")


def ewc(domain, **options):
    return EWC(EWCConfig(**options), domain, len(domain.tasks), 0)


def put(method, values):
    method.set_flat(torch.as_tensor(values, dtype=torch.float32))


def test_fisher_of_a_gaussian_linear_model_is_the_curvature_of_its_quadratic():
    solution = [2.0, -1.0, 0.5]
    domain = regression(solution)
    method = ewc(domain)
    put(method, solution)
    whole = domain.data[0]
    assert torch.autograd.grad(domain.loss(whole), list(method.weights))[0].abs().max() < 1e-6
    method.end_task(0)
    curvature = torch.autograd.functional.hessian(
        lambda w: (whole[0] @ w - whole[1]).square().mean() / 2, torch.tensor(solution)
    )
    torch.testing.assert_close(curvature, torch.diag(SCALES**2))
    torch.testing.assert_close(method.fisher, SCALES**2)


def test_away_from_the_solution_fisher_has_the_squared_residuals_too():
    domain = regression([2.0, -1.0, 0.5])
    method = ewc(domain)
    put(method, [2.0, 0.0, 0.5])  # one off in the second weight: residuals are noise + its input
    # mean over samples of (n + x)^2 s^2, where mean n^2 = 1, mean n x = 0 and mean x^2 = 1
    torch.testing.assert_close(method.task_fisher(0)[0], 2 * SCALES**2)
    assert method.task_fisher(0)[1] == 8
    half = ewc(domain, fisher_batches=1)
    put(half, [2.0, -1.0, 0.5])
    assert half.task_fisher(0)[1] == 4


def test_fisher_of_a_logistic_model_at_zero():
    x = HADAMARD[:, 1:4] * SCALES
    domain = Regression([(x, (HADAMARD[:, 4] > 0).float())], "logistic")
    # every output is 1/2 and every squared residual 1/4, whatever the labels
    torch.testing.assert_close(ewc(domain).task_fisher(0)[0], SCALES**2 / 4)


def test_with_lambda_one_ewc_of_two_quadratics_finds_their_joint_solution():
    first, second = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([-1.0, 3.0, 0.0])
    domain = regression(first.tolist(), second.tolist())
    method = ewc(domain, lambda_=1.0)
    put(method, first)
    method.end_task(0)
    method.begin_task(1)
    # the penalty is the first task's loss above its least, everywhere
    put(method, second)
    above = domain.loss(domain.data[0]) - 0.5
    torch.testing.assert_close(method.penalty(), above)
    assert above > 5
    optimizer = torch.optim.SGD(method.weights, lr=0.1)
    for _ in range(1000):
        optimizer.zero_grad()
        (domain.loss(domain.data[1]) + method.penalty()).backward()
        optimizer.step()
    # both have the curvature SCALES^2, so the joint solution is their mean
    torch.testing.assert_close(method.flat().detach(), (first + second) / 2, rtol=1e-5, atol=1e-5)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l2", "ewc"])
def test_a_large_lambda_holds_the_weights(build, name):
    moved = []
    for share in (0.0, 0.5):
        domain, method = build(name, *(SETS if name == "ewc" else SETS[:1]))
        begin(domain, method, 0)
        method.end_task(0)
        anchor = method.flat().detach().clone()
        begin(domain, method, 1)
        cost = method.fisher if name == "ewc" else torch.full_like(anchor, 2.0)
        # of the rate at which gradient descent on the penalty alone would begin to swing
        config = dataclasses.replace(method.config, lambda_=share / (0.1 * cost.max().item()))
        method.config = config
        optimizer = torch.optim.SGD(method.weights, lr=0.1)
        batch = next(domain.batches(1, 0))
        for _ in range(20):
            optimizer.zero_grad()
            loss, penalty = domain.loss(batch), method.penalty()
            (loss if penalty is None else loss + penalty).backward()
            optimizer.step()
        moved.append((cost * (method.flat().detach() - anchor).square()).sum().item())
    assert moved[0] > 0
    assert moved[1] < 0.7 * moved[0]


@pytest.mark.parametrize("name", ["l2", "ewc"])
def test_lambda_zero_is_training_without_penalty(tiny, executed, tmp_path, name):
    l2 = executed(tiny("l2", "method.lambda_=0"), tmp_path / "l2")
    this = executed(tiny(name, "method.lambda_=0"), tmp_path / "this")
    assert this.method.penalty() is None
    assert torch.equal(this.method.flat(), l2.method.flat())


@pytest.mark.parametrize("sets", [("l2",), ("l2", "method.reference=pretrained"), ("ewc",)])
def test_an_interrupted_run_ends_as_an_undisturbed_one(tiny, resumed, sets):
    resumed(tiny(*sets, "train.checkpoint_seconds=0", "train.batch_size=3", "method.lr=1e-3"), "task 3, step 1")


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (L2Config, {"lambda_": -1.0}, "method.lambda_ must not be negative, got -1.0"),
        (L2Config, {"reference": "first"}, "method.reference must be previous or pretrained, got 'first'"),
        (EWCConfig, {"lambda_": -1.0}, "method.lambda_ must not be negative, got -1.0"),
        (EWCConfig, {"fisher_batches": 0}, "method.fisher_batches must be at least 1, got 0"),
        (EWCConfig, {"decay": 1.5}, "method.decay must be between 0 and 1, got 1.5"),
    ],
)
def test_wrong_values_are_named(config, given, message):
    with pytest.raises(UserError) as error:
        config(**given)
    assert str(error.value) == message
