"""L2P++, DualPrompt and CODA-P: what they select, what they train, what they leave alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import dualcl.benchmark.core.compat  # noqa: F401 - before torchvision and timm
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.domain import Images
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains.classification import Classification
from dualcl.methods import available_methods, method_class
from dualcl.methods.coda_prompt import (
    CodaPrompt,
    CodaPromptConfig,
    CodaPromptSmallConfig,
    component_weights,
    orthogonality,
    orthonormal_rows,
    projected_rows,
)
from dualcl.methods.dualprompt import DualPrompt, DualPromptConfig
from dualcl.methods.l2p import L2P, L2PConfig
from dualcl.methods.shared.prompting import majority

DIM, BLOCKS, TASKS = 24, 6, 3
METHODS = ("l2p", "dualprompt", "coda_prompt", "coda_prompt_small")
SMALL = {
    "l2p": {"pool": 6, "length": 4, "top_k": 2, "deep": True},
    "dualprompt": {"general_length": 2, "expert_length": 4},
    "coda_prompt": {"pool": 7, "length": 4},
    "coda_prompt_small": {"pool": 4, "length": 2},
}


class PrefixOnly:
    """A network's sizes alone: what a prompt method may use of a domain until it is given images."""

    device = torch.device("cpu")

    def __init__(self, n_blocks: int = BLOCKS, feature_dim: int = DIM) -> None:
        self.network = SimpleNamespace(blocks=n_blocks, width=feature_dim)
        self.method = None

    def attach(self, method):
        self.method = method


def make(name, domain=None, n_tasks=TASKS, seed=0, **options):
    cls = method_class(name)
    return cls(cls.Config(**{**SMALL[name], **options}), domain or PrefixOnly(), n_tasks, seed)


def queries(rows: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))


def begun(name, tasks=TASKS, **options):
    """The method after `tasks` tasks began, each with one optimiser step, so that past and current state differ."""
    method = make(name, **options)
    for task in range(tasks):
        method.begin_task(task)
        step(method)
        method.end_task(task)
    return method


