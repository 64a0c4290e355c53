"""Everything that is wrong with a configuration, as one readable text."""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from d3etr.config.variants import fields_of
from d3etr.errors import UserError
from d3etr.text import nearest

_TEXTS = ("string_type", "path_type", "location_type")
MAXIMUM_SHOWN = 60
"""Characters of a found value that are quoted."""

EXPECTATIONS: Mapping[str, str] = {
    "bool_type": "true or false",
    "float_type": "a number",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "string_type": "text",
    "path_type": "a path",
    "location_type": "a path or URL",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "model_type": "a section",
    "finite_number": "a finite number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": "text that matches {pattern}",
}
"""What pydantic's error types expect, as the end of "found ..., expected ..."."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        path: dotted path, empty for the whole tree.
        text: what was found and what is allowed.
    """

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}" if self.path else self.text


class ConfigError(UserError):
    """A configuration that cannot be used; lists every problem at once."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source, self.problems = source, tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"Found {count} in {source}:", *(f"  - {problem}" for problem in problems)]
        super().__init__("\n".join(lines))


def problems_of(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """The problems in a pydantic error, one per key, in the order of the configuration.

    Args:
        error: what validation of ``root`` raised.
        root: the tree's model; its fields give the valid names.
    """
    grouped: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_path(detail["loc"], root), []).append(detail)
    return [
        Problem(_named_in(path, text, root), text)
        for path, details in grouped.items()
        for text in [_text(path, details, root)]
        if not _is_explained_below(path, details, grouped)
    ]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field's annotation allows (through unions and Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            yield from models_in(part)


def _path(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """The dotted path of a key: pydantic's location without the names of union branches."""
    parts: list[str] = []
    section: type[BaseModel] | None = root
    values: Any = None
    for part in location:
        if section is not None:
            parts.append(str(part))
            field = fields_of(section).get(str(part))
            annotation = field.annotation if field else None
            section = next(models_in(annotation), None)
            values = get_args(annotation)[1] if get_origin(annotation) is dict else None
        elif values is not None:  # a mapping's own key
            parts.append(str(part))
            section, values = next(models_in(values), None), None
        elif isinstance(part, int):
            parts[-1] += f"[{part}]"
    return ".".join(parts)


def _named_in(path: str, text: str, root: type[BaseModel]) -> str:
    """The path of the key that a section's own rule begins with; else of the section."""
    section: type[BaseModel] | None = root
    for part in path.split(".") if path else ():
        field = None if section is None else fields_of(section).get(part)
        section = None if field is None else next(models_in(field.annotation), None)
    first = text.split()[0].rstrip(",:") if text else ""
    known = section is not None and path and first.split(".")[0] in fields_of(section)
    return f"{path}.{first}" if known else path


def _is_explained_below(
    path: str, details: Sequence[ErrorDetails], grouped: Mapping[str, object]
) -> bool:
    """Whether a list is refused as "not one of these names" only because an element is wrong."""
    element_is_wrong = any(other.startswith(f"{path}[") for other in grouped)
    return element_is_wrong and all(detail["type"] == "literal_error" for detail in details)


def _text(path: str, details: Sequence[ErrorDetails], root: type[BaseModel]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return _unknown_key(path, root)
    if first["type"] == "missing":
        return "is missing and has no default"
    if first["type"] == "value_error":
        return "; ".join(str(detail["ctx"]["error"]) for detail in details if "ctx" in detail)
    found, allowed = first["input"], " or ".join(_allowed(details))
    if isinstance(found, str) and first["type"] == "literal_error":
        guess = difflib.get_close_matches(found, _choices(first), n=1)
        allowed += f"; did you mean '{guess[0]}'?" if guess else ""
    if first["type"] in _TEXTS and isinstance(found, int | float) and "[" not in path:
        allowed += f": quote what reads as a number or as true, --set \"{path}='...'\""
    return f"found {shown(found)}, expected {allowed}"


def _allowed(details: Sequence[ErrorDetails]) -> list[str]:
    """What each branch of a union allows, without repetition."""
    sentences = (_expectation(detail) for detail in details)
    return list(dict.fromkeys(sentences))


def _expectation(detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        return f"one of {', '.join(repr(choice) for choice in _choices(detail))}"
    sentence = EXPECTATIONS.get(detail["type"])
    limits = {name: _number(value) for name, value in detail.get("ctx", {}).items()}
    return sentence.format(**limits) if sentence else detail["msg"]


def _number(value: Any) -> Any:
    """0.0 as 0: limits read better that way."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _choices(detail: ErrorDetails) -> list[str]:
    """The names a literal allows; pydantic writes them as "'a', 'b' or 'c'"."""
    expected: str = detail["ctx"]["expected"]
    return expected.replace(" or ", ", ").replace("'", "").split(", ")


def _unknown_key(path: str, root: type[BaseModel]) -> str:
    """Name the nearest key of the same section, or where in the tree the key lives."""
    section, name = root, path
    while "." in name:  # a key may itself hold a dot
        field = fields_of(section).get(name.partition(".")[0])
        below = None if field is None else next(models_in(field.annotation), None)
        if below is None:
            break
        section, name = below, name.partition(".")[2]
    elsewhere = [place for place in all_paths(root) if place.split(".")[-1] == name]
    close = difflib.get_close_matches(name, fields_of(section), n=1, cutoff=0.6)
    if not close and elsewhere:
        shallowest = min(elsewhere, key=lambda place: place.count("."))
        return f"unknown key; did you mean '{shallowest}'?"
    return f"unknown key; {nearest(name, fields_of(section))}"


def all_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted paths of a section's keys and of the sections in it."""
    for name, field in fields_of(section).items():
        yield prefix + name
        for model in models_in(field.annotation):
            yield from all_paths(model, f"{prefix}{name}.")


def shown(value: object) -> str:
    """A found value for an error text: quoted, shortened, null spelled as in YAML."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a section"
    text = repr(value)
    return text if len(text) <= MAXIMUM_SHOWN else f"{text[:MAXIMUM_SHOWN]}..."
