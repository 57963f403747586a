"""Pictures on disk with what is said of them beside: files of a folder, samples of a tar, one `Entry` for each.

Nothing is extracted and no picture is opened here. A link that leads out of the source is not followed: its picture is
an entry that says so.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipeline.base import HeadraceError
from pipeline.intake.lists import CAPTION_NAMES
from pipeline.shards import Member, split_name, tar_members

PICTURES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
CAPTION_FILES = ("txt", "caption", "json")
MAX_TEXT = 16 << 20  # bytes of a caption file


@dataclass
class Entry:
    """A picture to be: where its bytes lie, what is said of it, or why it has no bytes.

    `path` stands for the URL: relative to the source, with `/`, and the tar's name before that of a member. `row` is
    its row in the table that its chunk comes with.
    """

    path: str
    file: str
    offset: int | None = None
    length: int | None = None
    caption: str | None = None
    captions: list[str] | None = None
    error: str | None = None
    row: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below `root` and the names in it, sorted; hidden ones are passed over, links to folders too."""
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if _is_source(Path(folder) / name))
        yield Path(folder), sorted(name for name in names if name[0] != ".")


def _is_source(folder: Path) -> bool:
    """Whether pictures are looked for in it: not in hidden folders, nor in what a run of ours left there."""
    return folder.name[0] != "." and folder.name != "__MACOSX" and not (folder / ".markers").is_dir()


def _unreadable(error: OSError) -> None:
    raise HeadraceError(f"{error.filename} cannot be opened: {error.strerror}", hint="check its permissions") from None


def inside(root: Path, path: Path) -> Path | None:
    """The file that `path` is or links to, None where that lies outside of `root` or is nothing."""
    if not path.is_symlink():
        return path
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    return target if target.is_relative_to(root) else None


def as_name(path: Path) -> str:
    """A path as UTF-8 text: with `/`, and bytes that are none as `\\xNN`."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def open_file(root: Path, name: str) -> IO[bytes]:
    """Open the file that an `Entry.file` names, never through a link; what is no regular file is an OSError."""
    path = root / name
    if not path.is_file() and "\\x" in name:
        raw = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), name.encode())
        path = root / os.fsdecode(raw)
    if not path.is_file():
        raise FileNotFoundError(2, "it is no file")
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


# --- a folder ----------------------------------------------------------------------------------------


def folder_entries(root: Path) -> Iterator[Entry]:
    for folder, names in folders(root):
        present = set(names)
        for name in names:
            if Path(name).suffix.lower()[1:] in PICTURES:
                yield _folder_entry(root, folder / name, present)


def _folder_entry(root: Path, path: Path, present: set[str]) -> Entry:
    name, target = as_name(path.relative_to(root)), inside(root, path)
    entry = Entry(name, name)
    if target is None:
        entry.error = "outside: a link that leads out of the source or nowhere"
    elif not target.is_file():
        entry.error = "unreadable: it is no regular file"
    else:
        entry.file = as_name(target.relative_to(root))
    for kind in CAPTION_FILES:
        beside = path.with_suffix(f".{kind}")
        if beside.name in present and (readable := inside(root, beside)) is not None and readable.is_file():
            with open_file(root, as_name(readable.relative_to(root))) as file:
                _say(entry, kind, file.read(MAX_TEXT), lines=True)
    return entry


def _say(entry: Entry, kind: str, data: bytes, *, lines: bool) -> None:
    """Put what a caption file says into the entry; earlier kinds prevail. With `lines` each line is a caption."""
    text = data.decode("utf-8-sig", "replace")
    if kind == "json":
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return
        if isinstance(said, dict):
            entry.extra = said
            lowered = {key.lower(): value for key, value in reversed(said.items())}
            found = next((lowered[name] for name in CAPTION_NAMES if lowered.get(name)), None)
            caption, captions = first_caption(found)
            entry.caption, entry.captions = entry.caption or caption, entry.captions or captions
        return
    caption, captions = first_caption([line.strip() for line in text.splitlines()] if lines else text)
    entry.caption, entry.captions = entry.caption or caption, entry.captions or captions


def first_caption(value: Any) -> tuple[str | None, list[str] | None]:
    """A caption, and where several were given, all of them: from a text or a list of texts, blank ones left out."""
    if isinstance(value, list):
        texts = [text for text in value if isinstance(text, str) and text.strip()]
        return (texts[0] if texts else None), (texts if len(texts) > 1 else None)
    return (value if isinstance(value, str) and value else None), None


# --- tars --------------------------------------------------------------------------------------------


def _members(tar: Path) -> list[Member]:
    try:
        return tar_members(tar)
    except HeadraceError as error:
        hint = "mend it or fetch it again, or move it out of the source"
        raise HeadraceError(error.message, hint=hint) from None


def tar_entries(root: Path, tar: Path, alone: bool = False) -> Iterator[Entry]:
    """The samples of a WebDataset tar; where it holds no captions at all, each picture by itself.

    A tar that is `alone` is itself the source, so that its name is no part of the members' paths.
    """
    name = as_name(tar.relative_to(root))
    members = _members(tar)
    told = any(split_name(member.name)[1] in CAPTION_FILES for member in members)
    keyed = itertools.groupby(members, key=lambda member: split_name(member.name)[0] if told else member.name)
    with open_file(root, name) as file:
        for _, group in keyed:
            sample = list(group)
            picture = _picture(sample)
            if picture is None:
                continue
            entry = Entry(picture.name if alone else f"{name}/{picture.name}", name, picture.offset, picture.length)
            kinds = {split_name(member.name)[1]: member for member in sample}
            for kind in CAPTION_FILES:
                if kind in kinds and told:
                    file.seek(kinds[kind].offset)
                    _say(entry, kind, file.read(min(kinds[kind].length, MAX_TEXT)), lines=False)
            yield entry


def _picture(sample: list[Member]) -> Member | None:
    """The sample's picture: one with a plain extension before `seg.png` and the like; AppleDouble files are none."""
    real = [member for member in sample if not member.name.rpartition("/")[2].startswith(".")]
    plain = (member for member in real if split_name(member.name)[1] in PICTURES)
    return next(plain, None) or next((m for m in real if m.name.rpartition(".")[2].lower() in PICTURES), None)