def step(method, lr=0.1):
    groups = method.trained()
    optimizer = torch.optim.Adam([{"params": g.params, "lr": lr, "weight_decay": g.weight_decay} for g in groups])
    prefixes = method.provide(queries(), training=True)
    loss = sum((k.square() + v.sin()).sum() for k, v in prefixes.values())
    penalty = method.penalty()
    if penalty is not None:
        loss = loss + penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_is_registered_for_classification_with_the_prefixes_capability(name):
    info = available_methods()[name]
    assert info.domains == ("classification",)
    assert "2211.13218" in info.source
    assert method_class(name).requires == ("features", "prefixes")
    domain = PrefixOnly()
    method = make(name, domain)
    assert domain.method is method


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("l2p", dict.fromkeys(range(5), 2 * 4 // 2)),
        ("dualprompt", {0: 1, 1: 1, 2: 2, 3: 2, 4: 2}),
        ("coda_prompt", dict.fromkeys(range(5), 2)),
        ("coda_prompt_small", dict.fromkeys(range(5), 1)),
    ],
)
def test_shapes_per_block(name, lengths, training):
    prefixes = begun(name).provide(queries(), training)
    assert {b: tuple(k.shape) for b, (k, _) in prefixes.items()} == {b: (5, n, DIM) for b, n in lengths.items()}
    assert all(k.shape == v.shape for k, v in prefixes.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_row_depends_on_its_own_query_only(name, training):
    method, q = begun(name), queries(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    whole, permuted = method.provide(q, training), method.provide(q[order], training)
    for block, pair in whole.items():
        for part, tensor in enumerate(pair):
            torch.testing.assert_close(permuted[block][part], tensor[order], rtol=1e-5, atol=1e-6)
            for row in range(len(q)):
                alone = method.provide(q[row : row + 1], training)[block][part]
                torch.testing.assert_close(alone[0], tensor[row], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(k[0], k[1]) for k, _ in method.provide(q, False).values())


@pytest.mark.parametrize("name", METHODS)
def test_everything_trained_gets_a_gradient_and_nothing_else_changes(name):
    method = begun(name, tasks=2)
    method.begin_task(2)
    trained = [p for g in method.trained() for p in g.params]
    assert {id(p) for p in method.parameters()} == {id(p) for p in trained}
    frozen = {k: v.clone() for k, v in method.named_buffers() if k.startswith("past_")}
    before = [p.detach().clone() for p in trained]
    step(method)
    assert all(p.grad is not None and not torch.equal(p, b) for p, b in zip(trained, before, strict=True))
    assert all(torch.equal(v, frozen[k]) for k, v in method.named_buffers() if k in frozen)


@pytest.mark.parametrize("name", METHODS)
def test_trained_groups_carry_the_configured_rates(name):
    method = make(name, lr=0.02, weight_decay=0.3)
    method.begin_task(0)
    assert [(g.lr, g.weight_decay) for g in method.trained()] == [(0.02, 0.3)]


@pytest.mark.parametrize("name", METHODS)
def test_initialisation_is_a_function_of_the_seed_and_the_task(name):
    one, same, other = make(name), make(name), make(name, seed=1)
    for method in (one, same, other):
        for task in range(2):
            method.begin_task(task)
    state = one.state_dict()
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in state.items())
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tasks", [1, 3])
def test_state_survives_a_safetensors_file(name, tasks, tmp_path):
    method = begun(name, tasks=tasks)
    save_file({k: v.contiguous() for k, v in method.state_dict().items()}, tmp_path / "state.safetensors")
    resumed = make(name)
    for task in range(tasks):
        resumed.begin_task(task)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for training in (True, False):
        prefixes, again = method.provide(queries(), training), resumed.provide(queries(), training)
        for block, (keys, values) in prefixes.items():
            assert torch.equal(again[block][0], keys)
            assert torch.equal(again[block][1], values)
    step(method)
    step(resumed)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in method.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_leaves_state_and_penalty_alone(name):
    method = begun(name)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    with torch.inference_mode():
        method.provide(queries(), training=False)
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert method.penalty() is None


@pytest.mark.parametrize("name", METHODS)
def test_features_are_a_plain_pass_and_one_with_the_prefixes_it_chooses(name):
    method, q, passes = begun(name), queries(), []

    def network(images, *, prefixes=None, key=None):
        passes.append((prefixes, key, torch.is_grad_enabled()))
        return q if prefixes is None else 2 * q

    images = Images(torch.zeros(len(q), 3, 4, 4))
    assert torch.equal(method.features(images, network), 2 * q)
    assert [(p is None, key, grad) for p, key, grad in passes] == [(True, "plain", False), (False, None, True)]
    for block, pair in method.provide(q, training=False).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, passes[1][0][block], strict=True))


# --- quirks of public codes, all of them ------------------------------------------------------------------------------

QUIRKS = [(name, quirk) for name in METHODS for quirk in method_class(name).Config.QUIRKS]
#: a sample's prompts depend on its batch
MIX_SAMPLES = {("l2p", "batch_vote"), ("dualprompt", "batch_vote"), ("dualprompt", "reshape")}


@pytest.mark.parametrize("name", METHODS)
def test_quirks_are_off_unless_named_and_listed_for_the_user(name):
    config = method_class(name).Config
    assert config().reference_quirks == ()
    own = ["knows the number of tasks in advance"] if name.startswith("coda") else []
    assert make(name).caveats() == [*own, "two passes per image"]
    text = next(f.metadata["help"] for f in dataclasses.fields(config) if f.name == "reference_quirks")
    assert all(quirk in text for quirk in config.QUIRKS)


@pytest.mark.parametrize(("name", "quirk"), QUIRKS)
def test_every_active_quirk_is_told_to_the_reader(name, quirk):
    (caveat,) = set(make(name, reference_quirks=(quirk,)).caveats()) - set(make(name).caveats())
    assert caveat.startswith(f"{quirk}: ")
    assert "public" in caveat
    assert ("task id in disguise" in caveat) == (quirk == "batch_vote")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "quirk"), QUIRKS)
def test_only_the_quirks_known_to_mix_samples_do(name, quirk, training):
    method, q = begun(name, reference_quirks=(quirk,)), queries(6)
    whole = method.provide(q, training)
    alone = [method.provide(q[row : row + 1], training) for row in range(len(q))]
    same = all(
        torch.allclose(one[block][part][0], tensor[row], rtol=1e-5, atol=1e-6)
        for block, pair in whole.items()
        for part, tensor in enumerate(pair)
        for row, one in enumerate(alone)
    )
    # DualPrompt's expert is the task's own in training, so that there is nothing to vote on
    votes = (name, quirk) == ("dualprompt", "batch_vote") and training
    assert same == ((name, quirk) not in MIX_SAMPLES or votes)


