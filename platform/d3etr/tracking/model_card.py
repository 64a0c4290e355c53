"""What a student's page in MLflow says about it: its origin, and how good, large and fast it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3etr.config.load import load_config
from d3etr.config.location import Url
from d3etr.config.tree import Config
from d3etr.detectors.weights import read_info
from d3etr.engine.provenance import INPUTS_KEY, data_key
from d3etr.engine.run_folder import RunFolder
from d3etr.files import read_json
from d3etr.tracking.description import backbone_title, recipe_name, teacher_tags

DIGEST_LENGTH = 16
CARD_FILE = "model_card.md"
LATENCY, MACHINE = "model/latency_ms", "latency_machine"
"""A run's metric, p50 of a batch in a benchmark, and the tag that says on what it was measured."""


@dataclass(frozen=True)
class ModelFacts:
    """A trained student.

    Attributes:
        name: of its recipe.
        detector: its kind and backbone.
        teacher: the run, weights or model that taught it; None: nobody did.
        data: the data set's name.
        split: what it was measured on: test, where it was, else validation; None: on nothing.
        mAP: on that, in [0, 1].
        data_digest: of that split's annotations: models are compared on the same data only.
        parameters: how many.
        run_folder: its name.
    """

    name: str
    detector: str
    teacher: str | None
    data: str
    split: str | None
    mAP: float | None
    data_digest: str
    parameters: int | None
    run_folder: str

    def tags(self) -> dict[str, str]:
        """Of the registered version: what is known."""
        values = {
            "detector": self.detector,
            "teacher": self.teacher or "none",
            "data": self.data,
            "split": self.split,
            "parameters": self.parameters,
            "run_folder": self.run_folder,
        }
        return {name: str(value) for name, value in values.items() if value is not None}

    def card(self, latency: str | None = None) -> str:
        """Markdown for people, with the latency of a benchmark where there is one."""
        rows = [
            ("detector", self.detector),
            ("teacher", self.teacher or "none"),
            ("data", self.data),
            ("mAP", _measured(self)),
            ("parameters", "not known" if self.parameters is None else f"{self.parameters:,}"),
        ]
        if latency is not None:
            rows.append(("latency", latency))
        rows.append(("run", self.run_folder))
        table = "\n".join(f"| {name} | {value} |" for name, value in rows)
        return f"# {self.name}\n\n| | |\n| --- | --- |\n{table}\n"


def model_facts(run_dir: Path) -> ModelFacts:
    """What a finished run's folder says about its student."""
    folder = RunFolder(run_dir)
    config, summary = load_config(folder.config, ()), read_json(folder.summary)
    split, mAP, digest = _quality(summary, read_info(folder.weights).evaluation or {})
    count = summary.get("parameters")
    detector = config.student.detector
    taught_by = teacher_tags(config)
    return ModelFacts(
        name=recipe_name(config),
        detector=f"{detector.name}, {backbone_title(detector)}",
        teacher=taught_by.get("teacher_weights") or next(iter(taught_by.values()), None),
        data=data_name(config),
        split=split,
        mAP=mAP,
        data_digest=digest[:DIGEST_LENGTH],
        parameters=None if count is None else int(count),
        run_folder=run_dir.name,
    )


def data_name(config: Config) -> str:
    """The validation data by a name that people know."""
    if config.data.validation is None:
        return "digit-scenes"
    place = config.data.validation.annotations
    file = place.path if isinstance(place, Url) else place
    return f"{file.parent.name}/{file.stem}"


def _quality(
    summary: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> tuple[str | None, float | None, str]:
    """Split, mAP on it and digest of its annotations."""
    digest = (summary.get(INPUTS_KEY) or {}).get(data_key("test"))
    if digest is not None and summary.get("test/mAP") is not None:
        return "test", float(summary["test/mAP"]), str(digest)
    mAP = evaluation.get("mAP")
    if mAP is None:
        return None, None, ""
    return "validation", float(mAP), str(evaluation.get("data_digest", ""))


def _measured(facts: ModelFacts) -> str:
    if facts.mAP is None:
        return "not measured"
    return f"{100 * facts.mAP:.1f} on {facts.split} ({facts.data_digest})"
