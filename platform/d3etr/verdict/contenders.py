"""Who competes: the distilled student of a recipe, and what is left of it without its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from d3etr.config.detector import DetectorPart, InitialiseFromConfig
from d3etr.config.load import load_config
from d3etr.config.location import Location
from d3etr.config.overrides import as_overrides
from d3etr.config.tree import Config
from d3etr.errors import UserError
from d3etr.pseudo_labels import override_with

PLAIN, INHERITED, FINE_TUNED, DISTILLED = "plain", "inherited plain", "fine-tuned", "distilled"
PSEUDO_LABELS, TAUGHT_LABELS = "pseudo-labels", "distilled on pseudo-labels"
CONTENDERS = (PLAIN, INHERITED, FINE_TUNED, PSEUDO_LABELS, TAUGHT_LABELS, DISTILLED)
ON_LABELS = (PSEUDO_LABELS, TAUGHT_LABELS)
"""Those that train on what the teacher has labelled."""
LABELS_FILE = "pseudo-labels.json"
"""In a verdict's folder."""
_NO_DECODER = "teacher.features is no detector: it has no decoder, heads or queries to start from"
_NO_DETECTIONS = "teacher.features is no detector: it cannot label images"
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

    def without_labels(self, reason: str) -> Contest:
        """The contest of those that train on no labels of the teacher."""
        rest = tuple(way for way in self.ways if way.name not in ON_LABELS)
        return Contest(rest, self.left_out | dict.fromkeys(ON_LABELS, reason))


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
    if config.teacher.detections is not None:
        raise UserError(
            f"{recipe} learns from teacher.detections, from which no rival could start: expected a "
            "recipe with teacher.weights; 'd3etr compare' compares runs of any kind"
        )
    anew = (*_from_nothing(config), *_without_labels(config), *WITHOUT_TEACHER)
    asked, left_out = {PLAIN: anew}, dict[str, str]()
    origin = config.initial_weights or config.teacher.weights
    start = () if origin is None else _start(config.student.initialise_from, origin)
    if start:
        asked[INHERITED] = (*_without_labels(config), *WITHOUT_TEACHER, *start)
    else:
        left_out[INHERITED] = _NO_DECODER
    if checkpoint is not None:
        parts = InitialiseFromConfig(weights=checkpoint, parts=get_args(DetectorPart))
        asked[FINE_TUNED] = (*anew, *_start(parts, checkpoint), "student.backbone_weights=null")
    images = config.data.unlabelled
    if images is not None and images.labels is None:
        labelled = override_with(Path(LABELS_FILE), images)
        if config.teacher.weights is None:
            left_out |= dict.fromkeys(ON_LABELS, _NO_DETECTIONS)
        else:
            asked[PSEUDO_LABELS] = (labelled, *WITHOUT_TEACHER, *start)
            asked[TAUGHT_LABELS] = (labelled,)
    ways = list[Way]()
    for name, changes in asked.items():
        try:
            ways.append(Way(name, changes, load_config(recipe, [*overrides, *changes])))
        except UserError as error:
            left_out[name] = str(error)
    if all(way.distilled for way in ways):
        raise UserError(f"no plain student can be trained: {left_out[PLAIN]}")
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


def with_labels(
    contest: Contest, recipe: Path, overrides: Sequence[str], file: Path, *, inherits: bool
) -> Contest:
    """The contest once the teacher's labels are there.

    Args:
        contest: somebody in it trains on them.
        recipe: that it was made from.
        overrides: for all contenders.
        file: the labels.
        inherits: whether the student can start from the teacher's parts; else it starts anew.
    """

    def placed(way: Way) -> Way:
        if way.name not in ON_LABELS:
            return way
        changes = [*way.overrides, *as_overrides({"data.unlabelled.labels": file})]
        changes += [] if inherits or way.distilled else _from_nothing(way.config)
        return Way(way.name, tuple(changes), load_config(recipe, [*overrides, *changes]))

    return replace(contest, ways=tuple(map(placed, contest.ways)))


def _from_nothing(config: Config) -> tuple[str, ...]:
    """No start from another detector, and nothing that is about what was inherited."""
    reset = ("optimisation.inherited_rate_factor=1.0", "optimisation.inherited_warmup_steps=0")
    used = config.optimisation.inherited_warmup_steps > 0
    return ("student.initialise_from=null", *(reset if used else ()))


def _start(start: InitialiseFromConfig | None, weights: Location) -> tuple[str, ...]:
    """The same start with its weights named, as there is no teacher to mean."""
    start = start or InitialiseFromConfig()
    tree = start.model_dump(mode="json", exclude_unset=True)
    whole = tree | {"weights": start.weights or weights}
    return (
        "student.initialise_from=null",
        *as_overrides({f"student.initialise_from.{key}": value for key, value in whole.items()}),
    )


def _without_labels(config: Config) -> tuple[str, ...]:
    """Without a teacher nothing is learnt from images that nobody has labelled."""
    images = config.data.unlabelled
    return () if images is None or images.labels is not None else ("data.unlabelled=null",)
