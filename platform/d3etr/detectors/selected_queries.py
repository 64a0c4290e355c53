"""Properties of detectors whose encoder selects the queries by the classes of its tokens."""

from __future__ import annotations

from d3etr.config.detector import DetectorConfig


class SelectedConfig(DetectorConfig):
    """Queries are boxes that the encoder selects in every image, with a content."""

    @property
    def reference_size(self) -> int:
        """Queries start from boxes."""
        return 4

    @property
    def proposals_tell_classes(self) -> bool:
        """The selected tokens learn objects' classes."""
        return True

    @property
    def queries_need_images(self) -> bool:
        """The encoder selects them."""
        return True

    @property
    def takes_embedding(self) -> bool:
        """It is computed from references."""
        return False

    @property
    def takes_content(self) -> bool:
        """Tokens of the encoder, or learned vectors."""
        return True

    @property
    def sampling_parts(self) -> frozenset[str]:
        """Sampling offsets."""
        return frozenset({"offsets"})