@pytest.mark.parametrize("name", METHODS)
def test_quirks_are_set_by_name(name, tiny):
    names = list(method_class(name).Config.QUIRKS)
    assert tiny(name, f"method.reference_quirks={','.join(names)}").sections["method"].reference_quirks == tuple(names)
    assert tiny(name, "method.reference_quirks=[]").sections["method"].reference_quirks == ()


def test_a_vote_takes_the_most_frequent_and_the_lower_of_two():
    choice = torch.tensor([[[4, 1], [1, 3], [3, 4], [0, 1]], [[2, 0], [2, 1], [0, 2], [4, 2]]])
    # votes of the first block: 0: 1, 1: 3, 3: 2, 4: 2; of the second: 2: 4, 0: 2
    assert majority(choice, 5).tolist() == [[[1, 3]] * 4, [[2, 0]] * 4]


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (L2PConfig, {"pool": 0}, r"method\.pool .* got 0"),
        (L2PConfig, {"pool": 4, "top_k": 5}, r"method\.top_k .*method\.pool=4, got 5"),
        (L2PConfig, {"top_k": 0}, r"method\.top_k .* got 0"),
        (L2PConfig, {"length": 5}, r"method\.length must be even.*got 5; use 4 or 6"),
        (L2PConfig, {"length": 1}, r"method\.length must be at least 2 .*got 1"),
        (L2PConfig, {"deep": True, "blocks": (3,)}, r"method\.deep=true .*method\.blocks=\[3\]"),
        (L2PConfig, {"blocks": (0, 0)}, r"method\.blocks must not name a block twice, got \[0, 0\]"),
        (DualPromptConfig, {"general_length": 7}, r"method\.general_length must be even.*got 7"),
        (DualPromptConfig, {"expert_length": 0}, r"method\.expert_length .*got 0"),
        (DualPromptConfig, {"expert_blocks": ()}, r"method\.expert_blocks must name at least one"),
        (DualPromptConfig, {"general_blocks": (-1,)}, r"method\.general_blocks .*negative.*\[-1\]"),
        (CodaPromptConfig, {"mu": -0.1}, r"method\.mu must not be negative, got -0\.1"),
        (CodaPromptConfig, {"length": 3}, r"method\.length must be even.*got 3; use 2 or 4"),
        (CodaPromptConfig, {"pool": -1}, r"method\.pool .*got -1"),
        (CodaPromptConfig, {"lr": -1.0}, r"method\.lr"),
        (
            L2PConfig,
            {"reference_quirks": ("batch_votes",)},
            r"'batch_votes' in method\.reference_quirks; .*'batch_vote'",
        ),
        (L2PConfig, {"reference_quirks": ("reshape",)}, r"'reshape' .*; quirks: batch_key_loss, batch_vote$"),
        (DualPromptConfig, {"reference_quirks": ("reshap",)}, r"did you mean 'reshape'"),
        (DualPromptConfig, {"reference_quirks": ("reshape", "reshape")}, r"must not name a quirk twice"),
        (CodaPromptSmallConfig, {"reference_quirks": ("drop",)}, r"'drop' .*drop_remainder, project_in_turn"),
    ],
)
def test_bad_options_are_named(config, options, message):
    with pytest.raises(UserError, match=message) as caught:
        config(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "l2p",
            r"method\.deep=true asks for blocks \[2, 3, 4\].*set method\.deep=false method\.blocks=0,1 ",
        ),
        ("dualprompt", r"method\.expert_blocks asks for blocks \[2, 3, 4\].* 2 attention blocks.*expert_blocks=1 "),
        ("coda_prompt", r"method\.blocks asks for blocks \[2, 3, 4\].*set method\.blocks=0,1 "),
    ],
)
def test_a_shallow_backbone_is_refused_with_the_mend(name, message):
    with pytest.raises(UserError, match=message):
        make(name, PrefixOnly(n_blocks=2))


@pytest.mark.parametrize("config", [L2PConfig, DualPromptConfig, CodaPromptConfig, CodaPromptSmallConfig])
def test_every_option_is_explained(config):
    assert all(f.metadata.get("help") for f in dataclasses.fields(config))


