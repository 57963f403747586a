"""A run as a diffusers directory: the same pictures without Headrace, the same text vectors, and errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from pipeline.base import HeadraceError
from pipeline.clip import Clip, load, quiet
from tests.trainer import tiny
from trainer.cascade import DEFAULT, How
from trainer.cli import main
from trainer.config import read_run_config
from trainer.export import export
from trainer.saved import KINDS, NAMES, build, save_model, write_run
from trainer.text_tower import write_text_encoder, write_tokenizer
from trainer.unclip import load as load_run

PROMPTS = ["A red circle, on the left!", "deux étoiles vertes &amp; 3 rings", "", "red " * 46]
SMALL = [  # base.toml's kinds at sizes for tests
    *("prior.width=32", "prior.depth=1", "prior.head=16"),
    *("decoder.side=16", "decoder.channels=[8, 16, 16]", "decoder.attention=[4, 2]", "decoder.head=8"),
    *("decoder.groups=4", "decoder.token_width=16", "decoder.predicts=v", "decoder.blocks=1", "upsampler.blocks=1"),
    *("upsampler.side=64", "upsampler.crop=32", "upsampler.channels=[8, 16]", "upsampler.groups=4"),
]
QUICK = How(3, 4, 2, 2.0, 3.0, 3.0)
CLEAN = """
import json, re, sys
import torch

class Without:  # a finder that does not find what the process shall not have
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in {"pipeline", "trainer", "open_clip", "pydantic", "ftfy"}
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
torch.cpu.get_capabilities = dict  # so float32
import numpy as np

lines = re.search("```python\\n(.*?)```", open("mini/README.md").read(), re.S)[1]
assert lines.count("\\n") == 3
names = {}
exec(lines, names)
drawn = {"readme": np.array(names["picture"])}
from diffusers import DiffusionPipeline
for folder in ("mini", "base"):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    settings = json.loads(sys.argv[1])
    drawn[folder] = pipe(settings.pop("prompt"), seed=[3, 4, 5, 6], output_type="np", **settings).images
for prompt, seed in (("red " * 47, 0), (["a", "b"], [1, 2, 3])):
    try:
        pipe(prompt, seed=seed)
    except ValueError as error:
        print(error)
