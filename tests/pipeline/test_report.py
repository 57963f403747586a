"""The report: what its figures say, what hostile text can do to it (nothing), and that a real browser shows it."""

import base64
import html
import io
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import html5lib
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.base import HeadraceError
from pipeline.books import raw_markers
from pipeline.engine import Part, Shard, run_stage
from pipeline.fates import DEDUP, FILTER
from pipeline.page import charts, examined, gallery
from pipeline.page.words import share
from pipeline.report import PAGE, ReportConfig, _within_bounds, run
from pipeline.shards import DataDir, read_parquet, write_parquet
from pipeline.verdict.aligned import Aligned
from tests.pipeline.factory import Row, make_raw, picture
from tests.pipeline.scored import add_signal

XHTML = "{http://www.w3.org/1999/xhtml}"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=http://evil.test/x onerror=alert(1)>',
    "</style><style>@import 'http://evil.test/';</style>",
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "&lt;script&gt;&#x3c;script>",
    "left \u202e right \u2066 and \x00\x1b[2J",
    "<!-- --><base href=http://evil.test/><meta http-equiv=refresh content='0;http://evil.test'>",
    "x" * 1_000_000,
    "<iframe srcdoc='<script>1</script>'></iframe><svg onload=alert(1)><a href=javascript:alert(1)>",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def decide(data: DataDir, reasons: list[str | None], kept_for: dict[int, int] | None = None) -> None:
    """Verdict files by hand: a reason per raw row; `kept_for` says for which row another was dropped as its copy."""
    raw = pa.concat_tables([read_parquet(data.raw / f"{m.shard}.parquet", ["key", "uid"]) for m in raw_markers(data)])
    keys, kept_for = raw["key"].to_pylist(), kept_for or {}
    fails = [[r.partition(":")[2]] if r and r.startswith("filter:") else [] for r in reasons]
    table = raw.append_column("reason", pa.array(reasons, pa.string()))
    table = table.append_column("fails", pa.array(fails, pa.list_(pa.string())))
    first = pa.array([None if r and r.startswith("dedup:") else r for r in reasons], pa.string())
    copies = {
        "cluster": pa.array([kept_for.get(i) for i in range(len(keys))], pa.int64()),
        "kept_key": pa.array([keys[kept_for[i]] if i in kept_for else None for i in range(len(keys))], pa.string()),
        "cosine": pa.array([0.97 if i in kept_for else None for i in range(len(keys))], pa.float32()),
        "hamming": pa.array([4 if i in kept_for else None for i in range(len(keys))], pa.int32()),
    }
    rules = {"min_clip": 0.25, "max_nsfw": 0.5, "min_side": None}
    _stage(data, "filter", rules, table.set_column(2, "reason", first), FILTER, ())
    for name, column in copies.items():
        table = table.append_column(name, column)
    _stage(data, "dedup", {}, table, DEDUP, (FILTER,))


def _stage(data, stage, settings, table, path, inputs):
    def write(shard):
        write_parquet(table, data.root / path)
        return {stage: Part(Counter(r or "kept" for r in table["reason"].to_pylist()), (path,))}

    settings = settings | {"reasons": table["reason"].to_pylist()}
    run_stage(data, {stage: settings}, write, [Shard("all", table.num_rows, inputs)])


