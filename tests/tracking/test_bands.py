"""The picture of a verdict."""

import math

import pytest

from d3etr.tracking.figures.bands import Band, draw_bands


@pytest.mark.parametrize(("hours", "unit", "last"), [(0.5, "minutes", 30.0), (6.0, "hours", 6.0)])
def test_a_band_for_each_contender_over_time(hours: float, unit: str, last: float) -> None:
    at = [hours / 2, hours]
    bands = [
        Band("plain", at, [0.2, 0.3], [0.1, 0.2], [0.3, 0.4]),
        Band("distilled", at, [0.3, 0.4], [-math.inf, 0.3], [math.inf, 0.5]),
    ]
    figure = draw_bands(bands, "title", "GPU time", level=0.6)
    [axes] = figure.axes
    assert axes.get_xlabel() == f"{unit} of GPU time"
    lines = {str(line.get_label()): line for line in axes.lines}
    assert set(lines) == {"plain", "distilled", "teacher"}
    assert list(lines["plain"].get_xdata())[-1] == last
    assert list(lines["plain"].get_ydata()) == pytest.approx([20.0, 30.0])
    assert len(axes.collections) == 2
