"""The tuning-free encoder: what its rows and image tokens are made of, what is refused, and what a run stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.image_branch import ImageBranch, cross_attentions
from dualcl.benchmark.models.row_encoder import HIDDEN, RowEncoder, load_row_encoder
from dualcl.benchmark.models.text_to_image import Text

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
        told |= {"width": width, "n_tokens": n_tokens, "base": "small", "pictures": 12}  # type: ignore[dict-item]
        told |= {"image_tokens": 0, "layers": [], **card}  # type: ignore[dict-item]
        (folder / "card.json").write_text(json.dumps(told))
        return folder

    return make


def test_rows_are_of_each_picture_by_itself_and_differ() -> None:
    torch.manual_seed(0)
    encoder = RowEncoder(16, 2).eval()
    encoder.fit_table(torch.randn(50, 16) * 3 + 1)
    embedded = encoder.embed(PICTURES)
    rows = encoder.rows(embedded)
    assert rows.shape == (3, 2, 16)
    assert torch.equal(encoder.embed(PICTURES[[2, 0, 1]]), embedded[[2, 0, 1]])
    torch.testing.assert_close(encoder.rows(embedded.mean(0, keepdim=True))[0], rows.mean(0))
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    # as drawn it stays near the table's rows
    assert ((rows - encoder.centre) / encoder.scale).abs().max() < 3


def test_a_concept_gets_the_mean_of_its_pictures_and_the_network_none(
    concepts: Callable[..., Any], empty_record: Any, tmp_path: Path
) -> None:
    work = concepts("encoder", tmp_path / "one", "concept.n_tokens=2", "method.image_scale=0")
    record = work.execute(empty_record())
    method, domain = work.method, work.domain
    for j in range(2):
        embedded = method.encoder.embed(domain.concept_images(j))
        wanted = method.encoder.rows(embedded).mean(0)
        torch.testing.assert_close(domain.token_rows(j)[0], wanted, rtol=0, atol=1e-6)
    assert (domain.token_rows(0)[0] - domain.token_rows(1)[0]).abs().max() > 0
    assert [t["steps"] for t in record["tasks"]] == [0, 0]
    size = sum(t.numel() for n, t in method.encoder.state_dict().items() if not n.startswith("branch."))
    assert size > 2.5e5
    assert sum(t.numel() for t in method.encoder.branch.state_dict().values()) > 1e5  # which this run does not read
    assert method.stored_parameters() == size
    assert record["tasks"][-1]["parameters_stored"] == size + domain.stored_parameters()
    assert "untrained" in method.caveats()[0]
    assert "text branch alone" in method.caveats()[-1]
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
    assert torch.equal(*drawn)  # the image branch is left out


# --- the image branch -------------------------------------------------------------------------------------------------


def test_without_weight_the_branch_changes_nothing_and_the_network_is_left_as_it_was(small_diffusion: Any) -> None:
    unet = small_diffusion.unet
    torch.manual_seed(0)
    branch = ImageBranch(HIDDEN, 128, 4, [a.to_k.out_features for a in cross_attentions(unet)]).requires_grad_(False)
    noisy, times = torch.randn(2, *small_diffusion.info.latent_shape), torch.tensor([5, 500])
    before, names = [a.processor for a in cross_attentions(unet)], [*unet.state_dict()]
    text, tokens = small_diffusion.encode_text(["a cat", "a dog"]), branch.tokens(torch.randn(2, HIDDEN))
    plain = small_diffusion.predict(noisy, times, text)
    drawn = {}
    for scale in (0.0, 1.0):
        with branch.on(unet, scale):
            states = (text.states, [tokens])
            drawn[scale] = unet(noisy, times, encoder_hidden_states=states).sample
    torch.testing.assert_close(drawn[0.0], plain, rtol=0, atol=1e-6)
    assert (drawn[1.0] - plain).abs().max() > 1e-3
    assert all(a.processor is p for a, p in zip(cross_attentions(unet), before, strict=True))
    assert [*unet.state_dict()] == names
    with pytest.raises(RuntimeError), branch.on(unet, 1.0):
        raise RuntimeError
    assert all(a.processor is p for a, p in zip(cross_attentions(unet), before, strict=True))


def test_started_at_the_network_s_weights_it_reads_a_token_as_the_text_is_read(small_diffusion: Any) -> None:
    """A text of one token, and that token as the picture's: twice the same attention."""
    unet = small_diffusion.unet
    branch = ImageBranch(HIDDEN, 128, 1, [a.to_k.out_features for a in cross_attentions(unet)]).requires_grad_(False)
    branch.fit(unet)
    (attention, *_), token = cross_attentions(unet), torch.randn(1, 1, 128)
    hidden = torch.randn(1, 9, attention.to_q.in_features)
    attention.residual_connection, out = False, attention.to_out[0]
    once = attention(hidden, encoder_hidden_states=token)
    with branch.on(unet, 1.0):
        twice = attention(hidden, encoder_hidden_states=(token, [token]))
    torch.testing.assert_close(twice - out.bias, 2 * (once - out.bias), rtol=1e-4, atol=1e-5)


def test_a_prompt_brings_the_tokens_of_the_concepts_that_it_names(
    concepts: Callable[..., Any], empty_record: Any, tmp_path: Path
) -> None:
    work = concepts("encoder", tmp_path / "run")
    work.execute(empty_record())
    method, domain = work.method, work.domain
    branch, model = method.encoder.branch, domain.diffusion
    h = [method.encoder.embed(domain.concept_images(j)).mean(0) for j in range(2)]
    torch.testing.assert_close(method.embeddings, torch.stack(h))
    encoder = sum(t.numel() for t in method.encoder.state_dict().values())
    assert method.stored_parameters() == encoder + 2 * branch.embedding
    method.restored(1)
    assert method.stored_parameters() == encoder + branch.embedding
    method.config = replace(method.config, shared_encoder=True)
    assert method.stored_parameters() == branch.embedding > 0
    first, second = (domain.placeholder(j) for j in range(2))
    text: Text = model.encode_text(["", "a photo of sun", f"a photo of {first}", f"{second} beside {first}"])
    none, own = branch.none(), branch.tokens(torch.stack(h))
    for found, wanted in zip(text.further["images"], (none, none, own[0], own.mean(0)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (own[0] - own[1]).abs().max() > 1e-3
    assert not any("text branch" in c for c in method.caveats())
    # what is drawn is by the prompt alone, and by pictures of the concept
    prompt, drawn = domain.prompts(0)[0], {}
    for name, j in (("own", 0), ("other", 1)):
        domain.set_image_embedding(0, h[j])
        drawn[name] = domain.sample([prompt], [torch.Generator().manual_seed(0)])
    assert not torch.equal(drawn["own"], drawn["other"])


# --- what is read -----------------------------------------------------------------------------------------------------


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
        ({"base_sha256": own}, ("method.image_scale=-1",), "method.image_scale must not be negative"),
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
