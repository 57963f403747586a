"""What a scene of the mini-web can hold, as plain values; it draws nothing and words nothing."""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 38),
    "orange": (255, 136, 10),
    "yellow": (255, 224, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "purple": (130, 30, 165),
    "black": (18, 18, 22),
    "white": (252, 252, 252),
}
SIZES: dict[str, float] = {"small": 0.15, "large": 0.225}  # radius, as a share of the picture's side
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (138, 138, 138),
    "pink": (244, 164, 190),
    "sandy": (206, 176, 128),
    "brown": (116, 74, 44),
    "teal": (24, 128, 132),
    "aqua": (150, 222, 220),
    "lavender": (184, 172, 226),
    "navy": (24, 34, 88),
}
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_TOO_CLOSE = 105.0  # an object's colour keeps at least this distance (RGB, 0..441) from its background


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    size: str
    texture: str


@dataclass(frozen=True)
class Scene:
    """One or two objects; with two, `objects[0]` stands `relation` `objects[1]`."""

    objects: tuple[Object, ...]
    relation: str | None
    background: str
    seed: int


@lru_cache(maxsize=len(BACKGROUNDS))
def colours_on(background: str) -> tuple[str, ...]:
    """The object colours that stand out from this background."""
    ground = BACKGROUNDS[background]
    return tuple(name for name, rgb in COLOURS.items() if math.dist(rgb, ground) >= _TOO_CLOSE)


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers that depend on `key` alone."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
