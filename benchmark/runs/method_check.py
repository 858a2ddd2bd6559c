"""Every property that a method must have, as a function: `dualcl check` and tests/methods call them.

A property reads a whole run of the method on a tiny stream, and raises Broken where a promise is not kept.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from dualcl.methods import method_info

#: by domain: a bundled preset and what makes it tiny, with tasks of different sizes
TINY = {
    "classification": (
        "glyphs",
        "data.classes=7 data.train_per_class=5 data.test_per_class=3 stream.tasks=3 train.batch_size=6",
    ),
    "customization": (
        "glyph-concepts-quick",
        "data.concepts=3 data.per_concept=3 stream.tasks=2 train.steps=2 train.batch_size=2 eval.n=1 eval.steps=1 "
        "eval.guidance=1.0 prior.n=2 prior.steps=1 prior.guidance=1.0",
    ),
}
_ALWAYS = ("train.checkpoint_seconds=0", "train.log_every=1", "device=cpu")


class Broken(AssertionError):
    """A promise that a method does not keep."""


def must(kept: bool, otherwise: str) -> None:
    """Raises Broken unless `kept`."""
    if not kept:
        raise Broken(otherwise)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    same = one.keys() & two.keys()
    return sorted((one.keys() ^ two.keys()) | {n for n in same if not torch.equal(one[n], two[n])})


# --- runs that are watched --------------------------------------------------------------------------------------------


class Watched(Run):
    """The real run; notes which tensors change in steps, in a whole task and in an evaluation, and what losses are."""

    def __init__(self, resolved: Resolved, folder: RunFolder, reporter: Reporter, domain: Domain | None = None) -> None:
        if domain is None:
            torch.manual_seed(derive_seed(resolved.general.seed, "build"))
            domain = domain_class(resolved.domain)(resolved, pick_device(resolved.general.device))  # type: ignore[call-arg]
        self.undeclared: list[str] = []
        self.needless_gradients: list[str] = []
        #: how many tensors the steps of each task changed
        self.moved: list[int] = []
        self.changed_old_rows: list[str] = []
        self.changed_by_evaluation: list[str] = []
        self.wrong_losses: list[str] = []
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
        hooks = {n: (type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        return {n: t.detach().clone() for n, t in model.state_dict().items()}, list(map(str, hooks.items()))

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
        state = {**self.tensors(), **{f"model.{k}": v for k, v in self.domain.model.state_dict().items()}}
        return {k: v.detach().clone() for k, v in state.items()}

    def execute(self, record: dict[str, Any]) -> dict[str, Any]:
        """As a run; its record is kept."""
        self.record = super().execute(record)
        return self.record

    def evaluate(self, seen: Sequence[int]) -> dict[str, Any]:
        """The domain's, looked at."""
        before = self.state()
        row = self.domain_evaluate(seen)
        self.changed_by_evaluation += _differing(before, self.state())
        return row

    def _noting(self, part: str, given: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def noted(*args: Any) -> Tensor | None:
            value = given(*args)
            if value is not None:
                wrong = [f"of shape {tuple(value.shape)}"] * bool(value.dim())
                wrong += [str(value.dtype)] * (value.dtype != torch.float32)
                wrong += ["not finite"] * (not bool(torch.isfinite(value).all()))
                wrong += ["without gradient"] * (part == "loss" and not value.requires_grad)
                self.wrong_losses += [f"{part} is {', '.join(wrong)}"] * bool(wrong)
            return value

        return noted

    def _fit(self, task: int, groups: Any, steps: int, partial: Any) -> dict[str, Any]:
        before = {n: (t, t.detach().clone()) for n, t in self.everything().items()}
        result = super()._fit(task, groups, steps, partial)
        declared = {id(p) for g in groups for p in g.params}
        changed = [n for n, (t, old) in before.items() if not torch.equal(t, old)]
        self.undeclared += [n for n in changed if id(before[n][0]) not in declared]
        self.moved.append(len(changed))
        # a gradient in front of frozen weights is computed for nothing
        held = [n for n, (t, _) in before.items() if t.is_leaf and t.grad is not None]
        self.needless_gradients += [n for n in held if id(before[n][0]) not in declared]
        return result

    def _stage(self, record: dict[str, Any], task: int, stages: int, partial: Any) -> None:
        rows = next(iter(self.parts().values()))
        old = {n: (p, p.detach().clone()) for n, p in rows.named_parameters()}
        super()._stage(record, task, stages, partial)
        self.changed_old_rows += [n for n, (p, before) in old.items() if not torch.equal(p, before)]


class Killed(Run):
    """Is interrupted in the last task: in its second step, after a checkpoint of the first, or where it takes none."""

    def step(self, batch: Any, optimizer: Any, factor: float, where: str) -> tuple[float, Tensor | None]:
        """The second one of the last task never ends."""
        if where == f"task {1 if self.joint else self.n_tasks}, step 1":
            raise KeyboardInterrupt
        return super().step(batch, optimizer, factor, where)

    def _stage(self, record: dict[str, Any], task: int, stages: int, partial: Any) -> None:
        if task == stages - 1 and not self.method.takes_steps(task):
            raise KeyboardInterrupt
        super()._stage(record, task, stages, partial)


#: a fresh run of the same configuration in a folder
Make = Callable[[Path, type[Run]], Run]


def empty_record() -> dict[str, Any]:
    """What `Run.execute` fills."""
    return {"tasks": [], "matrix": {"rows": []}, "measured": {"tasks": []}}


# --- what a model answers ---------------------------------------------------------------------------------------------


def pixels(domain: Any) -> Tensor:
    """Seven images of noise, normalised."""
    size = domain.view.size
    return torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(1))


