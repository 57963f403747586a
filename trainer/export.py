"""A run as a directory that diffusers loads without the trainer: weights, settings, and the code that draws.

The code is that of `trainer.exported` and of all that it imports, copied as it stands but for its imports. This module
writes files and needs neither diffusers nor transformers.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.base import HeadraceError, digest, disk_error, read_json, sync_directory, write_bytes, write_json
from trainer.saved import NAMES, Name, load_model, read_run
from trainer.text_tower import write_text_encoder, write_tokenizer
from trainer.unclip import load

FOLDER = "diffusers"
INDEX = "model_index.json"
ENTRY, PIPELINE = "exported", "HeadracePipeline"
CLASSES: dict[Name, str] = {"prior": "PriorNetwork", "decoder": "DecoderNetwork", "upsampler": "UpsamplerNetwork"}
MADE_FOR = "0.42.1"  # of diffusers
CACHED = "diffusers_modules.local"  # where diffusers copies a local directory's code and imports it from
OURS = re.compile(r"^(\s*)from trainer\.(\w+) import ", re.MULTILINE)
SETTINGS = re.compile(r"^from (?:pydantic|pipeline\.base) import (?=Field$|Config$)", re.MULTILINE)
BASE = '''"""Settings, as config.json has them: all are given, and were checked when the run was trained."""


class Config:
    """Values by name."""

    def __init__(self, **values):
        for name, value in values.items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)


def Field(**facts):
    """The default of a setting; its limits are not checked again."""
    return facts.get("default")
'''


def export(run: Path, out: Path, clip: str | None = None) -> None:
    """Write a run into `out`, whole or not at all; an earlier export there is replaced.

    Raises:
        HeadraceError: no such run, one without one of its three models, another CLIP or one whose text tower
            transformers does not have; `out` is something else.
    """
    out = out.absolute()
    _check_free(out)
    said = read_run(run)
    loaded = load(run, clip, "cpu").clip
    with _whole(out) as folder:
        facts: dict[str, dict[str, Any]] = {name: _write_network(run, name, folder / name) for name in NAMES}
        write_text_encoder(folder / "text_encoder", loaded)
        write_tokenizer(folder / "tokenizer", loaded)
        code = _sources()
        package = f"headrace_{digest(code)[:8]}"  # two versions can be loaded in one process
        for name, text in code.items():
            if name != ENTRY:
                write_bytes(folder / package / f"{name}.py", text.encode())
        write_bytes(folder / "pipeline.py", _pipeline(code, package).encode())
        write_json(folder / INDEX, _index())
        write_bytes(folder / "README.md", _card(out.name, said, facts).encode())


def _index() -> dict[str, Any]:
    index: dict[str, Any] = {name: [f"{CACHED}.pipeline", kind] for name, kind in CLASSES.items()}
    return index | {
        "_class_name": ["pipeline", PIPELINE],
        "_diffusers_version": MADE_FOR,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    }


def _write_network(run: Path, name: Name, folder: Path) -> dict[str, Any]:
    """Settings and weights of one model; returns what its run says of its training."""
    from safetensors.torch import save

    model, config = load_model(run, name)
    weights = {f"network.{key}": value.contiguous() for key, value in model.state_dict().items()}
    said = read_json(run / name / "config.json")
    values = {"_class_name": CLASSES[name], "_diffusers_version": MADE_FOR, "sizes": said["sizes"]}
    write_json(folder / "config.json", {**values, "settings": config.model_dump(mode="json")})
    write_bytes(folder / "diffusion_pytorch_model.safetensors", save(weights, metadata={"format": "pt"}))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, **said["training"]}


def _sources() -> dict[str, str]:
    """The pipeline's module and all that it imports, by name, importing from one another and from a small `base`."""
    found: dict[str, str] = {}
    left = [ENTRY]
    while left:
        name = left.pop()
        text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        found[name] = SETTINGS.sub("from .base import ", OURS.sub(r"\1from .\2 import ", text))
        left += [other for _, other in OURS.findall(text) if other not in found]
    return {"base": BASE, **dict(sorted(found.items()))}


def _pipeline(code: Mapping[str, str], package: str) -> str:
    """The entry, importing from the package; diffusers copies only those of its files that are named here."""
    text = re.sub(r"^from \.(\w+) import ", rf"from .{package}.\1 import ", code[ENTRY], flags=re.MULTILINE)
    unnamed = [name for name in code if name != ENTRY and f".{package}.{name} import" not in text]
    rest = "".join(f"from .{package}.{name} import __doc__ as _  # noqa\n" for name in sorted(unnamed))
    return text.replace("\nlogger = ", f"# Named, so that diffusers takes these files along:\n{rest}\nlogger = ", 1)


def _card(name: str, said: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> str:
    identity = said["identity"]
    keys = sorted({key for part in facts.values() for key, value in part.items() if isinstance(value, int | float)})
    rows = [["model", *keys], ["---"] * (len(keys) + 1)]
    rows += [[model, *(str(part.get(key, "")) for key in keys)] for model, part in facts.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [unclip, headrace]
---
# A text-to-picture model of the unCLIP kind

A prior, a decoder and an upsampler, trained by `trainer fit` of Headrace and written by `trainer export`. From the
folder that holds this directory:

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("./{name}", custom_pipeline="./{name}", trust_remote_code=True)
picture = pipe("a large red star to the left of a small blue ring", seed=0).images[0]
```

It needs torch, diffusers (made for {MADE_FOR}) and transformers, and nothing of Headrace. `trust_remote_code` is
asked for because `pipeline.py` and the folder beside it are the code that draws; of a directory on a hub, download
all of it and load the copy. The same prompt and seed give the picture that `trainer sample --best-of 1` draws, to a
grey level; pictures are not ranked by a CLIP here. Keep the weights in float32: the networks run in bfloat16 by
themselves where that is quicker. Prompts with typographic quotes or broken encodings are read as in training only
where `ftfy` is installed.

## What it was made of

- CLIP: {identity["name"]}, {identity["dimension"]} dimensions, weights sha256 `{identity["weights_sha256"]}`;
  of it the text tower and tokenizer are here, as transformers has them
- data: {"/".join(Path(said["shards"]).parts[-2:])}

{table}

## Licence

Of the weights: not stated; it is for whoever trained them to choose, by what the data allows. The code is Headrace's,
under the Apache License 2.0.
"""


def _check_free(out: Path) -> None:
    """Nothing may be lost: `out` is new, empty, or an earlier export."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    index = read_json(out / INDEX) if (out / INDEX).is_file() else {}
    if index.get("_class_name") != _index()["_class_name"]:
        raise HeadraceError(f"{out} is there and is no earlier export", hint="give another --out, or remove it first")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that takes its place on success and is removed on failure."""
    new, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        sync_directory(out.parent)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(new, ignore_errors=True)
