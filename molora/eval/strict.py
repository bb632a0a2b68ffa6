"""Mappings to frozen dataclasses, strictly: every key and every type is checked, at any depth."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from molora.suggest import unknown_key_message

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``2e-4`` is a number, ``yes``, ``no``, ``on`` and ``off`` are text (PyYAML reads YAML 1.1)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if not tag.endswith((":bool", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Reads YAML with 1.2 numbers and booleans."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (_Loader is a SafeLoader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping and expands ``${VAR}`` and ``${VAR:-default}`` in its strings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, or a variable that is not set and has no default.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; give the path of a YAML file")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping of sections, got {type(data).__name__}")
    return expand_variables(data, str(path))


def expand_variables(value: Any, where: str) -> Any:
    """Expands ``${VAR}`` and ``${VAR:-default}`` in every string of a nested value."""
    if isinstance(value, dict):
        return {key: expand_variables(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [expand_variables(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name, default)
        if found is None:
            raise ValueError(
                f"{where} names ${{{name}}}, which is not set; export {name}=... or write ${{{name}:-default}}"
            )
        return found

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", variable, value)


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Applies ``key.sub=value`` in place; values are YAML; an item of a list is named by its index or its ``name``.

    Only paths are resolved here: whether a key exists is checked by :func:`build`, once, for file and overrides alike.

    Raises:
        ValueError: no ``=``, or a path that runs through a value that has no keys.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ValueError(f"override {override!r} must read key.sub=value")
        *parents, last = path.split(".")
        node: Any = data
        for part in parents:
            node = _step(node, part, override)
        try:
            value = expand_variables(parse_yaml(text), path)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not valid YAML; put it in quotes") from error
        if isinstance(node, list):
            node[_position(node, last, override)] = value
        else:
            node[last] = value
    return data


def _step(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        node = node[_position(node, part, override)]
    else:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    if not isinstance(node, dict | list):
        raise ValueError(f"override {override!r}: {part!r} holds {node!r}, which has no keys; set {part!r} itself")
    return node


def _position(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise ValueError(
        f"override {override!r}: no item {part!r} in a list of {len(items)}; use an index or one of the names {names}"
    )


def build(tp: type[T] | Any, value: Any, where: str) -> T:
    """Builds a value of type ``tp`` from YAML data: dataclasses from mappings, recursively.

    Args:
        tp: a dataclass, a plain type, a ``Literal``, or unions, lists and dicts of these.
        value: what YAML gave.
        where: the path of the value, for messages, for instance ``"recipe.tasks[0]"``.

    Raises:
        ValueError: an unknown key (with the nearest valid one), a missing key, or a value of another type.
    """
    origin = get_origin(tp)
    if tp is Any:
        return value
    if is_dataclass(tp):
        return _build_dataclass(tp, value, where)
    if origin in (Union, types.UnionType):
        options = get_args(tp)
        if value is None and type(None) in options:
            return None  # type: ignore[return-value]
        options = tuple(option for option in options if option is not type(None))
        # More than one option is left only for containers, list or dict: take the one that the value is.
        chosen = next((o for o in options[1:] if isinstance(value, get_origin(o) or o)), options[0])
        return build(chosen, value, where)
    if origin is Literal:
        if value not in get_args(tp):
            raise ValueError(f"{where} must be one of {', '.join(map(repr, get_args(tp)))}, got {value!r}")
        return value
    if origin is list and isinstance(value, list):
        return [build(get_args(tp)[0], item, f"{where}[{index}]") for index, item in enumerate(value)]  # type: ignore[return-value]
    if origin is dict and isinstance(value, dict):
        return {key: build(get_args(tp)[1], item, f"{where}.{key}") for key, item in value.items()}  # type: ignore[return-value]
    if tp is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)  # type: ignore[return-value]
    plain = origin or tp
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        hint = "; put quotes around it" if plain is str else ""
        raise ValueError(f"{where} must be of type {plain.__name__}, got {value!r}{hint}")
    return value


def _build_dataclass(tp: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of keys, got {value!r}")
    known = {field.name: field for field in fields(tp)}
    for key in value:
        if key not in known:
            raise ValueError(unknown_key_message(where, str(key), known))
    missing = [
        name
        for name, field in known.items()
        if name not in value and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks the key {', '.join(missing)}; add it")
    hints = get_type_hints(tp)
    return tp(**{key: build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
