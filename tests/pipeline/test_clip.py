"""The CLIP wrapper: preprocessing, vectors, token states, identity, and what it says of a directory that is no CLIP."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.base import HeadraceError
from pipeline.clip import BATCH, MINI, Clip, Preprocess, load
from trainer.evaluate_clip import auc

TINY: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2], "resize_mode": "squash"},
}
LONG_TEXTS = {**TINY["model_cfg"], "text_cfg": {**TINY["model_cfg"]["text_cfg"], "context_length": 24}}
LONGER = json.dumps({**TINY, "model_cfg": LONG_TEXTS})


def write_clip(folder: Path, config: dict[str, dict[str, Any]]) -> Path:
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "tiny", TINY)


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load(str(folder), device="cpu")


def picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth noise, as a photograph has it."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_vectors_are_unit_float32_rows_whatever_the_sizes(clip: Clip) -> None:
    images = clip.encode_images([picture(0, 40, 90), picture(1, 32, 32), picture(2, 300, 20)])
    texts = clip.encode_texts(["a red circle", "", "word " * 500])
    for rows in (images, texts):
        assert rows.shape == (3, 16) and rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_nothing_in_gives_no_rows(clip: Clip) -> None:
    assert clip.encode_images([]).shape == (0, 16)
    assert clip.encode_texts([]).shape == (0, 16)


def test_vectors_equal_open_clips_own(clip: Clip) -> None:
    pictures = [picture(3, 64, 48)]
    small = clip.image_input(pictures).float() / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.25, 0.2])
    with torch.inference_mode():
        expected = clip.model.encode_image((small - mean.view(3, 1, 1)) / std.view(3, 1, 1), normalize=True)
    np.testing.assert_allclose(clip.encode_images(pictures), expected.numpy(), atol=1e-6)


def test_same_call_same_bytes_and_batches_are_cut_in_order(clip: Clip) -> None:
    texts = [f"caption number {n}" for n in range(BATCH + 7)]
    whole = clip.encode_texts(texts)
    assert whole.tobytes() == clip.encode_texts(texts).tobytes()
    assert whole[:BATCH].tobytes() == clip.encode_texts(texts[:BATCH]).tobytes()
    assert whole[BATCH:].tobytes() == clip.encode_texts(texts[BATCH:]).tobytes()


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(64, 64), (48, 64)])
@pytest.mark.parametrize("source", [(200, 300), (301, 97), (64, 64), (30, 41)])
def test_resize_follows_open_clips_rule(mode: str, size: tuple[int, int], source: tuple[int, int]) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if mode == "shortest" and size[0] != size[1]:
        pytest.skip("open_clip's own rule for this case resizes the longer side")
    ours = Preprocess(*size, mode, "bicubic", (0.0,) * 3, (1.0,) * 3, 255)
    rule = PreprocessCfg(
        size=size, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode, interpolation="bicubic", fill_color=255
    )
    image = picture(5, *source)
    expected = image_transform_v2(rule, is_train=False)(Image.fromarray(image)).numpy() * 255
    difference = np.abs(ours(image).numpy().astype(float) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.5


def test_a_text_fits_if_all_of_it_is_read(clip: Clip) -> None:
    room = clip.context_length - 2  # both marks
    texts = ["", "word " * room, "word " * (room + 1), "word " * 3 * room]
    assert clip.fits(texts).tolist() == [True, True, False, False]


def test_mask_ends_with_the_end_mark(clip: Clip) -> None:
    states, mask = clip.text_states(["circle", "a red circle!!!", "word " * 500])
    assert states.shape == (3, 16, 32) and states.dtype == np.float32
    assert mask.sum(axis=1).tolist() == [3, 6, 16] and mask[:, 0].all()


def test_state_at_the_end_mark_gives_the_vector(clip: Clip) -> None:
    texts = ["circle", "a red circle"]
    states, mask = clip.text_states(texts)
    last = torch.from_numpy(states[np.arange(2), mask.sum(axis=1) - 1]) @ clip.model.text_projection.detach()
    expected = torch.nn.functional.normalize(last, dim=1).numpy()
    np.testing.assert_allclose(clip.encode_texts(texts), expected, atol=1e-6)


def test_identity_is_json_and_names_the_weights(clip: Clip, folder: Path) -> None:
    import hashlib

    identity = json.loads(json.dumps(clip.identity))
    weights = (folder / "open_clip_model.safetensors").read_bytes()
    assert identity["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert identity["dimension"] == 16 and identity["name"] == "tiny"
    assert "squash 32x32" in identity["preprocessing"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "has no open_clip_config.json"),
        ("{", "does not describe a CLIP"),
        ("[]", "does not describe a CLIP"),
        (json.dumps({"model_cfg": {"embed_dim": 3}}), "does not describe a CLIP"),
        (json.dumps({"model_cfg": {**TINY["model_cfg"], "text_cfg": {"frobnicate": 1}}}), "cannot build it"),
        (json.dumps({**TINY, "model_cfg": {**TINY["model_cfg"], "embed_dim": 24}}), "do not fit its config"),
        (LONGER, r"do not fit its config \(positional_embedding is"),
    ],
)
def test_a_directory_that_is_no_clip_is_one_sentence(
    config: str | None, says: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    if config is not None:
        (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(HeadraceError, match=says) as caught:
        load(str(tmp_path))
    assert "\n" not in caught.value.message and "mini" in str(caught.value.hint)


def test_missing_and_damaged_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(TINY))
    with pytest.raises(HeadraceError, match="has no safetensors weights"):
        load(str(tmp_path))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(HeadraceError, match="is no CLIP"):
        load(str(tmp_path))


def test_a_device_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(HeadraceError, match="there is no cuda:99 here"):
        load("mini", device="cuda:99")
    with pytest.raises(HeadraceError, match="no device called gpu"):
        load("mini", device="gpu")


def test_the_embedded_clip_is_small_half_precision_and_plain_open_clips() -> None:
    import open_clip
    from safetensors.torch import load_file

    weights = MINI / "open_clip_model.safetensors"
    assert sum(path.stat().st_size for path in MINI.iterdir()) < 40_000_000
    assert {value.dtype for value in load_file(weights).values() if value.is_floating_point()} == {torch.float16}
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{MINI}")
    tokens = open_clip.get_tokenizer(f"local-dir:{MINI}")(["a red circle above a blue star"])
    with torch.inference_mode():
        expected = model.eval().encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(
        load("mini", "cpu").encode_texts(["a red circle above a blue star"]), expected, atol=1e-5
    )


@pytest.mark.parametrize("name", ["nowhere", "some/where", "ViT-B-32:no-such-weights", "NoSuchModel:openai"])
def test_an_unknown_name_says_what_works_offline(name: str) -> None:
    with pytest.raises(HeadraceError) as caught:
        load(name)
    assert caught.value.code == 3
    assert "`mini` and a local directory work offline" in str(caught.value.hint)


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", refuse)
    with pytest.raises(HeadraceError, match="cannot be fetched") as caught:
        load("ViT-B-32:openai")
    assert caught.value.code == 3 and "`mini`" in str(caught.value.hint)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache of a machine that is offline now and once fetched the repository me/tiny; its files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return write_clip(repository / "snapshots" / ("0" * 40), TINY)


def test_a_clip_of_the_hub_loads_by_its_repositorys_name(hub: Path, clip: Clip) -> None:
    fetched = load("hf-hub:me/tiny", device="cpu")
    np.testing.assert_array_equal(fetched.encode_texts(["a red circle"]), clip.encode_texts(["a red circle"]))
    assert fetched.identity == clip.identity | {"name": "hf-hub:me/tiny"}


def test_a_repository_of_the_hub_that_is_not_cached(hub: Path) -> None:
    with pytest.raises(HeadraceError, match="CLIP hf-hub:me/other cannot be fetched") as caught:
        load("hf-hub:me/other")
    assert caught.value.code == 3 and "`mini`" in str(caught.value.hint)


def test_a_tokenizer_that_needs_another_package(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TINY["model_cfg"]["text_cfg"] | {"hf_tokenizer_name": "me/words"}
    config = {**TINY, "model_cfg": TINY["model_cfg"] | {"text_cfg": text}}
    (hub / "open_clip_config.json").write_text(json.dumps(config))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HeadraceError, match="needs another package") as caught:
        load("hf-hub:me/tiny")
    assert "pip install transformers" in str(caught.value.hint)


def test_a_directory_may_be_named_as_open_clip_does(folder: Path, clip: Clip) -> None:
    assert load(f"local-dir:{folder}", device="cpu").identity == clip.identity


def test_listed_weights_get_the_activation_that_they_were_trained_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from open_clip.transformer import QuickGELU

    original = open_clip.create_model
    for module in "pretrained", "factory":  # 600 MB that are not wanted here: the architecture is
        monkeypatch.setattr(f"open_clip.{module}.download_pretrained", lambda *_, **__: folder / "any.safetensors")
    monkeypatch.setattr("open_clip.create_model", partial(original, load_weights=False))
    for tag, quick in ("openai", True), ("laion2b_s34b_b79k", False):
        modules = load(f"ViT-B-32:{tag}", device="cpu").model.modules()
        assert any(isinstance(module, QuickGELU) for module in modules) == quick


def test_our_resize_gives_open_clips_vectors_with_the_embedded_clip() -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from pipeline.miniweb import scenes

    mini = load("mini", device="cpu")
    pictures = [np.asarray(scenes.draw(scenes.scene(11, index), side=200)) for index in range(32)]
    transform = image_transform_v2(PreprocessCfg(**mini.model.visual.preprocess_cfg), is_train=False)
    with torch.inference_mode():
        batch = torch.stack([transform(Image.fromarray(image)) for image in pictures])
        theirs = mini.model.encode_image(batch, normalize=True).numpy()
    assert np.sum(theirs * mini.encode_images(pictures), axis=1).min() > 0.999


def test_the_embedded_clip_knows_scenes_it_was_not_trained_on() -> None:
    from pipeline.miniweb import scenes

    mini = load("mini", device="cpu")
    held = [s for s in (scenes.scene(12, index) for index in range(1500)) if scenes.held_out(s)][:64]
    below: list[bool] = []
    images = mini.encode_images([np.asarray(scenes.draw(s, side=128)) for s in held])
    cosine = images @ mini.encode_texts([scenes.caption(s, n) for n, s in enumerate(held)]).T
    assert (cosine.argmax(axis=1) == np.arange(64)).mean() > 0.9
    assert (cosine.diagonal() > 0.28).mean() > 0.9
    for row, scene in enumerate(held):
        swaps = images[row] @ mini.encode_texts(scenes.swaps(scene, row)).T
        below += [bool(cosine[row, row] > swap) for swap in swaps]
    assert np.mean(below) > 0.95
    wrong = mini.encode_texts([scenes.wrong_caption(s, 13, n, n) for n, s in enumerate(held)])
    assert auc(cosine.diagonal(), np.sum(images * wrong, axis=1)) > 0.99


def test_the_embedded_text_tower_is_the_transformers_class() -> None:
    """`CLIPTextModelWithProjection` with these weights gives our vectors (what a diffusers export relies on)."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    mini = load("mini", device="cpu")
    weights = mini.model.state_dict()
    width, layers = weights["ln_final.weight"].shape[0], len(mini.model.transformer.resblocks)
    config = CLIPTextConfig(
        vocab_size=mini.model.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=mini.dimension,
        num_hidden_layers=layers,
        num_attention_heads=mini.model.transformer.resblocks[0].attn.num_heads,
        max_position_embeddings=mini.context_length,
        hidden_act="gelu",
        bos_token_id=mini.tokenizer.sot_token_id,
        eos_token_id=mini.tokenizer.eot_token_id,
    )
    model: Any = CLIPTextModelWithProjection(config)
    model.eval()
    names = {
        "text_projection.weight": weights["text_projection"].T,
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
        "text_model.final_layer_norm.weight": weights["ln_final.weight"],
        "text_model.final_layer_norm.bias": weights["ln_final.bias"],
    }
    for layer in range(layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = weights[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            names |= {f"{theirs}.self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", parts, strict=True)}
            names[f"{theirs}.self_attn.out_proj.{kind}"] = weights[f"{ours}.attn.out_proj.{kind}"]
            names[f"{theirs}.mlp.fc1.{kind}"] = weights[f"{ours}.mlp.c_fc.{kind}"]
            names[f"{theirs}.mlp.fc2.{kind}"] = weights[f"{ours}.mlp.c_proj.{kind}"]
            names[f"{theirs}.layer_norm1.{kind}"] = weights[f"{ours}.ln_1.{kind}"]
            names[f"{theirs}.layer_norm2.{kind}"] = weights[f"{ours}.ln_2.{kind}"]
    expected_names = {name for name in model.state_dict() if not name.endswith("position_ids")}
    renamed = {n if n in expected_names else n.removeprefix("text_model."): value for n, value in names.items()}
    assert set(renamed) == expected_names
    model.load_state_dict(renamed, strict=False)
    texts = ["a red circle", "A large blue star above a small dotted heart."]
    with torch.inference_mode():
        out = model(mini.tokens(texts))
    vectors = torch.nn.functional.normalize(out.text_embeds, dim=1).numpy()
    np.testing.assert_allclose(vectors, mini.encode_texts(texts), atol=1e-5)
    states, mask = mini.text_states(texts)
    np.testing.assert_allclose(out.last_hidden_state.numpy()[mask], states[mask], atol=1e-4)
