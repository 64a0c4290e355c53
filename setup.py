"""What pyproject.toml cannot say: recipes, sweeps and weights go into the package when it is built.

An editable installation needs no copies: they are where the checkout has them.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    "trainers/recipes/**/*.yaml",
    "trainers/weights/README.md",
    "trainers/weights/digits-student-backbone.safetensors",
    "trainers/weights/digits-teacher.safetensors",
    "sweeps/*.yaml",
)


class BuildWithRecipes(build_py):
    """Also copies what is shipped to ``d3etr/shipped``."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What is built, for the list of installed files."""
        return [*super().get_outputs(include_bytecode), *self._shipped().values()]

    def get_source_files(self) -> list[str]:
        """What a source distribution needs."""
        return [*super().get_source_files(), *self._shipped()]

    def _shipped(self) -> dict[str, str]:
        """Source to target."""
        found = {pattern: sorted(Path().glob(pattern)) for pattern in SHIPPED}
        missing = [pattern for pattern, files in found.items() if not files]
        if missing:
            raise FileNotFoundError(f"not in this folder: {', '.join(missing)}")
        folder = Path(self.build_lib, "d3etr", "shipped")
        return {str(file): str(folder / file) for files in found.values() for file in files}


setup(cmdclass={"build_py": BuildWithRecipes})