def prompts(domain: Any) -> list[tuple[str, int]]:
    """Prompts of both concepts and of none, with seeds."""
    words = [domain.fill("a photo of {token}", j) for j in range(2)]
    return [(words[0], 5), (words[1], 6), ("a photo of a red star", 7)]


def draw(domain: Any, wanted: Sequence[tuple[str, int]]) -> Tensor:
    """Images of (prompt, seed) pairs, generated side by side."""
    generators = [torch.Generator().manual_seed(seed) for _, seed in wanted]
    drawn: Tensor = domain.sample([domain.tokens.expand(prompt) for prompt, _ in wanted], generators)
    return drawn


def answers(domain: Any) -> Tensor:
    """Scores of images of noise, or drawn images."""
    if domain.name != "classification":
        return draw(domain, prompts(domain))
    scores: Tensor = domain.predict(pixels(domain))
    return scores


# --- properties -------------------------------------------------------------------------------------------------------


def steps(work: Watched, make: Make) -> None:
    """Steps change declared parameters and nothing else."""
    must(not work.undeclared, f"steps change what `trained` does not give: {_few(work.undeclared)}")
    must(not work.needless_gradients, f"gradients of what is not trained: {_few(work.needless_gradients)}")
    stages = range(1 if work.joint else work.n_tasks)
    wanted = sum(work.method.takes_steps(task) for task in stages)
    must(len(work.moved) == wanted and all(work.moved), f"{sum(map(bool, work.moved))} of {wanted} tasks change it")


def losses(work: Watched, make: Make) -> None:
    """Losses are finite float32 scalars with gradient."""
    must(not work.wrong_losses, _few(list(dict.fromkeys(work.wrong_losses))))


def old_rows(work: Watched, make: Make) -> str:
    """Rows of finished tasks keep their bits."""
    cls = type(work.method)
    if work.domain.name == "classification" and (cls.rewrites_rows or cls.output_scope == "seen"):
        return "not promised: " + ("rewrites_rows" if cls.rewrites_rows else 'output_scope "seen"')
    must(not work.changed_old_rows, f"they change: {_few(work.changed_old_rows)}; say `rewrites_rows` if they may")
    return ""


def network(work: Watched, make: Make) -> str:
    """The pretrained network keeps its bits, as far as that is promised."""
    domain: Any = work.domain
    if domain.name != "classification":
        domain.check_tokens()
    if type(work.method).frozen:
        weights, modules = work.network()
        changed = _differing(work.attached[0], weights)
        must(not changed, f"`frozen` is promised, and these change: {_few(changed)}")
        must(modules == work.attached[1], "`frozen` is promised, and modules or hooks of the network change")
        return "frozen"
    if "network" in work.method.requires or domain.name == "classification":
        return "not promised: it may be trained"
    may_move = {id(p) for p in domain.full_parameters().values()}
    names = {n: t for n, t in domain.network_parameters().items() if id(t) not in may_move}
    changed = [n for n, t in names.items() if not torch.equal(t, work.attached[0][n])]
    must(not changed, f"weights that it may not train change: {_few(changed)}")
    return "but for the weights that it may train"


