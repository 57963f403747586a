"""Scenes as pictures: antialiased, the same picture at every size, varied in all that no caption names.

The scene's `seed` decides exact places, rotation, exact shades, light and the soft clutter behind the objects.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.miniweb.content import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene, generator

_MARGIN = 0.012
_OVERSAMPLE = 4
_CLUTTER = 6  # the background's soft clutter is a grid of this many random cells a side


@lru_cache(maxsize=len(SHAPES))
def _outline(shape: str) -> NDArray[np.float64]:
    """[points, 2] polygon in a disc of radius 1, y downwards; empty for shapes made of discs."""
    if shape == "square":
        corners = [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    elif shape == "triangle":
        corners = [(0.0, -1.0), (1.0, 0.82), (-1.0, 0.82)]
    elif shape == "cross":
        w = 0.33
        corners = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w)]
        corners += [(w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
    elif shape == "star":
        turns = [(1.08 if k % 2 == 0 else 0.45, math.pi * k / 5) for k in range(10)]
        corners = [(r * math.sin(a), -r * math.cos(a)) for r, a in turns]
    elif shape == "heart":
        turns2 = [2 * math.pi * k / 60 for k in range(60)]
        corners = [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
            )
            for t in turns2
        ]
    else:
        corners = []
    return np.array(corners, dtype=np.float64).reshape(-1, 2)


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _shape_mask(shape: str, box: int, centre: tuple[float, float], radius: float, turn: float) -> Image.Image:
    """Antialiased mask of `box` pixels a side; centre and radius in pixels of that box, turn in radians."""
    k = _OVERSAMPLE
    mask = Image.new("L", (box * k, box * k), 0)
    pen = ImageDraw.Draw(mask)
    x, y, r = centre[0] * k, centre[1] * k, radius * k
    cos, sin = math.cos(turn), math.sin(turn)
    points = _outline(shape)
    if len(points):
        moved = points @ np.array([[cos, sin], [-sin, cos]]) * r + (x, y)
        pen.polygon(moved.ravel().tolist(), fill=255)
    else:
        _disc(pen, x, y, r, 255)
        if shape == "ring":
            _disc(pen, x, y, r * 0.54, 0)
        elif shape == "crescent":
            _disc(pen, x + 0.52 * r * cos, y + 0.52 * r * sin, r * 0.8, 0)
    return mask.reduce(k)


def _texture_mask(texture: str, box: int, centre: tuple[float, float], radius: float, turn: float) -> Image.Image:
    """Antialiased mask of the stripes or dots; their pitch follows the object's radius."""
    k = _OVERSAMPLE
    mask = Image.new("L", (box * k, box * k), 0)
    pen = ImageDraw.Draw(mask)
    x, y, r = centre[0] * k, centre[1] * k, radius * k
    cos, sin = math.cos(turn), math.sin(turn)
    if texture == "striped":
        pitch, half = 0.5 * r, 0.125 * r
        for n in range(-3, 4):
            cx, cy = x - sin * n * pitch, y + cos * n * pitch
            corners = [
                (cx + s * 2 * r * cos - t * half * sin, cy + s * 2 * r * sin + t * half * cos)
                for s, t in ((-1, -1), (1, -1), (1, 1), (-1, 1))
            ]
            pen.polygon(corners, fill=255)
    else:
        pitch = 0.56 * r
        for row in range(-3, 4):
            for column in range(-3, 4):
                u, v = (column + 0.5 * (row % 2)) * pitch, row * pitch * 0.87
                _disc(pen, x + u * cos - v * sin, y + u * sin + v * cos, 0.16 * r, 255)
    return mask.reduce(k)


def _shades(colour: str, jitter: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The exact shade of a named colour, and the shade of its stripes or dots; jitter: 4 values in 0..1."""
    shade = np.clip(np.array(COLOURS[colour]) + (jitter[:3] - 0.5) * 26 + (jitter[3] - 0.5) * 20, 0, 255)
    mark = shade * 0.5 if colour != "black" else shade + 90.0
    return shade, mark


def _paint(
    canvas: Image.Image, thing: Object, at: tuple[float, float], radius: float, noise: NDArray[np.float64]
) -> None:
    """Draw one object; `at` and `radius` as shares of the side, noise: 8 values in 0..1."""
    side = canvas.width
    x, y, r = at[0] * side, at[1] * side, radius * side
    left, top = math.floor(x - 1.12 * r) - 1, math.floor(y - 1.12 * r) - 1
    box = math.ceil(2.24 * r) + 3
    centre = (x - left, y - top)
    shade, mark = _shades(thing.colour, noise[:4])
    light = 1.0 + 0.16 * (noise[4:8].reshape(2, 2, 1) - 0.5)
    lit = Image.fromarray(np.clip(shade * light, 0, 255).astype(np.uint8))
    tile = lit.resize((box, box), Image.Resampling.BILINEAR)
    if thing.texture != "plain":
        turn = (noise[0] - noise[3]) * math.pi
        tile.paste(tuple(int(v) for v in mark), mask=_texture_mask(thing.texture, box, centre, r, turn))
    canvas.paste(tile, (left, top), _shape_mask(thing.shape, box, centre, r, (noise[7] - 0.5) * 0.5))


def _ground(scene: Scene, side: int, noise: NDArray[np.float64]) -> Image.Image:
    """The background: its named colour, a slope of light and soft clutter; noise: 5 + _CLUTTER² values in 0..1."""
    shade = np.array(BACKGROUNDS[scene.background]) + (noise[:3] - 0.5) * 18
    across = np.linspace(-0.5, 0.5, _CLUTTER)
    slope = 50 * ((noise[3] - 0.5) * across[None, :] + (noise[4] - 0.5) * across[:, None])
    clutter = 66 * (noise[5:].reshape(_CLUTTER, _CLUTTER) - 0.5)
    small = np.clip(shade + (slope + clutter)[..., None], 0, 255).astype(np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def _places(scene: Scene, noise: NDArray[np.float64]) -> list[tuple[tuple[float, float], float]]:
    """Centre and radius of each object as shares of the side; noise: 7 values in 0..1."""
    radii = [SIZES[thing.size] * (0.95 + 0.1 * noise[k]) for k, thing in enumerate(scene.objects)]
    if scene.relation is None:
        r = radii[0]
        return [((0.5 + 0.36 * (noise[2] - 0.5), 0.5 + 0.36 * (noise[3] - 0.5)), r)]
    placed = []
    for k, r in enumerate(radii):
        low, high = r + _MARGIN, 0.5 - r - 0.004
        along = low + max(0.0, high - low) * noise[2 + k]
        if (k == 0) == (scene.relation in ("right of", "below")):
            along = 1.0 - along
        across = 0.5 + 0.34 * (noise[4] - 0.5) + 0.17 * (noise[5 + k] - 0.5)
        across = min(max(across, r + _MARGIN), 1 - r - _MARGIN)
        placed.append(((along, across) if "of" in scene.relation else (across, along), r))
    return placed


def draw(scene: Scene, side: int = 256, only: int | None = None) -> Image.Image:
    """The scene, or `only` one of its objects where it stands in it, as an RGB picture of `side` by `side` pixels.

    Another side shows the same picture.
    """
    noise = generator("nuisance", scene.seed).random(7 + 2 * 8 + 5 + _CLUTTER**2)
    canvas = _ground(scene, side, noise[23:])
    for k, (at, radius) in enumerate(_places(scene, noise[:7])):
        if only not in (None, k):
            continue
        _paint(canvas, scene.objects[k], at, radius, noise[7 + 8 * k : 15 + 8 * k])
    return canvas
