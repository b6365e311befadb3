"""``mea-ray keys``: the API keys of a victim's HTTP service. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mea_ray.cli.options import EPILOG, Debug

keys = typer.Typer(
    no_args_is_help=True,
    help="API keys of a victim's HTTP service: which clients can query, with which budget and rate.",
)

Victim = Annotated[
    Path, typer.Argument(help="Folder of a victim, written by `mea-ray train`, or an artifact of a run.")
]
State = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder of the service: keys, ledger, query log. Defaults to VICTIM.service, beside the victim."),
]
Name = Annotated[str, typer.Argument(help="Name of the client.", metavar="NAME")]


@keys.command("add", epilog=EPILOG)
def add(
    victim: Victim,
    name: Name,
    budget: Annotated[Optional[int], typer.Option(help="Query budget in images; no limit if omitted.", min=0)] = None,  # noqa: UP045
    rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Rate limit in images per second; no limit if omitted.", min=0),
    ] = None,
    burst: Annotated[
        int, typer.Option(help="With --rate: images that can be sent at once after a pause.", min=1)
    ] = 1000,
    state: State = None,
    debug: Debug = False,
) -> None:
    """Create a key for a client and print it. It is printed only once: only its hash is stored.

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
    """Revoke a client's key; a running service rejects it within a second.

    For example:

      mea-ray keys revoke victims/flowers alice
    """
    from mea_ray.cli import serve

    serve.revoke(victim, name, state)


@keys.command("limit", epilog=EPILOG)
def limit(
    victim: Victim,
    name: Name,
    budget: Annotated[Optional[str], typer.Option(help="Query budget in images, or none.")] = None,  # noqa: UP045
    rate: Annotated[Optional[str], typer.Option(help="Rate limit in images per second, or none.")] = None,  # noqa: UP045
    burst: Annotated[Optional[int], typer.Option(help="Images that can be sent at once after a pause.", min=1)] = None,  # noqa: UP045
    state: State = None,
    debug: Debug = False,
) -> None:
    """Change a client's limits, even while the service runs. A budget below what was already charged counts as spent.

    For example:

      mea-ray keys limit victims/flowers alice --budget 20000 --rate none
    """
    from mea_ray.cli import serve

    serve.limit(victim, name, budget, rate, burst, state)
