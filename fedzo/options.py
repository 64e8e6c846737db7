"""The options of a method: their types, defaults and descriptions, read off its class."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedzo.methods import METHODS, Method
from zokernels.finetune.config import UserError


@dataclass(frozen=True)
class Option:
    """An option of a method.

    Attributes:
        name: keyword.
        hint: type annotation.
        default: value where none is given.
        text: what it is, from the docstring of the class.
    """

    name: str
    hint: Any
    default: Any
    text: str


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UserError: there is none of that name.
    """
    if name not in METHODS:
        raise UserError(f"--method must be one of {', '.join(METHODS)}; got {name!r}")
    return METHODS[name]


def options_of(name: str) -> dict[str, Option]:
    """The options of a method by name.

    Raises:
        UserError: there is no such method.
    """
    kind = method_class(name)
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        texts.update(_texts(base.__doc__ or ""))
    hints = get_type_hints(kind)
    return {
        f.name: Option(f.name, hints[f.name], f.default, texts.get(f.name, ""))
        for f in dataclasses.fields(kind)
    }


def make_method(name: str, given: Mapping[str, Any]) -> Method:
    """A method with these options, converted from text where they come from a command line.

    Raises:
        UserError: an unknown method or option, or a value that is not allowed.
    """
    known = options_of(name)
    values = {}
    for option, value in given.items():
        if option not in known:
            raise UserError(
                f"method {name} has no option {option!r}; it has {', '.join(sorted(known))}"
            )
        values[option] = _converted(known[option], value, name)
    try:
        return method_class(name)(**values)
    except ValueError as error:
        raise UserError(f"method {name}: {error}") from error


def _converted(option: Option, value: Any, method: str) -> Any:
    kinds = get_args(option.hint) or (option.hint,)
    if isinstance(value, str):
        if type(None) in kinds and value.lower() in ("none", "null", ""):
            return None
        if str in kinds or option.hint is str:
            return value
        if any(get_args(kind) == (str, ...) for kind in (*kinds, option.hint)):
            return tuple(part.strip() for part in value.split(",") if part.strip())
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(
            option.hint, config={"arbitrary_types_allowed": True}
        )
        return adapter.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(
            f"method {method}: option {option.name}: {reason}; got {value!r}"
        ) from error


_ENTRY = re.compile(r"^(?P<names>[a-z_][\w, ]*): (?P<text>.+)$")


def _texts(docstring: str) -> dict[str, str]:
    """Descriptions under ``Args:``, by name."""
    _, found, rest = docstring.partition("Args:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in rest.splitlines() if found else ():
        if not line.strip() or not line.startswith("        "):
            break
        inner = line[8:]
        entry = None if inner.startswith(" ") else _ENTRY.match(inner)
        if entry is not None:
            names = [name.strip() for name in entry["names"].split(",")]
            texts.update(dict.fromkeys(names, entry["text"]))
        elif inner.startswith(" "):
            texts.update({name: f"{texts[name]} {inner.strip()}" for name in names})
        else:
            names = []
    return texts
