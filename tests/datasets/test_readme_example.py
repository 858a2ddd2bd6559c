"""The data sets that datasets/README.md shows, as they stand there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualcl.datasets import dataset_class, dataset_info
from dualcl.datasets.base import make_class_stream
from dualcl.datasets.concepts import make_concept_stream
from dualcl.datasets.reading.loader import ImageLoader
from dualcl.datasets.reading.views import View

PAGE = (Path(__file__).parents[2] / "datasets" / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^`datasets/(\w+)\.py`[^\n]*\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def shown(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The class of an example, given by its path."""
    path = tmp_path / f"{request.param}.py"
    path.write_text(EXAMPLES[request.param], encoding="utf-8")
    info = dataset_info(str(path))
    assert info.name == request.param
    assert info.summary
    return dataset_class(str(path))


def test_there_is_one_of_each_domain() -> None:
    domains = [re.findall(r'domain="(\w+)"', text) for text in EXAMPLES.values()]
    assert domains == [["classification"], ["customization"]]


@pytest.mark.parametrize("shown", ["stripes"], indirect=True)
def test_labelled_images(shown: Any) -> None:
    data = shown.load(shown.Config(per_class=8))
    assert data.split_hash == shown.load(shown.Config(per_class=8)).split_hash
    assert not {*data.train.ids} & {*data.test.ids}
    stream = make_class_stream(data, 4, "shuffle", 1)
    assert [len(task.train) for task in stream.tasks] == [16] * 4
    assert [len(task.test) for task in stream.tasks] == [4] * 4
    loader = ImageLoader(stream.tasks[0].train, View(32), workers=0)
    batch = next(loader.train_batches(seed=0, task=0, epochs=1, batch_size=16))
    assert batch.images.shape == (16, 3, 32, 32)
    assert batch.labels.unique().tolist() == [0, 1]
    # the classes can be told apart: by the spectrum, the nearest mean is mostly right
    train, test = (next(ImageLoader(part, View(32), workers=0).eval_batches(500)) for part in (data.train, data.test))
    spectra = [torch.fft.fft2(b.images.mean(1)).abs().flatten(1).log1p() for b in (train, test)]
    means = torch.stack([spectra[0][train.labels == c].mean(0) for c in range(8)])
    assert (torch.cdist(spectra[1], means).argmin(1) == test.labels).float().mean() > 0.6


@pytest.mark.parametrize("shown", ["blots"], indirect=True)
def test_concepts(shown: Any) -> None:
    data = shown.load(shown.Config(concepts=3))
    assert data.split_hash == shown.load(shown.Config(concepts=3)).split_hash
    stream = make_concept_stream(data, 2, "natural")
    assert [concept.name for concept in stream.concepts] == ["blot 0", "blot 1"]
    one, other = (np.asarray(c.images.load(0)) for c in stream.concepts)
    assert one.shape == (32, 32, 3)
    assert ((one == 20) != (other == 20)).any()
    again = np.asarray(stream.concepts[0].images.load(1))
    assert ((one == 20) == (again == 20)).all()
    assert (one != again).any()


@pytest.mark.parametrize("shown", list(EXAMPLES), indirect=True)
def test_keys_have_help(shown: Any) -> None:
    assert all(f.metadata["help"] for f in fields(shown.Config))
