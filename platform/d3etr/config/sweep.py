"""Configuration of a sweep: one recipe, many settings, and how to choose among them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from d3etr.config.base import MAXIMUM, Section
from d3etr.config.data import FilePath
from d3etr.config.overrides import apply_overrides
from d3etr.config.problems import ConfigError, problems_of
from d3etr.config.shipped import find_recipe, find_sweep_file, place_overrides
from d3etr.config.yaml_text import parse_yaml, read_text

Positive = Annotated[int, Field(ge=1, le=MAXIMUM)]
Values = Annotated[tuple[Any, ...], Field(min_length=1)]
Range = tuple[float, float]
Kind = Literal["grid", "choice", "uniform", "loguniform"]
KINDS: tuple[Kind, ...] = ("grid", "choice", "uniform", "loguniform")


class Domain(Section):
    """The values that one configuration key may take; exactly one kind."""

    grid: Values | None = None
    """Every value is tried, in combination with every value of the other grids."""
    choice: Values | None = None
    """One of these."""
    uniform: Range | None = None
    """A number between two."""
    loguniform: Range | None = None
    """A number between two, its logarithm evenly spread."""
    when: dict[str, Values] = Field(default_factory=dict)
    """Only where these keys, which stand above, have one of these values; else the key stays what
    the recipe says."""

    @property
    def kind(self) -> Kind:
        """Which of the four it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def applies(self, chosen: Mapping[str, Any]) -> bool:
        """Whether the key is set at all, given what the keys above it are."""
        return all(key in chosen and chosen[key] in values for key, values in self.when.items())

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"needs one of {', '.join(KINDS)}; found {found}")
        low, high = self.uniform or self.loguniform or (0.0, 1.0)
        if low >= high:
            raise ValueError(f"the range goes from {low:g} to {high:g}: give the smaller one first")
        if self.loguniform is not None and low <= 0:
            raise ValueError("loguniform needs numbers above 0")
        return self


class Case(Section):
    """A configuration with a name of its own, such as a row of an ablation."""

    recipe: FilePath | None = None
    """In place of the sweep's."""
    set: tuple[str, ...] = ()
    """Overrides, as after ``--set``."""
    baseline: str | None = None
    """The case that this one's gain is counted from, in place of the sweep's."""


