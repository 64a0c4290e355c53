"""Detecting over HTTP: replicas on Ray Serve, requests in batches."""

from __future__ import annotations

from d3etr.errors import UserError


def require_serve() -> None:
    """Refuse to serve without what only serving takes.

    Raises:
        UserError: it is missing; says how to install it.
    """
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"d3etr serve needs Ray Serve, which cannot be imported ({error}): "
            "pip install 'd3etr[serve]'"
        ) from error
