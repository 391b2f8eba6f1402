"""The ``simdetr`` command: arguments in, one call of ``pipeline.py`` (or of Lightning) out.

Commands are plain typed functions; jsonargparse makes their ``--help``, and takes what they hand on as ``**arguments``
from the function that gets it. Options with a dot, such as ``--trainer.max_epochs 3``, go over the values of the
config files.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import signal
import sys
import warnings
from argparse import HelpFormatter
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from simdetr.data.machine import prepare_openmp

POSITIONAL = ("convert", "doctor", "import")
"""Commands whose required arguments stand without a name: `simdetr doctor DIR`."""
FLAGS = (
    "--auto-batch",
    "--link-images",
    "--link_images",
    "--masks",
    "--no-browser",
    "--no_browser",
    "--no-propose",
    "--no_propose",
    "--overwrite",
    "--verify",
)
"""Options that stand without a value and mean true."""
LIGHTNING = ("fit", "validate", "test")
COMMANDS: dict[str, str | dict[str, str]] = {
    "quickstart": "quickstart.quickstart",
    "doctor": "prepare.doctor",
    "convert": "prepare.convert",
    "mine": "mine.mine",
    "cluster": "mine.cluster",
    "pretrain": "pretrain.pretrain_detector",
    "relabel": "predict.relabel",
    "split": "prepare.split_labels",
    "finetune": "pretrain.finetune_detector",
    "evaluate": "predict.evaluate_detector",
    "compare": "pretrain.compare_arms",
    "predict": "predict.predict_images",
    "autolabel": "labelling.autolabel_images",
    "label": "app.label",
    "label-order": "labelling.label_order",
    "label-simulate": "labelling.label_simulate",
    "encoder": {"fit": "mine.fit"},
    "probe": "mine.probe",
    "import": "export.import_detector",
    "export": {
        "labels": "export.labels",
        "safetensors": "export.safetensors",
        "transformers": "export.transformers",
        "official": "export.official",
        "onnx": "export.onnx",
    },
    "report": "pretrain.report_run",
    "rivals": "mine.rivals",
}
"""The function in ``simdetr.commands`` behind every command; its module is imported when its command is given.

Those modules import at their top what the signatures need, and in the functions what the work needs: to ask for help or
to mistype an option takes no torch. None has a name of ``simdetr`` itself: jsonargparse would import that one.
"""
GROUPS = {
    "encoder": "Train an encoder for mining on your own images: fit.",
    "export": "Write boxes for other tools: labels; a detector for others: safetensors, transformers, official, onnx.",
}
KEYWORDS = ("--from",)
"""Options whose names no argument of a Python function can have; it has an underscore after it."""
USER_ERRORS = (FileNotFoundError, PermissionError, ValueError, RuntimeError, OSError, ImportError)
"""Errors whose message is for the user; with --debug they come with their traceback."""


SIGNALLED = 128
"""Exit status after a signal, less its number, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; exits with 1 and one message when it cannot go on, with 2 when the arguments are wrong."""
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False)
    quieten(handler)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)  # the steps of the app's database are no news
    if args is None:  # this process is the command's own, and torch is not there yet
        prepare_openmp()
        signal.signal(signal.SIGTERM, terminate)
    try:
        if arguments[:1] and arguments[0] in LIGHTNING:
            from simdetr.commands.fit import FitCLI  # here, because Lightning takes seconds to import

            FitCLI(arguments)
        else:
            run(fold_options(arguments))
    except (KeyboardInterrupt, SystemExit) as stop:
        cause = signal_behind(stop)
        if cause is None or (debug and isinstance(stop, KeyboardInterrupt)):
            raise
        where = "".join(f" {note}" for note in getattr(stop, "__notes__", ()))
        console.print(
            f"stopped by {cause.name}{where}; the same command goes on with what is finished",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(SIGNALLED + cause)
    except USER_ERRORS as error:
        if debug:
            raise
        console.print(f"[bold red]error[/]: {escape(one_line(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def terminate(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, which ends what was begun in order: processes, files, locks.

    Not where another handler has taken this one's place and calls it, as Lightning's does, which ends after its step.
    """
    if signal.getsignal(number) is terminate:
        sys.exit(SIGNALLED + number)


def signal_behind(stop: KeyboardInterrupt | SystemExit) -> signal.Signals | None:
    """The signal that ends a command, None where it ends by itself.

    Lightning's way out on SIGTERM has no status, which shells take for success; on Ctrl-C it has that of an error.
    """
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return signal.SIGINT
    return signal.SIGTERM if stop.code in (None, SIGNALLED + signal.SIGTERM) else None