# --- L2P --------------------------------------------------------------------------------------------------------------


def by_hand(**options) -> L2P:
    """Four prompts of length 2 in two dimensions; prompt m is [[m, m], [10 + m, 10 + m]]."""
    method = L2P(L2PConfig(pool=4, length=2, top_k=2, **options), PrefixOnly(feature_dim=2), 1, 0)
    method.begin_task(0)
    with torch.no_grad():
        method.keys.copy_(torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]]]))
        ids = torch.arange(4.0).view(4, 1)
        method.prompts.copy_(torch.stack([ids, 10 + ids], dim=1).expand(1, 4, 2, 2))
    return method


def test_l2p_takes_the_nearest_prompts_per_sample():
    method = by_hand()
    keys, values = method.provide(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.1]]), training=True)[0]
    # nearest by cosine: sample 0 -> keys 0, 1; sample 1 -> 2, 1; sample 2 -> 3, 2
    assert keys[:, :, 0].tolist() == [[0, 1], [2, 1], [3, 2]]
    assert values[:, :, 0].tolist() == [[10, 11], [12, 11], [13, 12]]
    assert method.diagnostics()["prompt_use"] == {"0": [1, 2, 2, 1]}
    assert method.diagnostics()["prompt_use_in_evaluation"] == {"0": [0, 0, 0, 0]}


def test_l2p_key_loss_gathers_per_sample_and_is_handed_out_once():
    method, half = by_hand(), 1 - 0.5**0.5
    method.provide(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), training=True)
    # each sample: its own key at cosine 1, the diagonal key at cosine sqrt(1/2)
    assert method.penalty().item() == pytest.approx(half, abs=1e-6)
    assert method.penalty() is None


def test_l2p_quirk_is_the_reference_sum_over_batch_batch_and_choice():
    method, q = (
        by_hand(reference_quirks=("batch_key_loss",)),
        torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    )
    method.provide(q, training=True)
    cos_sim = F.normalize(q, dim=1) @ F.normalize(method.keys[0], dim=1).T
    expected = (1 - cos_sim[:, cos_sim.topk(2, dim=1).indices]).sum()
    torch.testing.assert_close(method.penalty(), expected)


def test_l2p_vote_gives_the_batch_one_choice_and_its_key_loss():
    q = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.1]])
    method = by_hand(reference_quirks=("batch_vote",))
    for training in (True, False):
        keys, values = method.provide(q, training)[0]
        # own choices 0 1, 2 1 and 3 2: prompts 1 and 2 have two votes each
        assert keys[:, :, 0].tolist() == [[1, 2]] * 3
        assert values[:, :, 0].tolist() == [[11, 12]] * 3
    assert method.diagnostics()["prompt_use"] == {"0": [0, 3, 3, 0]}
    cos_sim = F.normalize(q, dim=1) @ F.normalize(method.keys[0], dim=1).T
    torch.testing.assert_close(method.penalty(), (1 - cos_sim[:, 1:3]).sum() / 3)
    both = by_hand(reference_quirks=("batch_vote", "batch_key_loss"))
    both.provide(q, training=True)
    torch.testing.assert_close(both.penalty(), 3 * (1 - cos_sim[:, 1:3]).sum())


def test_l2p_gradient_reaches_the_chosen_prompts_only():
    method = by_hand()
    keys, values = method.provide(torch.tensor([[2.0, 0.0]]), training=True)[0]
    (keys.sum() + values.sum()).backward()
    assert method.prompts.grad[0, :, 0, 0].tolist() == [1, 1, 0, 0]
    assert method.keys.grad is None  # the choice itself has no gradient: keys learn from the key loss


def test_l2p_deep_prompts_five_blocks():
    assert L2PConfig().prompted == (0,)
    assert L2PConfig(deep=True).prompted == (0, 1, 2, 3, 4)
    assert L2PConfig(blocks=(2, 5)).prompted == (2, 5)


