"""What picture vectors know of captions: `python -m benchmarks.readout SETS/clipart/curated [--lexicon FILE]`.

Words are read off picture vectors by ridge regression on the training pictures of the embedded CLIP, and then told for
pictures it never saw; a caption's score is the cosine of what is told with its words, both divided by the root of how
often a word occurs. So the image side is judged without a text tower: of a CLIP, and of the networks that may teach it,
alone, together, and with pictures no larger than the CLIP's. What a teacher misses, its pupil will hardly find. With a
lexicon (`benchmarks.kinds`), what words are kinds of is read off too, and counts as much as the words.
"""

from __future__ import annotations

import argparse
import io
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from benchmarks.clip import CLIPART, CORPUS, measured, shuffled
from benchmarks.teacher import efficientnet, opennsfw, vectors
from pipeline import clip as clips
from trainer.evaluate_clip import pair_figures
from trainer.lexicon import Lexicon, read_lexicon
from trainer.readout import Known

Rows = NDArray[np.float32]
RIDGE = 0.5  # per row, of dimensions of deviation 1
SEEN = 2  # captions that must hold a word
COARSE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curated", type=Path)
    parser.add_argument("--lexicon", type=Path)
    parser.add_argument("--clip", default="mini")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    options = parser.parse_args()
    captions = {row["path"]: row["caption"] for row in pq.read_table(options.corpus / "captions.parquet").to_pylist()}
    tables = [pq.read_table(path, columns=["url"]) for path in sorted(options.curated.glob("train/*.parquet"))]
    trained = [name for table in tables for name in table["url"].to_pylist()]
    held = [name for name in captions if measured(name)]
    art, stamps = (shuffled(name for name in held if name.startswith(part)) for part in ("openclipart/", "stamps/"))
    sets = {"clip art": art[:CLIPART], "stamps": stamps}
    names = [*trained, *sets["clip art"], *sets["stamps"]]
    pictures = read(options.corpus, set(names))
    clip = clips.load(options.clip, device="cpu")
    shown = [pictures[name] for name in names]
    coarse = [picture.resize((COARSE, COARSE), Image.Resampling.BICUBIC) for picture in shown]
    one, other = opennsfw(shown), efficientnet(shown)
    kinds = {
        f"CLIP {clip.name}": clip.encode_images([np.asarray(picture) for picture in shown]),
        "OpenNSFW": one,
        "EfficientNet-Lite0": other,
        "both": np.concatenate([one, other], axis=1),
        f"both, of {COARSE} pixels": vectors(coarse),
    }
    lexicons = [None] if options.lexicon is None else [None, read_lexicon(options.lexicon)]
    for lexicon, (kind, rows) in product(lexicons, kinds.items()):
        told, words = readout(rows, len(trained), [captions[name] for name in trained], lexicon)
        place = dict(zip(names, told, strict=True))
        for part, chosen in sets.items():
            texts = [captions[name] for name in chosen]
            pictured = np.stack([place[name] for name in chosen])
            figures = pair_figures(unit(pictured), unit(words.rows(texts)), texts, 10)
            by = f"{kind}, words{' and kinds' if lexicon else ''}"
            print(f"{by:44s} {part:9s} first 10: {figures['first_10']:.3f}  AUC: {figures['auc']:.3f}", flush=True)


def read(corpus: Path, wanted: set[str]) -> dict[str, Image.Image]:
    """The pictures of these paths."""
    with tarfile.open(corpus / "images.tar") as tar:
        members = [member for member in tar if member.name in wanted]
        return {m.name: Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB") for m in members}  # type: ignore[union-attr]


class Words:
    """The words that captions hold, each weighted by the root of how seldom it is, and with a lexicon their kinds."""

    def __init__(self, captions: Sequence[str], lexicon: Lexicon | None = None) -> None:
        self._lexicon = lexicon
        self._kinds = None if lexicon is None else Known(lexicon.labels(captions))
        counted = Counter(word for text in captions for word in told_in(text))
        self._place = {word: n for n, word in enumerate(sorted(w for w, c in counted.items() if c >= SEEN))}
        self.weight = np.array([(len(captions) / counted[word]) ** 0.5 for word in self._place], np.float32)

    def rows(self, captions: Sequence[str]) -> Rows:
        """(N, words), a word's weight where a caption holds it; with a lexicon (N, words and kinds), of length 1."""
        out = np.zeros((len(captions), len(self._place)), np.float32)
        for row, text in enumerate(captions):
            for word in told_in(text) & self._place.keys():
                out[row, self._place[word]] = self.weight[self._place[word]]
        if self._lexicon is None or self._kinds is None:
            return out
        return unit(np.hstack([unit(out), self._kinds(self._lexicon.labels(captions)).numpy()]))


def told_in(caption: str) -> set[str]:
    """A caption's words of two letters and more."""
    return {word for word in re.findall(r"[a-z]+", caption.lower()) if len(word) > 1}


def readout(
    pictured: NDArray[np.floating], count: int, captions: Sequence[str], lexicon: Lexicon | None = None
) -> tuple[Rows, Words]:
    """What is told of all rows after a regression on the first `count`, which have these captions: (N, words)."""
    words = Words(captions, lexicon)
    known = np.asarray(pictured[:count], np.float32)
    mean, deviation = known.mean(axis=0), known.std(axis=0)
    x = (np.asarray(pictured, np.float32) - mean) / (deviation + 1e-3 * deviation.max())
    y = words.rows(captions)
    gram = x[:count].T @ x[:count] / count + RIDGE * np.eye(x.shape[1], dtype=np.float32)
    told: Rows = x @ np.linalg.solve(gram, x[:count].T @ (y - y.mean(axis=0)) / count)
    return told, words


def unit(rows: Rows) -> Rows:
    """Rows of length 1; one without a known word stays zero."""
    out: Rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return out


if __name__ == "__main__":
    main()
