"""Read dataclasses from plain dicts: unknown keys and wrong types are errors that name the place and the right key."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..common import nearest
from .other_names import RECIPE_KEYS

T = TypeVar("T")


def read(cls: type[T], raw: Any, where: str, prefix: str = "") -> T:
    """Make a `cls` from a mapping; `where` is the file, `prefix` the dotted path of this part in it."""
    if not isinstance(raw, Mapping):
        raise TypeError(f"{where}: {prefix or 'a recipe'} must be a mapping of keys to values, got {_show(raw)}")
    hints = hints_of(cls)
    values = {}
    for key, value in raw.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            raise ValueError(f"{where}: unknown key {path!r}; {_nearest_path(path, key_paths(cls, prefix))}")
        values[key] = convert(hints[key], value, f"{where}: {path}", path, where)
    missing = [field.name for field in dataclasses.fields(cls) if _required(field) and field.name not in values]  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{where}: {prefix + '.' if prefix else ''}{missing[0]} is missing; add it")
    try:
        return cls(**values)
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {prefix + ': ' if prefix else ''}{error}") from None


def hints_of(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def hint_at(cls: type, path: str) -> Any:
    """Return the type of the value at a dotted path; ValueError names the nearest path there is."""
    hint: Any = cls
    for part in path.split("."):
        inside = _section(hint)
        maps = [option for option in _options(hint) if get_origin(option) in (dict, Mapping)]
        if inside is not None and part in hints_of(inside):
            hint = hints_of(inside)[part]
        elif maps:
            hint = get_args(maps[0])[1]
        elif hint is not Any:
            raise ValueError(f"unknown key {path!r}; {_nearest_path(path, key_paths(cls))}")
    return hint


def leaves_at(cls: type, path: str, value: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Take the value at a dotted path apart, as ``leaves`` does; the type of the value decides what a section is."""
    *parents, last = parts = tuple(path.split("."))
    above = hint_at(cls, ".".join(parents)) if parents else cls
    if _section(above) is not None:
        return leaves(above, {last: value}, tuple(parents))
    return leaves(hint_at(cls, path), value, parts)


def leaves(hint: Any, value: Any, parts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Take a value apart into those of its keys: yield the path, the type and the value of each.

    Sections (dataclasses, and mappings of names to them) are taken apart; any other value is yielded as it stands, an
    empty mapping too. ValueError names the nearest path of an unknown key.
    """
    if not isinstance(value, Mapping) or not value:
        yield parts, hint, value
        return
    section = _section(hint)
    named = [get_args(option)[1] for option in _options(hint) if get_origin(option) in (dict, Mapping)]
    if section is not None:
        for key, one in value.items():
            yield from _field_leaves(section, str(key), one, parts)
    elif named and _section(named[0]) is not None:
        for key, one in value.items():
            yield from leaves(named[0], one, (*parts, str(key)))
    else:
        yield parts, hint, value


def _field_leaves(section: type, key: str, value: Any, parts: tuple[str, ...]) -> Iterator[tuple[Any, Any, Any]]:
    path, hints = (*parts, key), hints_of(section)
    if key not in hints:
        dotted = ".".join(path)
        raise ValueError(f"unknown key {dotted!r}; {_nearest_path(dotted, key_paths(section, '.'.join(parts)))}")
    if _fields_of(section, key) is not None and isinstance(value, Mapping) and value:
        # The section checks its own mapping of another class's fields, with that class's hints.
        yield from (((*path, str(name)), Any, one) for name, one in value.items())
    else:
        yield from leaves(hints[key], value, path)


def _section(hint: Any) -> type | None:
    """Return the dataclass that a type may be."""
    return next((one for one in _options(hint) if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def _fields_of(cls: type, name: str) -> type | None:
    """Return the dataclass whose fields a mapping in a field may hold: ``metadata={"fields_of": cls}``."""
    return next(field.metadata.get("fields_of") for field in dataclasses.fields(cls) if field.name == name)


def key_paths(cls: type, prefix: str = "") -> list[str]:
    """List the dotted paths of all keys, nested ones too."""
    paths = []
    for name, hint in hints_of(cls).items():
        path = f"{prefix}.{name}" if prefix else name
        paths.append(path)
        nested = _section(hint) or _fields_of(cls, name)
        paths += key_paths(nested, path) if nested is not None else []
    return paths


def convert(hint: Any, value: Any, name: str, path: str = "", where: str = "") -> Any:
    """Check a value against a type hint; text that reads as a number serves where only a number fits (YAML's 1e-3)."""
    failures: list[Exception] = []
    for option in sorted(_options(hint), key=lambda option: option in (float, str)):
        try:
            return _convert_one(option, value, name, path, where)
        except _MismatchError as error:
            failures.append(error)
    wanted = " or ".join(dict.fromkeys(str(error) for error in failures))
    raise TypeError(f"{name} must be {wanted}, got {_show(value)}")


def _nearest_path(path: str, known: list[str]) -> str:
    """Say which dotted path is meant: lr means train.lr; else list the keys that stand beside it."""
    ours = RECIPE_KEYS.get(path.rpartition(".")[2])
    if ours is not None:
        return f"did you mean {ours!r}?"
    same_end = [other for other in known if other.rpartition(".")[2] == path.rpartition(".")[2]]
    if same_end:
        return f"did you mean {' or '.join(map(repr, same_end[:3]))}?"
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    if close:
        return f"did you mean {close[0]!r}?"
    return nearest(path, [other for other in known if other.count(".") == path.count(".")] or known)


class _MismatchError(Exception):
    """The value is of another type; the text says which one was wanted."""


def _convert_one(option: Any, value: Any, name: str, path: str, where: str) -> Any:
    origin, args = get_origin(option), get_args(option)
    if dataclasses.is_dataclass(option) and isinstance(option, type):
        if not isinstance(value, Mapping):
            raise _MismatchError("a mapping")
        return read(option, value, where, path)
    if option is Any:
        return value
    if origin is Literal:
        if value not in args:
            raise _MismatchError(" | ".join(map(str, args)))
        return value
    if origin in (dict, Mapping) or option in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _MismatchError("a mapping")
        item = args[1] if args else Any
        return {str(key): convert(item, one, f"{name}.{key}", f"{path}.{key}", where) for key, one in value.items()}
    if origin in (list, tuple, Sequence) or option in (list, tuple):
        return _convert_list(origin or option, args, value, name, path, where)
    return _convert_scalar(option, value)


def _convert_list(kind: Any, args: tuple[Any, ...], value: Any, name: str, path: str, where: str) -> Any:
    fixed = kind is tuple and args and args[-1] is not Ellipsis
    wanted = f"a list of {len(args)} values" if fixed else "a list"
    if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(args)):
        raise _MismatchError(wanted)
    items = args if fixed else [args[0] if args else Any] * len(value)
    found = [
        convert(item, one, f"{name}[{i}]", path, where) for i, (item, one) in enumerate(zip(items, value, strict=True))
    ]
    return tuple(found) if kind is tuple else found


def _convert_scalar(option: Any, value: Any) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing (null)"}
    if option is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise _MismatchError(names[float]) from None
    if option is int and isinstance(value, bool):
        raise _MismatchError(names[int])
    if option is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, option):
        raise _MismatchError(names.get(option, getattr(option, "__name__", str(option))))
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({type(value).__name__})"
