"""Evaluation of generated images: rows against direct computation, drift from saved images, what is kept on disk."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.seeding import derive_seed
from dualcl.benchmark.domains.concept_evaluation import ConceptEvaluator, EvalConfig, sample_folder, slug
from dualcl.benchmark.domains.customization import Customization
from dualcl.benchmark.models.image_features import load_features, mmd
from dualcl.benchmark.models.sampling import sample
from dualcl.benchmark.models.weights import state_hash
from dualcl.datasets.base import ImageSet
from dualcl.datasets.concepts import Captioned, Concept, ConceptData
from dualcl.results.metrics import KINDS

N = 3


@pytest.fixture
def make(sd_preset, loaded_sd):
    """make(*assignments, folder=None, data=None) -> the domain, no concept begun."""

    def build(*sets, folder=None, data=None):
        resolved = resolve(sd_preset, "finetune", ["data.concepts=3", f"eval.n={N}", "eval.batch_size=2", *sets])
        domain = Customization(resolved, torch.device("cpu"), data=data, diffusion=copy.deepcopy(loaded_sd))
        domain.folder = folder
        return domain

    return build


def shake(domain, seed=0, std=2.0):
    """A change of the weights that changes what is drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in domain.full_parameters().values():
            weight.add_(std * torch.randn(weight.shape, generator=generator))


def learn(domain, upto, changing=True):
    """Rows of the evaluations after concepts 0, 1, ..., `upto`."""
    rows = []
    for j in range(upto + 1):
        domain.begin_task(j)
        if changing:
            shake(domain, j)
        rows.append(domain.evaluate(range(j + 1)))
    return rows


def read(folder):
    return torch.from_numpy(np.stack([np.array(Image.open(f)) for f in sorted(folder.glob("*.png"))]))


def images_folder(domain, after, j):
    return sample_folder(domain.folder, after, j + 1, domain.stream.concepts[j].name)


def photographs(*names, nouns=None, eval_prompts=(), n=2):
    """Concepts of n plain images each."""

    def concept(i, name):
        images = ImageSet(
            ids=tuple(f"{name}/{k}" for k in range(n)),
            labels=np.zeros(n, dtype=np.int64),
            load=lambda k: Image.new("RGB", (20, 16), (40 * i, 90 + 9 * k, 30)),
            fingerprint=name,
        )
        return Concept(name, (nouns or {}).get(name, "symbol"), images, eval_prompts=eval_prompts)

    return ConceptData("photographs", tuple(concept(i, n) for i, n in enumerate(names)), "all", "0")


# --- the row --------------------------------------------------------------------------------------------------------


def test_rows_against_direct_computation(make, tmp_path):
    domain = make(folder=tmp_path)
    features = load_features("glyph-vit", "cpu", "")
    reals = [features.images(domain.pixels(j)) for j in range(3)]
    centres = [F.normalize(r.double().mean(0), dim=0) for r in reals]
    own = {}
    for after in range(2):
        domain.begin_task(after)
        shake(domain, after)
        row = domain.evaluate(range(after + 1))
        fields = KINDS["mmd"].row_fields
        assert [*row, "attribute_share"] == list(fields[: len(row) + 1])  # which glyphs have none of
        assert all(f.startswith(("prior_share", "target_shown", "retained_")) for f in fields[len(row) + 1 :])
        assert KINDS["mmd"].problem({"after_task": after, **row}, 3, False) is None
        for j in range(after + 1):
            made = sample(
                domain.diffusion,
                [f"a photo of <c{j + 1}>"] * N,
                [torch_generator(0, "eval", j, k) for k in range(N)],
                scheduler="ddim",
                steps=2,
                guidance=2.0,
                batch_size=2,
            )
            assert torch.equal(made, read(images_folder(domain, after + 1, j)))
            found = features.images(made)
            own.setdefault(j, found)
            assert row["mmd"][j] == mmd(reals[j], found, estimator="biased")
            assert row["drift"][j] == mmd(own[j], found, estimator="biased")
            pairs = [float(a @ b) for a in found.double() for b in reals[j].double()]
            assert row["image_similarity"][j] == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)
            nearest = [max(range(3), key=lambda c: float(image @ centres[c])) for image in found.double()]
            assert row["nearest_correct"][j] == nearest.count(j)
            assert row["generated"][j] == N
        assert row["text_similarity"] == [None] * (after + 1)
        json.dumps(row, allow_nan=False)
    assert row["drift"][0] > 0
    assert row["drift"][1] == 0


