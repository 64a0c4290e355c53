"""Configuration of a teacher's outputs that are stored before training."""

from typing import Annotated, Literal

from pydantic import Field

from d3etr.config.base import MAXIMUM, Section
from d3etr.config.data import FilePath


class ViewsConfig(Section):
    """Stored teacher outputs: the teacher sees a few augmentations of each image once."""

    count: Annotated[int, Field(ge=1, le=1000)] = 8
    """K: augmentations (views) of each training image; each K epochs show every one once."""
    unlabelled_count: Annotated[int, Field(ge=1, le=1000)] | None = None
    """The same of images without labels (``data.unlabelled``), which training shows less often;
    None: ``count``."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the views; runs with other seeds (``run.seed``) share them and take them in another
    order."""
    queries: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Store the teacher's most confident queries of each image only; None stores all."""
    precision: Literal["float16", "float32"] = "float16"
    """Of what is stored; float32 takes twice the space."""
    folder: FilePath | None = None
    """Where stores are, one for each teacher, data and augmentation; on a cluster, storage that all
    nodes share. None: ``teacher-views`` in ``run.output``."""
    maximum_gigabytes: Annotated[float, Field(gt=0, le=MAXIMUM)] = 20.0
    """Larger stores of a run, taken together, are refused before they are begun."""

    @property
    def of_unlabelled(self) -> int:
        """K of images without labels."""
        return self.unlabelled_count or self.count
