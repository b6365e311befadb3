"""``mea-ray bench``: measurements of speed. Nothing heavy is imported before one is started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mea_ray.cli.options import EPILOG, Debug

bench = typer.Typer(no_args_is_help=True, help="Measure this machine: the service, a victim's training, a sweep.")

Options = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(help="Settings of the benchmark, name=value; `mea-ray list benchmarks`.", metavar="NAME=VALUE"),
]
Json = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", help="Also write all measurements to this JSON file."),
]


@bench.command("service", epilog=EPILOG)
def bench_service(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """Images per second through the service, against the bare forward pass and with merging switched off.

    For example:

      mea-ray bench service

      mea-ray bench service model=resnet18 --json service.json
    """
    from mea_ray.cli.commands import measure

    measure("service", options or [], output)


@bench.command("http", epilog=EPILOG)
def bench_http(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """Images per second and latency through HTTP, against the service in Ray and the bare forward pass.

    For example:

      mea-ray bench http

      mea-ray bench http request_images=[256] clients=[1] --json http.json
    """
    from mea_ray.cli.commands import measure

    measure("http", options or [], output)


@bench.command("storage", epilog=EPILOG)
def bench_storage(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """Requests and bytes that one trial costs on an object store, counted by an S3 server on this machine.

    For example:

      mea-ray bench storage

      mea-ray bench storage removals=0 budgets=10
    """
    from mea_ray.cli.commands import measure

    measure("storage", options or [], output)


@bench.command("sweep", epilog=EPILOG)
def bench_sweep(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """Overhead of a sweep: a thousand trials that only sleep, driver memory, a kill half way.

    For example:

      mea-ray bench sweep

      mea-ray bench sweep trials=200 few=20 kill=false
    """
    from mea_ray.cli.commands import measure

    measure("sweep", options or [], output)


@bench.command("scheduling", epilog=EPILOG)
def bench_scheduling(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """Utilisation of clusters of many GPUs by a sweep: a simulation, checked against a real sweep of dummy trials.

    For example:

      mea-ray bench scheduling

      mea-ray bench scheduling gpus=[8,32] trials=200 victims=10 check=false
    """
    from mea_ray.cli.commands import measure

    measure("scheduling", options or [], output)


@bench.command("efficiency", epilog=EPILOG)
def bench_efficiency(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """Parallel efficiency of real trials: the same thefts with one worker and with several, alternating.

    For example:

      mea-ray bench efficiency

      mea-ray bench efficiency workers=4 trials=16 budget=500
    """
    from mea_ray.cli.commands import measure

    measure("efficiency", options or [], output)


@bench.command("report", epilog=EPILOG)
def bench_report(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """CPU time, memory and size of the report of a large sweep, from synthetic results.

    For example:

      mea-ray bench report

      mea-ray bench report points=[1000] --json report.json
    """
    from mea_ray.cli.commands import measure

    measure("report", options or [], output)


@bench.command("train", epilog=EPILOG)
def bench_train(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """Images per second of a victim's training with all its losses, against the plain supervised loop.

    For example:

      mea-ray bench train

      mea-ray bench train model=resnet18 steps=10
    """
    from mea_ray.cli.commands import measure

    measure("train", options or [], output)


@bench.command("stack", epilog=EPILOG)
def bench_stack(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """Images per second of many small networks trained as one stack, against training them one after another.

    For example:

      mea-ray bench stack

      mea-ray bench stack networks=[4] model=cnn9 seeds=own
    """
    from mea_ray.cli.commands import measure

    measure("stack", options or [], output)


@bench.command("views", epilog=EPILOG)
def bench_views(options: Options = None, output: Json = None, debug: Debug = False) -> None:
    """Augmented views per second of self-supervised training, against the training step and torchvision's transforms.

    For example:

      mea-ray bench views

      mea-ray bench views model=cnn9 batch_size=256
    """
    from mea_ray.cli.commands import measure

    measure("views", options or [], output)
