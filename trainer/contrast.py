"""What a CLIP's loss adds to open_clip's own, and its text tower without padding: tensors in, tensors out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from trainer.evaluate_clip import GOOD_COSINE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LENGTH_GROUPS = 4  # texts are computed in so many groups of like length


def threshold_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """open_clip's sigmoid loss with its boundary fixed at a cosine of 0.28: right pairs above, unrelated below."""
    from open_clip.loss import SigLipLoss

    loss: Tensor = SigLipLoss()(images, texts, scale, -GOOD_COSINE * scale)
    return loss


def centre_loss(images: Tensor, texts: Tensor) -> Tensor:
    """Mean square of the mean cosine of each row, and of each column, with what is unrelated to it."""
    cosine = images @ texts.T
    unrelated = cosine - cosine.diag().diag()
    others = len(cosine) - 1
    return (unrelated.sum(dim=0) / others).square().mean() + (unrelated.sum(dim=1) / others).square().mean()


def encode_texts(model: Any, tokens: Tensor) -> Tensor:
    """Unit vectors of token ids (N, context), as the model's own `encode_text` gives them, without most padding.

    The stock tower is causal, so what follows the end mark changes nothing and need not be computed: texts of like
    length go through it together.
    """
    import torch
    from open_clip.model import CLIP
    from torch.nn import functional as F

    if not isinstance(model, CLIP) or model.text_pool_type != "argmax" or model.attn_mask is None:
        whole: Tensor = model.encode_text(tokens, normalize=True)
        return whole
    end = tokens.argmax(dim=1)
    order = end.argsort(stable=True)
    embedded = model.token_embedding(tokens[:, : int(end.max()) + 1])
    with short_attention(tokens.device):
        parts = [_encode_trimmed(model, embedded[rows], end[rows]) for rows in order.chunk(LENGTH_GROUPS)]
    return F.normalize(torch.cat(parts)[order.argsort()], dim=-1)


def short_attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU, attention written out as matrix products: which takes a fifth off a training step of mini-clip."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return nullcontext() if device.type != "cpu" else sdpa_kernel([SDPBackend.MATH])


def _encode_trimmed(model: Any, embedded: Tensor, end: Tensor) -> Tensor:
    """Vectors (N, dimension), not normalized, of embedded tokens (N, L, width) whose end marks are at `end`."""
    import torch

    length = int(end.max()) + 1
    x = embedded[:, :length] + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x[torch.arange(len(x)), end])
    out: Tensor = x @ model.text_projection
    return out
