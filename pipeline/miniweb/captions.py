"""Scenes in words: true captions in many phrasings, and the same phrasings made wrong by one exchange."""

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

from pipeline.miniweb.content import INVERSE, Object, Scene

_BETWEEN = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "directly above"),
    "below": ("below", "under", "beneath"),
}
_PLACES = {
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
_OPENINGS = ("", "a picture of ", "a drawing of ", "an image of ", "an illustration of ")
_GROUNDS = (
    "{text} on {a_colour} background",
    "{text} against {a_colour} background",
    "{text}, {colour} background",
    "{text} in front of {a_colour} backdrop",
)
# what a caption names beside shape, colour and relation: (sizes, textures, background)
_NAMED = (
    (True, True, True),
    (True, True, True),
    (True, True, False),
    (True, False, True),
    (False, True, True),
)


@dataclass(frozen=True)
class _Phrasing:
    sizes: bool
    textures: bool
    background: bool
    flipped: bool
    placed: bool  # 'X on the left and Y on the right' rather than 'X to the left of Y'
    word: int
    opening: str
    ground: str
    sentence: bool


@lru_cache(maxsize=4096)
def _phrasing(variant: int) -> _Phrasing:
    bits = iter(hashlib.sha256(f"variant/{variant}".encode()).digest())
    sizes, textures, background = _NAMED[next(bits) % len(_NAMED)]
    return _Phrasing(
        sizes=sizes,
        textures=textures,
        background=background,
        flipped=next(bits) % 2 == 1,
        placed=next(bits) % 4 == 0,
        word=next(bits) % 3,
        opening=_OPENINGS[next(bits) % len(_OPENINGS)] if next(bits) % 2 else "",
        ground=_GROUNDS[next(bits) % len(_GROUNDS)],
        sentence=next(bits) % 3 == 0,
    )


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _named(thing: Object, how: _Phrasing) -> str:
    words = [thing.size] if how.sizes else []
    if how.textures and thing.texture != "plain":
        words.append(thing.texture)
    return _article(" ".join([*words, thing.colour, thing.shape]))


def _told(objects: tuple[Object, ...], relation: str | None, background: str, how: _Phrasing) -> str:
    if relation is None:
        text = _named(objects[0], how)
    else:
        first, second = objects
        if how.flipped:
            first, second, relation = second, first, INVERSE[relation]
        one, other = _named(first, how), _named(second, how)
        if how.placed:
            here, there = _PLACES[relation]
            text = f"{one} {here} and {other} {there}"
        else:
            text = f"{one} {_BETWEEN[relation][how.word]} {other}"
    text = how.opening + text
    if how.background:
        text = how.ground.format(text=text, colour=background, a_colour=_article(background))
    return text[0].upper() + text[1:] + "." if how.sentence else text


def caption(scene: Scene, variant: int) -> str:
    """An English caption of the scene; any `variant` >= 0 is one phrasing, the same for every scene.

    Every phrasing names shape and colour of all objects and the relation, and at least two of sizes, textures
    and background.
    """
    return _told(scene.objects, scene.relation, scene.background, _phrasing(variant))


def placed(scene: Scene, which: int, variant: int) -> tuple[str, str]:
    """One object of a scene of two in words, where the other is not drawn: its true place, and the opposite one."""
    how = _phrasing(variant)
    relation = scene.relation or ""
    name, (here, there) = _named(scene.objects[which], how), _PLACES[INVERSE[relation] if which else relation]
    true, false = (f"{how.opening}{name} {place}" for place in (here, there))
    return true, false


def exchanged(scene: Scene, variant: int) -> list[Scene]:
    """The scenes that `caption` of this `variant` would tell of, were colours, sizes or the relation exchanged, in that
    order: only those that it tells apart from the true one."""
    if scene.relation is None:
        return []
    first, second = scene.objects
    found = []
    if first.colour != second.colour:
        found.append((replace(first, colour=second.colour), replace(second, colour=first.colour)))
    if _phrasing(variant).sizes and first.size != second.size:
        found.append((replace(first, size=second.size), replace(second, size=first.size)))
    turned = replace(scene, relation=INVERSE[scene.relation])
    return [*(replace(scene, objects=pair) for pair in found), turned]