def test_a_judge_says_what_share_of_the_attributes_of_a_concept_is_there(make, monkeypatch):
    data = photographs("a", "b", "c")
    looks = ({"hat": "cap", "nose": "long"}, {}, {"hat": "none"})
    concepts = tuple(dataclasses.replace(c, attributes=x) for c, x in zip(data.concepts, looks, strict=True))
    domain = make("stream.class_order=natural", data=dataclasses.replace(data, concepts=concepts))
    seen = [{"hat": "cap", "nose": "wide"}, {"hat": "none", "nose": "long"}, {"hat": "cap", "nose": "long"}]
    monkeypatch.setattr(type(domain.evaluator.features), "attributes", lambda self, images: seen)
    shares = [row["attribute_share"] for row in learn(domain, 2)]
    assert shares == [[4 / 6], [4 / 6, None], [4 / 6, None, 1 / 3]]


def test_after_the_last_task_a_judge_says_what_is_left_of_the_pretrained_model(make, monkeypatch):
    asked = [Captioned("a photo of a ghost", {"hat": "cap"}), Captioned("a rocket", {"hat": "none", "nose": "long"})]
    data = dataclasses.replace(photographs("a", "b"), prior=tuple(asked))
    domain = make("stream.class_order=natural", data=data)
    assert "prior_share" not in learn(domain, 1)[1]  # its features judge nothing
    drawn, seen = {}, [{"hat": "cap", "nose": "wide"}, {"hat": "none", "nose": "wide"}]
    judge = type(domain.evaluator.features)
    monkeypatch.setattr(judge, "attributes", lambda self, images: drawn.update(last=images) or seen)
    monkeypatch.setattr(judge, "judged", {"hat": ("cap", "none"), "nose": ("long", "wide")})
    domain = make("stream.class_order=natural", data=data)
    rows = learn(domain, 1)
    assert "prior_share" not in rows[0]
    assert rows[1]["prior_share"] == [None, 2 / 3]
    generators = [torch.Generator().manual_seed(derive_seed(0, "eval", "prior", k)) for k in range(2)]
    assert torch.equal(drawn["last"], domain.sample([one.prompt for one in asked], generators))
    assert domain.identity()["prior_hash"]
    assert "prior_hash" not in make(data=photographs("a", "b")).identity()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            {"concepts": {"hat": "fez"}},
            "the data say hat=fez of '[ab]', which .* cannot judge; it knows: cap, none; leave it",
        ),
        ({"concepts": {"hut": "cap"}}, "hut=cap of '[ab]'.*did you mean 'hat'"),
        ({"prior": {"hat": "cap", "eyes": "green"}}, "eyes=green of 'a ghost'"),
        ({"concepts": {"hat": "cap"}, "prior": {"hat": "none"}}, None),
    ],
)
def test_what_a_judge_cannot_see_is_refused_before_training(make, monkeypatch, told, said):
    data = photographs("a", "b")
    concepts = tuple(dataclasses.replace(c, attributes=told.get("concepts", {})) for c in data.concepts)
    prior = (Captioned("a ghost", told.get("prior", {})),)
    domain = make(data=dataclasses.replace(data, concepts=concepts, prior=prior))
    domain.check_new()  # its features judge nothing
    monkeypatch.setattr(type(domain.evaluator.features), "judged", {"hat": ("cap", "none"), "nose": ("long", "wide")})
    if said is None:
        domain.check_new()
    else:
        with pytest.raises(UserError, match=said):
            domain.check_new()


def test_with_unchanged_weights_images_are_bit_equal_and_drift_is_zero(make, tmp_path):
    domain = make(folder=tmp_path)
    rows = learn(domain, 2, changing=False)
    for j in range(3):
        first = read(images_folder(domain, j + 1, j))
        assert not torch.equal(first[0], first[1])
        for after in range(j + 1, 3):
            assert torch.equal(read(images_folder(domain, after + 1, j)), first)
            assert rows[after]["drift"][j] == 0.0
            assert rows[after]["mmd"][j] == rows[j]["mmd"][j]


def test_a_resumed_run_measures_drift_from_the_saved_images(make, tmp_path):
    domain = make(folder=tmp_path)
    rows = learn(domain, 1)
    resumed = make(folder=tmp_path)
    for j in range(2):
        resumed.begin_task(j)
        shake(resumed, j)
    assert resumed.evaluate(range(2)) == rows[1]
    assert rows[1]["drift"][0] > 0