def make(root: Path, captions: list[str]) -> DataDir:
    """Rows 0 to 9 are kept, 10 to 17 below `min_clip`, 18 to 20 not safe, 21 to 24 copies of row 0, 25 to 29 dead."""
    sides = [(96, 96), (150, 60), (60, 150)]
    pictures = [picture(i).resize(sides[i % 3]) for i in range(25)]
    rows = [Row(image, captions[i % len(captions)]) for i, image in enumerate(pictures)]
    rows += [Row(None, captions[i % len(captions)], error=f"http_404: {captions[0][:50]}") for i in range(25, 30)]
    data = make_raw(root, rows, shard_size=8)
    clip = [0.3 + i / 100 for i in range(10)] + [0.2 - i / 100 for i in range(8)] + [0.4] * 7 + [None] * 5
    add_signal(data, "clip", clip_sim=clip)
    nsfw = [0.1] * 9 + [0.45] + [0.9] + [0.2] * 7 + [0.95, 0.9, 0.99] + [0.1] * 4 + [None] * 5
    add_signal(data, "safety", nsfw=nsfw)
    reasons: list[str | None] = [None] * 10 + ["filter:min_clip"] * 8 + ["filter:max_nsfw"] * 3
    reasons += ["dedup:near"] * 4 + ["fetch:http_404"] * 5
    decide(data, reasons, dict.fromkeys(range(21, 25), 0))
    planted = {
        "fault": ["bomb", "bomb", "spam"],
        "expected": ["image"] * 2 + ["filter"],
        "got": ["image:x"] * 2 + ["keep"],
    }
    planted_table = pa.table(planted | {"right": [True, True, False]})
    write_parquet(planted_table, data.root / "miniweb" / "fates.parquet")
    return data


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> DataDir:
    data = make(tmp_path_factory.mktemp("plain"), [f"a picture of thing {i}" for i in range(30)])
    summary = run(ReportConfig(), data)
    assert summary.fates == {"kept": 10, "filter": 11, "dedup": 4, "fetch": 5}
    return data


def page(data: DataDir) -> str:
    return (data.root / PAGE).read_text(encoding="utf-8")


def parsed(text: str):
    return html5lib.parse(text)


def words(node) -> str:
    return " ".join(" ".join(node.itertext()).split())


# --- the page ---------------------------------------------------------------------------------------


def test_the_funnel_adds_up(plain):
    tree = parsed(page(plain))
    tiles = [words(node) for node in tree.iter(f"{XHTML}div") if node.get("class", "").startswith("tile ")]
    tiles += [words(node) for node in tree.iter(f"{XHTML}div") if node.get("class") == "tile"]
    text = "; ".join(tiles)
    assert "input rows 30" in text and "usable pictures 25" in text and "passed the filter 14" in text
    assert "kept 10 33.3% of the rows" in text
    rows = [words(row) for row in tree.iter(f"{XHTML}tr")]
    assert any("filter:min_clip" in row and row.split()[-4:] == ["8", "26.7%", "8", "8"] for row in rows)
    assert any("(0.25)" in row for row in rows)


def test_planted_faults(plain):
    tree = parsed(page(plain))
    assert "spam 1 0 0.0% 1 × keep for filter" in [words(row) for row in tree.iter(f"{XHTML}tr")]
    assert "bomb 2/2" in [words(item) for item in tree.iter(f"{XHTML}li")]


def test_hosts_and_examples(plain):
    text = words(parsed(page(plain)))
    assert "host0.test" in text and "HTTP 404" in text


def test_pictures_are_small_true_to_shape_and_without_the_source_bytes(plain):
    sources = [node.get("src") for node in parsed(page(plain)).iter(f"{XHTML}img")]
    assert len(sources) > 30
    shapes = set()
    for source in sources:
        body = base64.b64decode(source.removeprefix("data:image/webp;base64,"))
        assert len(body) <= gallery.THUMBNAIL_BYTES
        shapes.add(Image.open(io.BytesIO(body)).size)
    assert shapes == {(96, 96), (150, 60), (60, 150)}


def test_unsafe_pictures_wait_to_be_asked_for(plain):
    """Rows 18 to 20 fell to the safety rule, row 10 to another but is not safe either: all inside closed details."""
    tree = parsed(page(plain))
    parents = {child: parent for parent in tree.iter() for child in parent}
    covered = Counter()
    for image in tree.iter(f"{XHTML}img"):
        node, hidden = image, False
        while node in parents:
            node = parents[node]
            hidden |= node.tag == f"{XHTML}details" and node.get("open") is None
        covered[image.get("alt"), hidden] += 1
    for unsafe in (10, 18, 19, 20):
        assert covered[f"a picture of thing {unsafe}", True] and not covered[f"a picture of thing {unsafe}", False]
    assert covered["a picture of thing 11", False] and not covered["a picture of thing 11", True]


def test_same_data_same_bytes_and_nothing_to_do_twice(plain, tmp_path):
    other = make(tmp_path, [f"a picture of thing {i}" for i in range(30)])
    assert run(ReportConfig(), other).done == 1
    assert page(other) == page(plain)
    assert run(ReportConfig(), other).done == 0


