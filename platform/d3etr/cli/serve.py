"""``d3etr serve``: detecting over HTTP."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from d3etr.cli.command import (
    Command,
    above_zero,
    add_weights,
    complain,
    fraction,
    positive,
    whole_number,
)
from d3etr.cli.progress import print_progress

_HIGHEST_PORT = 65535


def _add_arguments(parser: ArgumentParser) -> None:
    from d3etr.serving.settings import ServeSettings

    own = ServeSettings(model="")
    add_weights(parser, ", an ONNX file of d3etr export")
    for name, kind, text in (
        ("host", str, "address to listen on"),
        ("port", whole_number(0, _HIGHEST_PORT), "to listen on; 0: any that is free"),
        ("replicas", positive, "processes that hold the model"),
        ("cpus", above_zero, "cores of each replica"),
        ("gpus", fraction, "share of a GPU of each replica; 0 detects on the CPU"),
        ("max-batch", whole_number(1, 256), "pictures that are detected together"),
        ("batch-wait-ms", above_zero, "milliseconds that a picture waits for others"),
        ("max-queue", positive, "requests that are held at a time; more get 503"),
        ("max-image-mb", above_zero, "largest body of a request; larger ones get 413"),
        ("max-megapixels", above_zero, "largest picture; larger ones get 413"),
        ("shutdown-seconds", above_zero, "for requests in flight after the signal to end"),
    ):
        default = getattr(own, name.replace("-", "_"))
        help_text = f"{text} (default {default:g})" if kind is not str else f"{text} ({default})"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=help_text)
    parser.add_argument(
        "--threshold", type=fraction, help="lowest score of a detection (default: the model's)"
    )


def _run(options: Namespace) -> int:
    from dataclasses import fields

    from d3etr.serving import require_serve
    from d3etr.serving.settings import ServeSettings

    require_serve()
    from d3etr.serving.service import run_service

    own = [each.name for each in fields(ServeSettings) if hasattr(options, each.name)]
    values: dict[str, Any] = {name: getattr(options, name) for name in own}
    settings = ServeSettings(str(options.weights), **values)

    def ready(address: str) -> None:
        replicas = "1 replica" if settings.replicas == 1 else f"{settings.replicas} replicas"
        print(f"{settings.model} is served at {address}/detect by {replicas}", flush=True)

    run_service(settings, ready, print_progress)
    complain("stopped")
    return 0


COMMAND = Command("serve", "detect over HTTP: an image in, JSON out", _add_arguments, _run)
