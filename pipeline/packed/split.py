"""Which sample of a packed set goes into which shard, and which are held out: `decisions/split.parquet`.

Whole groups of near-copies and equal captions are held out, chosen by hash, so that nothing in `val` is known from
`train`. The functions at the end take arrays and know nothing of files.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pipeline.base import FINDINGS, REFUSED, HeadraceError
from pipeline.engine import Part, Shard, run_stage
from pipeline.fates import DEDUP, PAIRS
from pipeline.shards import DataDir, read_parquet, write_parquet
from pipeline.verdict.aligned import Aligned, Column

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

FILE = "decisions/split.parquet"
PAIR = ("key_a", "key_b")
AT_LEAST = 256  # samples, as far as AT_MOST allows
AT_MOST = 0.1  # of all samples
LARGEST = 16  # a group of more than 1/16 of what val is to hold stays in train
UNDECIDED, TRAIN, VAL = -1, 0, 1
WORDS = {"train": TRAIN, "val": VAL, "validation": VAL}  # what a list's own `split` column may say
OWN = Column("urls", "split")


def run(data: DataDir, aligned: Aligned, verdicts: str, shard_size: int, val_fraction: float) -> None:
    """Bring `decisions/split.parquet` up to date with the decisions in `verdicts` (a path relative to the folder).

    It has one row per survivor, those of `train` in raw order, then those of `val`: key, group (rows that share one
    are near-copies or have equal captions), split, shard (number of the packed shard), raw (shard), row (in there).

    Raises:
        HeadraceError: code 1 when there is no survivor.
    """
    inputs = (verdicts, *([PAIRS] if verdicts == DEDUP else ()), *aligned.inputs(_columns(aligned).values()))
    settings = {"shard_size": shard_size, "val_fraction": val_fraction}
    process = _Split(data, aligned, verdicts, shard_size, val_fraction)
    shard = Shard("all", aligned.rows, tuple(dict.fromkeys(inputs)))
    run_stage(data, {"split": settings}, process, [shard], hash_inputs=False)


def _columns(aligned: Aligned) -> dict[str, Column]:
    """What of the raw rows decides."""
    columns = {name: Column("raw", name) for name in ("key", "uid", "caption", "sha256")}
    return columns | ({"split": OWN} if OWN in aligned.columns.values() else {})


@dataclass(frozen=True)
class _Split:
    data: DataDir
    aligned: Aligned
    verdicts: str
    shard_size: int
    val_fraction: float

    def __call__(self, shard: Shard) -> dict[str, Part]:
        import numpy as np
        import pyarrow as pa

        kept = self._survivors()
        labels = groups([kept.captions, kept.contents], self._pairs(kept.keys))
        val = held_out(labels, kept.uids, kept.own, self.val_fraction)
        order = np.concatenate([np.flatnonzero(~val), np.flatnonzero(val)])
        sizes = [int((~val).sum()), int(val.sum())]
        table = pa.table(
            {
                "key": kept.keys.take(order),
                "group": labels[order],
                "split": np.repeat(np.array(["train", "val"], dtype=object), sizes),
                "shard": np.concatenate([np.arange(size, dtype=np.int32) // self.shard_size for size in sizes]),
                "raw": pa.array([marker.shard for marker in self.aligned.shards]).take(kept.shards[order]),
                "row": kept.rows[order],
            }
        )
        write_parquet(table, self.data.root / FILE)
        fates = {"train": sizes[0], "val": sizes[1], "dropped": self.aligned.rows - sum(sizes)}
        return {"split": Part(fates, (FILE,))}

    def _survivors(self) -> _Survivors:
        """What decides about each survivor, in raw order."""
        import numpy as np
        import pyarrow as pa

        decided = read_parquet(self.data.root / self.verdicts, ["key", "reason"])
        columns, first, parts = _columns(self.aligned), 0, []
        for number, marker in enumerate(self.aligned.shards):
            verdict = decided.slice(first, marker.rows)
            first += marker.rows
            table = self.aligned.read(marker, columns)
            if not table["key"].equals(verdict["key"]):
                message = f"{self.verdicts} is not in the order of raw/{marker.shard}.parquet"
                raise HeadraceError(message, hint="run `curate filter` and `curate dedup` again", code=REFUSED)
            rows = np.flatnonzero(np.asarray(verdict["reason"].is_null()))
            parts.append(_survivors(table.take(rows), number, rows))
        if not any(len(part.rows) for part in parts):
            raise _nothing_left(decided["reason"])
        keys = pa.concat_arrays([part.keys for part in parts])
        return _Survivors(keys, *(np.concatenate(arrays) for arrays in zip(*(p[1:] for p in parts), strict=True)))

    def _pairs(self, keys: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The near-duplicate pairs among the survivors, as row numbers; none where dedup never ran."""
        import numpy as np
        import pyarrow.compute as pc

        if self.verdicts != DEDUP:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        pairs = read_parquet(self.data.root / PAIRS, list(PAIR))
        left, right = (pc.index_in(pairs[name], value_set=keys).combine_chunks() for name in PAIR)
        both = pc.and_(pc.is_valid(left), pc.is_valid(right))
        rows = [np.asarray(side.filter(both), dtype=np.int64) for side in (left, right)]
        return rows[0], rows[1]


