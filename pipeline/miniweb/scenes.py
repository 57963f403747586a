"""Scenes of the mini-web: which there are, which are held out, their pictures, their captions and wrong captions.

Everything is a pure function of its arguments. A scene holds what a caption may name (shapes, colours, sizes,
textures, one relation, a background) and one `seed` for what no caption names. This module knows nothing of URLs,
files or faults.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from pipeline.miniweb.captions import caption, exchanged, placed
from pipeline.miniweb.content import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Object,
    Scene,
    colours_on,
    generator,
)
from pipeline.miniweb.drawing import draw

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "Object",
    "Scene",
    "caption",
    "colours_on",
    "combination",
    "differences",
    "draw",
    "held_out",
    "placed",
    "reshaped",
    "scene",
    "swaps",
    "wrong_caption",
]

_SINGLE_SHARE = 0.06


def scene(seed: int, index: int) -> Scene:
    """The `index`-th scene of the sequence `seed`; the same on every machine."""
    draws = generator("scene", seed, index).random(16).tolist()

    def pick(values: tuple[str, ...]) -> str:
        return values[int(draws.pop() * len(values))]

    background = pick(tuple(BACKGROUNDS))
    allowed = colours_on(background)

    def make() -> Object:
        return Object(pick(SHAPES), pick(allowed), pick(tuple(SIZES)), pick(("plain", *TEXTURES)))

    nuisance = int(draws.pop() * 2**48)
    first = make()
    if draws.pop() < _SINGLE_SHARE:
        return Scene((first,), None, background, nuisance)
    second, relation = make(), pick(RELATIONS)
    if (second.shape, second.colour) == (first.shape, first.colour):
        second = replace(second, shape=SHAPES[(SHAPES.index(first.shape) + 1) % len(SHAPES)])
    return Scene((first, second), relation, background, nuisance)


def combination(scene: Scene) -> str:
    """Shapes, colours and relation in canonical form: 'A left of B' and 'B right of A' are one."""
    names = [f"{thing.colour} {thing.shape}" for thing in scene.objects]
    if scene.relation is None:
        return names[0]
    if scene.relation in ("right of", "below"):
        return f"{names[1]} {INVERSE[scene.relation]} {names[0]}"
    return f"{names[0]} {scene.relation} {names[1]}"


def held_out(scene: Scene) -> bool:
    """Whether no CLIP and no trainer may ever train on this combination; one in 16 is."""
    return hashlib.sha256(combination(scene).encode()).digest()[0] < 16


def swaps(scene: Scene, variant: int) -> list[str]:
    """The scene's caption with colours, sizes or the relation exchanged, in that order; only those that are wrong.

    A scene to train on has only those that may be trained on themselves: captions that are never right would betray
    what is held out.
    """
    others = exchanged(scene, variant)
    return [caption(other, variant) for other in others if held_out(scene) or not held_out(other)]


def reshaped(scene: Scene, shapes: Sequence[str]) -> Scene:
    """The scene with other shapes, one for each object, all else as it was."""
    return replace(scene, objects=tuple(replace(o, shape=s) for o, s in zip(scene.objects, shapes, strict=True)))


def differences(one: Scene, other: Scene) -> int:
    """How many shapes and colours differ, objects matched as well as can be; an object left over counts nothing."""
    if len(one.objects) < len(other.objects):
        one, other = other, one

    def apart(order: tuple[Object, ...]) -> int:
        pairs = zip(order, other.objects, strict=False)
        return sum((a.shape != b.shape) + (a.colour != b.colour) for a, b in pairs)

    return min(apart(one.objects), apart(one.objects[::-1]))


def wrong_caption(shown: Scene, seed: int, index: int, variant: int) -> str:
    """The caption of another scene that differs from `shown` in at least two shapes or colours."""
    for step in range(64):
        other = scene(seed, index * 64 + step)
        if differences(shown, other) >= 2:
            return caption(other, variant)
    raise AssertionError("64 scenes in a row that look like this one")
