"""What a run prints at its end: the funnel, planted against caught, and where the report is."""

from __future__ import annotations

from pipeline.shards import DataDir

WORDS = {
    "urls": "not fetched",
    "fetch": "fetch failed",
    "image": "no good picture",
    "filter": "filtered out",
    "dedup": "duplicates",
    "kept": "kept",
}


def run_text(data: DataDir) -> str:
    """The end of `curate run`."""
    parts = [funnel_text(data), planted_text(data), f"report: {data.report / 'index.html'}"]
    return "\n\n".join(part for part in parts if part)


def funnel_text(data: DataDir) -> str:
    """The funnel as a table: every input row once, by stage and reason."""
    from pipeline.fates import funnel

    counts = funnel(data)
    total = sum(count.rows for count in counts)
    lines, left = [f"{'input rows':<36}{total:>10,}"], total
    stages = list(dict.fromkeys(count.stage for count in counts))
    for stage in stages:
        inside = [count for count in counts if count.stage == stage]
        rows = sum(count.rows for count in inside)
        if stage == "kept":
            continue
        left -= rows
        lines.append(f"{WORDS.get(stage, stage):<36}{-rows:>10,}   {left:>10,} left")
        lines += [f"  {count.reason:<34}{-count.rows:>10,}" for count in inside]
    lines.append(f"{'kept':<36}{left:>10,}   {left / max(total, 1):>10.1%}")
    return "\n".join(lines)


def planted_text(data: DataDir) -> str:
    """Planted against caught by fault, where the run was of the mini-web; else nothing."""
    if not (data.root / "miniweb" / "fates.parquet").exists():
        return ""
    from pipeline.miniweb.web import planted_text

    return planted_text(data)