def evaluation(work: Watched, make: Make) -> None:
    """An evaluation changes nothing, and another one gives the same."""
    seen = range(work.n_tasks)
    must(work.domain.evaluate(seen) == work.domain.evaluate(seen), "a second evaluation gives something else")
    must(not work.changed_by_evaluation, f"it changes {_few(work.changed_by_evaluation)}")


def task_id(work: Watched, make: Make) -> None:
    """Answers do not depend on which task the domain is in."""
    domain: Any = work.domain
    current, expected = domain._current, answers(domain)
    try:
        for domain._current in (0, 1, None):
            must(torch.equal(answers(domain), expected), f"they differ when the domain is in task {domain._current}")
    finally:
        domain._current = current


def neighbours(work: Watched, make: Make, tolerance: float | None = None) -> None:
    """An answer depends on its image alone, and on no random numbers.

    `tolerance`: of scores; None: rounding in proportion to the largest one.
    """
    domain: Any = work.domain
    drawn = torch.get_rng_state()
    together = answers(domain)
    must(torch.equal(torch.get_rng_state(), drawn), "random numbers are drawn")
    if domain.name == "classification":
        images = pixels(domain)
        must(together.dtype == torch.float32, f"scores are {together.dtype}, not float32")
        wanted = (len(images), sum(len(domain.outputs(t)) for t in range(work.n_tasks)))
        must(tuple(together.shape) == wanted, f"scores have the shape {tuple(together.shape)}, not {wanted}")
        tolerance = tolerance or 1e-5 * max(1.0, float(together.abs().max()))
        order = [3, 0, 6, 2, 5, 1, 4]
        others = [(domain.predict(images[order]), together[order], "in another order")]
        parts = {n: torch.cat([domain.predict(part) for part in images.split(n)]) for n in (1, 3)}
        others += [(part, together, f"in batches of {n}") for n, part in parts.items()]
    else:
        said = _predictions(domain, [0, 1, 2])
        others = [(_predictions(domain, [2, 1, 0]).flip(0), said, "in another order")]
        others += [(torch.cat([_predictions(domain, [i]) for i in range(3)]), said, "one by one")]
        alone = torch.cat([draw(domain, [one]) for one in prompts(domain)])
        # rounding to a level of 255
        must(bool((together.int() - alone.int()).abs().max() <= 1), "an image drawn alone is another one")
        tolerance = tolerance or 1e-5
    for got, expected, how in others:
        away = float((got - expected).abs().max())
        must(away <= tolerance, f"answers {how} are up to {away:.2g} away")


@torch.no_grad()
def _predictions(domain: Any, at: list[int]) -> Tensor:
    """What the network says of some of three noisy images under three prompts."""
    model = domain.diffusion
    text = model.encode_text([domain.tokens.expand(prompt) for prompt, _ in prompts(domain)])
    noise = torch.randn(3, *model.info.latent_shape, generator=torch.Generator().manual_seed(2))
    said: Tensor = model.predict(noise[at], torch.tensor([900, 500, 100])[at], text[at])
    return said


def kept(work: Watched, make: Make) -> str:
    """Features that were kept under a key are those of the network now, bit for bit."""
    domain: Any = work.domain
    if domain.name != "classification":
        return "nothing is kept here"
    read = domain._scores

    out: list[Tensor] = []

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
    half = len(out) // 2
    must(
        all(map(torch.equal, out[:half], out[half:])),
        "scores change when the features kept under its keys are computed afresh",
    )
    return ""


def stored(work: Watched, make: Make) -> str:
    """What it says to store is in its checkpoint."""
    said = work.method.stored_parameters()
    state = work.method.state_dict(keep_vars=True).values()
    held = sum(t.numel() for t in {id(t): t for t in state}.values())
    must(isinstance(said, int) and 0 <= said <= held, f"it says {said}, and its checkpoint holds {held} numbers")
    told = work.record["tasks"][-1]["parameters_stored"] - work.domain.stored_parameters()
    must(told == said, f"it says {said} now, and said {told} after its last task")
    return f"{said:,} numbers; its checkpoint holds {held:,}"


