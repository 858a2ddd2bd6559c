"""The two frozen-feature baselines: class means and a linear probe."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestCentroid

import dualcl.benchmark.core.compat  # noqa: F401 - before torchvision and timm
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains.classification import Classification
from dualcl.methods import available_methods, method_class
from dualcl.methods.ncm import NCM, NCMConfig, read_out

IMAGES = [3, 5, 4, 6, 7, 2]  # training images per class: not equal, not a multiple of the batch


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> str:
    """Six overlapping classes of colours in folders, and a preset for a ViT of two blocks with fixed weights."""
    root: Path = tmp_path_factory.mktemp("shades")
    rng = np.random.default_rng(1)
    for part in ("train", "val"):
        for label, count in enumerate(IMAGES if part == "train" else [5] * 6):
            folder = root / part / f"shade{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(20 * label, 30, 3) + rng.normal(60, 20, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    file = root / "shades.yaml"
    file.write_text(
        f"""
domain: classification
data: {{name: image-folder, root: "{root}"}}
stream: {{tasks: 3}}
train: {{epochs: 1, batch_size: 4}}
eval: {{batch_size: 4}}
input: {{workers: 0, augment: none}}
backbone:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {{img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}}
"""
    )
    return str(file)


def build(preset, name, *sets):
    torch.manual_seed(0)
    resolved = resolve(preset, name, sets)
    domain = Classification(resolved, torch.device("cpu"))
    return domain, method_class(name)(resolved.sections["method"], domain, len(domain.tasks), 0)


def all_test_images(domain):
    parts = [batch for task in range(3) for batch in domain._test_loader(task).eval_batches(4)]
    return torch.cat([b.images for b in parts]), torch.cat([b.labels for b in parts]).numpy()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_the_nearest_centroid_of_sklearn(preset, metric):
    domain, method = build(preset, "ncm", f"method.metric={metric}")
    features, labels = [], []
    for task in range(3):
        domain.begin_task(task)
        method.begin_task(task)
        for x, y in domain.training_features(task):
            features.append(x.double().numpy())
            labels.append(y.numpy())
        method.end_task(task)
    centroids = NearestCentroid().fit(np.concatenate(features), np.concatenate(labels))
    images, truth = all_test_images(domain)
    queries = domain.network.run(images).detach().double().numpy()
    if metric == "cosine":
        # on the unit sphere the nearest point and the smallest angle are the same
        centroids.centroids_ /= np.linalg.norm(centroids.centroids_, axis=1, keepdims=True)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    expected = centroids.predict(queries)
    predicted = domain.predict(images).argmax(dim=1).numpy()
    assert np.array_equal(predicted, expected)
    assert len(set(expected.tolist())) > 2
    row = domain.evaluate(range(3))
    assert sum(row["correct"]) == int((expected == truth).sum())


def test_earlier_rows_stay_and_nothing_is_trained_or_stored(preset):
    domain, method = build(preset, "ncm")
    for task in range(2):
        domain.begin_task(task)
        method.begin_task(task)
        if task == 1:
            before = {k: v.clone() for k, v in domain.state_dict().items() if k.startswith("heads.0.")}
        method.end_task(task)
        counts = [IMAGES[c] for c in domain.stream.tasks[task].classes]
        assert method.diagnostics() == {"images_per_class": counts}
    assert all(torch.equal(domain.state_dict()[k], v) for k, v in before.items())
    assert not any(method.takes_steps(task) for task in range(3))
    assert method.frozen
    assert method.trained() == []
    assert method.stored_parameters() == 0


def test_read_out_by_hand():
    means = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    weight, bias = read_out(means, "euclidean")
    assert weight.tolist() == [[3, 4], [0, 2]]
    assert bias.tolist() == [-12.5, -2]
    weight, bias = read_out(means, "cosine")
    torch.testing.assert_close(weight, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    assert bias.tolist() == [0, 0]


class TwoClasses:
    """The `features` capability with two classes, the second one without images."""

    device = torch.device("cpu")
    network = SimpleNamespace(width=2)

    def attach(self, method):
        assert isinstance(method, NCM)

    def outputs(self, task):
        return range(4, 6)

    def training_features(self, task):
        yield torch.ones(3, 2), torch.tensor([4, 4, 4])


def test_a_class_without_images_is_named():
    method = NCM(NCMConfig(), TwoClasses(), 3, 0)
    method.begin_task(2)
    with pytest.raises(UserError, match=r"task 2 has no training image for the outputs \[5\]"):
        method.end_task(2)


def test_an_unknown_metric_is_named():
    with pytest.raises(UserError, match=r"method\.metric must be euclidean or cosine, got 'manhattan'"):
        NCMConfig(metric="manhattan")


def test_requirements():
    assert NCM.requires == ("features",)
    assert available_methods()["ncm"].domains == available_methods()["linear_probe"].domains == ("classification",)


def test_linear_probe_trains_the_current_rows_only(preset):
    domain, method = build(preset, "linear_probe")
    backbone = {k: v.clone() for k, v in domain.model.state_dict().items()}
    for task in range(2):
        head = domain.begin_task(task)
        method.begin_task(task)
        old = {k: v.clone() for k, v in domain.state_dict().items()}
        assert method.trained() == []
        assert method.requires == ()
        optimizer = torch.optim.Adam(head, lr=0.1)
        for batch in domain.batches(task, 0):
            loss = domain.loss(batch)
            assert method.penalty() is None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        method.end_task(task)
        changed = {k for k, v in domain.state_dict().items() if not torch.equal(v, old[k])}
        assert changed == {f"heads.{task}.weight", f"heads.{task}.bias"}
    assert all(torch.equal(v, backbone[k]) for k, v in domain.model.state_dict().items())
    assert method.stored_parameters() == 0
