"""The house: who may import whom, names that shadow nothing, and rules no review should repeat."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import miro_kernels

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "miro", "profiling", "tests")
MAX_LINES = 400

# Top floor first; a module of miro imports only from floors below its own. A room, which is a
# folder, may also import from itself. shared/design.md, section 2, says what each is for.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("cli_data", "cli_train", "demo"),
    (
        "annotate",
        "caption",
        "draw",
        "encode",
        "evaluate",
        "export",
        "fit_clip",
        "jobs",
        "launcher",
        "train",
    ),
    ("memory", "meter", "scoring", "survey", "visits"),
    ("data", "sample"),
    ("presets",),
    ("engine", "flops", "saving"),
    ("model", "partition"),
    ("conditioning", "encoding", "optimizer"),
    ("flow", "latents", "muon", "report", "rewards", "text"),
    (
        "checkpoint",
        "config",
        "locks",
        "peaks",
        "progress",
        "random",
        "ranks",
        "telemetry",
        "threads",
    ),
)
FLOOR = {room: height for height, floor in enumerate(reversed(FLOORS)) for room in floor}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The dotted name of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written from the root"
            assert node.module is not None
            # `from miro import flow` names a module, `from miro.flow import noised` does not.
            inside = node.module == "miro"
            yield from (f"miro.{alias.name}" if inside else node.module for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(ROOT / "miro").with_suffix("").parts[0]


def test_every_module_of_miro_has_its_floor() -> None:
    rooms = {room(path) for path in sources("miro")} - {"__init__"}

    assert rooms - FLOOR.keys() == set(), "say in FLOORS where these belong"


def test_imports_inside_miro_only_go_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("miro")
        for name in imports(path)
        if name.startswith("miro.")
        and (ours := room(path)) != (theirs := name.split(".")[1])
        and FLOOR.get(ours, 0) <= FLOOR.get(theirs, len(FLOORS))
    ]

    assert wrong == []


def test_kernels_import_torch_triton_and_the_standard_library_alone() -> None:
    allowed = {"torch", "triton", "miro_kernels"} | sys.stdlib_module_names
    # The interpreter computes with numpy; flash-attn is a backend, where it is installed.
    also = {"lab": "numpy", "attention.py": "flash_attn"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("kernels")
        for name in imports(path)
        if name.split(".")[0] not in allowed | {also[part] for part in path.parts if part in also}
    ]

    assert wrong == []


def test_nothing_imports_launch_files_profiling_scripts_or_tests() -> None:
    scripts = {path.stem for path in sources("profiling")}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("kernels", "miro")
        for name in imports(path)
        if name.split(".")[0] in {"launch", "profiling", "tests", "kernels"} | scripts
    ]

    assert wrong == []
    assert list((ROOT / "launch").rglob("*.py")) == [], "launch/ holds shell and host files"


@pytest.mark.parametrize("folder", ["kernels", "profiling", "launch", "tests"])
def test_a_folder_whose_name_another_package_has_is_no_package(folder: str) -> None:
    assert list((ROOT / folder).glob("__init__.py")) == []


def test_transformers_finds_no_kernels_package_of_ours() -> None:
    """From the root, `kernels` is nothing, a namespace, or the hub's package (house-style.md 5)."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"

    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    origin = found.stdout.strip()
    assert origin == "None" or "site-packages" in origin


def test_no_script_run_by_path_shadows_a_module() -> None:
    """Python puts a script's folder first on the path; the tests' helpers lie on it as well."""
    taken = sys.stdlib_module_names | {"torch", "triton", "numpy", "miro", "miro_kernels"}

    names = {path.stem for path in sources("profiling")}
    names |= {path.stem for path in (ROOT / "tests" / "miro").glob("*.py")}
    assert names & taken == set()


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*FOLDERS)
    }

    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MAX_LINES} == {}


def test_nothing_is_ever_unpickled() -> None:
    wrong = []
    for path in sources("kernels", "miro", "profiling"):
        unsafe = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        wrong += [f"{path}: imports {n}" for n in imports(path) if n.split(".")[0] in unsafe]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                loads = ast.unparse(node.func) == "torch.load"
                if loads and given.get("weights_only") != "True":
                    wrong.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
                if given.get("allow_pickle", "False") != "False":
                    wrong.append(f"{path}:{node.lineno}: allow_pickle")

    assert wrong == []


def test_no_error_is_swallowed_unseen() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources("kernels", "miro", "profiling")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
        and ast.unparse(node.body[-1]) != "raise"
    ]

    assert wrong == []


@pytest.mark.parametrize("name", sorted(set(miro_kernels.__all__) - {"prewarm", "use_backend"}))
def test_every_public_kernel_is_documented_and_has_its_reference(name: str) -> None:
    public = getattr(miro_kernels, name)
    module = importlib.import_module(public.__module__)

    assert inspect.getdoc(module) and inspect.getdoc(public)
    references = [n for n, _ in inspect.getmembers(module, inspect.isfunction)]
    if inspect.isclass(public):
        assert any(n.endswith("_reference") for n in references)
    else:
        assert f"{name}_reference" in references
