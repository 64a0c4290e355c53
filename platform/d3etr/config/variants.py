"""Sections that come in variants, each with a class of its own: detectors, methods.

One key of such a section names the variant; a registry knows its class, which is imported when it
is named. Extensions bring further ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, to_json
from pydantic_core.core_schema import ErrorType

from d3etr.config.base import Section
from d3etr.errors import UserError
from d3etr.registry import Registry


class VariantSection(Section):
    """A section whose class depends on one of its keys.

    Subclasses of a base class are its variants. Attributes of the base class:

    Attributes:
        registry: variant's name -> an object whose ``config_class`` is the variant's section.
        variant_key: the key that names the variant.
        default_variant: its name where the key is not set.
        wrote_all_keys: whether version 0.1 wrote the keys of all variants into one section: those
            of others are read where they hold their default.
        implied: of a variant, what version 0.1 wrote of further keys that it does not have.
    """

    registry: ClassVar[Registry]
    variant_key: ClassVar[str]
    default_variant: ClassVar[str]
    wrote_all_keys: ClassVar[bool] = False
    implied: ClassVar[Mapping[str, object]] = {}

    @classmethod
    def variant(cls, name: str) -> type[VariantSection]:
        """The class of one variant.

        Raises:
            UserError: there is none of this name, or it cannot be imported.
        """
        found: type[VariantSection] = cls.registry.find(name).config_class
        return found

    @classmethod
    def variants(cls) -> dict[str, type[VariantSection]]:
        """Every variant's class by name."""
        return {name: cls.variant(name) for name in cls.registry.names}

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Self:
        """A section of the class that ``settings`` name.

        Args:
            settings: plain values, as JSON has them.

        Raises:
            ValidationError: something is wrong with them.
        """
        name = settings.get(cls.variant_key, cls.default_variant)
        if not isinstance(name, str) or name not in cls.registry.names:
            raise _unknown_variant(cls, name)
        try:
            own = cls.variant(name)
        except UserError as error:
            raise _failed(cls, [_problem(cls.variant_key, name, str(error))]) from error
        known, problems = _without_foreign_defaults(cls, own, settings)
        try:
            found: Self = own.model_validate_json(to_json(own.complete(known)))  # type: ignore[assignment]
        except ValidationError as error:
            problems += [_again(detail) for detail in error.errors(include_url=False)]
        if problems:
            raise _failed(own, problems)
        return found

    @classmethod
    def complete(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings of a variant, completed by what its class knows better than its fields."""
        return settings

    @classmethod
    def coerce(cls, value: object) -> object:
        """Validator of fields that hold such a section: plain values become one."""
        return cls.parse(value) if isinstance(value, Mapping) else value


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section; of one with variants, those of all of them."""
    found: dict[str, FieldInfo] = {}
    if issubclass(section, VariantSection) and "registry" in section.__dict__:
        for variant in section.variants().values():
            found |= variant.model_fields
    return found | section.model_fields


def _without_foreign_defaults(
    base: type[VariantSection], own: type[VariantSection], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """Without keys of other variants that say nothing new, as version 0.1 wrote them.

    Returns:
        What is left, and the problems with such keys that hold something else.
    """
    known, problems = dict(settings), []
    for key in settings.keys() - own.model_fields.keys():
        owners = {n: v for n, v in base.variants().items() if key in v.model_fields}
        if not owners:
            continue  # the section's own validation says so
        value = known.pop(key)
        meant = [own.implied[key]] if key in own.implied else []
        if base.wrote_all_keys:
            meant += [_default(variant, key) for variant in owners.values()]
        if not any(_agrees(value, one) for one in meant):
            names = " or ".join(f"'{name}'" for name in owners)
            chosen = settings.get(base.variant_key, base.default_variant)
            text = f"has no effect on {base.registry.kind} '{chosen}', only on {names}"
            problems.append(_problem(key, value, text))
    return known, problems


def _default(variant: type[BaseModel], key: str) -> object:
    value = variant.model_fields[key].get_default(call_default_factory=True)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _agrees(value: object, known: object) -> bool:
    """Whether all that ``value`` says is what ``known`` says."""
    if isinstance(value, Mapping) and isinstance(known, Mapping):
        return all(key in known and _agrees(inner, known[key]) for key, inner in value.items())
    return value == known


def _unknown_variant(base: type[VariantSection], name: object) -> ValidationError:
    names = [f"'{one}'" for one in base.registry.names]
    expected = f"{', '.join(names[:-1])} or {names[-1]}"
    detail = InitErrorDetails(
        type="literal_error", loc=(base.variant_key,), input=name, ctx={"expected": expected}
    )
    return _failed(base, [detail])


def _problem(key: str, value: object, text: str) -> InitErrorDetails:
    error = ValueError(text)
    return InitErrorDetails(type="value_error", loc=(key,), input=value, ctx={"error": error})


def _again(detail: ErrorDetails) -> InitErrorDetails:
    """A problem of the variant's own validation, as one of the whole section's."""
    kind, context = detail["type"], detail.get("ctx", {})
    known = kind in get_args(ErrorType)
    return InitErrorDetails(
        type=kind if known else PydanticCustomError(kind, detail["msg"], context),
        loc=detail["loc"],
        input=detail["input"],
        ctx=context,
    )


def _failed(section: type[BaseModel], problems: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data(section.__name__, problems)