def one_line(error: BaseException) -> str:
    """The message of an error without what only its author can use, such as the traceback of a loader's process."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def run(arguments: list[str]) -> None:
    """Parse the arguments of one of ``COMMANDS`` and call it."""
    values = command_parser(arguments).parse_args(arguments)
    command: Any = COMMANDS
    while isinstance(command, dict):
        command, values = command[values.subcommand], values[values.subcommand]
    function_of(command)(**values)


def function_of(command: str) -> Callable[..., None]:
    """The function that one of ``COMMANDS`` names; imports what it needs, which takes seconds."""
    module, _, name = command.partition(".")
    function: Callable[..., None] = getattr(import_module(f"simdetr.commands.{module}"), name)
    return function


def command_parser(arguments: Sequence[str]) -> CommandParser:
    """The parser of the whole command line: a subcommand for every function, its help from type hints and docstring.

    Only the commands among ``arguments`` get their options: to find those of all takes seconds of imports.
    """
    parser = CommandParser(prog="simdetr", version=version("simdetr"), description=purpose())
    _add_commands(parser, COMMANDS, arguments)
    return parser


class CommandParser(ArgumentParser):
    """Speaks of wrong arguments in the words that were typed, and shows the usage of the command that was given."""

    chosen: CommandParser | None = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with 2, the usage and one message."""
        command: CommandParser = self
        while command.chosen is not None:
            command = command.chosen
        if command is not self:
            ex = ex or ValueError(message)
            ex.subcommand_parser = command  # type: ignore[attr-defined]  # whose usage is shown
        super().error(_in_typed_words(message, command), ex)

    def format_usage(self) -> str:
        """The usage, options as they are typed."""
        return _as_typed(super().format_usage())

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """The help, options as they are typed."""
        return _as_typed(super().format_help(formatter))


def _as_typed(text: str) -> str:
    """Options of ``KEYWORDS`` without the underscore that their arguments have."""
    for name in KEYWORDS:
        text = text.replace(f"{name}_ {name[2:].upper()}_", f"{name} {name[2:].upper()}").replace(f"{name}_", name)
    return text


def _in_typed_words(message: str, command: ArgumentParser) -> str:
    """What a parser says of wrong arguments, without its own names for them and without Python's types."""
    positional = {action.dest for action in command._actions if not action.option_strings}

    def typed(key: str) -> str:
        name = key.rpartition(".")[2]
        return name.upper() if name in positional else _as_typed(f"--{name}")

    head, required, names = message.partition("arguments are required: ")
    if required:
        return f"{head}{required}{', '.join(map(typed, names.split(', ')))}"
    key, choices = re.search(r'Parser key "([^"]+)"', message), re.search(r"Literal\[([^\]]+)\]", message)
    if key and choices:
        value = message.rpartition("Given value: ")[2].splitlines()[0] if "Given value: " in message else ""
        listed = choices[1].replace("'", "").replace('"', "")
        return f"{typed(key[1])}: expected one of {listed}" + (f", got {value}" if value else "")
    wanted_list = re.search(r"Expected a <class '(?:tuple|list)'>.*(?:Got|Given) value: (\S.*?)$", message, re.DOTALL)
    if key and wanted_list:
        given = wanted_list[1]
        return f"{typed(key[1])}: expected a list in brackets, such as '[{given}]', got {given}"
    return message


def _add_commands(
    parser: CommandParser, commands: Mapping[str, str | dict[str, str]], arguments: Sequence[str]
) -> None:
    subcommands = parser.add_subcommands()
    given = next((word for word in arguments if word in commands), None)
    for name, command in commands.items():
        summary = GROUPS[name] if isinstance(command, dict) else _summaries()[command]
        own = CommandParser(description=summary)
        if isinstance(command, str) and name in arguments:
            own.add_function_arguments(function_of(command), as_positional=name in POSITIONAL)
        subcommands.add_subcommand(name, own, help=summary)
        if name == given:
            parser.chosen = own
        if isinstance(command, dict):
            _add_commands(own, command, arguments)


@cache
def _summaries() -> dict[str, str]:
    """The first paragraph of every command's docstring, read from the sources: to import them takes seconds."""
    found = {}
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found[f"{path.stem}.{node.name}"] = (ast.get_docstring(node) or "").split("\n\n")[0]
    return found


def purpose() -> str:
    """What the command is for, and where Lightning's own commands are."""
    return (
        "From unlabelled images to a pretrained detection transformer, from few labels to a detector. "
        f"Lightning's own {' | '.join(LIGHTNING)} run on the same YAML files."
    )


def quieten(handler: logging.Handler) -> None:
    """Keep the terminal for what a user can act on: third parties' notices about their own internals are left out."""
    noisy = ("pytorch_lightning", "lightning", "torch", "fsspec", "matplotlib", "faiss")
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or not record.name.startswith(noisy))
    for message in (
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
        ".*does not have many workers.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def fold_options(arguments: Sequence[str]) -> list[str]:
    """Collect repeated ``--config`` and dotted options into the lists that the commands take.

    ``--config a --config b`` becomes ``--config=["a", "b"]``; ``--model.lr 1e-4`` becomes
    ``--options=["--model.lr=1e-4"]``. Hyphens within a name become underscores, and one of ``FLAGS`` becomes true
    unless a word after it says otherwise.

    Raises:
        ValueError: An option is the last word and has no value.
    """
    rest: list[str] = []
    folded: dict[str, list[str]] = {"--config": [], "--options": []}
    words = deque(arguments)
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        dotted = name.startswith("--") and "." in name
        if name != "--config" and not dotted:
            is_option = name.startswith("--")
            said = words.popleft() if word in FLAGS and words and words[0] in ("true", "false") else "true"
            flag = f"={said}" if word in FLAGS else ""
            argument = f"{name}_" if name in KEYWORDS else f"--{name[2:].replace('-', '_')}"
            rest.append(f"{argument}{equals}{value}{flag}" if is_option else word)
            continue
        if not equals:
            if not words:
                raise ValueError(f"{name}: expected a value after it, got the end of the command.")
            value = words.popleft()
        if dotted:
            folded["--options"].append(f"{name}={value}")
        else:
            folded["--config"].append(value)
    return rest + [f"{name}={json.dumps(values)}" for name, values in folded.items() if values]
