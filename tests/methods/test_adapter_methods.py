"""Methods with adapters beside the MLPs: their formulas by hand, and what must hold of each in a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Images
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs.runner import Run, run
from dualcl.methods.ease import EASEConfig, completed, weighed
from dualcl.methods.moal import MoALConfig
from dualcl.methods.mos import MOSConfig, found, told_apart
from dualcl.methods.shared.adapters import AdapterConfig, Bottleneck
from dualcl.methods.shared.alignment import aligned, scales
from dualcl.methods.shared.class_statistics import carried
from dualcl.methods.shared.ridge import Ridge
from dualcl.methods.tuna import TUNAConfig, answers, cosine_loss, merged, overlap, rising_scales

SMALL = ("method.bottleneck=4",)


def noise(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def ended(domain: Any, method: Any, tasks: range, teach: Callable[[int], None] = lambda task: None) -> torch.Tensor:
    """Scores of noise after tasks without steps, in each of which `teach` does what they would."""
    for task in tasks:
        domain.begin_task(task)
        method.begin_task(task)
        method.prepare(task)
        teach(task)
        method.end_task(task)
    scores: torch.Tensor = domain.predict(noise())
    return scores


def moved(method: Any) -> Callable[[int], None]:
    """Sets the newest bottlenecks to numbers of the task's own."""

    def teach(task: int) -> None:
        for i, side in enumerate(method.adapters[-1]):
            with torch.no_grad():
                side.up.normal_(generator=torch.Generator().manual_seed(100 * task + i))

    return teach


