"""What all commands share: exit codes, the line about them, and ``--debug``."""

from __future__ import annotations

from typing import Annotated

import typer

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

EPILOG = (
    "Exit codes: 0 success; 1 a trial or a running part failed; 2 the command, the config, the data or a file cannot "
    "be used; 130 interrupted (Ctrl-C, SIGTERM), finished work is kept."
)


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.find_root().ensure_object(dict)["debug"] = True
    return value


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug, is_eager=True)
]
