"""A trained CLIP as the directory that open_clip loads: config, half-precision weights, model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.base import write_bytes, write_json
from trainer.config import ClipConfig

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


def write_model(folder: Path, config: ClipConfig, weights: Mapping[str, Tensor]) -> None:
    """Write config and weights (float16; counters as they are)."""
    from safetensors.torch import save

    half = {k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in weights.items()}
    write_config(folder, config)
    write_bytes(folder / WEIGHTS, save(half))


def write_config(folder: Path, config: ClipConfig) -> None:
    """Write what open_clip builds a model from."""
    preprocess = config.preprocess_cfg.model_dump(mode="json")
    write_json(folder / CONFIG, {"model_cfg": config.model_cfg, "preprocess_cfg": preprocess})


def write_card(
    folder: Path,
    config: ClipConfig,
    sets: Mapping[str, Mapping[str, int]],
    command: str,
    step: int,
    figures: Mapping[str, Mapping[str, float]],
) -> None:
    """Write the model card: data, recipe, figures, limits. `sets` and `figures` are by set; `command` trains it."""
    context = config.model_cfg.get("text_cfg", {}).get("context_length", 77)
    text = f"""---
library_name: open_clip
tags: [clip]
---
# A compact CLIP

Load it with `open_clip.create_model_and_transforms("local-dir:DIRECTORY")`, or give its directory to
`curate score --clip`. The weights are the running average of training, in float16, but for what `readout_steps` change,
where there are: the text tower, and the image tower's last map.

## Data

{_table(sets)}

## Figures on held-out rows of its sets, at most 1,000 of each

{_table(figures)}

## Limits

- It knows pictures and words like those of its sets. Take other figures before you trust it on other pictures, other
  languages or text in pictures.
- Of a caption it reads the first {context - 2} tokens.
- Its vectors compare with its own only. What a cosine means is told by `right_mean` and `unrelated_mean` above.
- What its sets show of people and places, and how they name it, is in it too.

## Recipe

Step {step} of {config.training.all_steps} of this command, with the config below as `recipe.json`:

```
{command}
```

```json
{json.dumps(config.model_dump(mode="json"), indent=1)}
```
"""
    write_bytes(folder / "README.md", text.encode())


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A table of Markdown, a line for each row."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| set | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(str(row.get(key, "")) for key in names) + " |" for name, row in rows.items()]
    return "\n".join(lines)
