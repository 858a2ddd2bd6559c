import pytest
import torch
from torch import nn

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.pretraining.stages import Schedule, train

STEPS = 12


class Stopped(Exception):
    pass


def run(file, steps=STEPS, stop=None, told=None, ema=0.9, broken=False):
    """Trains a small model; `stop`: killed in that step. Every step is saved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(step):
        if step == stop:
            raise Stopped
        x = torch.randn(16, 3, generator=torch_generator(0, "x", step))
        return (model(x) - x.prod(1, keepdim=True)).square().mean() * (torch.nan if broken else 1)

    schedule = Schedule(steps, 1e-2, warm=3, flat=0.5, weight_decay=0.01, ema=ema)
    return train(file, told or {"seed": 0}, model, loss, schedule, lambda _: None, every=0.0)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_was_stopped_ends_as_what_was_not(tmp_path, ema):
    whole = run(tmp_path / "a.safetensors", ema=ema)
    for stop in (1, 5, 11):
        with pytest.raises(Stopped):
            run(tmp_path / f"{stop}.safetensors", stop=stop, ema=ema)
        assert same(run(tmp_path / f"{stop}.safetensors", ema=ema), whole)
    # what is done is only read
    assert same(run(tmp_path / "a.safetensors", stop=0, ema=ema), whole)


def test_a_longer_training_may_take_over_before_the_rate_falls(tmp_path):
    whole = run(tmp_path / "a.safetensors", steps=20)
    with pytest.raises(Stopped):
        run(tmp_path / "b.safetensors", steps=12, stop=6)
    assert same(run(tmp_path / "b.safetensors", steps=20), whole)
    with pytest.raises(Stopped):
        run(tmp_path / "c.safetensors", steps=12, stop=8)
    with pytest.raises(UserError, match=r"8 steps into a training of 12, too far for one of 20"):
        run(tmp_path / "c.safetensors", steps=20)


def test_a_state_of_something_else_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    run(file)
    with pytest.raises(UserError, match=r"another seed; give another --out"):
        run(file, told={"seed": 1})
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"is no state of a training"):
        run(file)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    with pytest.raises(UserError, match=r"the loss of step 0 is nan"):
        run(tmp_path / "a.safetensors", broken=True)
    assert not list(tmp_path.iterdir())
