"""Pictures of a user: reading one or a mask, writing PNG files and a labelled grid. It knows nothing of models."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import MISSING, HeadraceError, write_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FOLDER = "pictures"  # of a run: what was drawn with it
MAX_PIXELS = 1 << 26
MASK_GREY = 0.05  # share of a mask's pixels that may be neither black nor white: its edges
FEW = 24  # grey levels from black or white that still count as such (a mask saved as JPEG)
CELL = 128  # pixels: smaller pictures are enlarged in a grid
LABEL = 200  # pixels beside a row
GAP = 6
TEXT = 14


def read_picture(path: Path) -> NDArray[np.uint8]:
    """RGB (H, W, 3), upright, what is transparent on white.

    Raises:
        HeadraceError: no such file (code 3), no picture, one of more than 2^26 pixels, or one whose numbers have no
            white.
    """
    import numpy as np
    from PIL import Image

    picture = _open(path)
    if picture.mode in ("I", "F"):
        hint = "save it as a PNG of 8 or 16 bits"
        raise HeadraceError(f"{path} holds numbers of which none is known to be white", hint=hint)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return np.array(picture.convert("RGB"))


def read_mask(path: Path, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where to paint (H, W): true where the file is white, false where it is black.

    Raises:
        HeadraceError: as `read_picture`; also where it is not black and white, or not of `size` (H, W).
    """
    import numpy as np

    values = read_picture(path).astype(np.int16)
    dark, light = (values <= FEW).all(axis=2), (values >= 255 - FEW).all(axis=2)
    grey = 1 - float((dark | light).mean())
    if grey > MASK_GREY:
        share = f"{grey:.0%} of its pixels are neither black nor white"
        raise HeadraceError(f"{path} is no mask: {share}", hint="a mask is white where to paint and black elsewhere")
    if values.shape[:2] != size:
        found, wanted = (f"{width}×{height}" for height, width in (values.shape[:2], size))
        hint = "make the mask as large as the picture"
        raise HeadraceError(f"the mask {path} is {found}, the picture {wanted}", hint=hint)
    painted: NDArray[np.bool_] = values.mean(axis=2) >= 128
    return painted


def write_png(path: Path, picture: NDArray[np.uint8], notes: Mapping[str, str]) -> None:
    """Write one RGB picture (H, W, 3), with `notes` as its text fields."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in notes.items():
        info.add_itxt(key, value)
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG", pnginfo=info)
    write_bytes(path, data.getvalue())


def write_sheet(folder: Path, rows: Mapping[str, Sequence[NDArray[np.uint8]]], columns: Sequence[str] = ()) -> Path:
    """Write `grid.png` with a row of pictures per label; returns its path."""
    sheet = folder / "grid.png"
    write_png(sheet, grid(list(rows.values()), list(rows), columns), {})
    return sheet


def file_name(text: str) -> str:
    """A text as a short file name: its letters and digits of any script, joined by hyphens."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:48].rstrip("-") or "picture"


def grid(
    rows: Sequence[Sequence[NDArray[np.uint8]]], labels: Sequence[str], columns: Sequence[str] = ()
) -> NDArray[np.uint8]:
    """One RGB picture: a row per label (wrapped, on the left), headings above the columns; all cells of equal size.

    Pictures (H, W, 3) may differ in size: each is enlarged by a whole factor, without smoothing, to what a cell takes.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TEXT)
    side = max(CELL, *(max(picture.shape[:2]) for row in rows for picture in row))
    top = GAP + (TEXT + GAP if columns else 0)
    size = LABEL + GAP + (side + GAP) * max(map(len, rows)), top + (side + GAP) * len(rows)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(columns):
        draw.text((LABEL + GAP + number * (side + GAP), GAP), _fit(text, side, font), fill="black", font=font)
    for line, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + line * (side + GAP)
        text = "\n".join(_wrap(label, LABEL - 2 * GAP, font)[: side // (TEXT + 5)])
        draw.multiline_text((GAP, y), text, fill="black", font=font, spacing=4)
        for number, picture in enumerate(row):
            factor = side // max(picture.shape[:2])
            large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            sheet.paste(Image.fromarray(large), (LABEL + GAP + number * (side + GAP), y))
    return np.array(sheet)


def _open(path: Path) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = Image.open(path)
        if picture.width * picture.height > MAX_PIXELS:
            size = f"{picture.width}×{picture.height}"
            raise HeadraceError(f"{path} is too large: {size}", hint="give it at no more than 8192×8192")
        picture.load()
        return ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise HeadraceError(f"there is no picture {path}", hint="check the path", code=MISSING) from None
    except UnidentifiedImageError:
        raise HeadraceError(f"{path} is no picture", hint="give a PNG, JPEG or WebP file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HeadraceError(f"{path} cannot be read: {error}", hint="save it again as PNG") from None


def _wrap(text: str, width: int, font: Any) -> list[str]:
    """Lines no wider than `width` pixels, broken between words, and within one that is too long alone."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while font.getlength(lines[-1]) > width:
            head = _fit(lines[-1], width, font)
            lines[-1:] = [head, lines[-1][len(head) :]]
    return lines


def _fit(text: str, width: int, font: Any) -> str:
    """The longest start of a text, of one character at least, that is no wider than `width` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text
