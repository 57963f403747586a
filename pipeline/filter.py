"""`curate filter`: thresholds and rules over the numbers of `score`, one verdict per raw row, in seconds.

The rules have one order, whatever the recipe's; the first that a row fails is its reason, and `fails` names them all.
No picture is read, and only the columns that the rules in force need. It knows nothing of duplicates.

Memory: some 40 bytes per raw row for as long as it runs, besides one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.base import Config
from pipeline.books import Summary
from pipeline.engine import Part, Shard, run_stage
from pipeline.fates import FILTER, SUPERSEDED
from pipeline.shards import DataDir

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from pipeline.verdict.aligned import Aligned, Column
    from pipeline.verdict.concepts import Concepts
    from pipeline.verdict.rules import Rule
    from pipeline.verdict.verdicts import Verdicts

BATCH_ROWS = 200_000
PLACE = "__place"
SIGNAL_COLUMNS = {
    "caption": ("words", "chars", "lang", "p_en", "filename_like", "spam_like"),
    "clip": ("clip_sim", "image_emb", "text_emb"),
    "image": ("near_blank", "flat", "aspect", "brightness", "contrast", "entropy", "saturation", "sharpness"),
    "phash": ("phash",),
    "safety": ("nsfw",),
}
SIGNAL_OF = {column: signal for signal, columns in SIGNAL_COLUMNS.items() for column in columns}


class FilterConfig(Config):
    """The rules; one that is not given drops nothing."""

    min_side: int | None = Field(None, ge=1, description="least length of the source picture's short side, in pixels")
    max_aspect: float | None = Field(None, ge=1, description="greatest ratio of the long side to the short side")
    drop_near_blank: bool = Field(False, description="drop pictures of almost one colour")
    drop_no_caption: bool = Field(False, description="drop rows without caption (implied by rules that measure it)")
    min_words: int | None = Field(None, ge=1, description="least number of words in the caption")
    max_words: int | None = Field(None, ge=1, description="greatest number of words in the caption")
    drop_filename_captions: bool = Field(False, description="drop captions that look like a file's name")
    drop_spam_captions: bool = Field(False, description="drop captions that look like a template or an advertisement")
    min_p_en: float | None = Field(None, ge=0, le=1, description="least probability that the caption is English")
    max_caption_repeats: int | None = Field(
        None, ge=1, description="greatest number of different pictures that may share a caption"
    )
    max_nsfw: float | None = Field(None, ge=0, le=1, description="greatest probability that the picture is not safe")
    min_clip: float | None = Field(None, ge=-1, le=1, description="least cosine between picture and caption")
    top_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="keep this fraction, the most similar to their captions, of what the rules above keep",
    )
    block: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="drop pictures that show this, such as `a photo of a gun`; repeatable"
    )
    block_threshold: float = Field(0.9, gt=0, lt=1, description="from which probability on a picture shows a --block")
    where: str | None = Field(
        None, min_length=1, description="keep rows for which this SQL condition on their columns is true"
    )


def run(config: FilterConfig, data: DataDir) -> Summary:
    """Decide every raw row anew if a setting or an input changed, and write `decisions/filter.parquet`.

    Raises:
        HeadraceError: for a rule whose signal was never scored (code 3), or a `where` that is no condition (code 2).
    """
    from pipeline.verdict.aligned import Aligned

    aligned = Aligned(data)
    plan = _plan(config, aligned)
    shard = Shard("all", aligned.rows, aligned.inputs(plan.columns.values()))
    settings = config.model_dump(mode="json") | {"blocked_by": plan.concepts.identity if plan.concepts else None}
    return run_stage(data, {"filter": settings}, _Decide(aligned, plan), [shard], hash_inputs=False)


@dataclass(frozen=True)
class _Plan:
    """What to read and what to ask: the columns by the names that the SQL uses."""

    config: FilterConfig
    base: str
    rules: list[Rule]
    columns: dict[str, Column]
    concepts: Concepts | None

    def sql(self) -> str:
        """`base`, the reason before any rule, and `bits`, the rules that the row fails."""
        from pipeline.verdict.rules import bit

        terms = [f"CASE WHEN {rule.fails} THEN {bit(rule.name)} ELSE 0 END" for rule in self.rules]
        return f"SELECT {self.base} AS base, ({' + '.join(['0', *terms])})::UINTEGER AS bits FROM rows"


def _plan(config: FilterConfig, aligned: Aligned) -> _Plan:
    from pipeline.tables import connect
    from pipeline.verdict.concepts import Concepts
    from pipeline.verdict.rules import base_reason, threshold_rules, where_rule

    rules = threshold_rules(config.model_dump())
    if config.where is not None:
        names = {*aligned.columns, *SIGNAL_OF}
        rules.append(where_rule(connect(), config.where, names))
    wanted = {column: rule.name for rule in rules for column in rule.columns}
    wanted |= {"clip_sim": "top_fraction"} if config.top_fraction else {}
    wanted |= {"image_emb": "block"} if config.block else {}
    for column, rule in wanted.items():
        if column in SIGNAL_OF and column not in aligned.columns:
            aligned.require(SIGNAL_OF[column], f"--{rule.replace('_', '-')}")
    known = aligned.columns
    decode_error = "decode_error" if "decode_error" in known else None
    undecoded = next((name for name in ("phash", "nsfw") if name in known), None)
    names = {"uid", "status", "error_message", *wanted, *filter(None, [decode_error or undecoded])}
    concepts = Concepts.of(aligned.data, config.block, config.block_threshold) if config.block else None
    columns = {name: known[name] for name in sorted(names)}
    return _Plan(config, base_reason(decode_error, undecoded), rules, columns, concepts)


@dataclass(frozen=True)
class _Decide:
    """The work of the one shard: look at all rows, judge each, write."""

    aligned: Aligned
    plan: _Plan

    def __call__(self, shard: Shard) -> dict[str, Part]:
        from pipeline.tables import write_stream

        superseded, crowded = self._over_all_rows()
        verdicts = self._judge(superseded, crowded)
        write_stream(self._tables(verdicts), _schema(), self.aligned.data.root / FILTER)
        return {"filter": Part(verdicts.fates(), (FILTER,))}

    def _over_all_rows(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Per raw row: whether another row of its uid counts, and whether too many pictures share its caption."""
        import numpy as np

        from pipeline.verdict.rules import NO_CAPTION, NORMAL_CAPTION
        from pipeline.verdict.verdicts import crowded, superseded

        limit, known = self.plan.config.max_caption_repeats, self.aligned.columns
        names = ["uid", "status"] if limit is None else ["uid", "status", "caption", "key", "sha256"]
        sql = "SELECT hash(uid) AS uid, status = 'success' AS fetched"
        if limit is not None:
            text = f"CASE WHEN {NO_CAPTION} THEN 0 ELSE hash({NORMAL_CAPTION}) END"
            sql += f", {text} AS caption, hash(coalesce(sha256, key)) AS picture"
        parts = [
            {name: column.to_numpy() for name, column in zip(out.column_names, out.columns, strict=True)}
            for _, out in self._ask(f"{sql} FROM rows", {name: known[name] for name in names})
        ]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        lost = superseded(found["uid"], found["fetched"])
        if limit is None:
            return lost, np.zeros(len(lost), dtype=bool)
        counts = found["fetched"] & ~lost & (found["caption"] != 0)
        return lost, crowded(found["caption"], found["picture"], counts, limit)

    def _judge(self, superseded: NDArray[np.bool_], crowded: NDArray[np.bool_]) -> Verdicts:
        """Every rule on every row that has a picture and counts."""
        import numpy as np

        from pipeline.verdict.rules import bit
        from pipeline.verdict.verdicts import Verdicts, vocabulary

        plan, rows = self.plan, self.aligned.rows
        words, base = vocabulary(), np.zeros(rows, dtype=np.int32)
        bits = np.where(crowded, bit("max_caption_repeats"), 0).astype(np.uint32)
        similarity = np.zeros(rows if plan.config.top_fraction else 0, dtype=np.float32)
        first = 0
        for table, out in self._ask(plan.sql(), plan.columns):
            part = slice(first, first := first + table.num_rows)
            base[part] = _encoded(out["base"], words)
            bits[part] |= out["bits"].to_numpy()
            if plan.concepts:
                bits[part] |= np.where(plan.concepts.shown(table["image_emb"]), bit("block"), 0).astype(np.uint32)
            if plan.config.top_fraction:
                similarity[part] = table["clip_sim"].to_numpy()
        base[superseded] = words.index(SUPERSEDED)
        bits[base > 0] = 0
        if plan.config.top_fraction:
            _drop_below_best(base, bits, similarity, plan.config.top_fraction)
        return Verdicts(words, base, bits)

    def _ask(self, sql: str, columns: dict[str, Column]) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Some columns of the raw rows, batch by batch, each with what `sql` makes of it as the table `rows`.

        DuckDB's threads return rows in any order, so each row carries its place and the answer is put in order by it.
        """
        import pyarrow as pa

        from pipeline.tables import connect, sql_errors, widened

        connection = connect()
        for table in self.aligned.batches(columns, BATCH_ROWS):
            placed = widened(table).append_column(PLACE, pa.array(range(table.num_rows), pa.int64()))
            with sql_errors("--where"):
                connection.register("rows", placed)
                answer = connection.sql(sql.replace("SELECT ", f"SELECT {PLACE}, ", 1)).to_arrow_table()
                connection.unregister("rows")
            yield table, answer.sort_by(PLACE)

    def _tables(self, verdicts: Verdicts) -> Iterator[pa.Table]:
        import pyarrow as pa

        first, known = 0, self.aligned.columns
        for table in self.aligned.batches({name: known[name] for name in ("key", "uid")}, BATCH_ROWS):
            reason, fails = verdicts.columns(slice(first, first := first + table.num_rows))
            yield pa.table([*table.columns, reason, fails], schema=_schema())


def _encoded(column: pa.ChunkedArray, words: list[str]) -> NDArray[np.int32]:
    """Strings as indices into `words`, which grows by those not in it; null is 0."""
    import numpy as np

    coded = column.combine_chunks().dictionary_encode()
    words += [word for word in coded.dictionary.to_pylist() if word not in words]
    codes = np.array([*(words.index(word) for word in coded.dictionary.to_pylist()), 0], dtype=np.int32)
    out: NDArray[np.int32] = codes[coded.indices.fill_null(len(codes) - 1).to_numpy(zero_copy_only=False)]
    return out


def _drop_below_best(
    base: NDArray[np.int32], bits: NDArray[np.uint32], similarity: NDArray[np.float32], fraction: float
) -> None:
    """Mark, among all rows with a picture, those below the best `fraction` of what the rules before it keep."""
    from pipeline.verdict.rules import bit
    from pipeline.verdict.verdicts import least_of_best

    rule = bit("top_fraction")
    least = least_of_best(similarity[(base == 0) & (bits & (rule - 1) == 0)], fraction)
    bits[(base == 0) & ~(similarity >= least)] |= rule


def _schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    return pa.schema([("key", text), ("uid", text), ("reason", text), ("fails", pa.list_(text))])