def test_l2p_takes_each_blocks_prompts_from_its_own_pool_by_its_own_keys():
    method, q = begun("l2p"), queries()
    prefixes = method.provide(q, training=False)
    choices = []
    for i, block in enumerate(method.blocks):
        chosen = (F.normalize(q, dim=1) @ F.normalize(method.keys[i], dim=1).T).topk(2, dim=1).indices
        prompts = method.prompts[i][chosen]
        assert torch.equal(prefixes[block][0], prompts[:, :, :2].flatten(1, 2))
        assert torch.equal(prefixes[block][1], prompts[:, :, 2:].flatten(1, 2))
        choices.append(chosen)
    assert any(not torch.equal(choices[0], c) for c in choices[1:])


def test_l2p_histograms_are_per_task():
    method = by_hand()
    method.provide(queries()[:, :2], training=True)
    method.end_task(0)
    method.provide(queries()[:, :2], training=False)
    assert sum(method.diagnostics()["prompt_use"]["0"]) == 10
    assert sum(method.diagnostics()["prompt_use_in_evaluation"]["0"]) == 10
    method.begin_task(1)
    assert method.diagnostics()["prompt_use"] == {"0": [0, 0, 0, 0]}


# --- DualPrompt -------------------------------------------------------------------------------------------------------


AXES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])


def three_experts(**options) -> DualPrompt:
    """Experts of three tasks in two dimensions with keys along `AXES`; row i of expert t is [10 t + i, 10 t + i]."""
    config = DualPromptConfig(general_blocks=(0,), general_length=2, expert_blocks=(1,), expert_length=4, **options)
    method = DualPrompt(config, PrefixOnly(feature_dim=2), 3, 0)
    for task in range(3):
        method.begin_task(task)
        with torch.no_grad():
            method.key.copy_(AXES[task : task + 1])
            method.prompt.copy_(torch.tensor([10.0 * task + i for i in range(4)]).view(1, 4, 1).expand(1, 4, 2))
    return method


def test_dualprompt_trains_the_tasks_expert_and_finds_experts_by_key():
    method = three_experts()
    q = torch.tensor([[5.0, 1.0], [0.1, 2.0], [-1.0, 0.2], [0.2, 7.0]])
    keys, values = method.provide(q, training=True)[1]
    assert keys[:, :, 0].tolist() == [[20, 21]] * 4
    assert values[:, :, 0].tolist() == [[22, 23]] * 4
    expected = (1 - F.cosine_similarity(q, AXES[2:], dim=1)).mean()
    torch.testing.assert_close(method.penalty(), expected)
    method.end_task(2)
    keys, values = method.provide(q, training=False)[1]
    assert keys[:, :, 0].tolist() == [[0, 1], [10, 11], [20, 21], [10, 11]]
    assert values[:, :, 0].tolist() == [[2, 3], [12, 13], [22, 23], [12, 13]]
    assert method.diagnostics() == {"expert_choice_in_evaluation": {"1": [1, 2, 1]}}


def test_dualprompt_quirk_sums_the_key_loss_over_the_batch():
    method, q = three_experts(reference_quirks=("sum_key_loss",)), torch.tensor([[5.0, 1.0], [0.1, 2.0]])
    method.provide(q, training=True)
    torch.testing.assert_close(method.penalty(), (1 - F.cosine_similarity(q, AXES[2:], dim=1)).sum())


def test_dualprompt_quirk_lets_the_test_batch_vote():
    method = three_experts(reference_quirks=("batch_vote",))
    q = torch.tensor([[5.0, 1.0], [0.1, 2.0], [-1.0, 0.2], [0.2, 7.0]])
    assert method.provide(q, training=True)[1][0][:, :, 0].tolist() == [[20, 21]] * 4
    keys, values = method.provide(q, training=False)[1]  # own choices 0, 1, 2, 1
    assert keys[:, :, 0].tolist() == [[10, 11]] * 4
    assert values[:, :, 0].tolist() == [[12, 13]] * 4


def test_dualprompt_quirk_reshapes_without_a_permute():
    method = three_experts(reference_quirks=("reshape",))
    q = torch.tensor([[5.0, 1.0], [0.1, 2.0], [-1.0, 0.2], [0.2, 7.0]])
    # what the batch has, in a row: keys of samples 0-3, then values of samples 0-3; each sample takes the next two
    keys, values = method.provide(q, training=True)[1]
    assert keys[:, :, 0].tolist() == [[20, 21], [20, 21], [22, 23], [22, 23]]
    assert values[:, :, 0].tolist() == [[20, 21], [20, 21], [22, 23], [22, 23]]
    keys, values = method.provide(q, training=False)[1]  # experts 0, 1, 2, 1
    assert keys[:, :, 0].tolist() == [[0, 1], [20, 21], [2, 3], [22, 23]]
    assert values[:, :, 0].tolist() == [[10, 11], [10, 11], [12, 13], [12, 13]]
    assert torch.equal(method.provide(q, training=False)[0][0], method.general[0, :1].expand(4, -1, -1))


