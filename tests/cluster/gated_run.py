"""A driver whose workers train no further than a file allows.

``gated_run.py RECIPE FOLDER KEY=VALUE...``:
``FOLDER/gate`` holds the last step that may be made. What each step trained on is written to
``FOLDER/seen``.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d3etr.config.load import load_config
from d3etr.config.tree import Config
from d3etr.engine.distributed import TrainContext
from d3etr.launch.api import launch
from d3etr.launch.processes import train


class Gated:
    """Training that waits at the gate; pickled by value, workers need no copy of this file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, config: Config, run_dir: Path, context: TrainContext) -> dict[str, float]:
        """Train as one worker."""
        from d3etr.engine.step import TrainingStep

        make_step, folder = TrainingStep.__call__, self.folder
        seen = folder / "seen" / f"{time.time_ns()}-{os.getpid()}.jsonl"
        seen.parent.mkdir(exist_ok=True)

        def gated(training: TrainingStep, step: int, batches: Sequence[Any]) -> None:
            while step >= int((folder / "gate").read_text()):
                time.sleep(0.02)
            images = [id for _, targets in batches for id in targets.image_ids]
            record = {"step": step, "workers": context.world_size, "images": images}
            with seen.open("a") as file:
                file.write(json.dumps(record) + "\n")
            make_step(training, step, batches)

        TrainingStep.__call__ = gated  # type: ignore[method-assign]
        return train(config, run_dir, context)


if __name__ == "__main__":
    launch(load_config(Path(sys.argv[1]), sys.argv[3:]), task=Gated(Path(sys.argv[2])))