np.savez("drawn.npz", **drawn)
assert not {"pipeline", "trainer", "open_clip", "pydantic", "ftfy"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("mini", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> Path:
    return tiny.write_whole_run(tmp_path_factory.mktemp("runs") / "tiny", clip)


def write_untrained(folder: Path, clip: Clip, config: str, changes: Sequence[str] = ()) -> Path:
    """A run of a shipped config, with random weights."""
    whole = read_run_config(config, changes)
    for seed, name in enumerate(NAMES):
        values = getattr(whole, name).model_dump(include=set(KINDS[name].model_fields))
        model_config = KINDS[name].model_validate(values)
        torch.manual_seed(seed)
        model = build(model_config, tiny.sizes(clip))
        tiny.stirred(model)
        save_model(folder / name, model_config, tiny.sizes(clip), model.state_dict(), {"step": 12, "loss": 0.25})
    write_run(folder, "mini", clip.identity, Path("data/curated"), "")
    return folder


def test_a_clean_process_draws_the_native_pictures(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {
        "mini": write_untrained(tmp_path / "run-mini", clip, "mini"),
        "base": write_untrained(tmp_path / "run-base", clip, "base", SMALL),
    }
    for name, folder in runs.items():
        export(folder, tmp_path / name)
    settings = {
        "prompt": PROMPTS,
        "prior_num_inference_steps": QUICK.prior_steps,
        "decoder_num_inference_steps": QUICK.steps,
        "super_res_num_inference_steps": QUICK.large_steps,
        "prior_guidance_scale": QUICK.prior_guidance,
        "decoder_guidance_scale": QUICK.image_guidance,
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    given = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, json.dumps(settings)],
        cwd=tmp_path,
        env=given | offline,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "has 49 tokens, the CLIP reads 48" in done.stdout and "2 prompts and 3 seeds" in done.stdout
    assert "ftfy" in done.stderr  # a prompt is not ASCII
    monkeypatch.setattr("trainer.speed.half_precision", lambda device: False)
    with np.load(tmp_path / "drawn.npz") as drawn:
        for name, folder in runs.items():
            native = load_run(folder, None, "cpu").sample(PROMPTS, [3, 4, 5, 6], 1, QUICK)
            assert native.shape == (4, 64, 64, 3) and native.std() > 10
            assert np.abs(drawn[name] * 255 - native).max() <= 1
        text = "a large red star to the left of a small blue ring"
        (native,) = load_run(runs["mini"], None, "cpu").sample([text], [0], 1, DEFAULT)
        assert np.abs(drawn["readme"].astype(int) - native).max() <= 1


def write_clip(folder: Path, text: dict[str, Any], **more: Any) -> Clip:
    """A CLIP of random weights with a text tower of this kind."""
    size = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 8}
    folder.mkdir()
    model_cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": size | text, **more}
    values = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": values}))
    torch.manual_seed(0)
    with quiet():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    state = model.state_dict()
    for name in state:
        if name.startswith("transformer"):
            state[name] = state[name] + 0.3 * torch.randn(state[name].shape)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return load(str(folder), "cpu")


@pytest.mark.parametrize("kind", ["mini", "gelu", "quick_gelu"])
def test_the_text_tower_as_transformers_has_it(kind: str, clip: Clip, tmp_path: Path) -> None:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    given = clip if kind == "mini" else write_clip(tmp_path / "clip", {}, quick_gelu=kind == "quick_gelu")
    write_text_encoder(tmp_path / "text_encoder", given)
    write_tokenizer(tmp_path / "tokenizer", given)
    tower: Any = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder", local_files_only=True)
    tokenizer: Any = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    texts = [*PROMPTS[:1], "", "deux étoiles 東京 🙂", "it's 12 o'clock!!", "a very long text " * 30, "  Two\n\tlines "]
    inputs = tokenizer(
        texts, padding="max_length", truncation=True, max_length=given.context_length, return_tensors="pt"
    )
    states, mask = given.text_states(texts)
    seen = torch.from_numpy(mask)
    assert tokenizer.model_max_length == given.context_length
    assert torch.equal(inputs.attention_mask.bool(), seen)
    assert torch.equal(inputs.input_ids[seen], given.tokens(texts)[seen])
    with torch.inference_mode():
        out = tower(input_ids=inputs.input_ids)
    vectors = torch.nn.functional.normalize(out.text_embeds, dim=1).numpy()
    np.testing.assert_allclose(vectors, given.encode_texts(texts), atol=1e-4)
    np.testing.assert_allclose(out.last_hidden_state.numpy()[mask], states[mask], atol=1e-4)
    assert vectors.std(axis=0).max() > 0.01


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ({"pool_type": "last"}, {}, "read at the end mark"),
        ({"no_causal_mask": True}, {}, "not causal"),
        ({"ls_init_value": 0.1}, {}, "a weight transformer.resblocks.0.ls_1.gamma"),
        ({"act_kwargs": {"approximate": "none"}, "tokenizer_kwargs": {"clean": "canonicalize"}}, {}, "tokenizer"),
        ({}, {"custom_text": True}, "CustomTextCLIP"),
    ],
)
def test_a_tower_of_another_kind_is_refused(text: dict[str, Any], more: Any, said: str, tmp_path: Path) -> None:
    other = write_clip(tmp_path / "clip", text, **more)
    with pytest.raises(HeadraceError, match=f"the text tower of CLIP clip .*{said}") as caught:
        write_text_encoder(tmp_path / "text_encoder", other)
        write_tokenizer(tmp_path / "tokenizer", other)
    assert caught.value.code == 4 and "open_clip's own" in str(caught.value.hint)


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["trainer", "export", *map(str, options)])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out.strip(), err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs neither library, replaces an earlier export, and leaves nothing else behind."""
    for name in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    before = {path.name for path in run.iterdir()}
    out = run / "diffusers"
    assert call(monkeypatch, capsys, "--run", run) == (0, str(out), "")
    first = contents(out)
    (out / "stale.txt").write_text("from an older version")
    assert call(monkeypatch, capsys, "--run", run) == (0, str(out), "")
    assert contents(out) == first
    assert {path.name for path in run.iterdir()} == before | {"diffusers"}
    shutil.rmtree(out)
    card = first["README.md"].decode()
    assert load("mini", "cpu").identity["weights_sha256"] in card and "nowhere/curated" in card and "## Licence" in card
    code = b"\n".join(text for name, text in first.items() if name.endswith(".py")).decode()
    assert not [word for word in ("from trainer", "from pipeline", "import trainer", "pydantic") if word in code]


def test_what_cannot_be_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(monkeypatch, capsys, "--run", tmp_path / "none", "--out", tmp_path / "out")
    assert code == 3 and "none is no run" in err
    for missing in NAMES:
        part = shutil.copytree(run, tmp_path / missing)
        shutil.rmtree(part / missing)
        code, _, err = call(monkeypatch, capsys, "--run", part, "--out", tmp_path / "out")
        assert code == 3 and f"no trained {missing}" in err and f"--only {missing}" in err
    other = write_clip(tmp_path / "clip", {})
    code, _, err = call(monkeypatch, capsys, "--run", run, "--out", tmp_path / "out", "--clip", tmp_path / "clip")
    assert code == 4 and f"not trained with the CLIP {other.name}" in err
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for out in (mine, mine / "thesis.txt"):
        code, _, err = call(monkeypatch, capsys, "--run", run, "--out", out)
        assert code == 2 and f"{out} is there and is no earlier export" in err
    assert contents(mine) == {"thesis.txt": b"years of work"}
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, "clip", "mine"}


def test_an_earlier_export_survives_a_failure(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run, out)
    before = contents(out)
    broken = shutil.copytree(run, tmp_path / "broken", ignore=shutil.ignore_patterns("diffusers"))
    shutil.rmtree(broken / "upsampler")
    with pytest.raises(HeadraceError, match="no trained upsampler"):
        export(broken, out)
    assert contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "broken"}