def test_without_a_folder_earlier_images_are_kept_in_memory(make, tmp_path):
    domain = make(folder=tmp_path)
    rows = learn(domain, 1)
    assert learn(make(), 1) == rows
    late = make()  # never saw concept 0 when it was new
    late.begin_task(0)
    late.begin_task(1)
    assert late.evaluate(range(2))["drift"] == [None, 0.0]


@pytest.mark.parametrize(
    ("every", "there"),
    [(0, ["1", "01", "111"]), (1, ["1", "11", "111"]), (2, ["1", "11", "111"]), (3, ["1", "01", "111"])],
)
def test_every(make, tmp_path, every, there):
    domain = make(f"eval.every={every}", folder=tmp_path)
    for after, (row, seen) in enumerate(zip(learn(domain, 2), there, strict=True)):
        for key in ("mmd", "drift", "image_similarity", "nearest_correct", "generated"):
            assert [v is not None for v in row[key]] == [s == "1" for s in seen]
        assert KINDS["mmd"].problem({"after_task": after, **row}, 3, False) is None
        made = [images_folder(domain, after + 1, j).is_dir() for j in range(after + 1)]
        assert made == [s == "1" for s in seen]


def test_joint_training_has_no_drift(make, tmp_path):
    domain = make(folder=tmp_path)
    domain.begin_task(None)
    row = domain.evaluate(range(3))
    assert row["drift"] == [None] * 3
    assert None not in row["mmd"]
    assert KINDS["mmd"].problem({"after_task": 2, **row}, 3, True) is None
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["after_3", "real"]


def test_estimators_differ(make):
    (biased,), (unbiased,) = learn(make(), 0), learn(make("eval.estimator=unbiased"), 0)
    assert biased["mmd"] != unbiased["mmd"]
    assert biased["image_similarity"] == unbiased["image_similarity"]


