"""The rules of `filter` as SQL over one row's columns: what each needs, and when a row fails it.

A measurement that is missing or not a number fails its rule. What depends on other rows (how many pictures share a
caption, the best fraction) is not decided here.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.base import HeadraceError
from pipeline.fates import RULES
from pipeline.tables import syntax_tree, walk

if TYPE_CHECKING:
    import duckdb

IMAGE_CODES = ("not_an_image", "corrupt", "too_many_pixels", "empty", "aspect", "crashed", "memory")
CAPTION_RULES = frozenset({"min_words", "min_p_en", "min_clip", "top_fraction"})

# A caption as it is compared between rows: lower case, letters and digits only, single spaces; all if there are none.
_LETTERS = r"trim(regexp_replace(lower(caption), '[^\pL\pN]+', ' ', 'g'))"
NORMAL_CAPTION = f"coalesce(nullif({_LETTERS}, ''), caption)"

# The code before the colon of an error message; what is no code of ours (another tool's sentence) becomes one.
_CODE = r"""CASE
    WHEN regexp_matches(error_message, '^[a-z0-9_]+(:|$)') THEN split_part(error_message, ':', 1)
    WHEN regexp_matches(error_message, 'HTTP Error [0-9]{3}')
        THEN 'http_' || regexp_extract(error_message, 'HTTP Error ([0-9]{3})', 1)
    ELSE 'other' END"""
NO_CAPTION = r"caption IS NULL OR NOT regexp_matches(caption, '\S')"
_SHORT = "least(coalesce(original_width, width), coalesce(original_height, height))"
_LONG = "greatest(coalesce(original_width, width), coalesce(original_height, height))"


@dataclass(frozen=True)
class Rule:
    """A rule in force: `fails` is an SQL condition that is never NULL, over columns named in `columns`."""

    name: str
    fails: str
    columns: frozenset[str]


def base_reason(decode_error: str | None, undecoded: str | None) -> str:
    """SQL for why a row has no usable picture, NULL where it has one.

    `decode_error` is the column that says so, `undecoded` one that is NULL then, where they were scored.
    """
    codes = ", ".join(f"'{code}'" for code in IMAGE_CODES)
    failed = f"{decode_error} IS NOT NULL" if decode_error else f"{undecoded} IS NULL" if undecoded else "false"
    return f"""CASE
        WHEN status = 'failed_to_resize' THEN 'image:' || coalesce({_CODE}, 'other')
        WHEN status <> 'success' AND ({_CODE}) IN ({codes}) THEN 'image:' || {_CODE}
        WHEN status <> 'success' THEN 'fetch:' || coalesce({_CODE}, 'other')
        WHEN {failed} THEN 'image:undecodable' END"""


def threshold_rules(settings: Mapping[str, Any]) -> list[Rule]:
    """The rules that judge a row by its own columns, in order, for those settings that are given."""
    sides = ("width", "height", "original_width", "original_height")
    rules = [
        _compared("min_side", settings, f"{_SHORT} >= {{limit}}", *sides),
        _compared("max_aspect", settings, f"{_LONG} / {_SHORT} <= {{limit}}", *sides),
        _flag("near_blank", settings["drop_near_blank"], "near_blank"),
        _flag("no_caption", needs_caption(settings), "caption", NO_CAPTION),
        _compared("min_words", settings, "words >= {limit}", "words"),
        _compared("max_words", settings, f"({NO_CAPTION}) OR words <= {{limit}}", "words", "caption"),
        _flag("filename_caption", settings["drop_filename_captions"], "filename_like"),
        _flag("spam_caption", settings["drop_spam_captions"], "spam_like"),
        _compared("min_p_en", settings, "p_en >= {limit} AND NOT isnan(p_en)", "p_en"),
        _compared("max_nsfw", settings, "nsfw <= {limit}", "nsfw"),  # DuckDB puts NaN above every number
        _compared("min_clip", settings, "clip_sim >= {limit} AND NOT isnan(clip_sim)", "clip_sim"),
    ]
    return [rule for rule in rules if rule]


def needs_caption(settings: Mapping[str, Any]) -> bool:
    """Whether rows without caption are dropped: when asked for, or when a rule in force measures the caption."""
    return settings["drop_no_caption"] or any(settings[name] is not None for name in CAPTION_RULES)


def bit(rule: str) -> int:
    """The bit that stands for a rule in a row's set of failed rules; earlier rules have lower ones."""
    return 1 << RULES.index(rule)


def _compared(name: str, settings: Mapping[str, Any], passes: str, *columns: str) -> Rule | None:
    limit = settings[name]
    condition = f"NOT coalesce({passes.format(limit=repr(limit))}, false)"
    return None if limit is None else Rule(name, condition, frozenset(columns))


def _flag(name: str, active: bool, column: str, fails: str | None = None) -> Rule | None:
    return Rule(name, f"coalesce({fails or column}, false)", frozenset({column})) if active else None


def where_rule(connection: duckdb.DuckDBPyConnection, where: str, known: Collection[str]) -> Rule:
    """The rule that drops rows for which the user's condition is not true.

    It must be one expression of one row's columns: no subquery, no aggregate, no second expression.
    """
    hint = "such as `clip_sim > 0.3 AND lang = 'en'`, without SELECT"
    tree = syntax_tree(connection, f"SELECT ({where}\n)", "--where", hint)["node"]
    single = len(tree.get("select_list", ())) == 1 and tree["from_table"]["type"] == "EMPTY" and not tree["modifiers"]
    nodes = list(walk(tree))
    plain = not any(tree.get(part) for part in ("where_clause", "group_expressions", "having", "qualify", "sample"))
    if not (single and plain) or any(node.get("class") in ("SUBQUERY", "WINDOW", "STAR") for node in nodes):
        message = f"--where takes one condition on a row's columns, which this is not: {where}"
        raise HeadraceError(message, hint=hint)
    parts = {part.lower() for node in nodes if node.get("class") == "COLUMN_REF" for part in node["column_names"]}
    if not any(node.get("class") == "LAMBDA" for node in nodes):  # whose own names are no columns
        _check_names(nodes, known)
    used = frozenset(name for name in known if name.lower() in parts)
    return Rule("where", f"NOT coalesce(({where}\n)::BOOLEAN, false)", used)


def _check_names(nodes: Iterable[Mapping[str, Any]], known: Collection[str]) -> None:
    lowered = {name.lower(): name for name in known}
    for node in nodes:
        parts = node["column_names"] if node.get("class") == "COLUMN_REF" else []
        if parts and not any(part.lower() in lowered for part in parts):
            near = difflib.get_close_matches(parts[-1].lower(), lowered, n=1, cutoff=0.6)
            hint = f"did you mean `{lowered[near[0]]}`?" if near else f"there are {', '.join(sorted(known))}"
            raise HeadraceError(f"--where names `{parts[-1]}`, and there is no such column", hint=hint)
