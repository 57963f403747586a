"""Blocked concepts: does a picture show what a text says, by the CLIP that scored it?

A cosine alone means something else for every CLIP, so the concept competes with texts that name nothing. With s the
CLIP's own logit scale, c the concept and n the best of the neutral texts,
p = 1 / (1 + exp(-s (cos(picture, c) - cos(picture, n)))): zero-shot classification between two classes (Radford et al.
2021, section 3.1). A concept is the mean of its vectors in a few phrases, which tells better than it does alone (there,
section 3.1.4). A row's own caption has no say: a picture with a fitting caption is blocked all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.base import MISSING, REFUSED, HeadraceError, read_toml
from pipeline.books import read_markers
from pipeline.shards import DataDir, vectors

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from pipeline.clip import Clip

PHRASES = ("{}", "a picture of {}", "a photo of {}", "a drawing of {}")
NEUTRAL = ("", "a picture", "a photo", "a drawing", "a picture of something", "a photo of an object")


@dataclass(frozen=True)
class Concepts:
    """Concepts as unit vectors (`texts`, concepts first, then the neutral ones) of the CLIP called `identity`."""

    identity: dict[str, Any]
    texts: NDArray[np.float32]
    count: int
    scale: float  # of the CLIP's logits
    threshold: float  # a probability

    @classmethod
    def of(cls, data: DataDir, concepts: Sequence[str], threshold: float) -> Concepts:
        """Encode `concepts` with the CLIP that scored the folder.

        Raises:
            HeadraceError: code 3 where the clip signal or its CLIP is missing, 4 where the CLIP is another one now.
        """
        import numpy as np

        from pipeline.clip import load

        identity = scored_by(data, "--block")
        clip = load(clip_name(data, identity))
        if clip.identity != identity:
            raise HeadraceError(
                f"the pictures were scored by another CLIP {identity['name']} than {clip.name} is now",
                hint="run `curate score --signals clip` again, or put the former CLIP back",
                code=REFUSED,
            )
        texts = np.concatenate([_ensembled(clip, concepts), clip.encode_texts(NEUTRAL)])
        return cls(identity, texts, len(concepts), float(clip.model.logit_scale.detach().exp()), threshold)

    def probability(self, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
        """For each picture (unit vectors, [N, D]) the probability of its likeliest concept, [N]."""
        import numpy as np

        cosine = pictures @ self.texts.T
        margin = cosine[:, : self.count].max(axis=1) - cosine[:, self.count :].max(axis=1)
        out: NDArray[np.float32] = 1 / (1 + np.exp(-self.scale * margin))
        return out

    def shown(self, column: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Which rows of a column of stored vectors show a concept; rows without a vector do not."""
        import numpy as np

        shown = self.probability(vectors(column).astype(np.float32)) >= self.threshold
        out: NDArray[np.bool_] = shown & np.asarray(column.is_valid())
        return out


def _ensembled(clip: Clip, concepts: Sequence[str]) -> NDArray[np.float32]:
    """Unit vectors (concepts, D), each of the mean of what its phrases give."""
    import numpy as np

    phrases = clip.encode_texts([phrase.format(concept) for concept in concepts for phrase in PHRASES])
    means = phrases.reshape(len(concepts), len(PHRASES), -1).mean(axis=1)
    units: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return units


def scored_by(data: DataDir, why: str) -> dict[str, Any]:
    """The identity of the CLIP that scored a folder; `why` says what asks for it where there is none."""
    identity = next((marker.settings["identity"] for marker in read_markers(data, "score/clip").values()), None)
    if identity is None:
        message = f"{why} needs the signal clip, which was never scored"
        raise HeadraceError(message, hint="run `curate score --signals clip`", code=MISSING)
    return dict(identity)


def clip_name(data: DataDir, identity: Mapping[str, Any]) -> str:
    """The name by which a folder's CLIP can be loaded: the recipe's, which may be a path, else that of its identity."""
    recipe = read_toml(data.recipe) if data.recipe.exists() else {}
    return str(recipe.get("score", {}).get("clip", identity["name"]))
