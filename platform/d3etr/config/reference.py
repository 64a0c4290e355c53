"""Every key of the configuration: what it does, its values, unit and default.

Read from the configuration's classes, so it cannot disagree with them. Sections that come in
variants (detectors, methods) are walked through all of them; each key names those that have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from d3etr.config.base import MAXIMUM
from d3etr.config.location import Url
from d3etr.config.problems import models_in
from d3etr.config.renamed import EARLIER_KEYS, Renamed
from d3etr.config.tree import Config
from d3etr.config.variants import VariantSection
from d3etr.errors import UserError

Schema = dict[str, Any]

_UNITS = {
    "pixels": (
        *("shortest_side", "shortest_sides", "longest_side", "image_size", "crop_size"),
        *("minimum_scale", "maximum_scale", "exact_size"),
    ),
    "optimiser steps": ("steps", "every_steps", "checkpoint_every_steps", "warmup_steps"),
    "epochs": ("epochs", "every_epochs", "checkpoint_every_epochs", "off_for_last_epochs"),
    "seconds": ("start_timeout_seconds",),
    "minutes": ("minutes",),
    "images": ("batch_size", "train_images", "validation_images", "test_images"),
    "channels": ("width", "feedforward", "stem_width", "stage_widths"),
    "processes": ("workers", "minimum_workers"),
}
_PLAIN = {
    "boolean": "true or false",
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "path": "path",
    "location": "path or URL",
    "null": "null",
}
"""JSON schema's types and formats in words."""
UNITS = {name: unit for unit, names in _UNITS.items() for name in names}
"""Last part of a key -> unit of its values; fractions and counts of what a key names have none."""


@dataclass(frozen=True)
class Key:
    """One key, or one section.

    Attributes:
        path: dotted.
        description: what it does; Markdown.
        values: what it may be, in words.
        schema: the same as JSON Schema.
        defaults: (its default as YAML, the variants that have this one); one entry without
            variants where all agree; none of a section and of a key that must be set.
        family: what the variants are, ``detector`` or ``method``; "" outside of such sections.
        owners: the variants that have it; empty for all.
        is_section: whether keys are below it.
    """

    path: str
    description: str
    values: str
    schema: Schema
    defaults: tuple[tuple[str, tuple[str, ...]], ...] = ()
    family: str = ""
    owners: tuple[str, ...] = ()
    is_section: bool = False

    @property
    def unit(self) -> str | None:
        """Of its values; None where they are fractions, names or counts of what it is about."""
        return UNITS.get(self.path.rpartition(".")[2])

    @property
    def belongs_to(self) -> str:
        """The variants that have it, in words; "" for all."""
        names = ", ".join(f"`{name}`" for name in self.owners)
        return f"only {self.family} {names}" if names else ""

    @property
    def default(self) -> str:
        """The default in words."""
        if not self.defaults:
            return "" if self.is_section else "must be set"
        texts = [
            f"`{text}` ({', '.join(owners)})" if owners else f"`{text}`"
            for text, owners in self.defaults
        ]
        return ", ".join(texts)


def all_keys() -> list[Key]:
    """Every key and section of the configuration, in its order."""
    return list(_keys(Config, "", None))


def find_keys(wanted: str) -> list[Key]:
    """The keys of a dotted path, or of its last parts; a section comes with all that is in it.

    Raises:
        UserError: there is none; the nearest one is named.
    """
    keys = all_keys()
    found = [key for key in keys if key.path == wanted]
    if any(key.is_section for key in found):
        return [key for key in keys if f"{key.path}.".startswith(f"{wanted}.")]
    found = found or [key for key in keys if f".{key.path}".endswith(f".{wanted}")]
    if found:
        return found
    if wanted in EARLIER_KEYS:
        today = EARLIER_KEYS[wanted]
        name = today.key if isinstance(today, Renamed) else today
        text = "has no effect any more" if name is None else f"is '{name}' today"
        raise UserError(f"{wanted} is a key of an earlier version: it {text}")
    last = {key.path.rpartition(".")[2]: key.path for key in reversed(keys)}
    close = get_close_matches(wanted, [key.path for key in keys], n=1) or [
        last[name] for name in get_close_matches(wanted.rpartition(".")[2], last, n=1)
    ]
    advice = f"did you mean '{close[0]}'?" if close else "'d3etr explain' lists the sections"
    raise UserError(f"there is no key '{wanted}'; {advice}")