def test_dualprompt_quirk_offers_the_experts_of_tasks_to_come_as_they_will_start():
    plain, method = make("dualprompt"), make("dualprompt", reference_quirks=("future_experts",))
    for task in range(TASKS):
        plain.begin_task(task)
        method.begin_task(task)
        assert torch.equal(plain.prompt, method.prompt)
        assert plain.state_dict().keys() == method.state_dict().keys()
        if task == 0:
            drawn, keys = method.future_prompts.clone(), method.future_keys.clone()
            assert drawn.shape[1] == keys.shape[1] == TASKS - 1
            # queries along the keys of the first block find their expert there
            nearest = method.provide(keys[0], training=False)[2][0]
            assert torch.equal(nearest, drawn[0, :, :2])
            assert method.diagnostics()["expert_choice_in_evaluation"]["2"] == [0, 1, 1]
            assert all(k.shape[0] == TASKS - 1 for k, _ in method.provide(keys[0], training=True).values())
        else:
            assert torch.equal(method.prompt, drawn[:, task - 1])
            assert torch.equal(method.key, keys[:, task - 1])
    assert method.future_keys.shape[1] == 0
    assert method.stored_parameters() == plain.stored_parameters()


def test_dualprompt_takes_each_blocks_expert_by_its_own_keys():
    method, q = begun("dualprompt"), queries(16)
    keys = torch.cat([method.past_keys, method.key[:, None]], dim=1)
    prompts = torch.cat([method.past_prompts, method.prompt[:, None]], dim=1)
    prefixes = method.provide(q, training=False)
    nearest = [F.cosine_similarity(q[:, None], keys[i][None], dim=-1).argmax(dim=1) for i in range(3)]
    for i, block in enumerate((2, 3, 4)):
        assert torch.equal(torch.cat(prefixes[block], dim=1), prompts[i][nearest[i]])
    assert any(not torch.equal(nearest[0], n) for n in nearest[1:])


def test_dualprompt_general_prompt_is_the_same_for_all_samples_and_tasks():
    method = begun("dualprompt")
    keys, values = method.provide(queries(), training=False)[1]
    assert torch.equal(keys, method.general[1, :1].expand(5, -1, -1))
    assert torch.equal(values, method.general[1, 1:].expand(5, -1, -1))


def test_dualprompt_puts_the_expert_before_the_general_prompt_in_a_shared_block():
    method = begun("dualprompt", general_blocks=(0, 2))
    keys, _ = method.provide(queries(), training=True)[2]
    assert keys.shape == (5, 3, DIM)
    assert torch.equal(keys[0], torch.cat([method.prompt[0, :2], method.general[1, :1]]))


def test_dualprompt_stores_what_the_arithmetic_says():
    assert begun("dualprompt").stored_parameters() == DIM * (2 * 2 + 3 * TASKS * (4 + 1))


# --- CODA-P -----------------------------------------------------------------------------------------------------------


def direct_weights(query, attention, keys):
    """The definition as written, with the tensor (n_blocks, B, M, D)."""
    attended = query[None, :, None, :] * attention[:, None, :, :]
    return F.cosine_similarity(attended, keys[:, None, :, :].expand_as(attended), dim=-1)