class Kept(Run):
    """Notes each task's steps, what it stores, and the method's parameters at its end."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.steps: list[int] = []
        self.stored: list[int] = []
        self.after: list[dict[str, torch.Tensor]] = []

    def _stage(self, record: dict[str, Any], task: int, *given: Any) -> None:
        super()._stage(record, task, *given)
        self.steps.append(record["tasks"][-1]["steps"])
        self.stored.append(record["tasks"][-1]["parameters_stored"])
        self.after.append({n: p.detach().clone() for n, p in self.method.named_parameters()})


#: numbers in bottlenecks of width 4 in the tiny ViT
SIDES = 5 * (2 * 32 * 4 + 4 + 32)


# --- aper -------------------------------------------------------------------------------------------------------------


def test_aper_by_hand(build: Callable[..., Any]) -> None:
    _, method = build("aper", *SMALL)
    method.finished, method.begun = 1, 5
    method.means[0, 0, 0] = method.means[1, 1, 1] = 1.0
    features = torch.zeros(1, 2, 32)
    features[0, 0, 0], features[0, 1, 1] = 1.0, 2.0
    scores = method.scores(features)
    assert scores[0, :2].tolist() == pytest.approx([5**-0.5, 2 * 5**-0.5])
    assert (scores[0, 3:] == torch.finfo(torch.float32).min).all()  # of a task that has not ended


def test_aper_without_a_step_decides_as_ncm(build: Callable[..., Any]) -> None:
    (domain, method), (plain, ncm) = build("aper", *SMALL), build("ncm")
    ours, theirs = ended(domain, method, range(3)), ended(plain, ncm, range(3))
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    assert domain.evaluate(range(3)) == plain.evaluate(range(3))
    lengths = plain.network.run(noise()).norm(dim=1, keepdim=True)
    torch.testing.assert_close(ours * lengths, theirs, rtol=1e-4, atol=1e-5)


def test_aper_adapts_in_the_first_task_alone(tiny: Callable[..., Any], executed: Callable[..., Any], tmp_path: Path):
    work = executed(tiny("aper", *SMALL, "train.epochs=2"), tmp_path, Kept)
    assert work.steps == [6, 0, 0]
    assert work.stored == [SIDES + 2 * 32 * seen for seen in (3, 5, 7)]
    assert all(torch.equal(p, work.after[2][n]) for n, p in work.after[0].items())
    assert sum(p.abs().max() > 0 for n, p in work.after[0].items() if n.endswith(".up")) == 5
    method, domain = work.method, work.domain
    assert method.caveats()[0].startswith("takes steps in the first task alone")
    pixels = noise()
    plain, adapted = (domain.network.run(pixels, sides=s) for s in (None, dict(enumerate(method.adapters[0]))))
    assert (plain - adapted).abs().max() > 1e-4
    wanted = F.normalize(torch.cat([plain, adapted], 1), dim=1) @ F.normalize(method.means.flatten(1), dim=1).T
    torch.testing.assert_close(domain.predict(pixels), wanted)


def test_a_first_task_of_one_class_is_refused_and_later_ones_are_not(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task 1 has one class \(shade\d\)[^\n]*$"):
        run(tiny("aper", "stream.sizes=[1,3,3]"), tmp_path / "one")
    assert run(tiny("aper", "stream.sizes=[5,1,1]"), tmp_path / "run")["status"] == "finished"


# --- ease -------------------------------------------------------------------------------------------------------------

#: one class, then two, under two adapters; 7: not known
P = torch.tensor([[[1.0, 0], [7, 7]], [[1, 0], [2, 0]], [[0, 1], [0, 2]]])


def test_ease_by_hand() -> None:
    whole = completed(P, [1, 2])
    assert whole[0, 1].tolist() == pytest.approx([1.462117, 0.537883], abs=1e-6)
    assert torch.equal(whole[1:], P[1:])
    assert torch.equal(whole[:, 0], P[:, 0])
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert weighed(features, whole, [1, 2], 0.1).tolist() == [pytest.approx([1.034526, 0.1, 1.0], abs=1e-6)]
    # each class by its own task's adapter alone
    assert weighed(features, whole, [1, 2], 0.0).tolist() == [pytest.approx([1.0, 0.0, 1.0])]
    assert weighed(features[:, :1], P[:1, :1], [1], 0.1).tolist() == [[1.0]]  # after the first task


def test_what_ease_makes_up_reads_later_classes_of_all_tasks() -> None:
    sizes, means = [2, 1, 2], torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    whole = completed(means, sizes)
    cosines = F.cosine_similarity(means[1, 0].expand(2, 4), means[3:, 0], dim=-1)
    torch.testing.assert_close(whole[1, 2], cosines.softmax(0) @ means[3:, 2])
    cosines = F.cosine_similarity(means[1, 0].expand(3, 4), means[2:, 0], dim=-1)
    torch.testing.assert_close(whole[1, 1], cosines.softmax(0) @ means[2:, 1])
    unread = means.clone()
    unread[:2, 1:] = unread[2, 2] = float("nan")
    assert torch.equal(completed(unread, sizes), whole)


def test_permuted_classes_permute_the_scores_of_ease() -> None:
    means, features = torch.randn(5, 2, 4), torch.randn(3, 2, 4)
    order = [1, 0, 4, 2, 3]  # within the tasks
    plain = weighed(features, completed(means, [2, 3]), [2, 3], 0.1)
    torch.testing.assert_close(weighed(features, completed(means[order], [2, 3]), [2, 3], 0.1), plain[:, order])


def test_ease_after_one_task_is_class_means_under_its_adapter(build: Callable[..., Any]) -> None:
    domain, method = build("ease", *SMALL)
    said = ended(domain, method, range(1), moved(method))
    sides = dict(enumerate(method.adapters[0]))
    (pairs,) = [list(domain.training_features(0))]
    x, y = torch.cat([f[:, 0] for f, _ in pairs]), torch.cat([y for _, y in pairs])
    means = torch.stack([x[y == c].double().mean(0).float() for c in range(3)])
    wanted = F.cosine_similarity(domain.network.run(noise(), sides=sides)[:, None], means[None], dim=-1)
    torch.testing.assert_close(said, wanted)
    assert (domain.network.run(noise(), sides=sides) - domain.network.run(noise())).abs().max() > 0.01


def test_ease_keeps_earlier_adapters_and_counts_what_was_seen(
    tiny: Callable[..., Any], executed: Callable[..., Any], tmp_path: Path
) -> None:
    work = executed(tiny("ease", *SMALL), tmp_path, Kept)
    assert work.stored == [SIDES + 32 * 3, 2 * SIDES + 32 * (3 + 2 * 2), 3 * SIDES + 32 * (3 + 2 * 2 + 2 * 3)]
    for task in (1, 2):
        old = {n: p for n, p in work.after[task - 1].items() if n.startswith("adapters.")}
        assert len(old) == 5 * 4 * task
        assert all(torch.equal(p, work.after[task][n]) for n, p in old.items())
    assert not torch.equal(work.after[2]["adapters.2.0.up"], work.after[1]["adapters.1.0.up"])
    assert work.domain.predict(noise()).shape == (6, 7)


# --- tuna -------------------------------------------------------------------------------------------------------------


def test_the_universal_adapter_by_hand() -> None:
    assert merged(torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, -0.5]])).tolist() == [3.0, -2.0, -0.5]
    one = torch.randn(1, 50)
    assert torch.equal(merged(one), one[0])


def test_the_surest_adapter_answers_beside_the_last() -> None:
    shares = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]], [[0.2, 0.8], [0.5, 0.5], [0.3, 0.7]]])
    assert -(shares[0, :2] * shares[0, :2].log()).sum(1) == pytest.approx([0.693147, 0.325083], abs=1e-6)
    wanted = torch.tensor([[0.9 + 0.3, 0.1 + 0.7], [0.2 + 0.3, 0.8 + 0.7]])
    torch.testing.assert_close(answers(shares.log(), 2), wanted)
    torch.testing.assert_close(answers(shares.log()[[1, 0]], 2), wanted[[1, 0]])  # per image
    torch.testing.assert_close(answers(shares.log()[:, [1, 0, 2]], 2), wanted)


def test_scales_of_means_that_fall_for_earlier_classes_and_as_the_public_code_has_them() -> None:
    assert scales([2, 2]).tolist() == pytest.approx([0.95, 0.95, 1, 1])
    assert rising_scales([2, 2]).tolist() == pytest.approx([0.95, 0.9, 0.9, 0.85])
    assert float(rising_scales([20] * 10)[-1]) == pytest.approx(0.81)


def test_orthogonality_by_hand(build: Callable[..., Any]) -> None:
    one, two = (Bottleneck(2, 2, torch.Generator().manual_seed(0), torch.device("cpu")) for _ in range(2))
    with torch.no_grad():
        one.up.copy_(torch.tensor([[3.0, 0.0], [0.5, 0.0]]))
        two.up.copy_(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    rows = [F.normalize(side.up, dim=1) for side in (one, two)]
    assert float((rows[0] @ rows[1].T).mean()) == pytest.approx(0.5)
    assert float(overlap([one], [two])) == pytest.approx(0.5)
    assert float(overlap([one, one], [two, one])) == pytest.approx(0.75)

    domain, method = build("tuna", *SMALL, "method.orthogonality=0.3", "method.align_epochs=0")
    ended(domain, method, range(1), moved(method))
    assert method.penalty() is None  # the first task has none before it
    method.begin_task(1)
    assert all(map(torch.equal, method.adapters[1].parameters(), method.adapters[0].parameters()))
    wanted = 0.3 * math.exp(-2) * float(overlap(method.adapters[0], method.adapters[0]))
    assert float(method.penalty()) == pytest.approx(wanted)
    assert wanted > 0


def test_alignment_of_rows_by_cosine_finds_the_means() -> None:
    means, factors = 3 * torch.eye(4), 0.01 * torch.eye(4).expand(4, 4, 4)
    start = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    rows = aligned(start, means, factors, [2, 2], TUNAConfig(align_epochs=5, align_lr=0.5), generator, cosine_loss)
    assert (means @ F.normalize(rows, dim=1).T).argmax(1).tolist() == [0, 1, 2, 3]
    assert (means @ F.normalize(start, dim=1).T).argmax(1).tolist() != [0, 1, 2, 3]


TUNA = (*SMALL, "method.align_epochs=2")


def test_tuna_after_one_task_answers_by_its_adapter_alone(build: Callable[..., Any]) -> None:
    domain, method = build("tuna", *TUNA)
    said = ended(domain, method, range(1), moved(method))
    features = domain.network.run(noise(), sides=dict(enumerate(method.adapters[0])))
    cosines = F.cosine_similarity(features[:, None], method.rows[0].rows[None], dim=-1)
    torch.testing.assert_close(said, 2 * (20 * cosines).softmax(1))
    assert float(method.rows[0].scale) == 20
    assert not method.rows[0].scale.requires_grad


def test_tuna_aligns_all_rows_and_no_order_of_adapters_matters(build: Callable[..., Any]) -> None:
    found = []
    for quirks in ("[]", "[no_universal]", "[rising_decay]"):
        domain, method = build("tuna", *TUNA, f"method.reference_quirks={quirks}")
        found.append(ended(domain, method, range(3), moved(method)))
        passed = method.features(Images(noise()), domain.network)
        assert passed.shape == (6, 3 if quirks == "[no_universal]" else 4, 32)
        assert len(method.caveats()) == 2 + (quirks != "[]")
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    domain, method = build("tuna", *TUNA)
    torch.testing.assert_close(ended(domain, method, range(3), moved(method)), found[0])
    for more, same in (((), False), (("method.align_epochs=0",), True)):  # rows of the first task after a later one
        other, again = build("tuna", *TUNA, *more)
        ended(other, again, range(1), moved(again))
        first = again.rows[0].rows.clone()
        ended(other, again, range(1, 3), moved(again))
        assert torch.equal(again.rows[0].rows, first) == same
    rows = [r.rows.clone() for r in method.rows]
    method.adapters = torch.nn.ModuleList([method.adapters[i] for i in (2, 0, 1)])
    method.restored(3)
    domain.network.forget()
    torch.testing.assert_close(domain.predict(noise()), found[0])
    assert all(torch.equal(a, b.rows) for a, b in zip(rows, method.rows, strict=True))
    assert method.stored_parameters() == 3 * SIDES + 7 * 32 + 7 * (32 + 32 * 33 // 2)


# --- mos --------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_found_by_asking_again() -> None:
    tasks = torch.tensor([0, 0, 1, 2])
    logits = torch.zeros(4, 3, 4)  # of four images under three adapters
    logits[0, 0, 3] = logits[0, 2, 3] = 5.0  # adapter 0 says task 2, which stays
    logits[1, 0, 2] = logits[1, 1, 1] = 5.0  # 0 says 1, 1 says 0, and so on: the fourth answer counts
    logits[2, 1, 2] = 5.0  # stays at once
    logits[3, 2, 2] = logits[3, 1, 3] = logits[3, 0, 0] = 5.0
    got = found(logits, torch.tensor([0, 0, 1, 2]), tasks)
    assert torch.equal(got, torch.stack([logits[0, 2], logits[1, 1], logits[2, 1], logits[3, 1]]))


def test_the_mixture_of_adapters_by_hand(build: Callable[..., Any]) -> None:
    _, method = build("mos", *SMALL)
    for task, value in enumerate((1.0, 3.0, 10.0)):
        method.begin_task(task)
        for parameter in method.adapters[task].parameters():
            with torch.no_grad():
                parameter.fill_(value)
        if task == 0:
            method.stepped(True)  # nothing is there to be mixed in
    method.stepped(False)
    values = [torch.cat([p.flatten() for p in sides.parameters()]) for sides in method.adapters]
    for value, wanted in zip(values, (1.0, 3.0, 9.2), strict=True):
        torch.testing.assert_close(value, torch.full_like(value, wanted))


def test_features_are_told_apart_by_hand() -> None:
    features, means = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    wanted = (math.log(1 + math.exp(-1 / 0.8)) + math.log(1 + math.exp(-4 / 0.8))) / 2
    assert float(told_apart(features, means)) == pytest.approx(wanted)


def test_mos_after_one_task_adds_means_under_its_adapter_to_its_rows(build: Callable[..., Any]) -> None:
    domain, method = build("mos", *SMALL, "head.init=linear")
    said = ended(domain, method, range(1), moved(method))
    features = domain.network.run(noise(), sides=dict(enumerate(method.adapters[0])))
    pairs = list(domain.training_features(0))
    x, y = torch.cat([f[:, 0] for f, _ in pairs]), torch.cat([y for _, y in pairs])
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    cosines = F.cosine_similarity(features[:, None], means[None], dim=-1)
    torch.testing.assert_close(said, domain.rows(features).softmax(1) + cosines.softmax(1))


def test_mos_mixes_after_each_step_of_a_run(
    tiny: Callable[..., Any], executed: Callable[..., Any], tmp_path: Path
) -> None:
    runs = {}
    for mixture in (0.0, 1.0):
        sets = (*SMALL, f"method.mixture={mixture}", "method.align_epochs=1", "method.reference_quirks=[feature_loss]")
        runs[mixture] = executed(tiny("mos", *sets), tmp_path / str(mixture), Kept)
        assert runs[mixture].stored == [
            (t + 1) * SIDES + n * (33 + 32 + 32 + 32 * 33 // 2) for t, n in enumerate((3, 5, 7))
        ]
    for i in (1, 2):  # all of each step is undone
        for own, first in zip(*(runs[1.0].method.adapters[j].parameters() for j in (i, 0)), strict=True):
            torch.testing.assert_close(own, first)
        assert not torch.equal(runs[0.0].method.adapters[i][0].up, runs[0.0].method.adapters[0][0].up)
    assert torch.equal(runs[0.0].method.adapters[0][0].up, runs[1.0].method.adapters[0][0].up)
    domain: Any = runs[0.0].domain
    rows = torch.cat([torch.cat([head.weight, head.bias[:, None]], 1) for head in domain.heads])
    assert not torch.equal(rows[:3], runs[0.0].method.aligner.rows[:3])  # aligned since
    assert len(runs[0.0].method.caveats()) == 3


def test_mos_without_alignment_counts_the_means_that_its_loss_reads(
    tiny: Callable[..., Any], executed: Callable[..., Any], tmp_path: Path
) -> None:
    for quirks, more in (("[]", 0), ("[feature_loss]", 32)):
        sets = (*SMALL, "method.align_epochs=0", f"method.reference_quirks={quirks}")
        work = executed(tiny("mos", *sets), tmp_path / str(more), Kept)
        assert work.stored == [(t + 1) * SIDES + n * (33 + 32 + more) for t, n in enumerate((3, 5, 7))]


# --- moal -------------------------------------------------------------------------------------------------------------


def recursive(
    parts: list[tuple[torch.Tensor, torch.Tensor]], size: int, start: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """R and W of the public code: a solution of the first part times `start`, then updates by batches of `size`."""
    (h, y), *rest = parts
    r = torch.linalg.inv(h.T @ h + torch.eye(h.shape[1]).double())
    w = start * r @ h.T @ y
    for h, y in rest:
        for x, z in zip(h.split(size), y.split(size), strict=True):
            inner = torch.linalg.inv(torch.eye(len(x)).double() + x @ r @ x.T)
            r = r - r @ x.T @ inner @ x @ r
            w = w + r @ x.T @ (z - x @ w)
    return r, w


def test_recursive_updates_are_the_solution_of_the_sums() -> None:
    one, two = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 2.0]]).double()
    nothing = torch.zeros(1, 2).double()
    r, w = recursive([(nothing, nothing), (one, one), (two, two / 2)], 1)
    torch.testing.assert_close(r, torch.diag(torch.tensor([1 / 2, 1 / 5]).double()), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(w, torch.diag(torch.tensor([1 / 2, 2 / 5]).double()), atol=1e-9, rtol=1e-7)

    generator = torch.Generator().manual_seed(0)
    h, y = torch.randn(28, 5, generator=generator).double(), torch.arange(28) % 4
    onehot = F.one_hot(y, 4).double()
    for start in (1.0, 0.9):
        ridge = Ridge(5, 4, torch.device("cpu")).double()
        ridge.add(h[:14], y[:14])
        ridge.cross.mul_(start)
        ridge.add(h[14:], y[14:])
        for size in (1, 7, 14):
            _, w = recursive([(h[:14], onehot[:14]), (h[14:], onehot[14:])], size, start)
            torch.testing.assert_close(w, ridge.solve(1.0), atol=1e-9, rtol=1e-9)


def test_means_stay_where_features_do_and_follow_a_linear_map() -> None:
    x, means = torch.randn(40, 6), torch.randn(3, 6)
    torch.testing.assert_close(carried(means, x, x, 1.0), means.double(), atol=1e-9, rtol=1e-9)
    by, shift = torch.randn(6, 6), torch.randn(6)
    torch.testing.assert_close(
        carried(means, x, x @ by + shift, 1e-9).float(), means @ by + shift, atol=1e-4, rtol=1e-4
    )


MOAL = (*SMALL, "method.width=60", "method.lambda_=10")


def test_moal_without_movement_and_rumination_is_ranpac(build: Callable[..., Any]) -> None:
    sets = ("method.lambda_=10", "method.bottleneck=4", "method.width=60")
    domain, method = build("moal", *sets, "method.momentum=1", "method.ruminate=false")
    other, ranpac = build("ranpac", *sets, "method.adapt=adapter")
    ranpac.layer.copy_(method.layer)

    def learn(task: int) -> None:
        for i, side in enumerate(method.adapters[0]):
            with torch.no_grad():
                side.up.normal_(generator=torch.Generator().manual_seed(i + 7 * task))
        method.stepped(True)  # the average undoes it in later tasks

    def copied(task: int) -> None:
        ranpac.adapters.load_state_dict(method.adapters[0].state_dict())

    ours, theirs = ended(domain, method, range(3), learn), ended(other, ranpac, range(3), copied)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours.amax(1) - ours.amin(1)).min() > 0.01
    kept = "stores sums of products of random features, and a mean of every class"
    assert method.caveats() == [f"{kept}; another pass over each image"]
    made = "two more passes over each task's images, of which features of every class so far are made up"
    assert build("moal", *sets)[1].caveats() == [f"{kept}; {made}"]


def test_moal_adds_what_it_gets_wrong_of_new_and_of_made_up_features(build: Callable[..., Any]) -> None:
    domain, method = build("moal", *MOAL)
    ended(domain, method, range(1), moved(method))
    sums, means = method.ridge.cross.clone(), method.means.clone()
    domain.begin_task(1)
    method.begin_task(1)
    method.prepare(1)
    method.end_task(1)  # no step was taken: the means stay
    torch.testing.assert_close(method.means[:3], means[:3], rtol=1e-4, atol=1e-4)
    assert method.means[3:5].abs().min() > 0
    features, labels = (torch.cat(part) for part in zip(*domain.training_features(1), strict=True))
    h = method.random(features)
    grown = sums + h.T @ F.one_hot(labels, 7).float()
    wanted, added = grown.clone(), 0
    near = F.cosine_similarity(method.means[:3, None], method.means[None, 3:5], dim=-1).argmax(1) + 3
    before = build("moal", *MOAL, "method.ruminate=false")
    ended(*before, range(1), moved(before[1]))
    before[0].begin_task(1)
    before[1].begin_task(1)
    before[1].prepare(1)
    before[1].end_task(1)
    torch.testing.assert_close(before[1].ridge.cross, grown, rtol=1e-4, atol=1e-4)
    for output in range(5):
        source = output if output > 2 else int(near[output])
        made = method.random(features[labels == source] - method.means[source] + method.means[output])
        wrong = (made @ before[1].solved[:, :5]).argmax(1) != output
        wanted[:, output] += made[wrong].sum(0)
        added += int(wrong.sum())
    assert 0 < added < 25
    torch.testing.assert_close(method.ridge.cross, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(method.ridge.gram, before[1].ridge.gram)


@pytest.mark.parametrize("quirk", ["", "epoch_average"])
def test_the_adapter_of_moal_follows_by_its_average(
    quirk: str, tiny: Callable[..., Any], executed: Callable[..., Any], tmp_path: Path
) -> None:
    quirks = f"method.reference_quirks=[{quirk}]"
    half = executed(tiny("moal", *MOAL, "method.momentum=0.5", quirks, "method.ruminate=false"), tmp_path / "a", Kept)
    still = executed(tiny("moal", *MOAL, "method.momentum=1", "method.ruminate=false"), tmp_path / "b", Kept)
    live = executed(tiny("moal", *MOAL, "method.momentum=0", quirks, "method.ruminate=false"), tmp_path / "c", Kept)
    name = "adapters.0.0.up"
    first, second = (work.after[0][name] for work in (half, still))
    assert torch.equal(first, second)  # the first task has no average
    assert torch.equal(still.after[2][name], first)
    assert not torch.equal(live.after[1][name], first)
    middle = (first + live.after[1][name]) / 2
    once = torch.allclose(half.after[1][name], middle, rtol=1e-4, atol=1e-7)
    assert once == (quirk == "epoch_average")  # one epoch of two steps
    assert len(half.method.caveats()) == 1 + bool(quirk)
    known = (3, 5, 7)
    assert half.stored == [SIDES + n * (2 * 32 + 60) + 60 * 61 // 2 for n in known]


def test_the_first_solution_of_moal_is_scaled_where_asked(build: Callable[..., Any]) -> None:
    plain, shrunk = (
        ended(*build("moal", *MOAL, f"method.reference_quirks={q}"), range(1)) for q in ("[]", "[shrunk_start]")
    )
    torch.testing.assert_close(0.9 * plain, shrunk, rtol=1e-4, atol=1e-5)


def test_the_ridge_of_moal_is_chosen_once(build: Callable[..., Any]) -> None:
    domain, method = build("moal", *SMALL, "method.width=60")
    ended(domain, method, range(1), moved(method))
    chosen = method.diagnostics()["lambda"]
    assert chosen > 0
    for task in (1, 2):
        ended_again = ended(domain, method, range(task, task + 1))
        assert ended_again.isfinite().all()
    assert method.diagnostics()["lambda"] == chosen
    assert type(method).least_kept(MoALConfig()) == 10_000 * 10_001 // 2


def test_settings_of_adapter_methods_are_checked() -> None:
    with pytest.raises(UserError, match="bottleneck must be at least 1, got 0"):
        AdapterConfig(bottleneck=0)
    with pytest.raises(UserError, match="alpha must not be negative"):
        EASEConfig(alpha=-0.1)
    with pytest.raises(UserError, match="orthogonality must not be negative"):
        TUNAConfig(orthogonality=-1.0)
    with pytest.raises(UserError, match=r"mixture must be between 0 and 1, got 1\.5"):
        MOSConfig(mixture=1.5)
    for given, words in (
        ({"width": 0}, "width must be at least 1"),
        ({"lambda_": 0.0}, "lambda_ must be positive"),
        ({"momentum": 2.0}, "momentum must be between 0 and 1"),
        ({"map_ridge": 0.0}, "map_ridge must be positive"),
    ):
        with pytest.raises(UserError, match=words):
            MoALConfig(**given)
    with pytest.raises(UserError, match="align_epochs must not be negative"):
        TUNAConfig(align_epochs=-1)
    with pytest.raises(UserError, match="bottleneck must be at least 1"):
        TUNAConfig(bottleneck=0)
    with pytest.raises(UserError, match=r"unknown name 'no_univers' in method\.reference_quirks"):
        TUNAConfig(reference_quirks=("no_univers",))
