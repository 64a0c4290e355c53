"""``d3etr.train``: a run from a notebook or a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3etr.config.arguments import require_flag, require_path
from d3etr.config.load import load_config
from d3etr.config.overrides import as_overrides
from d3etr.launch.api import LauncherName, launch
from d3etr.launch.driver import RunResult

if TYPE_CHECKING:
    from d3etr.engine.hooks import Hook


def train(
    recipe: str | Path,
    *,
    launcher: LauncherName = "ray",
    quiet: bool = False,
    hooks: Sequence[Hook] = (),
    **overrides: Any,
) -> RunResult:
    """Train a recipe; a run that is finished already is returned as it is.

    Args:
        recipe: a YAML file, or the name of a shipped recipe, such as ``digits/d3etr``.
        launcher: ``ray`` (Ray Train) or ``local`` (this process).
        quiet: show no progress.
        hooks: objects of ``d3etr.engine.hooks.Hook``, told of steps, evaluations and the end.
        **overrides: sections of the configuration, such as ``optimisation={"epochs": 12}`` or
            ``**{"data.workers": 2}``; they win over the recipe.

    Returns:
        The run's folder, final metrics and weights.

    Raises:
        UserError: something that the caller can fix.
    """
    require_flag("quiet", quiet)
    config = load_config(require_path("recipe", recipe), as_overrides(overrides))
    return launch(config, launcher=launcher, quiet=quiet, hooks=hooks)
