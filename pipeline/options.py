"""Command-line options from settings classes: every field of a stage's settings is an option of its command.

A nested field loses its group's name on the command line (`fetch.retries` is `--retries`). An option not given is
None and leaves the recipe as it is.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from pipeline.base import Config, HeadraceError


def parameters(kind: type[Config], skip: frozenset[str] = frozenset()) -> list[inspect.Parameter]:
    """One keyword parameter per field of `kind`, as Typer reads them."""
    return [_parameter(path, field) for path, field in _fields(kind) if path not in skip]


def given(kind: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's arguments those that the user gave, by their dotted path in `kind`."""
    found = {}
    for path, field in _fields(kind):
        value = values.get(path.rpartition(".")[2])
        if value is not None and value != []:
            found[path] = _parsed(path, field, value)
    return found


def _fields(kind: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _parameter(path: str, field: FieldInfo) -> inspect.Parameter:
    name = path.rpartition(".")[2]
    kind = _plain(field.annotation)
    flag = name.replace("_", "-")
    words = [f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"]
    if get_origin(kind) in (list, tuple, dict):
        kind = list[str]
    option = typer.Option(*words, help=_help(field), show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Union[kind, None], option],  # noqa: UP007
    )


def _help(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    text = field.description or ""
    return text if default in (None, {}, [], ()) else f"{text} [{_shown(default)}]"


def _shown(default: Any) -> str:
    if isinstance(default, list | tuple):
        return ", ".join(str(item) for item in default)
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)


def _plain(annotation: Any) -> Any:
    """The type without `| None`, and a Literal as its values' type."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(arg for arg in get_args(annotation) if arg is not type(None)))
    if str(get_origin(annotation)).endswith("Literal"):
        return type(get_args(annotation)[0])
    return annotation


def _parsed(path: str, field: FieldInfo, value: Any) -> Any:
    origin = get_origin(_plain(field.annotation))
    if origin is dict:
        return dict(_pair(path, item) for item in value)
    if origin in (list, tuple) and path == "signals":
        return [part for item in value for part in item.split(",") if part]
    return value


def _pair(path: str, item: str) -> tuple[str, str]:
    left, equals, right = item.partition("=")
    if not equals:
        raise HeadraceError(f"--{path.rpartition('.')[2]} {item!r} has no `=`", hint="write it as PATTERN=HOST:PORT")
    return left, right
