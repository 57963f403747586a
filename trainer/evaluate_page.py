"""What `trainer eval` shows: lines for a terminal, and a page with every sample beside the truth and its neighbour.

The page is self-contained: pictures are data URIs, there is no script, and the content policy forbids both network and
scripts. Captions are text. It knows what the figures are called, not how they come about.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import spelled_out, write_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE = "index.html"
TEMPLATES = Path(__file__).parent / "templates"
MOST_CARDS = 512  # so that the page stays below some 8 MB
MOST_LIKE = 12  # cards of the samples that are most like a training picture
QUALITY = 90  # of JPEG


@dataclass(frozen=True)
class Card:
    """One sample: its record in metrics.json, and RGB pictures (S, S, 3)."""

    record: dict[str, Any]
    drawn: NDArray[np.uint8]
    true: NDArray[np.uint8]
    nearest: NDArray[np.uint8]


def summary(metrics: Mapping[str, Any]) -> list[str]:
    """The main figures as lines for a terminal."""
    cosines, precision, scores = metrics["prior"]["cosine"], metrics["r_precision"], metrics["clip_score"]
    lines = ["prior cosine      " + ", ".join(f"{name} {value:.3f}" for name, value in cosines.items())]
    lines.append(
        f"R-precision       {precision['drawn']:.1%} among {precision['among']:.4g} (true {precision['true']:.1%})"
    )
    for name, part in metrics["swaps_told_apart"]["drawn"].items():
        true = metrics["swaps_told_apart"]["true"][name]["share"]
        lines.append(f"{name + ' swaps':<17} {part['share']:.1%} of {part['count']} (true {true:.1%})")
    lines.append(
        f"CLIP score        {scores['drawn']:.2f} (true {scores['true']:.2f}, unrelated {scores['unrelated']:.2f})"
    )
    for name, values in metrics["clip_space_distance"].items():
        words = f"{name.removesuffix('_distance')} in CLIP space"
        lines.append(f"{words:<24} {values['drawn']:.4g} (training pictures {values['training']:.4g})")
    near = metrics["neighbours"]
    lines.append(f"nearest training picture {near['drawn']['mean']:.3f} (of true pictures {near['true']['mean']:.3f})")
    return lines


def write_page(folder: Path, metrics: Mapping[str, Any], cards: Sequence[Card]) -> Path:
    """Write `folder`/index.html."""
    write_bytes(folder / PAGE, render(metrics, cards).encode())
    return folder / PAGE


def render(metrics: Mapping[str, Any], cards: Sequence[Card]) -> str:
    """The page as HTML; everything in it is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"share": "{:.1%}".format, "cos": "{:.3f}".format, "figure": "{:.4g}".format}
    environment.filters |= {
        "error": lambda share, count: f"± {math.sqrt(share * (1 - share) / count):.1%}",
        "pretty": lambda value: json.dumps(value, indent=1, ensure_ascii=False),
        "uri": _data_uri,
    }
    like = sorted(cards, key=lambda card: -card.record["nearest"]["cosine"])[:MOST_LIKE]
    page = {"m": metrics, "cards": cards[:MOST_CARDS], "like": like, "left_out": max(0, len(cards) - MOST_CARDS)}
    return environment.get_template("eval.html").render(page)


def _data_uri(picture: NDArray[np.uint8]) -> str:
    import simplejpeg

    data = simplejpeg.encode_jpeg(picture.copy(order="C"), quality=QUALITY, colorsubsampling="444")
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _printable(value: Any) -> Any:
    """Every text that goes into the page, with its control and direction characters spelled out."""
    return "\n".join(map(spelled_out, value.split("\n"))) if type(value) is str else value
