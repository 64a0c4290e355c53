"""What a student says about a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from d3etr.structures import DecoderOutputs, Memory, Targets


@dataclass(frozen=True)
class Said:
    """What the student says about a batch.

    Attributes:
        memory: its encoder output.
        groups: outputs of each query group by name; ``detection`` is the main one.
    """

    memory: Memory
    groups: dict[str, DecoderOutputs]

    @property
    def main(self) -> DecoderOutputs:
        """Outputs of the student's own queries."""
        return self.groups["detection"]

    @property
    def supervised(self) -> dict[str, DecoderOutputs]:
        """What may learn from ground truth, a two-stage detector's proposals included."""
        found = {name: part for name, part in self.groups.items() if name != "general"}
        if self.memory.proposals is not None:
            found["proposals"] = self.memory.proposals
        return found

    def truth(self, name: str, targets: Targets) -> Targets:
        """A group's ground truth: proposals only tell objects from background, as class 0."""
        if name != "proposals":
            return targets
        return replace(targets, labels=torch.zeros_like(targets.labels))
