"""A CLIP's text tower and tokenizer as the files that transformers' CLIPTextModelWithProjection and CLIPTokenizer load.

It renames weights and writes down settings, without transformers; a tower that computes anything else is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import REFUSED, HeadraceError, write_bytes, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.clip import Clip

START, END = "<|startoftext|>", "<|endoftext|>"
OUTSIDE = ("visual.", "logit_scale", "logit_bias")  # of the CLIP, but not of its text tower
TOP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def write_text_encoder(folder: Path, clip: Clip) -> None:
    """Write config and float32 weights.

    Raises:
        HeadraceError: the tower is not open_clip's stock one (code 4).
    """
    from safetensors.torch import save

    config, weights = text_config(clip), text_weights(clip)
    write_json(folder / "config.json", config)
    write_bytes(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))


def write_tokenizer(folder: Path, clip: Clip) -> None:
    """Write vocabulary, merges and settings.

    Texts are padded with the end mark, as CLIPTokenizer does it, where open_clip pads with 0. Nothing before the first
    end mark sees the padding, and 0 is “!”, which must not become a special token.

    Raises:
        HeadraceError: the tokenizer is not open_clip's stock one (code 4).
    """
    tokenizer = _stock_tokenizer(clip)
    names = {tokenizer.sot_token_id: START, tokenizer.eot_token_id: END}
    vocabulary = {names.get(number, token): number for token, number in tokenizer.encoder.items()}
    merges = "".join(f"{' '.join(pair)}\n" for pair in tokenizer.bpe_ranks)
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_bytes(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
    write_bytes(folder / "merges.txt", f"#version: 0.2\n{merges}".encode())
    write_json(folder / "special_tokens_map.json", marks)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": clip.context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**settings, **marks})


def text_config(clip: Clip) -> dict[str, Any]:
    """The settings of CLIPTextConfig that make it compute what this text tower does."""
    model, tokenizer = _stock_model(clip), _stock_tokenizer(clip)
    blocks = model.transformer.resblocks
    first = blocks[0]
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "dtype": "float32",
        "hidden_size": first.attn.embed_dim,
        "intermediate_size": first.mlp.c_fc.out_features,
        "projection_dim": clip.dimension,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": first.attn.num_heads,
        "max_position_embeddings": clip.context_length,
        "vocab_size": model.vocab_size,
        "hidden_act": _activation(clip, first.mlp.gelu),
        "layer_norm_eps": model.ln_final.eps,
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }


def text_weights(clip: Clip) -> dict[str, Tensor]:
    """The tower's weights, float32, by transformers' names."""
    given = {name: value for name, value in _stock_model(clip).state_dict().items() if not name.startswith(OUTSIDE)}
    if "text_projection" in given:  # a matrix that is multiplied from the right
        given["text_projection.weight"] = given.pop("text_projection").T
    weights: dict[str, Tensor] = {}
    for name, value in given.items():
        renamed = _renamed(name, value)
        if not renamed:
            raise _not_stock(clip, f"it has a weight {name}")
        for new, part in renamed.items():
            weights[new] = part.detach().float().cpu().contiguous().clone()
    return weights


def _renamed(name: str, value: Tensor) -> dict[str, Tensor]:
    """One weight by its new name, or a joint projection as its three parts; nothing where the name is unknown."""
    if name in TOP:
        return {TOP[name]: value}
    number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
    place = f"text_model.encoder.layers.{number}"
    if rest.startswith("attn.in_proj_"):
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{place}.self_attn.{which}_proj.{rest.removeprefix('attn.in_proj_')}": part for which, part in parts}
    module, _, kind = rest.rpartition(".")
    return {f"{place}.{IN_BLOCK[module]}.{kind}": value} if module in IN_BLOCK else {}


def _activation(clip: Clip, module: nn.Module) -> str:
    kind = type(module).__name__
    name = {("QuickGELU", ""): "quick_gelu", ("GELU", "none"): "gelu", ("GELU", "tanh"): "gelu_pytorch_tanh"}
    try:
        return name[kind, getattr(module, "approximate", "")]
    except KeyError:
        raise _not_stock(clip, f"its activation is {kind}") from None


def _stock_model(clip: Clip) -> Any:
    """The model, if its text tower is the one that transformers has: causal, read at the first end mark."""
    model = clip.model
    if type(model).__name__ != "CLIP" or not hasattr(model, "text_pool_type"):
        raise _not_stock(clip, f"it is a {type(model).__name__}")
    if model.text_pool_type != "argmax" or model.attn_mask is None or model.text_projection is None:
        raise _not_stock(clip, f"it is not causal, projected, and read at the end mark ({model.text_pool_type})")
    return model


def _stock_tokenizer(clip: Clip) -> Any:
    tokenizer = clip.tokenizer
    stock = (
        type(tokenizer).__name__ == "SimpleTokenizer"
        and tokenizer.clean_fn.__name__ == "_clean_lower"
        and tokenizer.reduction_fn is None
        and tokenizer.vocab_size == getattr(clip.model, "vocab_size", None)
    )
    if not stock:
        raise _not_stock(clip, "its tokenizer is another one")
    return tokenizer


def _not_stock(clip: Clip, why: str) -> HeadraceError:
    message = f"the text tower of CLIP {clip.name} has no form in transformers: {why}"
    return HeadraceError(message, hint="export a run whose CLIP has open_clip's own text tower", code=REFUSED)
