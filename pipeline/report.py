"""Stage `report`: one self-contained page about a run, `report/index.html`, and nothing changed.

The page asks the network for nothing, runs no script, and its content policy forbids both; captions and URLs are text.
Equal data folders give equal pages. What the figures mean is said by `fates`, `charts` and `gallery`; here they meet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.base import (
    MISSING,
    REFUSED,
    Config,
    HeadraceError,
    digest,
    file_sha256,
    spelled_out,
    visible,
    write_bytes,
)
from pipeline.books import Summary, read_markers, recorded_outputs, stale_files
from pipeline.engine import Part, Shard, run_stage
from pipeline.fates import Count, Effect, effects, funnel, verdicts
from pipeline.page.words import LOST, STEPS, fault_words, figure_words, reason_words, share
from pipeline.shards import DataDir

if TYPE_CHECKING:
    from pipeline.page.charts import Chart
    from pipeline.page.examined import Examined
    from pipeline.page.gallery import Chooser, Cluster, Picture, Strip
    from pipeline.verdict.aligned import Aligned

PAGE = "report/index.html"
PLANTED = Path("miniweb") / "fates.parquet"
TEMPLATES = Path(__file__).parent / "templates"
MOST_PICTURES = 700  # on one page, so that it stays below 8 MB
DISTRIBUTIONS = ("headrace", "img2dataset", "open_clip_torch", "torch", "pillow", "pyarrow", "duckdb", "faiss-cpu")
COVERED = ("filter:max_nsfw", "filter:block")  # reasons whose pictures are hidden until asked for
COPIES = ("dedup:exact", "dedup:near")  # reasons that are shown as clusters


class ReportConfig(Config):
    """What the page shows."""

    pictures: int = Field(24, ge=0, le=60, description="pictures shown of each reason")
    clusters: int = Field(24, ge=0, le=60, description="groups of duplicates shown")


def run(config: ReportConfig, data: DataDir) -> Summary:
    """Write the page anew if a setting, a table or a picture has changed.

    Raises:
        HeadraceError: code 3, where nothing was decided yet.
    """
    from pipeline.verdict.aligned import Aligned

    chosen = verdicts(data)
    if chosen is None:
        raise HeadraceError(f"{data.root} has no decisions yet", hint="run `curate filter` first", code=MISSING)
    aligned = Aligned(data)
    marker = read_markers(data, chosen.stem).get("all")
    if marker is None or marker.rows != aligned.rows or stale_files(data, marker, recorded_outputs(data)):
        message = f"{chosen} is older than the rows that it decided on"
        raise HeadraceError(message, hint="run `curate filter` and `curate dedup` again", code=REFUSED)
    columns = [column for column in aligned.columns.values() if column.table != "urls"]
    tars = [f"raw/{shard.shard}.tar" for shard in aligned.shards]
    inputs = (*aligned.inputs(columns), *tars, *_listed(data), chosen.relative_to(data.root).as_posix())
    settings = config.model_dump() | {"context": digest(_context(data)), "template": _template_digest()}
    shard = Shard("all", None, tuple(dict.fromkeys(inputs)))
    return run_stage(data, {"report": settings}, _Write(config, aligned, chosen), [shard], hash_inputs=False)


def _listed(data: DataDir) -> list[str]:
    """The files of `urls/`, whichever stage wrote them."""
    markers = [*read_markers(data, "list").values(), *read_markers(data, "ingest").values()]
    return [path for marker in markers for path in marker.outputs if path.startswith("urls/")]


def _context(data: DataDir) -> dict[str, Any]:
    """What the page tells besides tables and pictures: the settings behind them, versions, the packed set."""
    from importlib.metadata import version

    from pipeline.status import place

    found = {str(path.parent.relative_to(data.markers)) for path in data.markers.glob("**/*.json")} - {"report"}
    settings = {stage: next(iter(read_markers(data, stage).values())).settings for stage in sorted(found, key=place)}
    planted = data.root / PLANTED
    return {
        "settings": settings,
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "packed": dict(_packed(data)),
        "planted": file_sha256(planted) if planted.exists() else None,
    }


def _packed(data: DataDir) -> Counter[str]:
    """Samples of the packed set by split; none where there is no whole one."""
    rows: Counter[str] = Counter()
    if (data.curated / "dataset.json").exists():
        for shard, marker in read_markers(data, "pack").items():
            rows[shard.partition("-")[0]] += marker.rows
    return rows


def _template_digest() -> str:
    return digest({path.name: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("report.*"))})


@dataclass(frozen=True)
class _Write:
    """The work of the one shard: look, choose, draw, write."""

    config: ReportConfig
    aligned: Aligned
    verdicts: Path

    def __call__(self, shard: Shard) -> dict[str, Part]:
        from pipeline.page.examined import examine
        from pipeline.page.gallery import Chooser, duplicates

        data, context = self.aligned.data, _context(self.aligned.data)
        counts = funnel(data)
        copies = duplicates(self.verdicts, self.config.clusters)
        seen = examine(self.aligned, self.verdicts, copies.keys())
        rules = context["settings"].get("filter", {})
        chooser = Chooser(seen.rows, rules, self.config.pictures)
        strips, clusters, kept = _strips(chooser, counts), chooser.clusters(copies), chooser.kept()
        strips, clusters = _within_bounds(kept, strips, clusters)
        page = {
            "context": context,
            "headline": _headline(counts, context["packed"]),
            "stages": _stages(counts, effects(data), rules),
            "has_effects": bool(effects(data)),
            "planted": _planted(data.root / PLANTED),
            "charts": _charts(seen, chooser),
            "whole": seen.whole,
            "examined": seen.rows.num_rows,
            "kept": kept,
            "strips": [strip for strip in strips if strip.dropped],
            "clusters": clusters,
            "copies": copies,
            "hosts": seen.hosts,
            "failures": _failures(seen),
            "thumbnails": _thumbnails(data, [*kept, *_pictures(strips, clusters)]),
            "covered_reasons": COVERED,
        }
        write_bytes(data.root / PAGE, render(page).encode())
        fates: Counter[str] = Counter()
        for count in counts:
            fates[count.stage] += count.rows
        return {"report": Part(fates, (PAGE,))}


def render(page: Mapping[str, Any]) -> str:
    """The page as HTML; everything in it is escaped."""
    import json

    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"rows": "{:,.0f}".format, "share": share, "pct": lambda part: f"{100 * part:.2f}"}
    environment.filters |= {
        "reason": reason_words,
        "figure": figure_words,
        "fault": fault_words,
        "pretty": lambda v: json.dumps(v, indent=1, ensure_ascii=False),
    }
    return environment.get_template("report.html").render(page)


def _printable(value: Any) -> Any:
    """Every text that goes into the page, with its control and direction characters spelled out."""
    return "\n".join(map(spelled_out, value.split("\n"))) if type(value) is str else value


# --- what is on the page ------------------------------------------------------------------------------


def _headline(counts: Sequence[Count], packed: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """The first numbers a reader wants: name, rows, and what they are a share of."""
    lost, total = Counter[str](), sum(count.rows for count in counts)
    for count in counts:
        lost[count.stage] += count.rows
    pictures = total - lost["urls"] - lost["fetch"] - lost["image"]
    passed = pictures - lost["filter"]
    cells = [
        ("input rows", total, ""),
        ("usable pictures", pictures, f"{share(pictures / max(total, 1))} of the rows"),
        ("passed the filter", passed, f"{share(passed / max(pictures, 1))} of the pictures"),
        ("kept", lost["kept"], f"{share(lost['kept'] / max(total, 1))} of the rows"),
    ]
    if packed:
        splits = ", ".join(f"{packed[name]:,} {name}" for name in sorted(packed))
        cells.append(("packed", sum(packed.values()), splits))
    return cells


def _stages(counts: Sequence[Count], measured: Sequence[Effect], rules: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The funnel: per stage what is left of the input, and its reasons."""
    total = sum(count.rows for count in counts)
    left, stages, by_rule = total, [], {effect.rule: effect for effect in measured}
    most = max((count.rows for count in counts if count.stage != "kept"), default=1)
    for stage in dict.fromkeys(count.stage for count in counts if count.stage != "kept"):
        inside = [count for count in counts if count.stage == stage]
        lost = sum(count.rows for count in inside)
        left -= lost
        reasons = []
        for count in inside:
            effect, setting = by_rule.get(count.reason) if stage == "filter" else None, rules.get(count.reason)
            reasons.append(
                {
                    "token": f"{stage}:{count.reason}",
                    "setting": setting if stage == "filter" and isinstance(setting, int | float) else None,
                    "rows": count.rows,
                    "share": count.rows / total,
                    "bar": count.rows / most,
                    "alone": effect.alone if effect else None,
                    "only": effect.only if effect else None,
                }
            )
        names = {"step": STEPS.get(stage, stage), "lost_words": LOST.get(stage, "dropped")}
        stages.append(
            names
            | {"lost": lost, "left": left, "share": left / total, "was": (left + lost) / total, "reasons": reasons}
        )
    return stages


