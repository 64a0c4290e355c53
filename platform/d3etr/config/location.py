"""Where data and weights are: a path on this machine, or the URL of a file or folder elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from d3etr.config.urls import Url, home_expanded, named_location, parse_location, refuse_url

__all__ = ["Location", "Url", "named_location", "parse_location", "refuse_url"]


def _from_recipe(value: object) -> Url | Path:
    if isinstance(value, Url):
        return value
    if isinstance(value, Path):
        return home_expanded(str(value))
    if not isinstance(value, str):
        raise PydanticCustomError("location_type", "Input is not a path or URL")
    return parse_location(value)


Location = Annotated[
    Url | Path,
    PlainValidator(_from_recipe, json_schema_input_type=str),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "format": "location"}),
]
"""A path (relative ones start at the working directory) or a URL, written as text."""