def test_a_new_verdict_makes_a_new_page(tmp_path):
    data = make(tmp_path, ["a", "b"])
    run(ReportConfig(), data)
    decide(data, [None] * 25 + ["fetch:http_404"] * 5)
    assert run(ReportConfig(), data).fates == {"kept": 25, "fetch": 5}


def test_without_decisions(tmp_path):
    data = make_raw(tmp_path, [Row(picture(1), "a")])
    with pytest.raises(HeadraceError, match="no decisions") as error:
        run(ReportConfig(), data)
    assert error.value.code == 3


def test_without_any_signal_or_picture(tmp_path):
    data = make_raw(tmp_path, [Row(None, None), Row(None, "b")])
    decide(data, ["fetch:dns", "fetch:dns"])
    assert run(ReportConfig(), data).fates == {"fetch": 2}
    assert "host name not found" in page(data)


# --- hostile text -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> DataDir:
    data = make(tmp_path_factory.mktemp("hostile"), HOSTILE)
    rows = [Row(picture(i), text, url=text[:2000]) for i, text in enumerate(HOSTILE)]
    rows += [Row(None, text, error=text[:2000], url=f"http://{text[:200]}/a") for text in HOSTILE]
    other = make_raw(data.root / "other", rows)
    add_signal(other, "phash", decode_error=[text[:100] for text in HOSTILE * 2])
    decide(other, [None] * len(HOSTILE) + [f"fetch:{text[:40]}" for text in HOSTILE])
    run(ReportConfig(), data)
    run(ReportConfig(), other)
    return data


@pytest.mark.parametrize("inside", ["", "other"])
def test_hostile_text_stays_text(hostile, inside):
    text = page(DataDir(hostile.root / inside))
    tree = parsed(text)
    tags = Counter(node.tag.rpartition("}")[2] for node in tree.iter() if isinstance(node.tag, str))
    assert not tags.keys() & {"script", "iframe", "object", "embed", "base", "link", "form", "image", "use"}
    assert tags["style"] == 1
    for node in tree.iter():
        for name, value in node.attrib.items():
            assert not name.startswith("on"), (node.tag, name)
            if name.rpartition("}")[2] in ("src", "href", "action", "data", "srcset", "poster", "srcdoc"):
                assert value.startswith(("data:image/webp;base64,", "#")), value
            if name == "style":
                assert re.fullmatch(r"[a-z-]+:(\d+(\.\d+)?(%|px)|var\(--[a-z]+\))", value), value
    policies = [node.get("content") for node in tree.iter(f"{XHTML}meta") if node.get("http-equiv")]
    assert len(policies) == 1 and "default-src 'none'" in policies[0] and "script" not in policies[0]
    assert "url(" not in text.partition("</style>")[0] and "@import" not in text.partition("</style>")[0]
    assert not set(text) & set("\u202e\u2066\x00\x1b")
    assert "49" not in [words(node) for node in tree.iter(f"{XHTML}bdi")]
    assert len(text) < 2_000_000
    if not inside:
        assert "<script>alert(1)</script>" in words(tree)


# --- the figures ------------------------------------------------------------------------------------


def test_large_sets_are_sampled_by_reason_with_weights(tmp_path, monkeypatch):
    data = make_raw(tmp_path, [Row(None, f"caption {i}") for i in range(400)], shard_size=50)
    decide(data, ["fetch:dns"] * 300 + ["fetch:timeout"] * 100)
    monkeypatch.setattr(examined, "PER_REASON", 50)
    wanted = f"{30_007:09d}"
    seen = examined.examine(Aligned(data), data.root / DEDUP, [wanted])
    assert not seen.whole and wanted in seen.rows["key"].to_pylist()
    assert 60 < seen.rows.num_rows < 160
    totals = Counter()
    for reason, weight in zip(seen.rows["reason"].to_pylist(), seen.rows["weight"].to_pylist(), strict=True):
        totals[reason] += weight
    assert totals == pytest.approx({"fetch:dns": 300, "fetch:timeout": 100})
    assert [host.rows for host in seen.hosts] == [80] * 5 and [host.failed for host in seen.hosts] == [80] * 5


