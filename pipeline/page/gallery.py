"""Which pictures a report shows, in which order, and their thumbnails.

Choosing is a function of the examined rows. Stored pictures are decoded by the sandbox's children, not here; a
thumbnail is made from plain pixels and holds nothing of the file it came from. It knows nothing of HTML.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import visible
from pipeline.page.charts import figure
from pipeline.page.examined import verdict_batches
from pipeline.page.plaintext import host
from pipeline.shards import DataDir, read_tar

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

SIDE = 160  # pixels of a thumbnail's longer side
THUMBNAIL_BYTES = 7_000
CAPTION = 140
COPIES = 5  # dropped pictures shown beside the one that was kept
NEAR, EXACT = "dedup:near", "dedup:exact"
UNSAFE = 0.5  # the probability from which a picture is covered where the recipe sets no threshold

Row = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """What a rule measures: the column, the sign that a value must meet, and what to call it."""

    column: str
    sign: str
    name: str
    unit: str = ""


MEASURED = {
    "min_side": Rule("short_side", "≥", "shorter side", " px"),
    "max_aspect": Rule("aspect", "≤", "aspect"),
    "min_words": Rule("words", "≥", "words"),
    "max_words": Rule("words", "≤", "words"),
    "min_p_en": Rule("p_en", "≥", "p(en)"),
    "max_nsfw": Rule("nsfw", "≤", "nsfw"),
    "min_clip": Rule("clip_sim", "≥", "clip"),
    "top_fraction": Rule("clip_sim", "≥", "clip"),
}


@dataclass(frozen=True)
class Picture:
    """A picture to show: where it lies, what stands below it, and whether it is covered until asked for."""

    shard: str
    key: str
    caption: str
    value: str
    host: str
    covered: bool


@dataclass(frozen=True)
class Strip:
    """The pictures of one reason: those it dropped, nearest to the threshold first, and those that just passed."""

    reason: str
    rows: int
    dropped: Sequence[Picture]
    passed: Sequence[Picture]


@dataclass(frozen=True)
class Cluster:
    """A kept picture and the copies of it that were dropped; `more` are not shown."""

    kept: Picture
    dropped: Sequence[Picture]
    more: int


@dataclass(frozen=True)
class Duplicates:
    """The duplicates to show: rows of the verdict file by the key kept, in order, and how many each key has in all.

    `total` counts the keys that were kept for others, `rows` the others.
    """

    groups: Mapping[str, Sequence[Row]]
    sizes: Mapping[str, int]
    total: int
    rows: int

    def keys(self) -> set[str]:
        """The keys of all pictures to show."""
        return {*self.groups, *(row["key"] for rows in self.groups.values() for row in rows)}


def duplicates(verdicts: Path, limit: int) -> Duplicates:
    """The largest groups of duplicates and those nearest to the threshold, half and half, `limit` in all."""
    import pyarrow as pa

    copies = [batch.select(["kept_key", "cosine"]) for batch in _copies(verdicts)]
    if not copies:
        return Duplicates({}, {}, 0, 0)
    grouped = pa.concat_tables(copies).group_by("kept_key").aggregate([("cosine", "min"), ([], "count_all")])
    names = ("kept_key", "count_all", "cosine_min")
    found = list(zip(*(grouped[name].to_pylist() for name in names), strict=True))
    largest = nsmallest(limit // 2, found, key=lambda item: (-item[1], item[0]))
    taken = {key for key, _, _ in largest}
    rest = (item for item in found if item[0] not in taken)
    nearest = nsmallest(limit - len(largest), rest, key=lambda item: (2.0 if item[2] is None else item[2], item[0]))
    chosen = [key for key, _, _ in (*largest, *nearest)]
    groups = _groups(verdicts, chosen)
    sizes = {key: size for key, size, _ in found if key in groups}
    return Duplicates(groups, sizes, len(found), sum(size for _, size, _ in found))


def _groups(verdicts: Path, kept: list[str]) -> dict[str, list[Row]]:
    """Of each kept key the dropped rows to show, least alike first."""
    import pyarrow as pa
    import pyarrow.compute as pc

    groups: dict[str, list[Row]] = {key: [] for key in kept}
    for batch in _copies(verdicts):
        for row in batch.filter(pc.is_in(batch["kept_key"], value_set=pa.array(kept, pa.string()))).to_pylist():
            groups[row["kept_key"]].append(row)
    return {key: sorted(rows, key=lambda row: (_cosine(row), row["key"]))[:COPIES] for key, rows in groups.items()}


def _copies(verdicts: Path) -> Iterator[pa.Table]:
    """The rows that were dropped for a kept one of the same set."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = ["key", "reason", "kept_key", "cosine", "hamming"]
    if not {*columns} <= {*pq.read_schema(verdicts).names}:
        return
    for batch in verdict_batches(verdicts, columns):
        copy = pc.is_in(batch["reason"], value_set=pa.array([NEAR, EXACT], pa.string()))
        yield pa.Table.from_batches([batch]).filter(pc.and_(copy, pc.is_valid(batch["kept_key"])))


def _cosine(row: Row) -> float:
    return 2.0 if row["cosine"] is None else float(row["cosine"])


