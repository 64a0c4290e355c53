"""What every section of the configuration tree shares."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from d3etr.config.credentials import refuse_credentials

MAXIMUM = 10**9
"""Of numbers that nothing else bounds: beyond it is a slip, and what computes with it breaks."""

Size = Annotated[int, Field(ge=1, le=65_536)]
"""Of a network: channels, heads, queries."""
Layers = Annotated[int, Field(ge=1, le=100)]


class Section(BaseModel):
    """A frozen, strict part of the tree: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @property
    def without_effect(self) -> frozenset[str]:
        """Keys that other keys of this section switch off; setting them is an error."""
        return frozenset()

    @field_validator("*")
    @classmethod
    def _no_credentials(cls, value: object) -> object:
        refuse_credentials(value)
        return value
