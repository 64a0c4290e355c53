"""Who competes: the distilled student of a recipe, and what is left of it without its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from d3etr.config.detector import DetectorPart, InitialiseFromConfig
from d3etr.config.load import load_config
from d3etr.config.location import Location
from d3etr.config.overrides import as_overrides
from d3etr.config.tree import Config
from d3etr.errors import UserError

PLAIN, INHERITED, FINE_TUNED, DISTILLED = "plain", "inherited plain", "fine-tuned", "distilled"
CONTENDERS = (PLAIN, INHERITED, FINE_TUNED, DISTILLED)
WITHOUT_TEACHER = ("teacher=null", "distillation={method: none}")


@dataclass(frozen=True)
class Way:
    """One way to train the student.

    Attributes:
        name: for people.
        overrides: on top of the recipe.
        config: the recipe with them.
    """

    name: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def distilled(self) -> bool:
        """Whether a teacher takes part in training."""
        return self.config.distillation.needs_teacher


@dataclass(frozen=True)
class Contest:
    """Everybody who can compete.

    Attributes:
        ways: the recipe's own student last, variants of it before.
        left_out: name -> why it cannot take part. That weights do not fit is known later.
    """

    ways: tuple[Way, ...]
    left_out: dict[str, str]


def make_contest(
    recipe: Path,
    overrides: Sequence[str],
    checkpoint: Location | None = None,
    variants: Mapping[str, Sequence[str]] | None = None,
) -> Contest:
    """The contenders of a distilled recipe.

    Args:
        recipe: of the distilled student.
        overrides: on top of it, for all contenders.
        checkpoint: the student's own pre-trained weights, to be fine-tuned.
        variants: name -> overrides of the recipe, each one more student that a teacher teaches.

    Raises:
        ConfigError: the recipe, or a variant, is not valid.
        UserError: it distils nothing.
    """
    config = load_config(recipe, overrides)
    if config.teacher is None:
        raise UserError(
            f"{recipe} distils nothing: distillation.method is '{config.distillation.method}'. "
            "Expected the recipe of a distilled student, such as digits/d3etr; its plain rivals "
            "are made from it"
        )
    weights = config.teacher.weights
    if weights is None:
        raise UserError(
            f"{recipe} learns from teacher.detections, from which no rival could start: expected a "
            "recipe with teacher.weights; 'd3etr compare' compares runs of any kind"
        )
    asked = {
        PLAIN: ("student.initialise_from=null",),
        INHERITED: _start(config.student.initialise_from, weights),
    }
    if checkpoint is not None:
        parts = InitialiseFromConfig(weights=checkpoint, parts=get_args(DetectorPart))
        asked[FINE_TUNED] = (*_start(parts, checkpoint), "student.backbone_weights=null")
    ways, left_out = list[Way](), dict[str, str]()
    for name, changes in asked.items():
        changed = (*_no_unlabelled(config), *WITHOUT_TEACHER, *changes)
        try:
            ways.append(Way(name, changed, load_config(recipe, [*overrides, *changed])))
        except UserError as error:
            left_out[name] = str(error)
    if not ways:
        raise UserError(f"no plain student can be trained: {left_out[INHERITED]}")
    own = [_variant(recipe, overrides, *each) for each in (variants or {}).items()]
    return Contest((*ways, *own, Way(DISTILLED, (), config)), left_out)


def _variant(recipe: Path, overrides: Sequence[str], name: str, changes: Sequence[str]) -> Way:
    """The recipe's student, taught otherwise."""
    if name in CONTENDERS:
        raise UserError(
            f"--variant {name}: a contender has this name already; expected one of its own"
        )
    way = Way(name, tuple(changes), load_config(recipe, [*overrides, *changes]))
    if not way.distilled:
        raise UserError(
            f"--variant {name}: no teacher teaches it (distillation.method is "
            f"'{way.config.distillation.method}'); plain rivals take part without being named"
        )
    return way


def _start(start: InitialiseFromConfig | None, weights: Location) -> tuple[str, ...]:
    """The same start with its weights named, as there is no teacher to mean."""
    start = start or InitialiseFromConfig()
    tree = start.model_dump(mode="json", exclude_unset=True)
    whole = tree | {"weights": start.weights or weights}
    return (
        "student.initialise_from=null",
        *as_overrides({f"student.initialise_from.{key}": value for key, value in whole.items()}),
    )


def _no_unlabelled(config: Config) -> tuple[str, ...]:
    """Without a teacher nothing is learnt from images without labels."""
    return () if config.data.unlabelled is None else ("data.unlabelled=null",)
