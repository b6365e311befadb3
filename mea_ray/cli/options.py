"""What all commands share: exit codes, their description, ``--debug``, and the layout of their help."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

EPILOG = (
    "Exit codes: 0 success; 1 a trial or a running component failed; 2 the command, the config, the data or a file "
    "is invalid; 130 interrupted (Ctrl-C, SIGTERM), finished work is saved."
)


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.find_root().ensure_object(dict)["debug"] = True
    return value


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug, is_eager=True)
]


def lay_out_help(commands: typer.Typer) -> None:
    """Give each command its docstring as help: paragraphs without line breaks, and one line for each example.

    Typer would keep the line breaks of all paragraphs but the first, and indent examples in some commands only.
    """
    for command in commands.registered_commands:
        paragraphs = [" ".join(each.split()) for each in (inspect.getdoc(command.callback) or "").split("\n\n")]
        text = "\n\n".join(paragraphs)
        command.help = text.replace("\n\nmea-ray ", "\nmea-ray ").replace("For example:\n", "For example:\n\n")