def test_histogram_counts_every_row():
    rng = np.random.default_rng(0)
    values = rng.normal(size=5000)
    kept, weights = values > 0.5, np.full(5000, 2.0)
    chart = charts.chart("x", "s", pa.chunked_array([values]), kept, weights, ("≥", 0.5))
    tallies = [
        tuple(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:kept|dropped)", b.title)) for b in chart.bars
    ]
    assert sum(stays for stays, _ in tallies) == 2 * kept.sum()
    assert sum(goes for _, goes in tallies) == 2 * (~kept).sum()
    assert max(bar.kept + bar.dropped for bar in chart.bars) == pytest.approx(1)
    assert chart.limit.passes == pytest.approx((values >= 0.5).mean())
    low, high = np.quantile(values, [0.005, 0.995])
    assert chart.limit.place == pytest.approx((0.5 - low) / (high - low), abs=0.01)
    assert chart.missing == 0


def test_whole_numbers_get_a_bar_each_and_the_line_falls_between():
    column = pa.chunked_array([pa.array([1, 1, 2, 3, None], pa.int32())])
    kept = np.array([False, False, True, True, False])
    chart = charts.chart("words", "caption", column, kept, np.ones(5), ("≥", 2.0))
    assert [(round(b.kept, 3), round(b.dropped, 3)) for b in chart.bars] == [(0, 1), (0.5, 0), (0.5, 0)]
    assert chart.limit.place == pytest.approx(1 / 3)
    assert chart.limit.passes == 0.5 and chart.missing == pytest.approx(0.2)
    assert chart.axis[0] == "1" and chart.axis[2] == "3"


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0, 5.0])
def test_odd_columns_break_nothing(value):
    column = pa.chunked_array([pa.array([value] * 3)])
    chart = charts.chart("x", "s", column, np.array([True, False, True]), np.ones(3), ("≤", 5.0))
    assert chart is None if not np.isfinite(value) else len(chart.bars) >= 1
    assert charts.chart("x", "s", pa.chunked_array([pa.nulls(3)]), np.ones(3, bool), np.ones(3)) is None


def test_labels_are_ranked_and_the_rest_is_one():
    values = [f"l{i}" for i in range(12) for _ in range(20 - i)]
    chart = charts.chart(
        "lang", "caption", pa.chunked_array([values]), np.ones(len(values), bool), np.ones(len(values))
    )
    assert [label[0] for label in chart.labels] == [*(f"l{i}" for i in range(9)), "all others"]
    assert chart.labels[-1][3] == 11 + 10 + 9


def test_weighted_quantile_equals_repetition():
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 5.0, 4.0])
    repeated = np.repeat(values, weights.astype(int))
    for q in (0.1, 0.5, 0.6, 0.95):
        expected = np.quantile(repeated, q, method="inverted_cdf")
        assert charts.weighted_quantile(values, weights, q) == expected


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (-0.0, "0"),
        (12345, "12,345"),
        (0.31234, "0.312"),
        (123.456, "123.5"),
        (0.0001, "<0.001"),
        (64.0, "64"),
    ],
)
def test_figure(number, shown):
    assert charts.figure(number) == shown


def test_share():
    assert [share(part) for part in (0, 0.0001, 0.5, 1)] == ["0.0%", "<0.1%", "50.0%", "100.0%"]


def chooser(data: DataDir, each: int = 5) -> gallery.Chooser:
    seen = examined.examine(Aligned(data), data.root / DEDUP)
    return gallery.Chooser(seen.rows, {"min_clip": 0.25, "max_nsfw": 0.5}, each)


def test_nearest_to_the_threshold_first(plain):
    strip = chooser(plain).strip("filter:min_clip", 8)
    assert [picture.value for picture in strip.dropped] == [
        "clip 0.2",
        "clip 0.19",
        "clip 0.18",
        "clip 0.17",
        "clip 0.16",
    ]
    assert [picture.value for picture in strip.passed] == ["clip 0.3", "clip 0.31"]
    strip = chooser(plain).strip("filter:max_nsfw", 3)
    assert [picture.value for picture in strip.dropped] == ["nsfw 0.9", "nsfw 0.95", "nsfw 0.99"]
    assert strip.passed[0].value == "nsfw 0.45"


