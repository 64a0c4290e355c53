"""What every section of the configuration tree shares."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, strict part of the tree: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )
