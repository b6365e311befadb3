"""``mea-ray keys``: the API keys of a victim's HTTP service. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mea_ray.cli.options import EPILOG, Debug

keys = typer.Typer(no_args_is_help=True, help="API keys of a victim's HTTP service: who may ask, how much, how fast.")

Victim = Annotated[Path, typer.Argument(help="Folder of a victim: of `mea-ray train`, or an artifact of a run.")]
State = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder of the service: keys, ledger, query log. VICTIM.service beside the victim if omitted."),
]
Name = Annotated[str, typer.Argument(help="Name of the client.", metavar="NAME")]


@keys.command("add", epilog=EPILOG)
def add(
    victim: Victim,
    name: Name,
    budget: Annotated[Optional[int], typer.Option(help="Images in all; no limit if omitted.", min=0)] = None,  # noqa: UP045
    rate: Annotated[Optional[float], typer.Option(help="Images per second; no limit if omitted.", min=0)] = None,  # noqa: UP045
    burst: Annotated[int, typer.Option(help="Images at once after a pause, with --rate.", min=1)] = 1000,
    state: State = None,
    debug: Debug = False,
) -> None:
    """Make a key for a client and print it, this once: only its hash is stored.

    For example:

      mea-ray keys add victims/flowers alice --budget 10000 --rate 50
    """
    from mea_ray.cli import serve

    serve.add(victim, name, state, budget=budget, images_per_second=rate, burst=burst)


@keys.command("list", epilog=EPILOG)
def list_(victim: Victim, state: State = None, debug: Debug = False) -> None:
    """List the clients with their limits.

    For example:

      mea-ray keys list victims/flowers
    """
    from mea_ray.cli import serve

    serve.list_keys(victim, state)


@keys.command("revoke", epilog=EPILOG)
def revoke(victim: Victim, name: Name, state: State = None, debug: Debug = False) -> None:
    """End a client's key; a running service refuses it within a second.

    For example:

      mea-ray keys revoke victims/flowers alice
    """
    from mea_ray.cli import serve

    serve.revoke(victim, name, state)


@keys.command("limit", epilog=EPILOG)
def limit(
    victim: Victim,
    name: Name,
    budget: Annotated[Optional[str], typer.Option(help="Images in all, or none.")] = None,  # noqa: UP045
    rate: Annotated[Optional[str], typer.Option(help="Images per second, or none.")] = None,  # noqa: UP045
    burst: Annotated[Optional[int], typer.Option(help="Images at once after a pause.", min=1)] = None,  # noqa: UP045
    state: State = None,
    debug: Debug = False,
) -> None:
    """Change a client's limits, also while the service runs. A budget below what was charged counts as spent.

    For example:

      mea-ray keys limit victims/flowers alice --budget 20000 --rate none
    """
    from mea_ray.cli import serve

    serve.limit(victim, name, budget, rate, burst, state)
