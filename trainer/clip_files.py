"""A trained CLIP as the directory that open_clip loads: config, half-precision weights, model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    write_json(folder / CONFIG, {"model_cfg": config.model_cfg, "preprocess_cfg": config.preprocess_cfg})
    write_bytes(folder / WEIGHTS, save(half))


def write_card(
    folder: Path, config: ClipConfig, sets: Sequence[str], seed: int, step: int, figures: Mapping[str, Any]
) -> None:
    """Write the model card: data, recipe, figures."""
    names = sorted({key for part in figures.values() for key in part})
    rows = ["| set | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    rows += [
        f"| {name} | " + " | ".join(str(part.get(key, "")) for key in names) + " |" for name, part in figures.items()
    ]
    text = f"""---
library_name: open_clip
tags: [clip]
---
# A compact CLIP

Trained by `trainer clip` on {", ".join(sets)}; seed {seed}, {step} of {config.training.steps} steps. Weights are the
running average, in float16. Load it with `open_clip.create_model_and_transforms("local-dir:DIRECTORY")`, or give its
directory to `curate score --clip`.

## Figures on the held-out rows of its sets

{chr(10).join(rows)}

## Recipe

```json
{json.dumps(config.model_dump(mode="json"), indent=1)}
```
"""
    write_bytes(folder / "README.md", text.encode())
