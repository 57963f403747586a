"""The perceptual hash: 64 bits that change little when a picture is resized or encoded again."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.signals import Picture, SignalOptions

if TYPE_CHECKING:
    import pyarrow as pa


def settings(options: SignalOptions) -> dict[str, Any]:
    """What the bytes depend on."""
    return {"version": 1, "imagehash": version("imagehash")}


def load(options: SignalOptions) -> Phash:
    """Ready to work."""
    return Phash()


class Phash:
    """`phash`: imagehash's DCT hash, its first bit the highest."""

    reads = frozenset({"pixels"})

    def schema(self) -> pa.Schema:
        """One column."""
        import pyarrow as pa

        return pa.schema([("phash", pa.uint64())])

    def look(self, picture: Picture) -> int | None:
        """The hash itself."""
        import imagehash
        from PIL import Image

        if picture.pixels is None:
            return None
        return int(str(imagehash.phash(Image.fromarray(picture.pixels))), 16)

    def columns(self, seen: Sequence[int]) -> pa.Table:
        """The hashes."""
        import pyarrow as pa

        return pa.table([pa.array(seen, pa.uint64())], schema=self.schema())
