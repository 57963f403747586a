"""Gives a CLIP's cosines a size, without training: pictures' and texts' vectors that vary alike.

Where texts vary in directions in which pictures hardly do, or the other way round, right pairs are told from wrong ones
by small parts of long vectors: their cosines are small. With v become L v and t become L⁻ᵀ t, v · t is what it was, and
an L that lets both vary alike makes them as short as they can be: tr(L A Lᵀ) + tr(L⁻ᵀ B L⁻¹), their mean squared
lengths, is least. Both maps go into the last weights of the towers; and the image tower's bias, where it has one, puts
unrelated pairs at 0. It knows nothing of training and of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data import epoch_order
from trainer.ridge import power

if TYPE_CHECKING:
    from pipeline.clip import Clip
    from trainer.sources import Source

RIDGE = 0.01  # of the mean eigenvalue: directions with less than that are rounding
ROWS = 2000  # captions of each set, with a picture each, that are looked at, at most
SHORTEST = 1e-6  # of a picture's vector
STEPS = 8  # each with the lengths that the one before left: after three a CLIP moves no more
ALIKE = 0.2  # sets whose mean texts differ by less than that share are put right together: less may be chance


def balancing(pictures: Tensor, texts: Tensor, share: float = RIDGE) -> Tensor:
    """The symmetric L (D, D), float64, with L A L = L⁻¹ B L⁻¹ for second moments A of picture vectors and B of texts'.

    L² is the matrix geometric mean of A⁻¹ and B, which is also the linear map that carries a normal distribution with
    the covariance A to one with B the shortest way (Olkin and Pukelsheim 1982): A^-½ (A^½ B A^½)^½ A^-½. To both
    `share` of their mean eigenvalue is added first.
    """
    a, b = (_floored(moment.double(), share) for moment in (pictures, texts))
    root, inverse = power(a, 0.5), power(a, -0.5)
    return power(inverse @ power(root @ b @ root, 0.5) @ inverse, 0.5)


def centring(pictures: Sequence[Tensor], texts: Sequence[Tensor]) -> Tensor:
    """A b (D,) of the sets' mean texts with which unrelated pairs of each set have a mean cosine of 0.

    Given are each set's pictures x (N, D), of any length, and texts (N, D), unit vectors; x becomes x + b.
    """
    told = torch.stack([part.mean(dim=0) for part in texts])
    bias = torch.zeros_like(told[0])
    for _ in range(STEPS):
        lengths = [(part + bias).norm(dim=1, keepdim=True).clamp(min=SHORTEST) for part in pictures]
        means = torch.stack(
            [((part + bias) / length).mean(dim=0) for part, length in zip(pictures, lengths, strict=True)]
        )
        slopes = told * torch.stack([(1 / length).mean() for length in lengths])[:, None]
        bias = bias - torch.linalg.pinv(slopes, rtol=ALIKE) @ (means * told).sum(dim=1)
    return bias


@torch.no_grad()
def balance(clip: Clip, sources: Sequence[Source], seed: int) -> bool:
    """Balance a CLIP in place by training pairs of these sets, each of which counts the same, and has no caption twice.

    False, and nothing is changed, where a tower does not end in a linear map, or is not open_clip's own.
    """
    clip.model.eval()
    image, text = _last_maps(clip.model)
    if image is None or text is None:
        return False
    seen, told = zip(*(_vectors(clip, source, seed) for source in sources), strict=True)
    towards = balancing(_moment([F.normalize(part, dim=1) for part in seen]), _moment(told))
    back = torch.linalg.inv(towards)
    _follow(image, towards)
    _follow(text, back)
    if image.bias is not None:
        shift = centring([part @ towards for part in seen], [F.normalize(part @ back, dim=1) for part in told])
        image.bias.add_(shift.to(image.bias))
    return True


class Last(NamedTuple):
    """A tower's last linear map: its weight (D', D), multiplied from the right, and its bias (D,)."""

    weight: Tensor
    bias: Tensor | None


def _last_maps(model: Any) -> tuple[Last | None, Last | None]:
    """Of the image tower and of the text tower, where they are open_clip's own."""
    pooled = getattr(getattr(model.visual, "attnpool", None), "c_proj", None)
    image = pooled or getattr(model.visual, "proj", None)
    return _last(image), _last(getattr(getattr(model, "text", model), "text_projection", None))


def _last(layer: object) -> Last | None:
    if isinstance(layer, nn.Linear):
        return Last(layer.weight.detach().T, layer.bias)
    return Last(layer, None) if isinstance(layer, Tensor) else None


def _follow(last: Last, matrix: Tensor) -> None:
    """Let a map be followed by a symmetric matrix (D, D): in place."""
    for part in last:
        if part is not None:
            part.copy_(part.double() @ matrix.to(part.device))


def _vectors(clip: Clip, source: Source, seed: int) -> tuple[Tensor, Tensor]:
    """Of a picture of each of a set's captions, whole and as it is, vectors of any length, and of the captions unit
    ones: (N, D) both, in float64, on the CPU."""
    rows = epoch_order(source.train.captions, seed, 0)[:ROWS]
    small = (clip.normalized(part.to(clip.device)) for part in source.whole(rows))
    pictures = torch.cat([clip.model.encode_image(part).cpu() for part in small])
    texts = torch.from_numpy(clip.encode_texts([source.train.captions[row] for row in rows]))
    return pictures.double(), texts.double()


def _moment(parts: Sequence[Tensor]) -> Tensor:
    """Second moment (D, D) of vectors (N, D) of several sets, each of which counts the same."""
    return torch.stack([part.T @ part / len(part) for part in parts]).mean(dim=0)


def _floored(moment: Tensor, share: float) -> Tensor:
    size = len(moment)
    return moment + share * float(moment.trace()) / size * torch.eye(size, dtype=moment.dtype)
