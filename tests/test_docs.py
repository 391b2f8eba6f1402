"""Every command in the documentation is one that the command line takes: names, options and values of the configs."""

import re
import shlex
from pathlib import Path

import pytest

from simdetr.commands.main import LIGHTNING, command_parser, fold_options
from simdetr.recipe import Recipe, RecipeCLI

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands_of(page: Path) -> list[str]:
    """Commands in the code blocks of a page, continued lines joined, comments left out."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("simdetr ")]


COMMANDS = [pytest.param(line, id=f"{page.stem}: {line[:60]}") for page in PAGES for line in commands_of(page)]


def configs_of(page: Path) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


CONFIGS = [
    pytest.param(text, id=f"{page.stem}-{index}") for page in PAGES for index, text in enumerate(configs_of(page))
]


def test_pages_have_commands_and_configs():
    assert COMMANDS and CONFIGS


@pytest.mark.parametrize("text", CONFIGS)
def test_config_is_accepted(text, tmp_path):
    """Alone, or over a config that describes the detector."""
    config = tmp_path / "shown.yaml"
    config.write_text(text, encoding="utf-8")
    _, resolved = Recipe((str(ROOT / "configs/tiny.yaml"), str(config)), ("--data.images=photos",)).resolved()
    assert "class_path: simdetr.detectors." in resolved


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_accepted(line, monkeypatch):
    monkeypatch.chdir(ROOT)  # where configs/ is
    words = shlex.split(line, comments=True)[1:]
    if words[0] in LIGHTNING:
        RecipeCLI(
            [word for word in words[1:] if word != "--ckpt_path" and not word.endswith(".ckpt")],
            run=False,
            parse_only=True,
        )
        return
    arguments = fold_options(words)
    values = command_parser(arguments).parse_args(arguments)
    own = values[values.subcommand]
    if not own.get("config"):
        return
    detector = [] if not own.get("init") else ["--model.detector=simdetr.detectors.DeformableDETR"]
    _, text = Recipe(tuple(own.config), (f"--data.images={own.images}", *detector, *(own.options or ()))).resolved()
    assert "DeformableDETR" in text


def test_unknown_option_is_refused(monkeypatch):
    """The check above can fail: a misspelt option of a config is not accepted."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="imagesize"):
        Recipe(("configs/tiny.yaml",), ("--data.images=photos", "--mining.imagesize=4")).resolved()


def test_files_that_the_architecture_names_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"simdetr/[\w/]+\.py", text))
    assert named and {path for path in named if not (ROOT / path).is_file()} == set()
    for folder in (path for path in (ROOT / "simdetr").iterdir() if (path / "__init__.py").is_file()):
        assert folder.name in text


def test_functions_that_the_architecture_names_are_where_it_says():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    said = re.findall(r"`(simdetr/[\w/]+\.py)`: `(\w+)`", text)
    assert said
    for path, name in said:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE), name
