"""The ``simdetr`` command: arguments in, one call of ``pipeline.py`` (or of Lightning) out.

Commands are plain typed functions; jsonargparse makes their ``--help``. Options with a dot, such as
``--trainer.max_epochs 3``, go over the values of the config files.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.logging import RichHandler

from simdetr import commands

LIGHTNING = ("fit", "validate", "test")
COMMANDS: dict[str, Any] = {
    "quickstart": commands.quickstart,
    "doctor": commands.doctor,
    "mine": commands.mine,
    "cluster": commands.cluster,
    "pretrain": commands.pretrain,
    "relabel": commands.relabel,
    "finetune": commands.finetune,
    "evaluate": commands.evaluate,
    "compare": commands.compare,
    "predict": commands.predict,
    "export": {"_help": "Write results in other formats.", "labels": commands.export_labels},
    "report": commands.report,
}
USER_ERRORS = (FileNotFoundError, PermissionError, ValueError, RuntimeError, OSError)
"""Errors whose message is for the user; with --debug they come with their traceback."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; exits with 1 and one message when it cannot go on, with 2 when the arguments are wrong."""
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, rich_tracebacks=False)],
    )
    quieten()
    try:
        if arguments[:1] and arguments[0] in LIGHTNING:
            from simdetr.recipe import RecipeCLI  # here, because Lightning takes seconds to import

            RecipeCLI(arguments)
        else:
            auto_cli(COMMANDS, args=fold_options(arguments), as_positional=False, prog="simdetr", version=version())
    except USER_ERRORS as error:
        if debug:
            raise
        console.print(f"[bold red]error[/]: {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


def version() -> str:
    """Version of the installed package."""
    from importlib.metadata import version as installed

    return installed("simdetr")


def quieten() -> None:
    """Keep the terminal for what a user can act on: third parties' notices about their own internals are left out."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning.utilities._pytree")  # its own use of torch
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*number of training batches .* is smaller than the logging interval.*")


def fold_options(arguments: Sequence[str]) -> list[str]:
    """Collect repeated ``--config`` and dotted options into the lists that the commands take.

    ``--config a --config b`` becomes ``--config=["a", "b"]``; ``--model.lr 1e-4`` becomes
    ``--options=["--model.lr=1e-4"]``.

    Raises:
        ValueError: An option is the last word and has no value.
    """
    rest: list[str] = []
    folded: dict[str, list[str]] = {"--config": [], "--options": []}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        dotted = name.startswith("--") and "." in name
        if name != "--config" and not dotted:
            rest.append(word)
            continue
        if not equals:
            following = next(words, None)
            if following is None:
                raise ValueError(f"{name}: expected a value after it, got the end of the command.")
            value = following
        if dotted:
            folded["--options"].append(f"{name}={value}")
        else:
            folded["--config"].append(value)
    return rest + [f"{name}={json.dumps(values)}" for name, values in folded.items() if values]