def test_evaluation_changes_no_weight_and_no_global_random_state(make):
    domain = make()
    domain.begin_task(0)
    before, modules = state_hash(domain.model.state_dict()), list(domain.model.modules())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    row = domain.evaluate([0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert domain.evaluate([0]) == row
    assert state_hash(domain.model.state_dict()) == before
    assert all(a is b for a, b in zip(domain.model.modules(), modules, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in domain.model.parameters())


# --- prompts and text -----------------------------------------------------------------------------------------------


def test_a_concepts_own_prompts_take_turns(make, tmp_path):
    data = photographs("My Dog!", "Katze", nouns={"My Dog!": "dog"}, eval_prompts=("a {token} toy", "{token} here"))
    domain = make("stream.class_order=natural", "concept.n_tokens=2", data=data, folder=tmp_path)
    learn(domain, 0)
    texts = [Image.open(tmp_path / f"samples/after_1/1_my-dog/{k}.png").text for k in range(N)]
    assert [t["prompt"] for t in texts] == ["a <c1> toy", "<c1> here", "a <c1> toy"]
    assert [(t["concept"], t["after_task"]) for t in texts] == [("My Dog!", "1")] * N
    # the words reach the model with all their tokens
    again = sample(
        domain.diffusion,
        ["<c1> <c1>_1 here"],
        [torch.Generator().manual_seed(int(texts[1]["seed"]))],
        scheduler="ddim",
        steps=2,
        guidance=2.0,
        batch_size=1,
    )
    made = read(tmp_path / "samples/after_1/1_my-dog")
    assert (again[0].int() - made[1].int()).abs().max() <= 1


def test_text_similarity_is_to_the_prompt_with_the_noun(make, clip_folder, tmp_path):
    data = photographs("one", "two", nouns={"one": "cat", "two": "house"}, eval_prompts=("a {token}", "red {token}"))
    domain = make(
        "stream.class_order=natural", f"eval.features={clip_folder}", "concept.n_tokens=2", data=data, folder=tmp_path
    )
    rows = learn(domain, 1)
    clip = load_features(str(clip_folder), "cpu", "")
    for j, noun in enumerate(("cat", "house")):
        found = clip.images(read(images_folder(domain, 2, j)))
        texts = clip.texts([f"a {noun}", f"red {noun}", f"a {noun}"])
        assert rows[1]["text_similarity"][j] == pytest.approx(float((found * texts).sum(1).mean()), abs=1e-6)
    assert KINDS["mmd"].problem({"after_task": 1, **rows[1]}, 2, False) is None
    assert domain.identity()["features"] == "tiny-clip"


# --- files ----------------------------------------------------------------------------------------------------------


def test_layout(make, tmp_path):
    data = photographs("b c", "B_c", n=10)
    domain = make("stream.class_order=natural", data=data, folder=tmp_path)
    learn(domain, 1)
    found = {str(p.parent.relative_to(tmp_path / "samples")) for p in tmp_path.rglob("*.png")}
    assert found == {f"{part}/{c}_b-c" for part in ("after_2", "real") for c in (1, 2)} | {"after_1/1_b-c"}
    assert [p.name for p in sorted((tmp_path / "samples/after_2/1_b-c").iterdir())] == ["0.png", "1.png", "2.png"]
    assert torch.equal(read(tmp_path / "samples/real/2_b-c"), domain.pixels(1)[:8])
    seeds = [Image.open(p).text["seed"] for p in sorted((tmp_path / "samples/after_2").rglob("*.png"))]
    assert len(set(seeds)) == 2 * N


def test_needed_images_only(make, tmp_path):
    domain = make("eval.save=needed", folder=tmp_path)
    rows = learn(domain, 2)
    there = {(after, j) for after in range(3) for j in range(after + 1) if images_folder(domain, after + 1, j).is_dir()}
    assert there == {(0, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
    assert None not in rows[1]["drift"]


def damage(file, how):
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:60])
    elif how == "garbage":
        file.write_bytes(b"no image")
    else:
        Image.new("RGB", (8, 4)).save(file)


DAMAGE = {"missing": "is missing", "truncated": "cannot be read", "garbage": "cannot be read", "small": "8 x 4"}


def test_damaged_images_of_the_first_evaluation(make, tmp_path):
    domain = make(folder=tmp_path)
    learn(domain, 0)
    file = images_folder(domain, 1, 0) / "1.png"
    whole = file.read_bytes()
    domain.begin_task(1)
    for how, what in DAMAGE.items():
        damage(file, how)
        resumed = ConceptEvaluator(domain, domain.evaluator.config)
        with pytest.raises(UserError, match=what) as error:
            resumed.evaluate(range(2))
        assert str(file) in str(error.value)
        assert f"delete {tmp_path} to start afresh" in str(error.value)
        assert "\n" not in str(error.value)
        file.write_bytes(whole)
    assert resumed.evaluate(range(2)) == domain.evaluate(range(2))


def test_slug():
    assert slug("Teddy Bear (old)") == "teddy-bear-old"
    assert slug("../../x") == "x"
    assert slug("猫") == "concept"
    assert len(slug("a" * 300)) == 40


# --- configuration and identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "eval.n must be at least 1"),
        ({"n": 1, "estimator": "unbiased"}, "eval.n of at least 2"),
        ({"every": -1}, "eval.every must be at least 0"),
        ({"steps": 0}, "eval.steps must be at least 1"),
        ({"guidance": -1.0}, "eval.guidance must be at least 0"),
        ({"batch_size": 0}, "eval.batch_size must be at least 1"),
        ({"prompt": "a photo"}, "eval.prompt"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(UserError, match=message):
        EvalConfig(**values)


def test_unbiased_needs_two_photographs(make):
    with pytest.raises(UserError, match=r"'solo' has one; set eval\.estimator=biased"):
        make("eval.estimator=unbiased", data=photographs("solo", n=1))


def test_features_are_not_loaded_before_they_are_needed(make):
    domain = make("eval.features=nobody/no-clip")
    domain.begin_task(0)
    with pytest.raises(UserError, match="nobody/no-clip"):
        domain.identity()


def test_identity_names_everything_the_numbers_depend_on(make):
    domain = make(data=photographs("a", "b"))

    def identity(**values):
        return ConceptEvaluator(domain, dataclasses.replace(domain.evaluator.config, **values)).identity()

    plain = identity()
    assert plain["features"] == "glyph-vit"
    assert len(plain["features_sha256"]) == 64
    assert (plain["kernel"], plain["estimator"]) == ("poly2", "biased")
    assert json.loads(json.dumps(plain)) == plain
    for key, value in {
        "n": 2,
        "steps": 3,
        "guidance": 1.0,
        "scheduler": "dpm",
        "negative_prompt": "x",
        "prompt": "a {token}",
        "estimator": "unbiased",
    }.items():
        assert identity(**{key: value}) != plain
    assert identity(save="needed", every=0) == plain
    # of templates, whatever the order of the concepts
    turned = make("stream.class_order=[1,0]", data=photographs("a", "b")).evaluator
    assert turned.identity() == plain
    other = make(data=photographs("a", "b", eval_prompts=("my {token}",))).evaluator
    assert other.identity()["eval"]["prompts_hash"] != plain["eval"]["prompts_hash"]