def test_component_weights_equal_the_direct_form():
    generator = torch.Generator().manual_seed(0)
    query, attention, keys = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, DIM), (2, 9, DIM), (2, 9, DIM))
    )
    for t in (query, attention, keys):
        t.requires_grad_()
    fast, slow = component_weights(query, attention, keys), direct_weights(query, attention, keys)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    mix = torch.randn(fast.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((fast * mix).sum(), (query, attention, keys)),
        torch.autograd.grad((slow * mix).sum(), (query, attention, keys)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_component_weights_of_a_dead_query_are_zero():
    attention = torch.ones(1, 2, 3, requires_grad=True)
    weights = component_weights(torch.zeros(1, 3), attention, torch.ones(1, 2, 3))
    weights.sum().backward()
    assert weights.tolist() == [[[0, 0]]]
    assert torch.isfinite(attention.grad).all()


def test_coda_prompts_are_weighted_sums_of_old_and_new_components():
    method, q = begun("coda_prompt"), queries()
    prefixes = method.provide(q, training=True)
    for i, block in enumerate(method.config.blocks):
        keys = torch.cat([method.past_keys[i], method.keys[i]])
        attention = torch.cat([method.past_attention[i], method.attention[i]])
        prompts = torch.cat([method.past_prompts[i], method.prompts[i]])
        weights = direct_weights(q, attention[None], keys[None])[0]
        expected = torch.einsum("bm,mld->bld", weights, prompts)
        torch.testing.assert_close(torch.cat(prefixes[block], dim=1), expected, rtol=1e-4, atol=1e-5)


def test_orthonormal_rows():
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(9, 16, generator=generator) * 100  # trained rows: neither normal nor orthogonal
    new = orthonormal_rows(7, old, generator)
    torch.testing.assert_close(new @ new.T, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (new @ old.double().T).abs().max() < 1e-9


def test_each_coda_task_starts_orthonormal_and_orthogonal_to_the_trained_components():
    method = make("coda_prompt")
    for task in range(TASKS):
        method.begin_task(task)
        for old, new in (
            (method.past_keys, method.keys),
            (method.past_attention, method.attention),
            (method.past_prompts, method.prompts),
        ):
            old, new = old.flatten(2).double(), new.detach().flatten(2).double()
            identity = torch.eye(new.shape[1], dtype=torch.float64).expand(len(new), -1, -1)
            torch.testing.assert_close(new @ new.mT, identity, rtol=0, atol=1e-6)
            assert task == 0 or (new @ old.mT).abs().max() < 1e-5
            assert not torch.equal(new[0], new[1])
        step(method)


def test_projected_rows_stay_aslant_of_trained_rows():
    old = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    # (1, 2, 3) less 1 x (1, 0, 0) and 3/2 x (1, 1, 0)
    wanted = torch.tensor([-1.5, 0.5, 3.0]) / 11.5**0.5
    torch.testing.assert_close(projected_rows(torch.tensor([[1.0, 2.0, 3.0]]), old), wanted[None])
    kept = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # orthogonal rows are left out exactly, zeros do no harm
    new = projected_rows(torch.tensor([[1.0, 2.0, 3.0], [4.0, -1.0, 2.0]]), kept)
    torch.testing.assert_close(new @ new.T, torch.eye(2))
    assert new[:, 0].tolist() == [0, 0]


def test_coda_quirks_leave_a_remainder_and_project_in_turn():
    method = make("coda_prompt", reference_quirks=("drop_remainder", "project_in_turn"))
    for task in range(TASKS):
        method.begin_task(task)
        new = method.keys.detach().double()
        torch.testing.assert_close(new.norm(dim=-1), torch.ones(5, 2, dtype=torch.float64))
        overlap = (new @ method.past_keys.double().mT).abs()
        assert task == 0 or overlap.max() > 1e-3  # the step has turned the old rows to each other
        with torch.no_grad():
            method.keys.add_(0.3 * method.keys.flip(1))
    assert method.diagnostics() == {"components": [2, 2, 2]}  # of 7


def test_the_whole_pool_is_shared_out_and_later_tasks_add_to_it():
    method = make("coda_prompt", pool=11)
    for task in range(5):
        method.begin_task(task)
    assert method.diagnostics() == {"components": [4, 4, 3, 3, 3]}
    assert method.stored_parameters() == 5 * 17 * DIM * (2 + 4)
    for task in (5, 6):
        method.begin_task(task)
    with pytest.raises(UserError, match=r"method\.pool=11 planned for 3 tasks means 26 components at task 7.*24 dim"):
        method.begin_task(7)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (2, r"method\.pool=2 leaves some of the 3 tasks without a component; set method\.pool to at least 3"),
        (25, r"method\.pool=25 .* 24 dimensions; set method\.pool to at most 24"),
    ],
)
def test_coda_pools_that_cannot_work_are_refused(pool, message):
    with pytest.raises(UserError, match=message):
        make("coda_prompt", pool=pool)


def test_orthogonality_is_the_mean_squared_deviation_from_the_identity():
    rows = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    # first block: gram [[1, 1], [1, 2]] - 1 = [[0, 1], [1, 1]], mean square 3/4; second block: 0
    assert orthogonality(rows).item() == pytest.approx(0.75)


def test_coda_penalty_covers_all_components_and_pulls_on_the_current_ones():
    method = begun("coda_prompt", tasks=2, mu=0.5)
    parts = [
        torch.cat([old, new], dim=1).flatten(2)
        for old, new in (
            (method.past_keys, method.keys),
            (method.past_attention, method.attention),
            (method.past_prompts, method.prompts),
        )
    ]
    expected = sum(((block @ block.T - torch.eye(len(block))) ** 2).mean() for part in parts for block in part.detach())
    penalty = method.penalty()
    assert penalty.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    penalty.backward()
    assert all(p.grad.abs().max() > 0 for g in method.trained() for p in g.params)
    assert make("coda_prompt").penalty() is None


def test_the_small_variant_is_the_size_of_l2p():
    def size(cls, config):
        method = cls(config, PrefixOnly(feature_dim=32), 10, 0)
        for task in range(10):
            method.begin_task(task)
        return method.stored_parameters()

    small, l2p = size(method_class("coda_prompt_small"), CodaPromptSmallConfig()), size(L2P, L2PConfig())
    assert small == 600 * 32
    assert l2p == 630 * 32
    assert issubclass(method_class("coda_prompt_small"), CodaPrompt)


# --- in the real domain -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    """Six classes of noisy colours as a folder, and a preset for a ViT of two blocks."""
    root: Path = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 4)):
        for label in range(6):
            folder = root / part / f"colour{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(40 * label, 20, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    file = root / "colours.yaml"
    file.write_text(
        f"""
domain: classification
data: {{name: image-folder, root: "{root}"}}
stream: {{tasks: 3}}
train: {{epochs: 1, batch_size: 6}}
input: {{workers: 0, augment: none}}
backbone:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {{img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}}
"""
    )
    return str(file)