def restores(work: Watched, make: Make) -> None:
    """A checkpoint, read by a fresh run, gives the same answers, which a fresh run alone does not."""
    stages = 1 if work.joint else work.n_tasks

    def said(domain: Any) -> Tensor:
        return answers(domain) if domain.name == "classification" else _predictions(domain, [0, 1, 2])

    with tempfile.TemporaryDirectory() as place:
        again = make(Path(place), Run)
        for task in range(stages):
            again.begin(task)
        fresh = said(again.domain)
        work.folder.save_checkpoint("copy", work.tensors(), {})
        tensors, _ = work.folder.load_checkpoint("copy") or ({}, {})
        again.restore(tensors, stages)
        expected = said(work.domain)
        must(torch.equal(said(again.domain), expected), "answers differ: some state is not in `state_dict`")
        must(not torch.equal(fresh, expected), "nothing was learnt")
        now = again.method.stored_parameters()
        must(now == work.method.stored_parameters(), f"it stores {now} numbers then")


def resumes(work: Watched, make: Make) -> None:
    """A run that is interrupted and goes on ends as an undisturbed one, bit for bit."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with contextlib.suppress(KeyboardInterrupt):
            make(folder, Killed).execute(empty_record())
        again = make(folder, Run)
        record = again.execute(empty_record())
        changed = _differing(again.tensors(), work.tensors())
        must(not changed, f"these differ then: {_few(changed)}")
        for part in ("matrix", "tasks"):
            must(record[part] == work.record[part], f"the record's {part} differ then")
        pictures = [
            {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*.png")} for f in (work.folder.path, folder)
        ]
        must(pictures[0] == pictures[1], "its pictures differ then")
        must(bool(pictures[0]) == (work.domain.name == "customization"), "there are no pictures")


PROPERTIES: dict[str, Callable[[Watched, Make], str | None]] = {
    "steps change what it declares and nothing else": steps,
    "losses are finite float32 scalars with gradient": losses,
    "rows of finished tasks keep their bits": old_rows,
    "the pretrained network keeps its bits": network,
    "an evaluation changes nothing": evaluation,
    "no task id": task_id,
    "no neighbour in a batch, no random numbers": neighbours,
    "what is kept under a key is still right": kept,
    "what it stores is in its checkpoint": stored,
    "a checkpoint gives the same answers": restores,
    "an interrupted run ends as an undisturbed one": resumes,
}


# --- `dualcl check` ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A property of a method in a domain; `problem` "": it holds."""

    domain: str
    name: str
    problem: str = ""
    detail: str = ""


def check_method(reference: str, sets: Sequence[str] = ()) -> Iterator[Result]:
    """Runs a method, a name or FILE.py, on a tiny stream of every domain that it serves, and checks all properties.

    `sets`: settings of it, as `method.rank=4`. Raises UserError for a method that cannot be had.
    """
    plan = []
    for domain in method_info(reference).domains:
        domain_class(domain)
        preset, tiny = TINY[domain]
        plan.append(resolve(preset, reference, [*tiny.split(), *_ALWAYS, *sets]))
        check_capabilities(plan[-1])
    for resolved in plan:
        with tempfile.TemporaryDirectory() as place:
            yield from _checked(resolved, Path(place))


def _checked(resolved: Resolved, folder: Path) -> Iterator[Result]:
    def make(place: Path, kind: type[Run]) -> Run:
        return kind(resolved, RunFolder(place), Reporter(quiet=True))

    def tried(name: str, call: Callable[[], str | None]) -> Result:
        try:
            return Result(resolved.domain, name, detail=call() or "")
        except Broken as broken:
            return Result(resolved.domain, name, str(broken))
        except Exception as error:  # the method's own, whatever it is
            return Result(resolved.domain, name, printable(f"{type(error).__name__}: {error}"))

    runs: list[Any] = []

    def whole() -> str:
        runs.append(make(folder, Watched))
        record = runs[0].execute(empty_record())
        return f"{sum(t['steps'] for t in record['tasks'])} steps in {len(record['tasks'])} tasks"

    yield (first := tried("it runs a stream of tasks", whole))
    for name, holds in PROPERTIES.items() if not first.problem else ():
        yield tried(name, lambda holds=holds: holds(runs[0], make))  # type: ignore[misc]
