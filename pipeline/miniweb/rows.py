"""Rows of the mini-web's list, and the maker of clean ones: each with a scene, a caption and a URL of its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.miniweb import hosts
from pipeline.miniweb.content import Scene
from pipeline.miniweb.faults import CLEAN
from pipeline.miniweb.pictures import Picture
from pipeline.miniweb.replies import Reply
from pipeline.miniweb.scenes import caption, combination, held_out, scene, swaps

UNIQUE = 4000  # so many scenes of one list have combinations of their own
SIDES = (192, 208, 224, 240, 256)
_FOLDERS = ("images", "media", "2019/04", "uploads", "p", "gallery/thumbs")
_EXTENSIONS = {"jpeg": "jpg", "tiff": "tif"} | {name: name for name in ("png", "gif", "webp", "bmp")}


@dataclass(frozen=True)
class PlannedUrl:
    """One row of the list. `routes` are the answers that it needs: URL and reply."""

    url: str | None
    caption: str | None
    fault: str
    expected: str
    split: str | None
    swaps: tuple[str, ...]
    group: str | None
    scene: Scene | None
    routes: tuple[tuple[str, Reply], ...] = ()

    @property
    def shown(self) -> Scene:
        """The scene, of a row that has one."""
        assert self.scene is not None, "only rows with a scene are varied"
        return self.scene


class Maker:
    """Makes rows: scenes in the order of the seed, and URLs that no other row has."""

    def __init__(self, seed: int, unique: bool) -> None:
        self.seed = seed
        self.unique = unique
        self.copies = 0
        self._next_scene = 0
        self._rows = 0
        self._taken: set[str] = set()

    def scene(self, held: bool | None = False, fits: Callable[[Scene], bool] | None = None) -> Scene:
        """The next scene that is held out or not (None: either) and `fits`."""
        while True:
            found = scene(self.seed, self._next_scene)
            self._next_scene += 1
            name = combination(found)
            if held is not None and held_out(found) != held:
                continue
            if (fits is None or fits(found)) and not (self.unique and name in self._taken):
                if len(self._taken) < UNIQUE:
                    self._taken.add(name)
                return found

    def row(
        self,
        reply: Reply | None = None,
        *,
        shown: Scene | None = None,
        held: bool | None = False,
        host: str | None = None,
        folder: str | None = None,
        extension: str | None = None,
        side: int = 0,
        text: str | None = "",
        **picture: Any,
    ) -> PlannedUrl:
        """A row that is clean but for what is asked. `picture`: fields of `Picture`; `text`: another caption."""
        number = self._rows
        self._rows += 1
        shown = shown or self.scene(held)
        side = side or SIDES[number % len(SIDES)]
        planned = Picture(shown, side=side, **picture)
        ending = extension if extension is not None else _EXTENSIONS.get(planned.form.partition("_")[0], "jpg")
        url = self.url(shown, number, host, folder, ending)
        reply = reply or Reply()
        reply = replace(reply, picture=planned) if not reply.picture else reply
        variant = self.seed * 1_000_003 + number
        return PlannedUrl(
            url=url,
            caption=caption(shown, variant) if text == "" else text,
            fault=CLEAN,
            expected="keep",
            split="val" if held_out(shown) else "train",
            swaps=tuple(swaps(shown, variant)) if text == "" else (),
            group=None,
            scene=shown,
            routes=((url, reply),),
        )

    def url(
        self,
        shown: Scene,
        number: int,
        host: str | None = None,
        folder: str | None = None,
        extension: str = "jpg",
    ) -> str:
        host = host or hosts.ORDINARY[number % len(hosts.ORDINARY)]
        folder = folder if folder is not None else _FOLDERS[number % len(_FOLDERS)]
        slug = "-".join(f"{thing.colour}-{thing.shape}" for thing in shown.objects)
        dot = "." if extension else ""
        return f"http://{host}/{folder}/{slug}-{self.seed:x}{number:05d}{dot}{extension}"

    def other(self, row: PlannedUrl, **changes: Any) -> PlannedUrl:
        """The row with another URL for the same answer; `changes` as in `url`."""
        shown, number = row.shown, self._rows
        self._rows += 1
        return replace(row, url=self.url(shown, number, **changes))
