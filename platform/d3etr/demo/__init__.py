"""The demonstration: teacher, plain student and D3ETR student on digit scenes, side by side."""

from d3etr.demo.runs import DemoRun, prepare, run_demo

__all__ = ["DemoRun", "prepare", "run_demo"]
