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
FOLDERS = ("kernels", "miro", "examples", "profiling", "tests")
MAX_LINES = {"kernels": 350, "miro": 350, "profiling": 350, "examples": 400, "tests": 400}

# Lowest first; a package of miro imports from itself and from those before it in this list.
LAYERS = (
    "utils",
    "flow",
    "conditioning",
    "images",
    "sources",
    "model",
    "encoders",
    "rewards",
    "data",
    "training",
    "report",
    "prepare",
    "inspect",
    "sampling",
    "evaluate",
    "cli",
)
LAYER = {name: height for height, name in enumerate(LAYERS)}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name by which a file is imported."""
    roots = [ROOT / "kernels", ROOT / "examples", ROOT / "profiling", ROOT]
    root = next(r for r in roots if path.is_relative_to(r))
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sources("kernels", "miro", "examples", "profiling")}


def imports(path: Path) -> Iterator[str]:
    """The dotted name of every module a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            assert node.module is not None
            for alias in node.names:
                # `from miro import flow` imports a module, `from miro.flow import Path` does not.
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def test_no_two_modules_import_each_other() -> None:
    """Depth-first search over all modules of the product: any cycle is reported whole."""
    graph = {
        name: [imported for imported in imports(path) if imported in MODULES]
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " imports ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_package_of_miro_has_a_layer() -> None:
    packages = {name.split(".")[1] for name in MODULES if name.startswith("miro.")}

    assert packages == set(LAYERS)


def test_imports_inside_miro_only_go_down() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, path in MODULES.items()
        if name.startswith("miro.")
        for imported in imports(path)
        if imported.startswith("miro.")
        and (ours := name.split(".")[1]) != (theirs := imported.split(".")[1])
        and LAYER[ours] <= LAYER[theirs]
    ]

    assert wrong == []


def test_no_two_modules_share_a_base_name() -> None:
    """Package names count too; op.py and reference.py are the same part of each kernel."""
    names = [
        name.rpartition(".")[2]
        for name in MODULES
        if name.startswith(("miro.", "miro_kernels.", "openmoji."))
    ]
    repeated = {name for name in names if names.count(name) > 1}

    assert repeated - {"__main__", "op", "reference"} == set()


def test_the_package_is_small_enough_to_scan() -> None:
    entries = {p.name for p in (ROOT / "miro").iterdir() if p.name != "__pycache__"}

    assert len(entries) <= 17, sorted(entries)


def test_kernels_import_torch_triton_and_the_standard_library_alone() -> None:
    allowed = {"torch", "triton", "miro_kernels"} | sys.stdlib_module_names
    # The interpreter computes with numpy; flash-attn is a backend, where it is installed.
    also = {"lab": "numpy", "attention": "flash_attn"}
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
        if name.split(".")[0]
        in {"launch", "profiling", "tests", "kernels", "examples", "openmoji"} | scripts
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
    names |= {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
    assert names & taken == set()


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*FOLDERS)
    }

    long = {str(path.relative_to(ROOT)): lines for path, lines in lengths.items()}
    assert {name: n for name, n in long.items() if n > MAX_LINES[name.split("/")[0]]} == {}


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