class _Survivors(NamedTuple):
    """Arrays of shape (n,), one entry per survivor; the hashes are 0 where there is nothing to compare."""

    keys: pa.Array
    shards: NDArray[np.int32]
    rows: NDArray[np.int32]
    uids: NDArray[np.uint64]
    captions: NDArray[np.uint64]
    contents: NDArray[np.uint64]
    own: NDArray[np.int8]


def _survivors(table: pa.Table, shard: int, rows: NDArray[np.int64]) -> _Survivors:
    import numpy as np

    own = [str(word).strip().lower() for word in table["split"].to_pylist()] if "split" in table.column_names else []
    return _Survivors(
        table["key"].combine_chunks(),
        np.full(len(rows), shard, dtype=np.int32),
        rows.astype(np.int32),
        hashes(table["uid"].to_pylist()),
        hashes(normalized(caption) for caption in table["caption"].to_pylist()),
        hashes(table["sha256"].to_pylist()),
        np.array([WORDS.get(word, UNDECIDED) for word in own] or [UNDECIDED] * len(rows), dtype=np.int8),
    )


def _nothing_left(reasons: pa.ChunkedArray) -> HeadraceError:
    """The sentence for a set without survivors."""
    if not len(reasons):
        return HeadraceError("nothing is left to pack: the list has no rows", hint="give one with rows", code=FINDINGS)
    [(reason, rows)] = Counter(reasons.to_pylist()).most_common(1)
    message = f"nothing is left to pack: all {len(reasons):,} rows were dropped, {rows:,} of them by {reason}"
    if reason.startswith(("filter:", "dedup:")):
        hint = "loosen that rule and run `curate filter` and `curate dedup` again; `curate report` shows what it drops"
    else:
        hint = "check the list and the network; `curate report` shows how many rows failed for which reason"
    return HeadraceError(message, hint=hint, code=FINDINGS)


# --- arrays in, arrays out ------------------------------------------------------------------------


def normalized(caption: str | None) -> str | None:
    """A caption as it is compared: case, width of characters and spaces do not count; None where nothing is left."""
    return " ".join(unicodedata.normalize("NFKC", caption or "").casefold().split()) or None


def hashes(values: Iterable[str | None]) -> NDArray[np.uint64]:
    """A 64-bit hash per text; 0 stands for None."""
    import numpy as np

    digests = [hashlib.sha256(v.encode("utf-8", "surrogatepass")).digest()[:8] if v else bytes(8) for v in values]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def groups(
    equal: Sequence[NDArray[np.uint64]], pairs: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """The group of each of n rows: rows are joined by an equal hash (0 joins nothing) or by a pair, and so on.

    `equal` holds arrays of shape (n,), `pairs` two arrays of row numbers. Returns labels, shape (n,).
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(equal[0])
    left, right = [pairs[0]], [pairs[1]]
    for values in equal:
        _, first, label = np.unique(values, return_index=True, return_inverse=True)
        rows = np.flatnonzero(values)
        left.append(rows)
        right.append(first[label[rows]])
    edges = np.concatenate(left), np.concatenate(right)
    graph = coo_array((np.ones(len(edges[0]), dtype=bool), edges), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def held_out(
    labels: NDArray[np.int64], uids: NDArray[np.uint64], own: NDArray[np.int8], fraction: float
) -> NDArray[np.bool_]:
    """True where a row belongs to `val`; all arrays have shape (n,).

    `own` is the list's own word (TRAIN, VAL or UNDECIDED) and is obeyed. Undecided rows of a group with such a row
    follow it (into `train` where it has both). The other groups are taken whole in the order of a hash of their
    smallest uid's hash, until `fraction` of all rows, at least AT_LEAST, at most AT_MOST, is held out.
    """
    import numpy as np

    if not len(labels):
        return np.zeros(0, dtype=bool)
    count = int(labels.max()) + 1
    sizes = np.bincount(labels, minlength=count)
    decided = [np.bincount(labels[own == word], minlength=count) > 0 for word in (TRAIN, VAL)]
    chosen = decided[VAL] & ~decided[TRAIN]
    smallest = np.full(count, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, labels, uids)
    target = size_of_val(len(labels), fraction)
    room = target - int((own == VAL).sum()) - int(((own == UNDECIDED) & chosen[labels]).sum())
    open_groups = ~decided[TRAIN] & ~decided[VAL] & (sizes <= max(target // LARGEST, 2))
    candidates = np.flatnonzero(open_groups)
    for group in candidates[np.argsort(_mixed(smallest[candidates]), kind="stable")]:
        if room <= 0:
            break
        if sizes[group] <= room:
            chosen[group] = True
            room -= int(sizes[group])
    result: NDArray[np.bool_] = np.where(own == UNDECIDED, chosen[labels], own == VAL)
    return result


def size_of_val(rows: int, fraction: float) -> int:
    """How many of `rows` samples `val` is to hold; 0 for a fraction of 0."""
    return min(max(round(rows * fraction), AT_LEAST), int(rows * AT_MOST)) if fraction else 0


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The smallest of many hashes is small, so a large group would come first: hash again (splitmix64's finalizer)."""
    import numpy as np

    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
