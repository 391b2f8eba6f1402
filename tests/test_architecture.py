"""The rules of the layout (design.md, section 3), kept by reading the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import simdetr

PACKAGE = Path(simdetr.__file__).parent
TESTS = Path(__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "boxes": set(),
    "machine": set(),
    "data": {"boxes"},
    "proposals": {"boxes", "machine", "data"},
    "detectors": {"boxes", "data"},
    "training": {"boxes", "machine", "data", "proposals", "detectors"},
    "evaluation": {"boxes", "machine", "data", "proposals", "detectors", "training"},
    "heads": {"boxes", "machine", "data", "proposals", "detectors", "training", "evaluation"},
    "labelling": {"boxes", "machine", "data", "proposals", "detectors", "training", "evaluation", "heads"},
}
"""What a folder (or a file of the root) may import beside itself; the other top-level modules may import everything."""
WITH_LIGHTNING = {"training", "evaluation", ""}

TESTED_ELSEWHERE = {
    "__init__.py": "names only; test_architecture imports it",
    "__main__.py": "two lines around cli.main",
    "commands.py": "test_cli.py runs every command",
    "fit_results.py": "test_heads_at_work.py",
    "inference.py": "test_pipeline.py",
    "mining_steps.py": "test_mining_commands.py, test_pipeline.py",
    "results.py": "test_cli.py reads what it writes",
    "rival_commands.py": "test_rival_comparison.py runs the command",
    "data/image_labels.py": "test_labels.py",
    "evaluation/prediction_samples.py": "test_heads_at_work.py reads the page",
    "evaluation/score_text.py": "test_heads_at_work.py",
    "data/image_lists.py": "test_images.py",
    "data/scene_drawing.py": "test_scenes.py",
    "proposals/kmeans_starts.py": "test_kmeans.py",
    "proposals/mining_progress.py": "test_miner.py",
    "proposals/shard_mining.py": "test_miner.py, test_mining_faults.py",
    "proposals/shards.py": "test_store.py",
    "proposals/unreadable.py": "test_mining_faults.py",
    "training/checkpoints.py": "test_train.py resumes from them",
}
"""Modules without a test file of their own name, and where they are tested."""


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of(dotted: str) -> str:
    """``simdetr.data.images`` -> ``data``; other top-level modules -> ``""``."""
    part = dotted.split(".")[1] if "." in dotted else ""
    return part if part in MAY_IMPORT else ""


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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    own = layer_of("simdetr." + name_of(path).removesuffix(".py").replace("/", "."))
    imported = [name for name in imports_of(path) if name.startswith("simdetr.")]
    if own:
        layers = {layer_of(name): name for name in imported}
        wrong = {layer: name for layer, name in layers.items() if layer not in MAY_IMPORT[own] | {own}}
        assert not wrong, f"{own} must not import {sorted(wrong.values())}"
    uses_lightning = any(name.startswith(("pytorch_lightning", "lightning")) for name in imports_of(path))
    assert own in WITH_LIGHTNING or not uses_lightning


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_small_named_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 700
    assert ast.get_docstring(ast.parse(text))
    assert not {"utils", "util", "misc", "common", "helpers", "helper"} & set(path.stem.split("_"))
    assert len(path.relative_to(PACKAGE).parts) <= 2


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=name_of)
def test_every_module_has_a_test_of_its_name(path):
    own = TESTS / path.relative_to(PACKAGE).parent / f"test_{path.name}"
    if name_of(path) in TESTED_ELSEWHERE:
        assert not own.is_file(), "no exemption is needed any more"
    else:
        assert own.is_file()


def test_exemptions_speak_of_files_that_exist():
    assert {name for name in TESTED_ELSEWHERE if not (PACKAGE / name).is_file()} == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short_with_few_arguments(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, node.name
            assert not any(isinstance(child, ast.ImportFrom) and child.names[0].name == "*" for child in node.body)


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
