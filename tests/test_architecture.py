"""The rules of the layout, kept by reading the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import simdetr

PACKAGE = Path(simdetr.__file__).parent
TESTS = Path(__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts)
"""All but the steps of the app's database, which are data."""

ORDER = (
    "boxes",
    "data",
    "evaluation",
    "mining",
    "detectors",
    "heads",
    "exchange",
    "training",
    "encoder_training",
    "recipe",
    "reports",
    "pipeline",
    "labelling",
    "app",
    "commands",
)
"""Folders and files of the root; each may import those before it."""
WITHOUT_LIGHTNING = ORDER[: ORDER.index("training")]
TESTED_ELSEWHERE = {
    "reports/prediction_samples.py": "tests/test_heads_at_work.py looks at what it writes",
    "mining/clustering_config.py": "tests/mining/test_pseudo_labels.py clusters with every choice",
    "labelling/corrector_networks.py": "tests/labelling/test_correction.py trains and applies them",
}
"""Modules without a test file of their own name, and where they are tested."""


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of(dotted: str) -> str:
    """``simdetr.data.images`` -> ``data``."""
    return dotted.split(".")[1]


def imports_of(path: Path) -> list[str]:
    """Dotted names of all imports of a file, also those within functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [node.module or ""]
            if node.module == "simdetr":
                found += [f"simdetr.{alias.name}" for alias in node.names]
    return found


ROOMS = [path for path in MODULES if path.parent != PACKAGE or path.stem in ORDER]


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_imports_point_one_way(path):
    own = layer_of("simdetr." + name_of(path).removesuffix(".py").replace("/", "."))
    imported = [name for name in imports_of(path) if name.startswith("simdetr.")]
    wrong = [name for name in imported if ORDER.index(layer_of(name)) > ORDER.index(own)]
    assert not wrong, f"{own} must not import {wrong}"
    uses_lightning = any(name.startswith(("pytorch_lightning", "lightning")) for name in imports_of(path))
    assert own not in WITHOUT_LIGHTNING or not uses_lightning


def circle_of(needs: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle():
    """Imports within functions count; a folder stands for what its ``__init__`` imports."""
    names = {"simdetr." + name_of(path).removesuffix(".py").replace("/", "."): path for path in MODULES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    needs = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {module if module in names else node.module for module in modules}
        needs[name] = found & set(names) - {name}
    assert circle_of(needs) == []
    assert circle_of(needs | {"simdetr.boxes": {"simdetr.pipeline"}})


def test_the_root_is_a_hallway():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "pipeline", "recipe", "boxes"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} < set(ORDER)


def test_no_two_modules_have_the_same_or_a_twin_name():
    """Neither one stem, nor singular and plural, nor the same words in another order or form."""
    stems = [path.stem for path in MODULES if path.stem not in ("__init__", "__main__")]
    bare = [re.sub(r"(_steps|_ranks|_commands|_names|_results)$", "", stem).rstrip("s") for stem in stems]
    twins = {name: [s for s, b in zip(stems, bare, strict=True) if b == name] for name in bare if bare.count(name) > 1}
    assert not twins


@pytest.mark.parametrize(
    "folder", [path.parent for path in MODULES if path.name == "__init__.py"], ids=lambda f: f.name
)
def test_a_folder_lists_its_files_in_reading_order(folder):
    if folder == PACKAGE:
        return
    listed = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    for path in folder.glob("*.py"):
        assert path.stem == "__init__" or re.search(rf"\b{path.stem}\b", listed), f"{path.stem} is not in the list"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_named_and_documented(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert not {"utils", "util", "misc", "common", "helpers", "helper"} & set(path.stem.split("_"))
    assert len(path.relative_to(PACKAGE).parts) <= 2 or path.parent == PACKAGE / "data" / "label_formats"


@pytest.mark.parametrize("path", [path for path in MODULES if not path.name.startswith("__")], ids=name_of)
def test_every_module_has_a_test_of_its_name(path):
    own = TESTS / path.relative_to(PACKAGE).parent / f"test_{path.name}"
    if name_of(path) in TESTED_ELSEWHERE:
        assert not own.is_file(), "no exemption is needed any more"
    else:
        assert own.is_file()


def test_exemptions_speak_of_files_that_exist():
    assert {name for name in TESTED_ELSEWHERE if not (PACKAGE / name).is_file()} == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_operators_and_nothing_global(path):
    source = path.read_text(encoding="utf-8")
    for forbidden in ("torch.ops.", "torch._C", "set_float32_matmul_precision", "fp32_precision"):
        assert forbidden not in source, "results must not depend on the processor or on who was called before"


def test_public_names():
    assert sorted(simdetr.__all__) == simdetr.__all__
    for name in simdetr.__all__:
        assert callable(getattr(simdetr, name))
    assert set(simdetr.__all__) <= set(dir(simdetr))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        simdetr.nothing  # noqa: B018


ON_FIRST_USE = [path for path in MODULES if path.name == "__init__.py" and "names_on_first_use" in path.read_text()]


@pytest.mark.parametrize("path", ON_FIRST_USE, ids=name_of)
def test_names_on_first_use_are_those_that_type_checkers_see(path):
    """Each name stands in three lists, and is no module's, which it would be taken for once that was imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ".".join(["simdetr", *path.parent.relative_to(PACKAGE).parts])
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {node.module: tuple(alias.name for alias in node.names) for node in checked.body}
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    homes = {f"{package}.{module}": names for module, names in ast.literal_eval(call.args[1]).items()}
    (public,) = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    assert homes == seen
    names = [name for names in homes.values() for name in names]
    assert sorted(ast.literal_eval(public)) == sorted(names) and len(names) == len(set(names))
    assert not set(names) & {entry.stem for entry in path.parent.iterdir()}


def test_importing_everything_warns_of_nothing():
    names = [
        "simdetr." + name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in MODULES
        if path.name != "__main__.py" and path.parent != PACKAGE
    ]
    # DeprecationWarning: some third parties' own
    code = f"import importlib; [importlib.import_module(name) for name in {names}]; import simdetr.pipeline"
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
