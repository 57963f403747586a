"""How to draw with a trained run: `python -m benchmarks.guidance RUN --judge CLIP steps=50 image_guidance=3,…`.

Draws one picture for each of a run's held-out captions with each variant of `trainer.cascade.How` (names and values
joined by commas; the plain settings come first) and judges it: as `trainer eval` does, and by shape as `shapes.py`. The
last column is the drawing's time.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.shapes import told
from pipeline.clip import load as load_clip
from trainer.cascade import DEFAULT, How
from trainer.evaluate import EvalRun, drawn_samples, held_out, judged
from trainer.unclip import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--judge", help="a CLIP that conditioned nothing; else the run's own")
    parser.add_argument("--count", type=int, default=256)
    options = parser.parse_intermixed_args()  # variants may follow --judge
    unclip = load(options.run)
    judge = load_clip(options.judge, "cpu") if options.judge else unclip.clip
    asked = EvalRun(options.run, count=options.count)
    held = held_out(asked, unclip.clip)
    print(f"{'variant':60s} R-precision  swaps  attribute  relation  CLIP score   seconds  shapes")
    for variant in ("", *options.variants):
        began = time.monotonic()
        drawn = drawn_samples(unclip, held.captions, replace(asked, how=how_of(variant)), lambda line: None)
        spent = time.monotonic() - began
        figures, _ = judged(judge, drawn, held, asked.seed)
        told_apart = figures["swaps_told_apart"]["drawn"]  # empty for a set without swaps
        swaps = [told_apart.get(kind, {}).get("share", math.nan) for kind in ("all", "attribute", "relation")]
        numbers = [figures["r_precision"]["drawn"], *swaps, figures["clip_score"]["drawn"], spent]
        shapes = told(judge, judge.encode_images(list(drawn)), held.captions).line()
        columns = [f"{variant or 'as it is':60s}", *(f"{number:9.3f}" for number in numbers), shapes]
        print("  ".join(columns), flush=True)


def how_of(variant: str) -> How:
    """The plain settings with some changed: `steps=12,text_guidance=3`."""
    changes = dict(part.split("=") for part in variant.split(",") if part)
    return replace(DEFAULT, **{name: type(getattr(DEFAULT, name))(value) for name, value in changes.items()})


if __name__ == "__main__":
    main()
