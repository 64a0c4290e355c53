"""The demonstration: teacher, plain student and D3ETR student on digit scenes, side by side."""

from d3etr.demo.runs import DemoRun, draw_scenes, run_demo

__all__ = ["DemoRun", "draw_scenes", "run_demo"]