class SearchConfig(Section):
    """How points of the space are chosen."""

    method: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination. random: ``trials`` samples of what is no grid, for every
    combination of the grids. optuna: a tree-structured Parzen estimator (TPE) proposes from what
    it has seen."""
    trials: Positive = 1
    seed: Annotated[int, Field(ge=0, le=MAXIMUM)] = 0
    startup_trials: Positive = 8
    """optuna only: so many random points before it proposes."""

    @field_validator("method", mode="before")
    @classmethod
    def _no_population(cls, method: Any) -> Any:
        if method == "population":
            raise ValueError(
                "population based training is gone: use optuna, or random with pruning"
            )
        return method

    @model_validator(mode="after")
    def _every_setting_counts(self) -> Self:
        others = set() if self.method == "optuna" else {"startup_trials"}
        others |= {"trials", "seed"} if self.method == "grid" else set()
        extra = sorted(self.model_fields_set & others)
        if extra:
            raise ValueError(f"method '{self.method}' has no use for {', '.join(extra)}")
        return self


class PruningConfig(Section):
    """Stop trials early that are worse than others were at the same epoch (ASHA)."""

    grace_epochs: Positive = 1
    """No trial is stopped before."""
    reduction: Annotated[int, Field(ge=2, le=MAXIMUM)] = 3
    """One of so many goes on at each rung."""


class SweepConfig(Section):
    """One sweep: everything that is needed to repeat it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")]
    title: str = ""
    recipe: FilePath
    set: tuple[str, ...] = ()
    """Overrides of every trial, as after ``--set``."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)] = (0,)
    """Every configuration is trained with each."""
    space: dict[str, Domain] = Field(default_factory=dict)
    """Configuration key to the values it may take."""
    cases: dict[str, Case] = Field(default_factory=dict)
    """Named configurations; with a space as well, the space is searched in each."""
    baseline: str | None = None
    """The case that gains are counted from."""
    search: SearchConfig = SearchConfig()
    pruning: PruningConfig | None = None
    maximum_concurrent: Positive | None = None
    """Trials at a time; None: as many as the cluster has room for."""

    def baseline_of(self, case: str | None) -> str | None:
        """The case that the gain of one is counted from; None for a baseline itself."""
        own = None if case is None else self.cases[case].baseline
        baseline = own or self.baseline
        return None if baseline == case else baseline

    @model_validator(mode="after")
    def _is_a_sweep(self) -> Self:
        if not self.space and not self.cases:
            raise ValueError("nothing to sweep over: give a space, or cases")
        baselines = {self.baseline, *(case.baseline for case in self.cases.values())} - {None}
        for name in baselines - {*self.cases}:
            raise ValueError(f"baseline '{name}' is none of the cases")
        keys = list(self.space)
        for number, (key, domain) in enumerate(self.space.items()):
            for other, values in domain.when.items():
                if other not in keys[:number]:
                    raise ValueError(f"space.{key}.when names '{other}', which is not above it")
                possible = self.space[other].grid or self.space[other].choice or ()
                if never := [value for value in values if value not in possible]:
                    known = ", ".join(map(repr, possible)) or "but it has a range"
                    raise ValueError(
                        f"space.{key}.when: {other} is never {never[0]!r}: expected values of its "
                        f"grid or choice, {known}"
                    )
        self._check_method()
        return self

    def _check_method(self) -> None:
        method = self.search.method
        grids = [key for key, domain in self.space.items() if domain.kind == "grid"]
        sampled = [key for key in self.space if key not in grids]
        if method == "grid" and sampled:
            raise ValueError(
                f"search.method 'grid' tries every value, but {sampled[0]} is no grid: use "
                "search.method random or optuna, or give it a grid"
            )
        if method != "grid" and not sampled and not (method == "optuna" and grids):
            raise ValueError(f"search.method '{method}' has nothing to sample: use grid")
        if method == "optuna" and grids:
            raise ValueError(f"search.method 'optuna' chooses: make {grids[0]} a choice")
        if method == "optuna" and (self.cases or len(self.seeds) > 1):
            raise ValueError("search.method 'optuna' searches one case with one seed")


OWN_KEYS = frozenset(SweepConfig.model_fields)


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that change the sweep itself, and those that change the recipe of its trials."""
    own = [text for text in overrides if re.split(r"[.=]", text)[0].strip() in OWN_KEYS]
    return own, [text for text in overrides if text not in own]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file.

    Recipes and weights that it names by relative paths start at the working directory; where there
    is nothing, at the sweep file's folder.

    Args:
        path: YAML, or the name of a shipped sweep, such as ``ablation``.
        overrides: ``a.b=c`` texts: of the sweep where they begin with one of its keys
            (``search.trials=40``), else for the recipe of every trial, on top of the file's
            ``set``.

    Raises:
        ConfigError: listing every problem with its dotted path, or the file cannot be read.
    """
    path = find_sweep_file(path)
    tree = parse_yaml(read_text(path), str(path))
    own, overrides = split_overrides(overrides)
    if own and isinstance(tree, dict):  # else it is refused below
        tree, problems = apply_overrides(tree, own)
        if problems:
            raise ConfigError("--set", problems)
    try:
        sweep = SweepConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(str(path), problems_of(error, SweepConfig)) from error
    changes = _placed(sweep, path.parent)
    if sweep.cases:
        cases = sweep.cases.items()
        placed = {name: case.model_copy(update=_placed(case, path.parent)) for name, case in cases}
        changes |= {"cases": placed}
    return sweep.model_copy(update=changes | {"set": (*changes.get("set", ()), *overrides)})


def _placed(section: SweepConfig | Case, folder: Path) -> dict[str, Any]:
    """The recipe and overrides of a sweep or case with paths that start at the sweep's folder."""
    changes: dict[str, Any] = {}
    if section.recipe is not None:
        changes["recipe"] = find_recipe(section.recipe, Path(), folder)
    if section.set:
        changes["set"] = tuple(place_overrides(section.set, folder))
    return changes