class Chooser:
    """Picks pictures out of the examined rows (see `Examined.rows`)."""

    def __init__(self, rows: pa.Table, settings: Mapping[str, Any], each: int) -> None:
        import numpy as np

        self._rows, self._settings, self._each = rows, settings, each
        self._reasons = np.array(rows["reason"].to_pylist(), dtype=object)
        self._counted = rows["weight"].to_numpy() > 0
        self._uids = np.array(rows["uid"].to_pylist(), dtype=object)
        self._unsafe = settings.get("max_nsfw") or UNSAFE

    def limit(self, rule: str) -> tuple[str, float] | None:
        """The threshold in force of a rule that measures something: its sign and number."""
        measured, number = MEASURED.get(rule), self._settings.get(rule)
        if measured is None or number is None or rule == "top_fraction":
            return None
        return measured.sign, float(number)

    def kept(self) -> list[Picture]:
        """A fixed sample of what was kept."""
        return [self._picture(int(i), None) for i in self._by_uid(self._where("kept"))]

    def strip(self, reason: str, rows: int) -> Strip:
        """The pictures of one reason."""
        rule = MEASURED.get(reason.partition(":")[2]) if reason.startswith("filter:") else None
        dropped = self._where(reason)
        if rule is None or rule.column not in self._rows.column_names:
            return Strip(reason, rows, [self._picture(int(i), None) for i in self._by_uid(dropped)], ())
        ascending = rule.sign == "≤"
        near = self._by_value(dropped, rule.column, ascending)
        passed = self._by_value(self._where("kept"), rule.column, not ascending)[: self._each // 2]
        return Strip(reason, rows, [self._picture(i, rule) for i in near], [self._picture(i, rule) for i in passed])

    def clusters(self, found: Duplicates) -> list[Cluster]:
        """The groups of duplicates whose pictures are at hand."""
        place = {key: i for i, key in enumerate(self._rows["key"].to_pylist())}
        clusters = []
        for kept, rows in found.groups.items():
            shown = [row for row in rows if row["key"] in place]
            if kept in place and shown:
                copies = [self._picture(place[row["key"]], None, _likeness(row)) for row in shown]
                clusters.append(Cluster(self._picture(place[kept], None), copies, found.sizes[kept] - len(shown)))
        return clusters

    def _where(self, reason: str) -> NDArray[np.intp]:
        import numpy as np

        return np.flatnonzero((self._reasons == reason) & self._counted)

    def _by_uid(self, places: NDArray[np.intp]) -> list[int]:
        """The first few by uid: as good as at random, and the same each time."""
        return sorted(places.tolist(), key=lambda i: (self._uids[i], i))[: self._each]

    def _by_value(self, places: NDArray[np.intp], column: str, ascending: bool) -> list[int]:
        """The first few by a column's value; rows without one come last."""
        values = self._rows[column].take(places).to_pylist()
        order = sorted(
            range(len(values)),
            key=lambda i: (values[i] is None, (values[i] or 0) * (1 if ascending else -1), self._uids[places[i]], i),
        )
        return [int(places[i]) for i in order[: self._each]]

    def _picture(self, place: int, rule: Rule | None, value: str = "") -> Picture:
        row = self._rows.slice(place, 1).to_pylist()[0]
        if rule is not None:
            number = row[rule.column]
            value = f"{rule.name} {'missing' if number is None else figure(number) + rule.unit}"
        unsafe = row.get("nsfw") is not None and row["nsfw"] > self._unsafe
        return Picture(
            shard=row["shard"],
            key=row["key"],
            caption=visible(row["caption"] or "", CAPTION),
            value=value,
            host=visible(host(row["url"] or ""), 60),
            covered=unsafe or row["reason"] in ("filter:max_nsfw", "filter:block"),
        )


def _likeness(row: Row) -> str:
    if row["reason"] == EXACT:
        return "the same file"
    parts = [] if row["cosine"] is None else [f"{row['cosine']:.3f}"]
    return " · ".join(parts + ([] if row["hamming"] is None else [f"{row['hamming']} bits"]))


# --- thumbnails ---------------------------------------------------------------------------------------

Decode = Callable[[bytes], "NDArray[np.uint8] | str"]


def thumbnails(data: DataDir, pictures: Collection[Picture], decode: Decode) -> dict[str, str]:
    """Data URLs of WebP thumbnails by key; a picture that cannot be decoded or found has none.

    `decode` makes RGB pixels (H, W, 3) of stored bytes, or says why it cannot.
    """
    wanted: dict[str, set[str]] = {}
    for picture in pictures:
        wanted.setdefault(picture.shard, set()).add(picture.key)
    found = {}
    for shard in sorted(wanted):
        for sample in read_tar(data.raw / f"{shard}.tar", frozenset(wanted[shard])):
            body = sample.image() if sample.key in wanted[shard] else None
            pixels = decode(body) if body else "none"
            if not isinstance(pixels, str):
                found[sample.key] = data_url(pixels)
    return found


def data_url(pixels: NDArray[np.uint8]) -> str:
    """Pixels (H, W, 3) as a WebP of at most `SIDE` pixels and `THUMBNAIL_BYTES` bytes, as a data URL."""
    from PIL import Image

    image = Image.fromarray(pixels)
    for side, quality in ((SIDE, 75), (SIDE, 45), (SIDE, 15), (SIDE // 2, 15)):
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        small.save(out, "WEBP", quality=quality, method=4)
        if out.tell() <= THUMBNAIL_BYTES:
            break
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
