"""Every property that a method must have, as a function: `dualcl check` and tests/methods call them.

A property reads a whole run of the method on a tiny stream, and raises Broken where a promise is not kept.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.devices import pick_device
from dualcl.benchmark.core.domain import Domain
from dualcl.benchmark.core.seeding import derive_seed
from dualcl.benchmark.core.settings import Resolved
from dualcl.benchmark.core.text import printable
from dualcl.benchmark.domains import domain_class
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run, check_capabilities
from dualcl.methods import method_class, method_info
from dualcl.methods.base import Method

_TINY_IMAGES = "train.steps=2 train.batch_size=2 eval.n=1 eval.steps=1 eval.guidance=1.0 prior.n=2 prior.steps=1"
#: by stream: a bundled preset, and what makes it tiny, with tasks of different sizes
TINY = {
    "classification": "glyphs data.classes=7 data.train_per_class=5 data.test_per_class=3 stream.tasks=3 "
    "train.batch_size=6",
    "customization": "glyph-concepts-quick data.concepts=3 data.per_concept=3 stream.tasks=2 prior.guidance=1.0 "
    + _TINY_IMAGES,
    "requests": "unlearn-prompts base.model=glyph-diffusion data.requests=[umbrella=symbol,cat=house,star=symbol] "
    "stream.tasks=2 data.retained=[moon] prior.guidance=1.0 " + _TINY_IMAGES,
}
_ALWAYS = ("train.checkpoint_seconds=0", "train.log_every=1", "device=cpu")


class Broken(AssertionError):
    """A promise that a method does not keep."""


def must(kept: bool, otherwise: str) -> None:
    """Raises Broken unless `kept`."""
    if not kept:
        raise Broken(otherwise)


def none_of(names: Sequence[str], otherwise: str) -> None:
    """Raises Broken, which names the first ones, unless there are none."""
    shown = list(dict.fromkeys(names))
    must(not shown, f"{otherwise}: {', '.join(shown[:3])}" + (f" and {len(shown) - 3} more" if shown[3:] else ""))


def _differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    return [n for n in sorted({*one, *two}) if n not in one or n not in two or not torch.equal(one[n], two[n])]


# --- runs that are watched --------------------------------------------------------------------------------------------


class Watched(Run):
    """The real run; notes which tensors change in steps, in a whole task and in an evaluation, and what losses are."""

    def __init__(self, resolved: Resolved, folder: RunFolder, reporter: Reporter, domain: Domain | None = None) -> None:
        if domain is None:
            torch.manual_seed(derive_seed(resolved.general.seed, "build"))
            domain = domain_class(resolved.domain)(resolved, pick_device(resolved.general.device))  # type: ignore[call-arg]
        #: undeclared, needless_gradients, moved (a line for each task that steps changed), old_rows, evaluation, losses
        self.noted: defaultdict[str, list[str]] = defaultdict(list)
        self.record: dict[str, Any] = {}
        #: the network when the method attached to it
        self.attached: tuple[dict[str, Tensor], list[str]] = {}, []
        attach = domain.attach

        def watched(method: Any) -> None:
            attach(method)
            self.attached = self.network()

        domain.attach = watched  # type: ignore[method-assign]
        super().__init__(resolved, folder, reporter, domain)
        self.domain_evaluate = domain.evaluate
        domain.evaluate = self.evaluate  # type: ignore[method-assign]
        for part in ("loss", "penalty"):
            setattr(self.method, part, self._noting(part, getattr(self.method, part)))

    def network(self) -> tuple[dict[str, Tensor], list[str]]:
        """Copies of the network's weights and buffers, and its modules with their numbers of hooks."""
        model: nn.Module = self.domain.model
        hooks = [f"{n} {type(m)} {len(m._forward_hooks)} {len(m._forward_pre_hooks)}" for n, m in model.named_modules()]
        return {n: t.detach().clone() for n, t in model.state_dict().items()}, hooks

    def parts(self) -> dict[str, nn.Module]:
        """The domain's modules beside the network; the first holds what it adds for each task."""
        domain: Any = self.domain
        if domain.name == "classification":
            return {"heads": domain.heads}
        encoders = nn.ModuleList(v.encoder for v in domain.diffusion.vocabularies)
        return {"tokens": domain.tokens.rows, "text": encoders, "vae": domain.diffusion.vae}

    def everything(self) -> dict[str, Tensor]:
        """Every floating-point tensor of network, domain and method by name, each once."""
        parts = {"model": self.domain.model, "method": self.method, **self.parts()}
        named = {f"{k}.{n}": t for k, m in parts.items() for n, t in (*m.named_parameters(), *m.named_buffers())}
        return {n: t for n, t in {id(t): (n, t) for n, t in named.items()}.values() if t.is_floating_point()}

    def state(self) -> dict[str, Tensor]:
        """A copy of all that a checkpoint holds and of the network."""
        own = {k: v.detach().clone() for k, v in self.tensors().items()}
        return {**own, **{f"model.{k}": v for k, v in self.network()[0].items()}}

    def execute(self, record: dict[str, Any]) -> dict[str, Any]:
        """As a run; its record is kept."""
        self.record = super().execute(record)
        return self.record

    def evaluate(self, seen: Sequence[int]) -> dict[str, Any]:
        """The domain's, looked at."""
        before = self.state()
        row = self.domain_evaluate(seen)
        self.noted["evaluation"] += _differing(before, self.state())
        return row

    def _noting(self, part: str, given: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def noted(*args: Any) -> Tensor | None:
            value = given(*args)
            if value is not None:
                wrong = [f"{part} of shape {tuple(value.shape)}"] * bool(value.dim())
                wrong += [f"{part} in {value.dtype}"] * (value.dtype != torch.float32)
                wrong += [f"{part} {value.tolist()}"] * (not bool(torch.isfinite(value).all()))
                wrong += [f"{part} without gradient"] * (part == "loss" and not value.requires_grad)
                self.noted["losses"] += wrong
            return value

        return noted

    def _fit(self, task: int, groups: Any, steps: int, partial: Any) -> dict[str, Any]:
        before = {n: (t, t.detach().clone()) for n, t in self.everything().items()}
        result = super()._fit(task, groups, steps, partial)
        declared = {id(t) for t in (*self.method.averages(), *(p for g in groups for p in g.params))}
        changed = [n for n, (t, old) in before.items() if not torch.equal(t, old)]
        # a gradient in front of frozen weights is computed for nothing
        held = [n for n, (t, _) in before.items() if t.is_leaf and t.grad is not None]
        for what, names in (("undeclared", changed), ("needless_gradients", held)):
            self.noted[what] += [n for n in names if id(before[n][0]) not in declared]
        self.noted["moved"] += changed[:1]
        return result

    def _stage(self, record: dict[str, Any], task: int, stages: int, partial: Any) -> None:
        rows = next(iter(self.parts().values()))
        old = {n: (p, p.detach().clone()) for n, p in rows.named_parameters()}
        super()._stage(record, task, stages, partial)
        self.noted["old_rows"] += [n for n, (p, before) in old.items() if not torch.equal(p, before)]


class Killed(Run):
    """Is interrupted in the last task: in its second step, after a checkpoint of the first, or where it takes none."""

    def step(
        self, batch: Any, optimizer: Any, factor: float, where: str, ended: bool = False
    ) -> tuple[float, Tensor | None]:
        """The second one of the last task never ends."""
        if where == f"task {1 if self.joint else self.n_tasks}, step 1":
            raise KeyboardInterrupt
        return super().step(batch, optimizer, factor, where, ended)

    def _stage(self, record: dict[str, Any], task: int, stages: int, partial: Any) -> None:
        if task == stages - 1 and not self.method.takes_steps(task):
            raise KeyboardInterrupt
        super()._stage(record, task, stages, partial)


class Inherited(Run):
    """The run by the method that this one inherits `stored_parameters` from."""

    def method_class(self) -> type[Method]:
        """The one that counts."""
        return counted_by(super().method_class())


def counted_by(cls: type[Method]) -> type[Method]:
    """The first of the methods that count as `cls` does; itself where it counts, or where all that is kept counts."""
    if cls.stored_parameters is Method.stored_parameters:
        return cls
    same = (c for c in cls.__mro__ if issubclass(c, Method) and c.stored_parameters is cls.stored_parameters)
    return [cls, *(c for c in same if "name" in vars(c))][-1]


#: a fresh run of the same configuration in a folder
Make = Callable[[Path, type[Run]], Run]


def empty_record() -> dict[str, Any]:
    """What `Run.execute` fills."""
    return {"tasks": [], "matrix": {"rows": []}, "measured": {"tasks": []}}


# --- what a model answers ---------------------------------------------------------------------------------------------


def prompts(domain: Any) -> list[tuple[str, int]]:
    """Prompts of both concepts and of none, with seeds."""
    words = [domain.tokens.expand(domain.fill("a photo of {token}", j)) for j in range(2)]
    return [(words[0], 5), (words[1], 6), ("a photo of a red star", 7)]


def draw(domain: Any, wanted: Sequence[tuple[str, int]]) -> Tensor:
    """Images of (prompt, seed) pairs, generated side by side."""
    drawn: Tensor = domain.sample([p for p, _ in wanted], [torch.Generator().manual_seed(seed) for _, seed in wanted])
    return drawn


@torch.no_grad()
def scores(domain: Any, at: Sequence[int]) -> Tensor:
    """Scores of some of seven images of noise; what the network says of some of three noisy images under a prompt."""
    noise = torch.Generator().manual_seed(1)
    said: Tensor
    if domain.name == "classification":
        said = domain.predict(torch.randn(7, 3, *[domain.view.size] * 2, generator=noise)[at])
    else:
        model = domain.diffusion
        text, noisy = model.encode_text([p for p, _ in prompts(domain)]), torch.empty(3, *model.info.latent_shape)
        said = model.predict(noisy.normal_(generator=noise)[at], torch.tensor([900, 500, 100])[at], text[at])
    return said


# --- properties: the first line of each is what `dualcl check` says ---------------------------------------------------


def steps(work: Watched, make: Make) -> None:
    """steps change what it declares and nothing else"""
    none_of(work.noted["undeclared"], "steps change what `trained` does not give")
    none_of(work.noted["needless_gradients"], "gradients of what is not trained")
    wanted = sum(work.method.takes_steps(task) for task in range(1 if work.joint else work.n_tasks))
    must(len(work.noted["moved"]) == wanted, f"in {len(work.noted['moved'])} of {wanted} tasks they change something")


def losses(work: Watched, make: Make) -> None:
    """losses are finite float32 scalars with gradient"""
    none_of(work.noted["losses"], "there was")


def old_rows(work: Watched, make: Make) -> str:
    """rows of finished tasks keep their bits"""
    cls = type(work.method)
    all_rows = cls.output_scope == "seen" and cls.trains_rows
    if work.domain.name == "classification" and (cls.rewrites_rows or all_rows):
        return "not promised: " + ("rewrites_rows" if cls.rewrites_rows else 'output_scope "seen"')
    none_of(work.noted["old_rows"], "say `rewrites_rows` if they may change, as these do")
    return ""


def network(work: Watched, make: Make) -> str:
    """the pretrained network keeps its bits"""
    domain: Any = work.domain
    if domain.name != "classification":
        domain.check_tokens()
    if type(work.method).frozen:
        weights, modules = work.network()
        none_of(_differing(work.attached[0], weights), "`frozen` is promised, and these change")
        must(modules == work.attached[1], "`frozen` is promised, and modules or hooks of the network change")
        return "frozen"
    if "network" in work.method.requires or domain.name == "classification":
        return "not promised: it may be trained"
    may_move = {id(p) for p in domain.full_parameters().values()}
    weights = {n: t for n, t in domain.network_parameters().items() if id(t) not in may_move}
    none_of(_differing({n: work.attached[0][n] for n in weights}, weights), "these it may not train, and they change")
    return "but for the weights that it may train"


def evaluation(work: Watched, make: Make) -> None:
    """an evaluation changes nothing"""
    seen = range(work.n_tasks)
    must(work.domain.evaluate(seen) == work.domain.evaluate(seen), "a second one gives something else")
    none_of(work.noted["evaluation"], "these change")


def task_id(work: Watched, make: Make) -> None:
    """no answer depends on the task that the domain is in"""
    domain: Any = work.domain

    def answers() -> Tensor:
        return scores(domain, range(7)) if domain.name == "classification" else draw(domain, prompts(domain))

    current, expected = domain._current, answers()
    try:
        for domain._current in (0, 1, None):
            must(torch.equal(answers(), expected), f"they differ when it is in task {domain._current}")
    finally:
        domain._current = current


def neighbours(work: Watched, make: Make, tolerance: float | None = None) -> None:
    """no answer depends on neighbours in a batch or on random numbers

    `tolerance`: of scores; None: rounding in proportion to the largest one.
    """
    domain: Any = work.domain
    order = [3, 0, 6, 2, 5, 1, 4] if domain.name == "classification" else [2, 1, 0]
    drawn = torch.get_rng_state()
    together = scores(domain, range(len(order)))
    must(torch.equal(torch.get_rng_state(), drawn), "random numbers are drawn")
    if domain.name == "classification":
        wanted = torch.float32, (len(order), sum(len(domain.outputs(t)) for t in range(work.n_tasks)))
        found = together.dtype, tuple(together.shape)
        must(found == wanted, f"scores are {found[0]} of shape {found[1]}, not {wanted[0]} of {wanted[1]}")
    else:
        alone = torch.cat([draw(domain, [one]) for one in prompts(domain)]).int()
        levels = int((draw(domain, prompts(domain)).int() - alone).abs().max())
        must(levels <= 1, "an image drawn alone is another one")  # rounding to a level of 255
    tolerance = tolerance or 1e-5 * max(1.0, float(together.abs().max()))
    for size, rows in ((len(order), order), (1, range(len(order))), (3, range(len(order)))):
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        away = float((torch.cat([scores(domain, part) for part in parts]) - together[rows]).abs().max())
        must(away <= tolerance, f"in other batches, of {size}, answers are up to {away:.2g} away")


def kept(work: Watched, make: Make) -> str:
    """what is kept under a key is what the network gives now"""
    domain: Any = work.domain
    if domain.name != "classification":
        return "nothing is kept here"
    read, out = domain._scores, []

    def noted(images: Any) -> Tensor:
        out.append(read(images))
        return out[-1]

    domain._scores = noted
    try:
        work.domain_evaluate(range(work.n_tasks))
        domain.network.forget()
        work.domain_evaluate(range(work.n_tasks))
    finally:
        domain._scores = read
    same = all(map(torch.equal, out[: len(out) // 2], out[len(out) // 2 :]))
    must(same, "scores change when it is computed afresh")
    return ""


def stored(work: Watched, make: Make) -> str:
    """what it says to store is in its checkpoint"""
    said = work.method.stored_parameters()
    state = work.method.state_dict(keep_vars=True).values()
    held = sum(t.numel() for t in {id(t): t for t in state}.values())
    must(isinstance(said, int) and 0 <= said <= held, f"it says {said}, and its checkpoint holds {held} numbers")
    told = work.record["tasks"][-1]["parameters_stored"] - work.domain.stored_parameters()
    must(told == said, f"it says {said} now, and said {told} after its last task")
    return f"{said:,} numbers; its checkpoint holds {held:,}{_uncounted(work, make)}"


def _uncounted(work: Watched, make: Make) -> str:
    """A remark where a method keeps more floating-point numbers than its parent, and counts what that counts.

    Not by what it keeps alone: a checkpoint may hold a sum where its factors are counted.
    """
    cls, parent = type(work.method), counted_by(type(work.method))
    if parent is cls:
        return ""
    kept, said = [], []
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(Exception):  # the parent may refuse the settings
        for kind in (Run, Inherited):
            run = make(Path(place), kind)
            for task in range(1 if run.joint else run.n_tasks):
                run.begin(task)
            state = {id(t): (n, t) for n, t in run.method.state_dict(keep_vars=True).items()}
            kept.append({n: t.numel() for n, t in state.values() if t.is_floating_point()})
            said.append(run.method.stored_parameters())
    if len(said) < 2:
        return ""
    more = sum(kept[0].values()) - sum(kept[1].values()) - (said[0] - said[1])
    first = next((name for name, size in kept[0].items() if size > kept[1].get(name, 0)), "")
    if not first or more <= said[0] / 100:  # a number here and there is no matter
        return ""
    counts = f"{parent.__name__}.stored_parameters, which {cls.__name__} inherits, does not count"
    return f"; remark: {counts} {more:,} numbers that it keeps besides ({first}, ...)"


def restores(work: Watched, make: Make) -> None:
    """a checkpoint gives the same answers"""
    stages, every = 1 if work.joint else work.n_tasks, range(3)
    with tempfile.TemporaryDirectory() as place:
        again = make(Path(place), Run)
        for task in range(stages):
            again.begin(task)
        fresh, expected = scores(again.domain, every), scores(work.domain, every)
        work.folder.save_checkpoint("copy", work.tensors(), {})
        again.restore((work.folder.load_checkpoint("copy") or ({}, {}))[0], stages)
        must(torch.equal(scores(again.domain, every), expected), "they differ: some state is not in `state_dict`")
        must(not torch.equal(fresh, expected), "nothing was learnt")
        now = again.method.stored_parameters()
        must(now == work.method.stored_parameters(), f"it stores {now} numbers then")


def resumes(work: Watched, make: Make) -> None:
    """a run that was interrupted ends as an undisturbed one"""
    with tempfile.TemporaryDirectory() as place:
        with contextlib.suppress(KeyboardInterrupt):
            make(Path(place), Killed).execute(empty_record())
        again = make(Path(place), Run)
        record = again.execute(empty_record())
        none_of(_differing(again.tensors(), work.tensors()), "these differ then")
        for part in ("matrix", "tasks"):
            must(record[part] == work.record[part], f"the record's {part} differ then")
        folders = work.folder.path, Path(place)
        one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.png")} for f in folders)
        must(one == two and bool(one) == (work.domain.name == "customization"), "its pictures differ then")


PROPERTIES: tuple[Callable[..., str | None], ...]
PROPERTIES = (steps, losses, old_rows, network, evaluation, task_id, neighbours, kept, stored, restores, resumes)


# --- `dualcl check` ---------------------------------------------------------------------------------------------------


def check_method(reference: str, sets: Sequence[str] = ()) -> Iterator[tuple[str, str, str, str]]:
    """Runs a method, a name or FILE.py, on a tiny stream of every domain that it serves, and checks all properties.

    (domain, property, what is wrong or "", detail) of each. `sets`: its settings, as `method.rank=4`. Raises UserError
    for a method that cannot be had.
    """
    plan = []
    for domain in method_info(reference).domains:
        domain_class(domain)
        preset, *tiny = TINY["requests" if "requests" in method_class(reference).requires else domain].split()
        plan.append(resolve(preset, reference, [*tiny, *_ALWAYS, *sets]))
        check_capabilities(plan[-1])
    for resolved in plan:
        with tempfile.TemporaryDirectory() as place:
            yield from ((resolved.domain, *result) for result in _checked(resolved, Path(place)))


def _checked(resolved: Resolved, folder: Path) -> Iterator[tuple[str, str, str]]:
    def make(place: Path, kind: type[Run]) -> Run:
        return kind(resolved, RunFolder(place), Reporter(quiet=True))

    def tried(holds: Callable[..., str | None], *given: Any) -> tuple[str, str, str]:
        name, problem, detail = str(holds.__doc__).partition("\n")[0], "", None
        try:
            detail = holds(*given)
        except Exception as error:  # the method's own, whatever it is
            problem = printable(str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}")
        return name, problem, detail or ""

    runs: list[Any] = []

    def whole() -> str:
        """it runs a stream of tasks"""
        runs.append(make(folder, Watched))
        record = runs[0].execute(empty_record())
        return f"{sum(t['steps'] for t in record['tasks'])} steps in {len(record['tasks'])} tasks"

    yield (first := tried(whole))
    for holds in PROPERTIES if not first[1] else ():
        yield tried(holds, runs[0], make)
