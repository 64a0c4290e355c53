"""Distillation methods by name: what each sets, for ``DistillationConfig``.

A method is a choice among the same parts; whatever a recipe says itself comes on top. ``d3etr`` is
the parts' defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_OFF = {"weight": 0.0}

KD_DETR: Mapping[str, Any] = MappingProxyType(
    {
        # Specific points are the teacher's queries, general ones are drawn anew in each step; a
        # point is the same query in both models (arXiv 2211.08071, section 3.2).
        "adaptive_ratio": 0.0,
        "general_points": {"count": 300},
        # Temperature, weights and the last teacher layer for all: the authors' code. There, the
        # class term is a sum over points; here all terms are divided by the confidence.
        "layer_map": "last",
        "prediction": {
            "weight": 1.0,
            "class_loss": "kl",
            "temperature": 10.0,
            "class_weight": 1.0,
            "class_pair_weights": "confidence",
        },
        "self_attention": _OFF,
        "cross_attention": _OFF,
        "auxiliary_group": {"ground_truth": False},
    }
)
DETRDISTILL: Mapping[str, Any] = MappingProxyType(
    {
        # Matched logits, target-aware features, and the teacher's queries as a group that learns
        # from ground truth by the teacher's assignment (arXiv 2211.10156; weights: its code).
        "adaptive_ratio": 1.0,
        "auxiliary_group": {"always": True},
        "matching_cost": {"class_distance": "bce", "class_cost": 1.0},
        "prediction": {
            "weight": 1.0,
            "class_loss": "bce",
            "class_weight": 1.0,
            "pair_weights": "uniform",
            "class_pair_weights": "uniform",
        },
        "self_attention": _OFF,
        "cross_attention": _OFF,
        "features": {"weight": 1.0},
    }
)
METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"none": {}, "d3etr": {}, "kd_detr": KD_DETR, "detrdistill": DETRDISTILL}
)


def with_method(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings on top of its method's.

    Args:
        settings: raw ``distillation`` section; an unknown method changes nothing.
    """
    method = settings.get("method")
    return _on_top(METHODS.get(method, {}) if isinstance(method, str) else {}, settings)


def _on_top(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[key] = _on_top(under, value) if both else value  # type: ignore[arg-type]
    return merged