def _charts(seen: Examined, chooser: Chooser) -> list[Chart]:
    """A chart for every figure of the source picture and of every signal, over the rows that have a picture."""
    import numpy as np

    from pipeline.page.charts import chart
    from pipeline.page.gallery import MEASURED

    reasons = np.array(seen.rows["reason"].to_pylist(), dtype=object)
    pictures = np.array([not reason.startswith(("fetch:", "image:")) for reason in reasons], dtype=bool)
    pictures &= seen.rows["weight"].to_numpy() > 0
    rows, kept = seen.rows.filter(pictures), reasons[pictures] == "kept"
    weights, charts = rows["weight"].to_numpy(), []
    for column, signal in {"short_side": "source", "aspect": "source", **seen.signals}.items():
        rules = [name for name, rule in MEASURED.items() if rule.column == column and chooser.limit(name)]
        limit = chooser.limit(rules[0]) if rules else None
        charts.append(chart(column, signal, rows[column], kept, weights, limit))
    return sorted((c for c in charts if c), key=lambda c: (c.limit is None, not c.bars))


def _strips(chooser: Chooser, counts: Sequence[Count]) -> list[Strip]:
    tokens = {f"{count.stage}:{count.reason}": count.rows for count in counts if count.stage in ("filter", "dedup")}
    return [chooser.strip(token, rows) for token, rows in tokens.items() if token not in COPIES]


