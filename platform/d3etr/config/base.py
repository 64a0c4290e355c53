"""What every section of the configuration tree shares."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, strict part of the tree: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )

    @property
    def without_effect(self) -> frozenset[str]:
        """Keys that other keys of this section switch off; setting them is an error."""
        return frozenset()
