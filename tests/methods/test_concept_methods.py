"""Methods of the domain customization: the merge in closed form, prior images, replay, and what each keeps."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains.customization import Customization
from dualcl.benchmark.runs.runner import Run
from dualcl.methods.custom_diffusion import CustomDiffusionConfig
from dualcl.methods.custom_diffusion_merge import CustomDiffusionMergeConfig, merging_map
from dualcl.methods.dreambooth import DreamBoothConfig
from dualcl.methods.generative_replay import GenerativeReplayConfig


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merge(w0, inputs, values, common):
    return w0 + (values - w0 @ inputs.T) @ merging_map(inputs, common.T @ common)


# --- the closed form --------------------------------------------------------------------------------------------------


def test_the_merge_solves_the_constrained_least_squares_problem():
    """Against the linear system of its Lagrange conditions (arXiv 2212.04488, section 3.2)."""
    w0, c, common = random(6, 10), random(4, 10, seed=1), random(50, 10, seed=2)
    v = random(6, 4, seed=3)
    gram = common.T @ common
    system = torch.cat([torch.cat([2 * gram, c.T], 1), torch.cat([c, torch.zeros(4, 4, dtype=torch.float64)], 1)])
    direct = torch.linalg.solve(system, torch.cat([2 * gram @ w0.T, v.T]))[:10].T
    merged = merge(w0, c, v, common)
    torch.testing.assert_close(merged, direct, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged @ c.T, v, rtol=1e-9, atol=1e-9)
    assert (merged - w0).norm() > 1


def test_targets_that_hold_already_change_nothing():
    w0, c, common = random(6, 10), random(4, 10, seed=1), random(50, 10, seed=2)
    torch.testing.assert_close(merge(w0, c, w0 @ c.T, common), w0, rtol=0, atol=1e-12)


def test_inputs_given_twice_get_the_mean_of_their_targets_and_the_others_theirs():
    w0, c, common = random(6, 10), random(3, 10, seed=1), random(50, 10, seed=2)
    v = random(6, 4, seed=3)
    # the second copy as float32 arithmetic leaves it
    twice = torch.cat([c, c[:1] * (1 + 1e-7)])
    merged = merge(w0, twice, v, common)
    torch.testing.assert_close(merged @ c[0], (v[:, 0] + v[:, 3]) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged @ c[1:].T, v[:, 1:3], rtol=1e-5, atol=1e-5)


def test_more_inputs_than_dimensions_give_the_least_squares_compromise():
    w0, c, common = random(6, 5), random(20, 5, seed=1), random(50, 5, seed=2)
    v = random(6, 20, seed=3)
    direct = torch.linalg.lstsq(c, v.T).solution.T
    torch.testing.assert_close(merge(w0, c, v, common), direct, rtol=1e-9, atol=1e-9)


def test_fewer_captions_than_dimensions_are_no_trouble():
    w0, c, common = random(6, 10), random(2, 10, seed=1), random(3, 10, seed=2)
    v = random(6, 2, seed=3)
    merged = merge(w0, c, v, common)
    assert merged.abs().max() < 100
    torch.testing.assert_close(merged @ c.T, v, rtol=1e-6, atol=1e-6)
    # the constraints can be met without touching what the captions use
    torch.testing.assert_close(merged @ common.T, w0 @ common.T, rtol=0, atol=1e-4)


# --- custom_diffusion_merge -------------------------------------------------------------------------------------------


class MergingRun(Run):
    """The real run; keeps the weights that each task starts from and ends with."""

    def __init__(self, *args):
        super().__init__(*args)
        self.starts, self.ends = [], []

    def _fit(self, task, groups, steps, partial):
        self.starts.append(self.method.flat().detach().clone())
        result = super()._fit(task, groups, steps, partial)
        self.ends.append(self.method.flat().detach().clone())
        return result


@pytest.fixture(scope="module")
def merged(concepts, empty_record, tmp_path_factory):
    """A finished run of custom_diffusion_merge on three concepts, and its record."""
    sets = ("stream.tasks=3", "method.lr=3e-3", "method.head_lr=1e-2")
    work = concepts("custom_diffusion_merge", tmp_path_factory.mktemp("merge"), *sets, kind=MergingRun)
    return work, work.execute(empty_record())


def test_every_concept_starts_from_the_pretrained_weights(merged, concepts, tmp_path):
    pretrained = concepts("custom_diffusion_merge", tmp_path).method.pretrained
    assert all(torch.equal(start, pretrained) for start in merged[0].starts)
    assert len({tuple(end[:50].tolist()) for end in merged[0].ends}) == 3


def test_each_concept_keeps_what_its_own_weights_make_of_it(merged):
    work, _ = merged
    domain, method = work.domain, work.method
    sites = list(domain.sites().values())
    for task in range(3):
        assert torch.equal(method.learnt(task), work.ends[task])
        own = method.learnt(task).split([w.numel() for w in method.weights])
        # the concept's own word; the words before it are in all prompts, where a compromise is all there can be
        word = domain.tokens.words(task)[-1]
        ids = domain.diffusion.vocabularies[0].ids(domain.prompts(task)[:1])[0]
        at = ids.tolist().index(domain.diffusion.tokenizer.convert_tokens_to_ids(word))
        with torch.no_grad():
            hidden = domain.diffusion.encode_text(domain.prompts(task)[:1]).states[0, at]
        assert (domain.concept_inputs(task) - hidden).abs().sum(1).min() < 1e-4
        for site, weight, start in zip(sites, own, work.starts[task].split([w.numel() for w in own]), strict=True):
            wanted = weight.view(site.d_out, site.d_in) @ hidden
            torch.testing.assert_close(site.weight @ hidden, wanted, rtol=1e-3, atol=1e-3)
            assert (start.view(site.d_out, site.d_in) @ hidden - wanted).abs().max() > 5e-3


def test_ordinary_words_are_changed_less_than_by_any_concept_alone(merged):
    work, _ = merged
    common = work.domain.common_inputs(60)
    sizes = [w.numel() for w in work.method.weights]

    def change(weights):
        parts = zip(weights.split(sizes), work.method.pretrained.split(sizes), work.method.weights, strict=True)
        return sum((((w - p).view(like.shape) @ common.T) ** 2).sum().item() for w, p, like in parts)

    assert 0 < change(work.method.flat().detach()) < max(change(end) for end in work.ends)


def test_a_ridge_keeps_the_merged_weights_small_and_the_concepts_as_they_were(merged):
    work, _ = merged
    method, sizes, found = work.method, [w.numel() for w in work.method.weights], {}
    inputs = torch.cat([work.domain.concept_inputs(j)[-2:] for j in range(3)])  # the word and the end
    for ridge in (0.0, 1e-3):
        method.config = dataclasses.replace(method.config, ridge=ridge)
        method.gram = None
        weights = method.merged(3)
        outputs = [w.view(like.shape) @ inputs.T for w, like in zip(weights.split(sizes), method.weights, strict=True)]
        found[ridge] = (weights - method.pretrained).norm().item(), torch.cat(outputs)
    assert found[1e-3][0] < 0.5 * found[0.0][0]
    torch.testing.assert_close(found[1e-3][1], found[0.0][1], rtol=0, atol=2e-2)


def test_storage_counts_every_concept(merged):
    work, record = merged
    size = sum(p.numel() for p in work.domain.full_parameters().values())
    rows = work.domain.tokens.rows[0].numel()
    assert [t["parameters_stored"] for t in record["tasks"]] == [(t + 1) * (size + rows) for t in range(3)]
    assert [t["parameters_trained"] for t in record["tasks"]] == [size + rows] * 3


# --- custom_diffusion, dreambooth: prior images -----------------------------------------------------------------------


def test_custom_diffusion_without_prior_is_finetune_bit_for_bit(concepts, empty_record, tmp_path):
    sets = ("method.lr=1e-4", "method.head_lr=1e-3")
    found = {}
    for name, extra in (("finetune", ()), ("custom_diffusion", ("method.prior_weight=0",)), ("custom_diffusion", ())):
        work = concepts(name, tmp_path / f"{len(found)}", *sets, *extra)
        work.execute(empty_record())
        found[len(found)] = work.tensors()
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())
    assert not all(torch.equal(t, found[2][n]) for n, t in found[0].items())


@pytest.mark.parametrize("name", ["custom_diffusion", "custom_diffusion_merge", "dreambooth"])
def test_prior_images_join_every_batch_with_their_weight(concepts, tmp_path, name):
    found = {}
    for weight in (0.0, 0.5, 2.0):
        work = concepts(name, tmp_path / f"{weight}", f"method.prior_weight={weight}")
        work.begin(0)
        batch = next(work.domain.batches(0, 0))
        found[weight] = work.domain.loss(batch).item()
        assert len(batch.prompts) == (2 if weight == 0 else 4)
        assert ["<c1>" in p for p in batch.prompts] == [True] * 2 + [False] * (len(batch.prompts) - 2)
    prior = (found[2.0] - found[0.5]) / 1.5
    assert prior > 0
    # the noise of the concept's images is drawn together with that of the prior images, so only the slope is exact
    work = concepts(name, tmp_path / "4", "method.prior_weight=4")
    work.begin(0)
    loss = work.domain.loss(next(work.domain.batches(0, 0))).item()
    assert loss == pytest.approx(found[2.0] + 2 * prior, rel=1e-4)


def test_dreambooth_trains_the_whole_network_and_no_text(concepts, tmp_path):
    work = concepts("dreambooth", tmp_path)
    (group,) = work.method.trained()
    assert {id(p) for p in group.params} == {id(p) for p in work.domain.model.parameters()}
    shared = work.begin(0)
    assert [id(p) for p in shared] == [id(work.domain.tokens.rows[0])]
    text = [p for n, p in work.domain.diffusion.text_encoder.named_parameters() if "rows" not in n]
    assert not any(p.requires_grad for p in text)


def test_dreambooth_refuses_half_precision_weights(concepts_preset, concepts, small_diffusion):
    from dualcl.benchmark.config.resolve import resolve
    from dualcl.methods import method_class

    resolved = resolve(concepts_preset, "dreambooth", ("precision=bf16", "base.weights_dtype=bf16"))
    coarse = copy.deepcopy(small_diffusion)
    coarse.unet.bfloat16()
    domain = Customization(resolved, torch.device("cpu"), diffusion=coarse)
    with pytest.raises(UserError, match=r"dreambooth trains the whole network, .* is torch\.bfloat16: small steps"):
        method_class("dreambooth")(resolved.sections["method"], domain, 2, 0)


# --- textual_inversion ------------------------------------------------------------------------------------------------


def test_textual_inversion_leaves_the_model_alone_and_forgets_nothing(
    concepts, empty_record, tmp_path, small_diffusion
):
    work = concepts("textual_inversion", tmp_path, "stream.tasks=3")
    record = work.execute(empty_record())
    ours = work.domain.model.state_dict()
    assert all(torch.equal(ours[n], t) for n, t in small_diffusion.unet.state_dict().items())
    assert [r["drift"] for r in record["matrix"]["rows"]] == [[0.0], [0.0, 0.0], [0.0, 0.0, 0.0]]
    width = work.domain.tokens.rows[0].numel()
    assert [t["parameters_stored"] for t in record["tasks"]] == [width, 2 * width, 3 * width]


# --- generative_replay ------------------------------------------------------------------------------------------------


class ReplayingRun(Run):
    """The real run; notes the training set of every task, and images of the first concept made before each."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sets = []

    def _fit(self, task, groups, steps, partial):
        self.sets.append([p[0] for p in self.domain._training_entries(task).prompts])
        self.replayed = list(self.domain._replayed)
        return super()._fit(task, groups, steps, partial)


def test_generative_replay_trains_on_images_of_earlier_concepts(concepts, empty_record, tmp_path):
    work = concepts("generative_replay", tmp_path, "stream.tasks=3", kind=ReplayingRun)
    work.execute(empty_record())
    photos = [[f"a photo of <c{j}>"] * 3 for j in (1, 2, 3)]
    made = [[f"a photo of <c{j}>"] * 2 for j in (1, 2, 3)]
    assert work.sets == [photos[0], photos[1] + made[0], photos[2] + made[0] + made[1]]
    assert [(j, tuple(images.shape)) for j, images in work.replayed] == [(j, (2, 32, 32, 3)) for j in (0, 1)]
    assert work.method.stored_parameters() == sum(p.numel() for p in work.domain.full_parameters().values())


def test_replayed_images_are_made_by_the_model_as_the_last_task_left_it(concepts, tmp_path):
    work = concepts("generative_replay", tmp_path)
    work.begin(0)
    work.method.prepare(0)
    assert work.domain._replayed == []
    work.method.end_task(0)
    images = []
    for factor in (1.0, 1.0, -5.0):
        with torch.no_grad():
            for weight in work.method.weights:
                weight.mul_(factor)
        if not images:
            work.begin(1)
        work.domain._replayed = []
        work.method.prepare(1)
        images.append(work.domain._replayed[0][1])
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (DreamBoothConfig, {"prior_weight": -1.0}, "method.prior_weight must not be negative, got -1.0"),
        (CustomDiffusionConfig, {"prior_weight": -1.0}, "method.prior_weight must not be negative, got -1.0"),
        (CustomDiffusionMergeConfig, {"prior_weight": -1.0}, "method.prior_weight must not be negative, got -1.0"),
        (
            CustomDiffusionConfig,
            {"reference_quirks": ("hold",)},
            "unknown name 'hold' in method.reference_quirks; quirks: hold_start_token",
        ),
        (CustomDiffusionMergeConfig, {"captions": 0}, "method.captions must be at least 1, got 0"),
        (CustomDiffusionMergeConfig, {"ridge": -1.0}, "method.ridge must not be negative, got -1.0"),
        (GenerativeReplayConfig, {"per_concept": 0}, "method.per_concept must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_named(config, given, message):
    with pytest.raises(UserError) as error:
        config(**given)
    assert str(error.value) == message
