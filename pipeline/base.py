"""What every module may use: the one exception and how it ends a command, frozen settings from TOML, text that is fit
to be shown, and files that appear whole or not at all.

It knows nothing of shards, stages or pictures.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import logging
import os
import sys
import threading
import tomllib
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

# Exit codes: 0 is done, 130 is interrupted.
FINDINGS, USAGE, MISSING, REFUSED = 1, 2, 3, 4
INTERRUPTED = 130
MESSAGE = 2000  # characters of an error that are shown
_SPELLED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_JOINERS = "\u200c\u200d"  # harmless, and part of emoji and of some scripts


class HeadraceError(Exception):
    """A condition the user can mend: `message` says what and where, `hint` how; `code` is the exit code."""

    def __init__(self, message: str, hint: str | None = None, code: int = USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __reduce__(self) -> tuple[type[HeadraceError], tuple[str, str | None, int]]:
        return type(self), (self.message, self.hint, self.code)


class Config(BaseModel):
    """Base of every settings class: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=Config)


def run_command(app: Callable[..., Any], name: str, interrupted: str) -> NoReturn:
    """Run a Typer app on the command line and exit.

    An error of the user's making ends as `error:` and `hint:` with its exit code, and so does a disk that is full or
    closed; Ctrl-C ends with the line `interrupted`.
    """
    from typer import TyperException

    hush_libraries()
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except TyperException as error:  # a wrong option or argument
        command = getattr(getattr(error, "ctx", None), "command_path", name)
        code = _complain(HeadraceError(error.format_message(), hint=f"`{command} --help` says what it takes"))
    except HeadraceError as error:
        code = _complain(error)
    except OSError as error:
        known = disk_error(error, Path(os.fsdecode(error.filename or "the output")))
        if not isinstance(known, HeadraceError):
            raise
        code = _complain(known)
    if code == INTERRUPTED:
        print(f"interrupted: {interrupted}", file=sys.stderr)
    sys.exit(code)


def _complain(error: HeadraceError) -> int:
    """Print the two lines; names out of hostile files may be in them."""
    print(f"error: {visible(error.message, MESSAGE)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {visible(error.hint, MESSAGE)}", file=sys.stderr)
    return error.code


def visible(text: str, limit: int) -> str:
    """Text on one line, at most `limit` characters, with control and direction characters spelled out."""
    shown = spelled_out(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def spelled_out(text: str) -> str:
    """Text with every control and direction character, line ends too, written as its escape."""
    return "".join(map(_spelled, text))


def _spelled(character: str) -> str:
    if character in _JOINERS or (unicodedata.category(character)[0] != "C" and character not in "\u2028\u2029"):
        return character
    return _SPELLED.get(character, f"\\u{ord(character):04x}")


def hush_libraries() -> None:
    """Keep off the terminal what libraries log or warn of; `python -W` and PYTHONWARNINGS still show warnings."""
    logging.disable(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        sys.warnoptions.append("ignore")  # Python hands these to the processes it starts
    sys.unraisablehook = _unraisable
    threading.excepthook = _in_thread


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """A file that cannot be closed as it goes away: the write that failed before it has been told."""
    if not isinstance(found.exc_value, OSError):
        sys.__unraisablehook__(found)


def _in_thread(found: threading.ExceptHookArgs) -> None:
    """A write that failed in a library's thread: whom it was for is told, and tells."""
    if not isinstance(found.exc_value, OSError):
        threading.__excepthook__(found)


def parse_config(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """Check `values` against `kind`; every problem is named at once, an unknown key with the nearest known one."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_problem(kind, issue) for issue in error.errors()]
        raise HeadraceError(f"{where}: " + "; ".join(lines), hint=f"correct {where} and run again") from None


def _problem(kind: type[BaseModel], issue: Any) -> str:
    path = [str(part) for part in issue["loc"]]
    name = ".".join(path)
    if issue["type"] != "extra_forbidden":
        table = "input should be a table" if issue["type"] in ("model_type", "dict_type") else None
        text = table or issue["msg"].removeprefix("Value error, ")
        return f"`{name}`: {text[0].lower()}{text[1:]}, not {issue.get('input')!r}"
    near = difflib.get_close_matches(path[-1], _keys_at(kind, path[:-1]), n=1, cutoff=0.5)
    return f"unknown key `{name}`" + (f", did you mean `{near[0]}`?" if near else "")


def _keys_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        kind = field.annotation
    return list(kind.model_fields)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; a missing or malformed one is a `HeadraceError`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HeadraceError(f"there is no file {path}", hint="check the path", code=MISSING) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise HeadraceError(f"{path} is not valid TOML: {error}", hint="correct that line") from None


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON-able value in its canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it is flushed to the disk and renamed to `path`, else removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, Path(error.filename or path.parent)) from error
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def disk_error(error: OSError, path: Path) -> Exception:
    """A sentence for a disk that is full, read-only or over its quota, or a path that is closed; else the error."""
    if error.errno not in (*_FULL, *_CLOSED):
        return error
    mend = "free some space" if error.errno in _FULL else "mend that"
    hint = f"{mend} or choose another folder, then run again: what was finished is kept"
    return HeadraceError(f"cannot write {path}: {os.strerror(error.errno).lower()}", hint=hint, code=FINDINGS)


def sync_directory(folder: Path) -> None:
    """Flush a directory, so that a rename inside it survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: sorted keys, one trailing newline."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a `HeadraceError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HeadraceError(f"{path} is damaged: {error}", hint="remove the file and run the stage again") from None


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Write nested dicts of str, int, float, bool, lists and dicts as TOML, atomically; None is left out."""
    import tomli_w

    write_bytes(path, tomli_w.dumps(_without_none(values)).encode())


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value