TWO_BLOCKS = {
    "l2p": ["method.blocks=0,1", "method.pool=6", "method.length=4", "method.top_k=2"],
    "dualprompt": ["method.general_blocks=0", "method.expert_blocks=0,1", "method.expert_length=4"],
    "coda_prompt": ["method.blocks=0,1", "method.pool=8", "method.mu=0.1"],
    "coda_prompt_small": ["method.blocks=0,1", "method.pool=6"],
}


@pytest.mark.parametrize("name", METHODS)
def test_learns_in_the_real_domain_and_predicts_per_sample(name, preset):
    torch.manual_seed(0)
    resolved = resolve(preset, name, TWO_BLOCKS[name])
    domain = Classification(resolved, torch.device("cpu"))
    weights = {k: v.clone() for k, v in domain.model.state_dict().items()}
    method = method_class(name)(resolved.sections["method"], domain, len(domain.tasks), 0)
    for task in range(3):
        head = domain.begin_task(task)
        method.begin_task(task)
        params = [p for g in method.trained() for p in g.params]
        optimizer = torch.optim.Adam([*head, *params], lr=1e-2)
        losses = []
        for _ in range(4):
            for batch in domain.batches(task, 0):
                loss = domain.loss(batch)
                losses.append(loss.item())
                penalty = method.penalty()
                total = loss if penalty is None else loss + penalty
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
        assert losses[-1] < losses[0]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in params)
        method.end_task(task)
    row = domain.evaluate(range(3))
    assert row["total"] == [8, 8, 8]
    assert all(
        torch.equal(v, weights[k.replace(".attn.attn.", ".attn.")]) for k, v in domain.model.state_dict().items()
    )
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    together = domain.predict(images)
    assert together.shape == (5, 6)
    for i in range(5):
        torch.testing.assert_close(domain.predict(images[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        plain = domain.rows(domain.network.run(images))
    assert not torch.allclose(plain, together, atol=1e-4)


def test_the_default_blocks_are_refused_on_the_shallow_vit(preset):
    resolved = resolve(preset, "coda_prompt")
    with pytest.raises(UserError, match=r"method\.blocks=0,1"):
        method_class("coda_prompt")(resolved.sections["method"], Classification(resolved, torch.device("cpu")), 3, 0)
