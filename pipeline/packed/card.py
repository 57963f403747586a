"""The dataset card of a packed set: README.md, as Hugging Face and a person read it.

Without its `configs:` Hugging Face's `load_dataset` takes the Parquet files and shows no pictures; without its
`features:` it guesses from five samples, and loses the pictures of any other file type. It knows only the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HF_NAMES = {"train": "train", "val": "validation"}
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)


def card(manifest: Mapping[str, Any], extensions: Sequence[str]) -> str:
    """The card's text, from the manifest and the extensions that the pictures have."""
    counts = {split: count for split, count in manifest["counts"].items() if count["samples"]}
    parts = [_head(counts, extensions), _summary(counts, manifest), _load(counts, extensions)]
    parts += [_fields(manifest["columns"], manifest["clip"]), _funnel(manifest["funnel"]), LICENCE]
    return "\n".join(parts)


def _head(counts: Mapping[str, Any], extensions: Sequence[str]) -> str:
    total = sum(count["samples"] for count in counts.values())
    size = next((name for limit, name in SIZES if total < limit), "n>10M")
    lines = ["---", "task_categories:", "- text-to-image", "- image-to-text", "size_categories:", f"- {size}"]
    lines += ["configs:", "- config_name: default", "  data_files:"]
    for split in counts:
        lines += [f"  - split: {HF_NAMES[split]}", f"    path: {split}/*.tar"]
    lines += ["dataset_info:", "  config_name: default", "  features:"]
    for extension in extensions:
        lines += [f"  - name: {extension}", "    dtype: image"]
    lines += ["  - name: txt", "    dtype: string", "  - name: json", "    struct:"]
    for name, kind in (
        *((text, "string") for text in ("uid", "url", "caption")),
        ("width", "int64"),
        ("height", "int64"),
    ):
        lines += [f"    - name: {name}", f"      dtype: {kind}"]
    lines += ["  - name: __key__", "    dtype: string", "  - name: __url__", "    dtype: string", "---", ""]
    return "\n".join(lines)


def _summary(counts: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    clip = manifest["clip"]
    vectors = (
        f"The vectors are those of the CLIP `{clip['name']}` ({clip['dimension']} values, weights "
        f"`{clip['weights_sha256'][:12]}`); another CLIP's vectors are not comparable with them."
        if clip
        else "It holds no CLIP vectors."
    )
    known = manifest["split"]["val_samples_known_from_train"]
    split = (
        f"The list's own `split` column decided: {known:,} samples of `val` have a near-copy or caption in `train`."
        if known
        else "No sample of `val` shares a caption, or a known near-copy, with `train`."
    )
    rows = [f"| {name} | {c['samples']:,} | {c['shards']:,} |" for name, c in counts.items()]
    table = "\n".join(["| split | samples | shards |", "|---|---:|---:|", *rows])
    return f"""# Curated image-caption pairs

Packed by Headrace. `dataset.json` holds the recipe, the counts and a sha256 per file; `curate verify DIR` checks them.
{vectors} {split}

{table}
"""


def _load(counts: Mapping[str, Any], extensions: Sequence[str]) -> str:
    split = next(iter(counts))
    last = max(count["shards"] for name, count in counts.items() if name == split) - 1
    shards = f"{split}/00000.tar" if not last else f"{split}/{{00000..{last:05d}}}.tar"
    picture = ";".join(extensions)
    return f"""## How to load it

```python
from datasets import load_dataset                                 # pictures: {", ".join(extensions)}
samples = load_dataset("DIR", split="{HF_NAMES[split]}", streaming=True)

import webdataset
pairs = webdataset.WebDataset("DIR/{shards}").decode("pil").to_tuple("{picture}", "txt")

import duckdb
duckdb.sql("SELECT key, caption FROM 'DIR/{split}/*.parquet' LIMIT 10")
```

open_clip: `--train-data 'DIR/{shards}' --train-num-samples {counts[split]["samples"]} --dataset-type webdataset`.
`offset` and `length` in the Parquet say where a picture's bytes lie in the tar of the same name, for random access.
"""


def _fields(columns: Mapping[str, str], clip: Any) -> str:
    rows = "\n".join(f"| `{_cell(name)}` | {kind} |" for name, kind in columns.items())
    return f"""## Fields

A sample in a tar is `KEY.{{picture}}`, `KEY.txt` (the caption) and `KEY.json` (uid, url, caption, width, height).
The Parquet beside each tar has a row per sample, in the same order; `weight` is 1 unless the list brought its own:

| column | type |
|---|---|
{rows}
"""


def _funnel(counts: Sequence[Mapping[str, Any]]) -> str:
    total = sum(count["rows"] for count in counts)
    rows = "\n".join(f"| {count['stage']} | {_cell(count['reason'])} | {count['rows']:,} |" for count in counts)
    return f"""## Where the input rows went

| stage | reason | rows |
|---|---|---:|
{rows}
| all | | {total:,} |
"""


def _cell(text: str) -> str:
    """A list's column name or a server's token, harmless in a Markdown table."""
    return "".join(c for c in text if c.isprintable()).replace("|", "/").replace("`", "'").replace("<", "(")


LICENCE = """## Licences and limits

The pictures and captions belong to those who made them, each under its own terms: `url` says where each came from. This
card grants no licence. Automatic filters miss things: expect unsafe, private or wrongly described pictures among many.
Who redistributes the set answers for it, and should remove what its makers ask to have removed.
"""
