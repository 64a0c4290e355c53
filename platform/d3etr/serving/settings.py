"""What a service is started with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeSettings:
    """A service of one model.

    Attributes:
        model: weights file, ONNX file, URL, or a registered model (``models:/NAME@champion``).
        host: address to listen on.
        port: of TCP.
        replicas: processes that hold the model.
        cpus: cores, and threads, of each replica.
        gpus: GPUs of each replica; 0 detects on the CPU.
        max_batch: pictures that go through the detector together.
        batch_wait_ms: milliseconds that a picture waits for others.
        max_queue: requests that are held at a time; further ones are refused.
        max_image_mb: of a request's body, in 10^6 bytes.
        max_megapixels: of a picture, in 10^6 pixels.
        tracking_uri: MLflow's address, where the model is registered there.
        threshold: lowest score of a detection; None: that of the model.
        shutdown_seconds: how long requests in flight may take after the signal to end.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    max_batch: int = 8
    batch_wait_ms: float = 5.0
    max_queue: int = 128
    max_image_mb: float = 20.0
    max_megapixels: float = 50.0
    tracking_uri: str | None = None
    threshold: float | None = None
    shutdown_seconds: float = 30.0

    @property
    def max_bytes(self) -> int:
        """Of a request's body."""
        return int(self.max_image_mb * 1e6)