def _within_bounds(
    kept: Sequence[Picture], strips: list[Strip], clusters: list[Cluster]
) -> tuple[list[Strip], list[Cluster]]:
    """The same with fewer pictures each, where they would be too many for one page."""
    from dataclasses import replace

    total = len(kept) + len(list(_pictures(strips, clusters)))
    part = min(1.0, (MOST_PICTURES - len(kept)) / max(total - len(kept), 1))
    cut = [replace(s, dropped=_first(s.dropped, part), passed=_first(s.passed, part)) for s in strips]
    return cut, list(_first(clusters, part))


def _first(items: Sequence[Any], part: float) -> Sequence[Any]:
    return items if part >= 1 else items[: max(1, int(len(items) * part))]


def _pictures(strips: Sequence[Strip], clusters: Sequence[Cluster]) -> Iterator[Picture]:
    for strip in strips:
        yield from (*strip.dropped, *strip.passed)
    for cluster in clusters:
        yield from (cluster.kept, *cluster.dropped)


def _thumbnails(data: DataDir, pictures: Sequence[Picture]) -> dict[str, str]:
    from pipeline.images import ImageSandbox, Limits
    from pipeline.page.gallery import thumbnails

    with ImageSandbox(Limits()) as sandbox:
        return thumbnails(data, pictures, sandbox.decode)


def _failures(seen: Examined) -> list[dict[str, Any]]:
    """Every way in which there came no picture, with two rows it happened to."""
    failed = [reason for reason in seen.counts if reason.startswith(("fetch:", "image:"))]
    examples: dict[str, list[tuple[str, str]]] = {reason: [] for reason in failed}
    columns = (seen.rows[name].to_pylist() for name in ("uid", "reason", "url", "error_message"))
    for _, reason, url, error in sorted(zip(*columns, strict=True), key=lambda row: row[0]):
        if len(examples.get(reason, "xx")) < 2:
            examples[reason].append((visible(url or "", 90), visible(error or "", 90)))
    ranked = sorted(failed, key=lambda reason: (-seen.counts[reason], reason))
    return [{"reason": reason, "rows": seen.counts[reason], "examples": examples[reason]} for reason in ranked]


def _planted(path: Path) -> dict[str, Any] | None:
    """The planted faults: rows of each, and those with the right fate; None where none are planted."""
    from pipeline.shards import read_parquet

    if not path.exists():
        return None
    table = read_parquet(path, ["fault", "expected", "got", "right"])
    planted, caught, missed = Counter[str](), Counter[str](), dict[str, Counter[tuple[str, str]]]()
    for fault, expected, got, right in zip(*(column.to_pylist() for column in table.columns), strict=True):
        planted[fault] += 1
        caught[fault] += right
        if not right:
            missed.setdefault(fault, Counter())[expected, got] += 1
    rows = [
        {"fault": name, "planted": count, "caught": caught[name], "missed": missed.get(name, Counter()).most_common(2)}
        for name, count in sorted(planted.items())
    ]
    wrong = [row for row in rows if row["missed"]]
    right = [row for row in rows if not row["missed"]]
    return {"wrong": wrong, "right": right, "planted": planted.total(), "caught": caught.total()}
