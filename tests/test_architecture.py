"""The shape of the code: who may import whom, how big things get, what must not appear."""

import ast
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "platform" / "d3etr"
MODULES = sorted(LIBRARY.rglob("*.py"))

# Every package may import itself and what stands on earlier lines.
TIERS = (
    {"text"},
    {"logs"},
    {"errors"},
    {"registry"},
    {"files", "progress"},
    {"config"},
    {"storage"},
    {"attention_maps", "edge_distributions"},
    {"structures", "timing"},
    {"kernels"},
    {"matching"},
    {"losses"},
    {"data", "detectors"},
    {"methods"},
    {"distiller"},
    {"evaluation"},
    {"tiles"},
    {"predictions"},
    {"exports"},
    {"engine", "inference"},
    {"pseudo_labels"},
    {"fonts"},
    {"drawing"},
    {"tracking"},
    {"loading"},
    {"launch"},
    {"serving"},
    {"dry_run", "demo", "latency", "verdict", "project"},
    {"cli"},
    {"__main__"},
)
ARRAYS = {"torch", "torchvision", "scipy", "numpy"}
THIRD_PARTY = {
    "text": set[str](),
    "errors": set[str](),
    "files": set[str](),
    "attention_maps": {"torch"},
    "edge_distributions": {"torch"},
    "structures": {"torch"},
    "timing": {"torch"},
    "kernels": {"torch", "triton"},
    "config": {"pydantic", "pydantic_core", "yaml"},
    "storage": {"fsspec", "aiohttp"},
    "matching": ARRAYS,
    "losses": ARRAYS,
    "methods": ARRAYS | {"pydantic"},
    "distiller": ARRAYS,
    "detectors": ARRAYS | {"safetensors", "pydantic", "timm", "transformers"},
    "tiles": {"numpy"},
    "predictions": {"numpy", "PIL"},
    "loading": {"torch"},
}
CORE = ("engine", "inference", "methods", "losses", "distiller", "evaluation", "data")
ONLY_IN = {
    "ray": ("launch", "serving"),
    "mlflow": "tracking",
    "fsspec": "storage",
    "triton": "kernels",
    "transformers": ("detectors/foundation.py", "detectors/exports/hugging_face.py"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime", "openvino"), "exports"),
}


def package_of(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            submodules = node.module == "d3etr"
            yield from (
                f"d3etr.{alias.name}" if submodules else node.module for alias in node.names
            )


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            yield place, node.end_lineno - node.lineno + 1


def relative(path: Path) -> str:
    return str(path.relative_to(LIBRARY))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_dependencies_point_one_way(path: Path) -> None:
    package = package_of(path)
    if package == "__init__":
        pytest.skip("the root only forwards, see test_importing_the_package_is_cheap")
    tier = next((index for index, names in enumerate(TIERS) if package in names), None)
    assert tier is not None, f"{package} has no place in TIERS"
    allowed = set[str]().union({package}, *TIERS[:tier])
    used = {name.split(".")[1] for name in imports(path) if name.startswith("d3etr.")}
    assert used <= allowed


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_third_party_packages_stay_where_they_belong(path: Path) -> None:
    package = package_of(path)
    used = {name.split(".")[0] for name in imports(path)} - {"d3etr"} - sys.stdlib_module_names
    for name, home in ONLY_IN.items():
        homes = (home,) if isinstance(home, str) else home
        here = not {package, relative(path)}.isdisjoint(homes)
        assert name not in used or here, f"{name} belongs in d3etr/{home}"
    if package in THIRD_PARTY:
        assert used <= THIRD_PARTY[package]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_library_code_does_not_print(path: Path) -> None:
    if package_of(path) in {"cli", "demo"} or path.stem in {"__main__"}:
        pytest.skip("commands talk to people")
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    prints = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert not prints


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_loggers_are_those_that_lose_credentials(path: Path) -> None:
    assert path.stem == "logs" or "logging.getLogger(__name__)" not in path.read_text()


def test_functions_and_files_are_small() -> None:
    sizes = sorted((lines, place) for path in MODULES for place, lines in functions(path))
    lengths = [lines for lines, _ in sizes]
    assert statistics.median(lengths) <= 12
    assert lengths[int(0.9 * len(lengths))] <= 40
    assert [place for lines, place in sizes if lines > 60] == []
    long_files = [relative(p) for p in MODULES if len(p.read_text().splitlines()) > 400]
    assert long_files == []


def test_classes_are_small_and_take_few_arguments() -> None:
    classes = [
        (relative(path), node)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert [(p, c.name) for p, c in classes if (c.end_lineno or 0) - c.lineno >= 200] == []
    constructors = [
        (place, node.name, len(part.args.args + part.args.kwonlyargs) - 1)
        for place, node in classes
        for part in node.body
        if isinstance(part, ast.FunctionDef) and part.name == "__init__"
    ]
    assert [found for found in constructors if found[2] > 7] == []


def test_the_ways_through_the_house_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    stops = re.findall(r"^\| \d+ \| `([\w/<>]+\.py)`: `([\w.]+)`", text, re.M)
    assert len(stops) == len(re.findall(r"^\| \d+ \|", text, re.M)) > 12
    for file, name in stops:
        files = [LIBRARY / file.replace("<name>", stem) for stem in ("detr", "dab_detr")]
        for path in files if "<name>" in file else [LIBRARY / file]:
            defined = ast.walk(ast.parse(path.read_text()))
            names = {
                node.name for node in defined if isinstance(node, ast.ClassDef | ast.FunctionDef)
            }
            assert {*name.split(".")} <= names, f"{file} has no {name}"


def test_platform_stays_the_standard_librarys() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform; assert platform.system()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("folder", [".", "trainers", "sweeps", "tests"])
def test_no_script_shadows_a_module(folder: str) -> None:
    taken = sys.stdlib_module_names | set(ONLY_IN) | ARRAYS
    assert {path.stem for path in (ROOT / folder).glob("*.py")} & taken == set()


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports them as top-level modules: a name that is taken twice ends every test."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    twice = [name for name, count in names.items() if count > 1]
    assert set(twice) <= {"conftest.py"}


def test_importing_the_package_is_cheap() -> None:
    heavy = ["torch", "numpy", "ray", "mlflow", "pydantic"]
    code = f"import sys, d3etr; d3etr.__version__; assert not {{*{heavy}}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "platform", check=True)


@pytest.mark.slow
def test_the_core_works_without_ray_and_mlflow() -> None:
    names = [
        ".".join(("d3etr", *path.relative_to(LIBRARY).with_suffix("").parts))
        for path in MODULES
        if package_of(path) in CORE and path.stem != "__init__"
    ]
    code = (
        "import sys, importlib; sys.modules.update(ray=None, mlflow=None); "
        f"[importlib.import_module(name) for name in {names}]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "platform", check=True)


def test_no_file_names_somebodys_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt)/\w")
    folders = ("platform", "trainers", "sweeps", "tests", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile"]
    kinds = {".py", ".yaml", ".yml", ".md", ".toml", ".txt", ".json", ""}
    texts = (p for p in files if p.is_file() and p.suffix in kinds and p != Path(__file__))
    named = [str(path.relative_to(ROOT)) for path in texts if pattern.search(path.read_text())]
    assert named == []
