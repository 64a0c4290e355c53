"""The demonstration: teacher, plain student and D3ETR student on digit scenes, side by side."""