def _keys(section: type[BaseModel], prefix: str, default: object) -> Iterator[Key]:
    """The keys of a section.

    Args:
        section: its model.
        prefix: of their paths.
        default: the section's own default, which may differ from its fields'.
    """
    if issubclass(section, VariantSection) and "registry" in section.__dict__:
        yield from _keys_of_variants(section, prefix)
        return
    for name, field in section.model_fields.items():
        path, inside = f"{prefix}{name}", next(models_in(field.annotation), None)
        value = field.get_default(call_default_factory=True)
        value = getattr(default, name) if isinstance(default, section) else value
        if inside is None:
            schema = _schema_of(field)
            yield Key(path, _text(field.description), _words(schema), schema, _default(value))
            continue
        description = _text(field.description) or _text(_first_paragraph(inside))
        optional = value is None
        values = "section, or null" if optional else "section"
        given = (("null", ()),) if optional else ()
        yield Key(path, description, values, {"type": "object"}, given, is_section=True)
        yield from _keys(inside, f"{path}.", value)


def _keys_of_variants(base: type[VariantSection], prefix: str) -> Iterator[Key]:
    """The keys of all variants; what is the same for several of them comes once."""
    kind, names = base.registry.kind, base.registry.names
    own = f"{prefix}{base.variant_key}"
    yield Key(
        own,
        f"Which {kind}: each has keys of its own.",
        _choice(names),
        {"enum": list(names)},
        ((base.default_variant, ()),),
    )
    merged: dict[str, list[tuple[str, Key]]] = {}
    for name, variant in base.variants().items():
        for key in _keys(variant, prefix, None):
            if key.path != own:
                about = "" if key.is_section else f"{key.description} {key.values}"
                merged.setdefault(f"{key.path} {about}", []).append((name, key))
    with_keys = {name for found in merged.values() for name, _ in found}
    for found in merged.values():
        owners = tuple(name for name, _ in found)
        defaults: dict[str, list[str]] = {}
        for name, key in found:
            for text, _ in key.defaults:
                defaults.setdefault(text, []).append(name)
        by_owner = tuple((text, tuple(who)) for text, who in defaults.items())
        yield replace(
            found[0][1],
            family=kind,
            owners=owners if len(owners) < len(with_keys) else (),
            defaults=by_owner if len(by_owner) > 1 else tuple((text, ()) for text in defaults),
        )


def _default(value: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if value is PydanticUndefined:
        return ()
    plain = str(value) if isinstance(value, Path | Url) else to_jsonable_python(value)
    return ((plain if isinstance(plain, str) else json.dumps(plain), ()),)


def _first_paragraph(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").split("\n\n")[0]


def _text(docstring: str | None) -> str:
    """A docstring as Markdown on one line, with YAML's word for None."""
    line = " ".join((docstring or "").split()).replace("``", "`")
    return re.sub(r"\bNone\b", "null", line)


def _schema_of(field: FieldInfo) -> Schema:
    """What a field may be, as JSON schema."""
    kind: Any = Annotated.__class_getitem__((field.annotation, None, *field.metadata))  # type: ignore[attr-defined]
    return TypeAdapter(kind).json_schema()


def _words(schema: Schema) -> str:
    """What a JSON schema allows, in words."""
    if "enum" in schema or "const" in schema:
        return _choice(schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(_words(part) for part in schema["anyOf"]))
    if "items" in schema:
        return f"list of: {_words(schema['items'])}"
    kind = schema.get("format") or schema.get("type")
    text = _PLAIN.get(kind, "anything") if kind else "anything"
    limits = _range(schema)
    return f"{text}, {limits}" if limits else text


def _choice(names: Sequence[object]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _range(schema: Schema) -> str:
    """Bounds in words; the one that all numbers have is none worth a word."""
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None and high < MAXIMUM:
        return f"{low:g} to {high:,.10g}"
    words = {"minimum": "at least", "exclusiveMinimum": "above"}
    words |= {"maximum": "at most", "exclusiveMaximum": "below"}
    texts = [
        f"{words[name]} {schema[name]:,.10g}"
        for name in words
        if name in schema and schema[name] < MAXIMUM
    ]
    return " and ".join(texts)
