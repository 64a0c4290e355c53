"""Which settings of a sweep matter: permutation importance in a random forest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST_TRIALS = 8
"""With fewer a forest is no evidence."""
TREES = 300
REPEATS = 20


def importance(
    points: Sequence[Mapping[str, Any]], scores: Sequence[float], keys: Sequence[str]
) -> tuple[dict[str, float], float] | None:
    """Share of each key in what explains the scores.

    Args:
        points: settings of each trial; keys whose condition did not hold are missing.
        scores: mAP of each.
        keys: which settings.

    Returns:
        Key -> share (they add up to 1), and the share of the variance that the forest explains
        out of its bag; None with too few trials, or when nothing varies.
    """
    varied = [key for key in keys if len({str(point.get(key)) for point in points}) > 1]
    if len(points) < FEWEST_TRIALS or not varied or len(set(scores)) < 2:
        return None
    # Slow to import, and only the end of a sweep needs it.
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    features = np.stack([_feature([p.get(key) for p in points]) for key in varied], axis=1)
    forest = RandomForestRegressor(TREES, oob_score=True, random_state=0)
    forest.fit(features, scores)
    found = permutation_importance(forest, features, scores, n_repeats=REPEATS, random_state=0)
    raised = np.maximum(found.importances_mean, 0.0)
    if raised.sum() == 0:
        return None
    shares = raised / raised.sum()
    return dict(zip(varied, shares.tolist(), strict=True)), float(forest.oob_score_)


def _feature(values: Sequence[Any]) -> NDArray[np.float64]:
    """Numbers as they are, words by their place in the alphabet, what is missing below all."""
    given = [value for value in values if value is not None]
    if all(isinstance(value, int | float) for value in given):
        missing = min(given) - 1.0
        return np.array([missing if value is None else float(value) for value in values])
    words = sorted({str(value) for value in given})
    return np.array([-1.0 if value is None else words.index(str(value)) for value in values])