def test_clusters_show_the_kept_one_and_how_alike(plain):
    found = gallery.duplicates(plain.root / DEDUP, 10)
    assert (found.total, found.rows) == (1, 4)
    (cluster,) = chooser(plain).clusters(found)
    assert cluster.kept.caption == "a picture of thing 0"
    assert [picture.value for picture in cluster.dropped] == ["0.970 · 4 bits"] * 4 and cluster.more == 0


def test_many_copies_are_counted_not_shown(tmp_path):
    data = make_raw(tmp_path, [Row(picture(0), "a")] * 9)
    decide(data, [None] + ["dedup:near"] * 8, dict.fromkeys(range(1, 9), 0))
    found = gallery.duplicates(data.root / DEDUP, 10)
    (cluster,) = chooser(data).clusters(found)
    assert len(cluster.dropped) == gallery.COPIES and cluster.more == 3


def test_noise_makes_no_large_thumbnail():
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    body = base64.b64decode(gallery.data_url(noise).partition(",")[2])
    assert len(body) <= gallery.THUMBNAIL_BYTES
    wide, high = Image.open(io.BytesIO(body)).size
    assert wide / high == pytest.approx(4 / 3, rel=0.02)


def test_the_page_has_a_bound():
    one = gallery.Picture("0", "k", "", "", "", False)
    strips = [gallery.Strip(f"filter:{i}", 1, [one] * 60, [one] * 30) for i in range(15)]
    clusters = [gallery.Cluster(one, [one] * 5, 0)] * 60
    cut, few = _within_bounds([one] * 60, strips, clusters)
    total = 60 + sum(len(s.dropped) + len(s.passed) for s in cut) + sum(1 + len(c.dropped) for c in few)
    assert total <= 700 and all(strip.dropped for strip in cut)
    assert 700 * (4 * gallery.THUMBNAIL_BYTES / 3 + 1500) < 8_000_000
    same = replace(strips[0], dropped=[one])
    assert _within_bounds([one], [same], []) == ([same], [])


# --- a real browser ---------------------------------------------------------------------------------

MEASURE = """<!doctype html><iframe width={width} height={height} srcdoc="{page}" style="border:0"></iframe><script>
addEventListener("load", () => {{
  const {{contentDocument: inside, contentWindow: view}} = document.querySelector("iframe");
  for (const details of inside.querySelectorAll("details")) details.open = true;
  const shown = [...inside.images].filter(image => image.complete && image.naturalWidth > 0).length;
  const wide = [...inside.querySelectorAll("main *")].filter(
    node => node.getBoundingClientRect().right > view.innerWidth + 1 && !node.closest(".scroll"));
  const figures = [inside.documentElement.scrollWidth, view.innerWidth, shown, wide.length];
  document.documentElement.dataset.measured = figures.join(" ");
}});
</script>"""


def browse(path: Path, profile: Path, *options: str) -> str:
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", *options, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_chromium_shows_it(kind, width, height, tmp_path, request):
    data = request.getfixturevalue(kind)
    size = f"--window-size={width},{height}"
    browse(data.root / PAGE, tmp_path / "a", size, f"--screenshot={tmp_path / 'shot.png'}")
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert shot.shape == (height, width, 3) and len(np.unique(shot.reshape(-1, 3), axis=0)) > 50
    # The page's own policy forbids scripts, so a copy without it is measured; a frame can be as narrow as a phone.
    text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page(data))
    assert count == 1
    wrapper = tmp_path / "measured.html"
    wrapper.write_text(
        MEASURE.format(width=width, height=height, page=html.escape(text.replace(' loading="lazy"', ""))),
        encoding="utf-8",
    )
    dom = browse(wrapper, tmp_path / "b", "--dump-dom")
    found = re.search(r'data-measured="(\d+) (\d+) (\d+) (\d+)"', dom)
    assert found
    scroll, inner, shown, wide = map(int, found.groups())
    assert inner == width and scroll <= inner and wide == 0
    assert shown == text.count("<img ") > 30
    dom = browse(data.root / PAGE, tmp_path / "c", "--dump-dom")
    assert "usable pictures" in dom and "Every input row has one fate" in dom
