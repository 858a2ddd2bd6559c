"""The tuning-free encoder: what its rows are made of, what is refused, and what a run with it stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.row_encoder import RowEncoder, load_row_encoder

PICTURES = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """written(width, n_tokens, **card) -> the folder of an encoder as it is pretrained."""

    def make(width: int = 128, n_tokens: int = 1, **card: Any) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / "some_encoder"
        folder.mkdir(exist_ok=True)
        save_file(
            {k: v.half() for k, v in RowEncoder(width, n_tokens).state_dict().items()}, folder / "model.safetensors"
        )
        told = {"sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}
        told |= {"width": width, "n_tokens": n_tokens, "base": "small", "pictures": 12, **card}  # type: ignore[dict-item]
        (folder / "card.json").write_text(json.dumps(told))
        return folder

    return make


def test_rows_are_of_each_picture_by_itself_and_differ() -> None:
    torch.manual_seed(0)
    encoder = RowEncoder(16, 2).eval()
    encoder.fit_table(torch.randn(50, 16) * 3 + 1)
    rows = encoder.rows(PICTURES)
    assert rows.shape == (3, 2, 16)
    assert torch.equal(encoder.rows(PICTURES[[2, 0, 1]]), rows[[2, 0, 1]])
    torch.testing.assert_close(encoder.rows(PICTURES[[1, 1]]).mean(0), rows[1], rtol=0, atol=1e-6)
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    # as drawn it stays near the table's rows
    assert ((rows - encoder.centre) / encoder.scale).abs().max() < 3


def test_a_concept_gets_the_mean_of_its_pictures_and_the_network_none(
    concepts: Callable[..., Any], empty_record: Any, tmp_path: Path
) -> None:
    work = concepts("encoder", tmp_path / "one", "concept.n_tokens=2")
    record = work.execute(empty_record())
    method, domain = work.method, work.domain
    for j in range(2):
        images = domain.concept_images(j)
        torch.testing.assert_close(domain.token_rows(j)[0], method.encoder.rows(images).mean(0), rtol=0, atol=1e-6)
    assert (domain.token_rows(0)[0] - domain.token_rows(1)[0]).abs().max() > 0
    assert [t["steps"] for t in record["tasks"]] == [0, 0]
    size = sum(t.numel() for t in method.encoder.state_dict().values())
    assert 2.5e5 < size < 4e5
    assert method.stored_parameters() == size
    assert record["tasks"][-1]["parameters_stored"] == size + domain.stored_parameters()
    assert "untrained" in method.caveats()[0]
    assert method.diagnostics()["row_spread"] > 0
    other = concepts("textual_inversion", tmp_path / "two", "concept.n_tokens=2")
    for j in range(2):
        other.domain.begin_task(j)
        other.domain.set_token_rows(j, domain.token_rows(j))
    drawn = [
        w.domain.sample(
            [w.domain.prompts(j)[0] for j in range(2)], [torch.Generator().manual_seed(j) for j in range(2)]
        )
        for w in (work, other)
    ]
    assert torch.equal(*drawn)  # there is no image branch


def test_a_trained_encoder_is_read_for_its_model_alone(
    concepts: Callable[..., Any], small_diffusion: Any, written: Callable[..., Path], tmp_path: Path
) -> None:
    own = small_diffusion.info.weights_sha256
    folder = written(base_sha256=own)
    work = concepts("encoder", tmp_path / "run", f"method.encoder={folder}", "method.shared_encoder=true")
    assert "trained on 12 pictures of this world before the stream" in work.method.caveats()[0]
    assert work.method.caveats()[1] == "the encoder is not counted as stored"
    assert work.method.stored_parameters() == 0
    assert work.method.diagnostics()["encoder_sha256"] == work.method.encoder.card["sha256"]
    for card, given, message in (
        ({"base_sha256": "0" * 64}, (), r"was trained for small \(sha256 000000000000\), the model is small"),
        ({"base_sha256": own}, ("concept.n_tokens=3",), "gives a concept 1 tokens, concept.n_tokens is 3; set concept"),
    ):
        folder = written(**card)
        with pytest.raises(UserError, match=message):
            concepts("encoder", tmp_path / "refused", f"method.encoder={folder}", *given)


def test_encoders_that_are_not_there_or_damaged_are_refused(written: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method.encoder=nothing is no bundled encoder.*dualcl pretrain portraits-enc"):
        load_row_encoder("nothing")
    folder = written(base_sha256="0")
    assert load_row_encoder(str(folder)).n_tokens == 1
    for change in ({"width": 5}, {"sha256": "0"}, {"n_tokens": None}, {"base_sha256": 1}, {"pictures": "many"}):
        card = json.loads((folder / "card.json").read_text())
        (folder / "card.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(UserError, match=r"damaged|no encoder as dualcl pretrain writes it"):
            load_row_encoder(str(folder))
        (folder / "card.json").write_text(json.dumps(card))
