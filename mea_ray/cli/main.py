"""The command line: ``mea-ray run | train | serve | keys | usage | sweep | plan | status | sync | report | ...``.

Nothing heavy is imported before a command needs it, so that ``--help`` is instant.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from mea_ray.cli.bench import bench
from mea_ray.cli.keys import keys
from mea_ray.cli.options import EPILOG, FAILED, INTERRUPTED, OK, Debug, lay_out_help

app = typer.Typer(
    name="mea-ray",
    help="If a watermarked model is stolen through its query API, can its owner still prove it, and what did the theft "
    "cost?\n\nStart with: mea-ray sweep quickstart",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
app.add_typer(keys, name="keys")


def _show_version(value: bool) -> None:
    if value:
        from mea_ray import __version__

        typer.echo(__version__)
        raise typer.Exit(OK)


Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads it at run time, on Python 3.10 too
    typer.Argument(help="Config paths to override, key.path=value (the value is YAML).", metavar="KEY.PATH=VALUE"),
]
Address = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Ray cluster: host:port as printed by `ray start`, or auto for the cluster that runs on this machine "
        "(RAY_ADDRESS). If omitted, a new Ray is started on this machine and RAY_ADDRESS is ignored."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an earlier run; nothing that has finished is repeated.")
]


@app.callback()
def _root(
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(epilog=EPILOG)
def run(
    file: Annotated[Path, typer.Argument(help="YAML file of one experiment.")],
    overrides: Overrides = None,
    local: Annotated[
        bool,
        typer.Option("--local", help="Run in this process, without Ray and without the query service; for debugging."),
    ] = False,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Name of the results folder in the storage; defaults to the file's name."),
    ] = None,
    resume: Resume = False,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Run one experiment: train the victim, serve it, steal it, prove the theft.

    For example:

      mea-ray run experiment.yaml

      mea-ray run experiment.yaml thief.model=resnet18 'thief.budgets=[500,1000]' --local
    """
    from mea_ray.cli import commands

    if not local:
        commands.check_address(address)
    config = commands.read_experiment(file, overrides or [])
    name = name if name is not None else re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip(".-_") or "experiment"
    if local:
        _exit(commands.run_local(config, name))
    _exit(commands.run_sweep(commands.sweep_of_one(config, name), resume, address))


@app.command(epilog=EPILOG)
def train(
    file: Annotated[
        Path,
        typer.Argument(
            help="YAML file of an experiment or a sweep, or a victim's folder in STORAGE/artifacts/victims."
        ),
    ],
    to: Annotated[Path, typer.Option(help="Output folder; its name becomes the victim's name.")],
    overrides: Overrides = None,
    copies: Annotated[
        bool,
        typer.Option(
            "--copies/--no-copies", help="Also write model.pt2, and model.onnx if the onnx extra is installed."
        ),
    ] = True,
    debug: Debug = False,
) -> None:
    """Train the watermarked victim of an experiment and write it to a folder: model, card, exports, and key.

    A victim that a run or a sweep has already trained is reused. serve, commit, nulls and verify take this folder.

    For example:

      mea-ray train experiment.yaml --to victims/flowers

      mea-ray train mea_ray_results/artifacts/victims/2d1278fe01234567 --to victims/flowers
    """
    from mea_ray.cli import train as training

    training.train(file, overrides or [], to, copies)


@app.command(epilog=EPILOG)
def commit(
    victim: Annotated[Path, typer.Argument(help="A victim's folder, from train, or STORAGE/artifacts/victims/NAME.")],
    tsa: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="URL of a time-stamp authority (RFC 3161); its reply is checked and saved.", metavar="URL"),
    ] = None,
    reply: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The authority's reply, if you sent it the request file yourself."),
    ] = None,
    roots: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Root certificate of the authority, PEM; defaults to those of this system. Saved beside the reply."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Commit to a victim's key before the theft, so that nobody can claim that the key was made up afterwards.

    Writes a hash of the key, the weights, the admissible keys and a nonce, and a time-stamp request, which contains the
    hash alone. Without --tsa nothing leaves this machine. Run the command again to check the commitment.

    For example:

      mea-ray commit victims/flowers --tsa http://timestamp.digicert.com

      mea-ray commit victims/flowers --reply reply.tsr --roots tsa_root.pem
    """
    from mea_ray.cli import commit as committing

    committing.run(victim, tsa, reply, roots)


@app.command(epilog=EPILOG)
def nulls(
    victim: Annotated[Path, typer.Argument(help="Folder of a victim, from `mea-ray train`.")],
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(help="Total number of null models; those already measured count.", min=1)] = 20,
    stolen: Annotated[int, typer.Option(help="How many of them to steal as well, as controls for a theft.", min=0)] = 0,
    budget: Annotated[
        Optional[list[int]],  # noqa: UP006, UP045
        typer.Option(help="--stolen: query budget of the thefts, in images. Repeatable."),
    ] = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Train innocent models in the same way as a victim and measure them with its key: the reference for suspects.

    Measurements are saved; to continue after an interruption, run the same command again.

    For example:

      mea-ray nulls victims/flowers --count 20

      mea-ray nulls victims/flowers --count 20 --stolen 8 --budget 1000 thief.attack=knockoff
    """
    from mea_ray.cli import commands
    from mea_ray.cli import nulls as models

    commands.check_address(address)
    models.nulls(victim, count, stolen, budget or [], overrides or [], address)


@app.command(epilog=EPILOG)
def verify(
    victim: Annotated[Path, typer.Argument(help="Folder of a victim, with null models from `mea-ray nulls`.")],
    suspect: Annotated[
        str,
        typer.Option(
            help="An ONNX, torch.export, TorchScript or safetensors file, a state dict, a folder of mea_ray, a URL, or "
            "package.module:function."
        ),
    ],
    overrides: Overrides = None,
    classes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Order of the suspect's classes: a YAML file with its class names or with NAME: COLUMN; or match, "
            "to infer it from answers to clean images. Defaults to the victim's order."
        ),
    ] = None,
    outputs: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Type of its outputs: logits, probabilities, top_k or labels; detected if omitted."),
    ] = None,
    preprocessing: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The image format that it expects, as YAML: size, channel_order, value_range, mean, deviation, e.g. "
            "'{size: [224, 224], channel_order: BGR}'."
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Architecture for a file of weights: a name, or YAML with its options; defaults to the victim's."
        ),
    ] = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which output to use if a file has several: its name, or its index if they have no names."),
    ] = None,
    budget: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Query budget of the claimed theft; selects the stolen null models that serve as controls."),
    ] = None,
    seen: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="When you first saw the suspect (UTC date); the commitment must be older. Defaults to now."),
    ] = None,
    key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="API key for a URL: env:NAME, file:PATH, or the key itself.", envvar="MEA_RAY_KEY"),
    ] = None,
    api: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="YAML file that describes the API behind the URL, if it is not `mea-ray serve`."),
    ] = None,
    memory_gb: Annotated[
        float, typer.Option(help="Memory limit of the process that runs a suspect's file, in GiB.", min=1.0)
    ] = 16.0,
    seconds: Annotated[
        float, typer.Option(help="Time limit for an answer from a suspect's file, in seconds.", min=1.0)
    ] = 300.0,
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for verdict.json and verdict.html; defaults to a new one in VICTIM/owner/verdicts."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Judge someone else's model: was it stolen from this victim?

    A file runs in a separate process, without network access and with limits. docs/verify.md says what that does not
    protect against.

    For example:

      mea-ray verify victims/flowers --suspect stolen.onnx --budget 1000

      mea-ray verify victims/flowers --suspect weights.pt --model resnet18 --classes match

      mea-ray verify victims/flowers --suspect https://api.example/v2 --api example.yaml --key env:KEY
    """
    from mea_ray.cli import verify as verifying

    options = verifying.Options(
        classes=classes,
        outputs=outputs,
        preprocessing=preprocessing,
        model=model,
        output=output,
        budget=budget,
        seen=seen,
        key=key,
        api=api,
        memory_gb=memory_gb,
        seconds=seconds,
        to=to,
    )
    verifying.verify(victim, suspect, options, overrides or [])


@app.command(epilog=EPILOG)
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file of a sweep, or the name of one that comes with mea_ray.")],
    overrides: Overrides = None,
    resume: Resume = False,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Run a sweep: every point of its space is a trial; trials share victims and services, and run in parallel.

    An override sets a key of the sweep itself or a config path of its base experiment.

    For example:

      mea-ray sweep quickstart

      mea-ray sweep budgets data.name=parquet data.path=data/cifar10

      mea-ray sweep quickstart --resume
    """
    from mea_ray.cli import commands

    commands.check_address(address)
    _exit(commands.run_sweep(commands.read_sweep(file, overrides or []), resume, address))


@app.command(epilog=EPILOG)
def plan(
    file: Annotated[Path, typer.Argument(help="YAML file of a sweep, or the name of one that comes with mea_ray.")],
    overrides: Overrides = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Check a sweep against its data, and show what it needs: trials, models, queries, time, memory, resources.

    For example:

      mea-ray plan architectures verification.null_models=3
    """
    from mea_ray.cli.commands import read_sweep
    from mea_ray.cli.plan import show
    from mea_ray.report.terminal import make_console

    show(make_console(), read_sweep(file, overrides or []), address)


@app.command(epilog=EPILOG)
def status(
    folder: Annotated[str, typer.Argument(help="Folder of a sweep: its path, or URI (s3://bucket/storage/sweep).")],
    lines: Annotated[int, typer.Option(help="Number of recent events to show.")] = 8,
    debug: Debug = False,
) -> None:
    """Show the progress of a sweep, during or after it, from any machine that can read its storage.

    For example:

      mea-ray status mea_ray_results/quickstart
    """
    from mea_ray.cli.status import print_status
    from mea_ray.report.terminal import make_console
    from mea_ray.sweep.status import open_folder, read_status

    print_status(make_console(), read_status(open_folder(folder)), lines=lines)


@app.command(epilog=EPILOG)
def sync(
    folder: Annotated[str, typer.Argument(help="Folder of a sweep: its path, or URI (s3://bucket/storage/sweep).")],
    per_minute: Annotated[float, typer.Option(help="Maximum number of runs to upload per minute.", min=1.0)] = 60.0,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Afterwards, create or update a W&B report of the sweep; needs wandb-workspaces."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Upload the W&B runs that a sweep stored offline, on all nodes, to the account of `wandb login`; none twice.

    For example:

      mea-ray sync mea_ray_results/quickstart --report
    """
    from mea_ray.cli.sync import save_wandb_report, send
    from mea_ray.report.terminal import make_console
    from mea_ray.sweep.status import open_folder

    console, sweep = make_console(), open_folder(folder)
    failed = send(sweep, lambda text: console.print(text, soft_wrap=True), per_minute=per_minute)
    if report and not failed:
        console.print(f"report   {save_wandb_report(sweep)}", soft_wrap=True)
    _exit(failed)


@app.command(epilog=EPILOG)
def report(
    folder: Annotated[str, typer.Argument(help="Folder of a sweep (path or URI) that contains results/*.json.")],
    storage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where the victims are stored, if they were moved."),
    ] = None,
    png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also write the robustness curves to this PNG file."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown instead, with the papers' figures.")
    ] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print one CSV row for each measured model instead.")] = False,
    record: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write a record of the sweep to this folder instead, e.g. sweeps/results/budgets."),
    ] = None,
    command: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="--record: the command that started the sweep, if its log does not contain it."),
    ] = None,
    note: Annotated[str, typer.Option(help="--record: a note for readers, e.g. about the machine.")] = "",
    page: Annotated[
        Optional[list[Path]],  # noqa: UP006, UP045
        typer.Option(help="Rewrite the marked blocks of this Markdown page; FOLDER holds the records. Repeatable."),
    ] = None,
    images: Annotated[Path, typer.Option(help="--page: folder of the pictures.")] = Path("docs/images"),
    only: Annotated[
        Optional[list[str]],  # noqa: UP006, UP045
        typer.Option(
            help="Report only these trials: the start of a trial's name, or path=value, e.g. model=resnet18. "
            "Repeatable."
        ),
    ] = None,
    price: Annotated[
        Optional[list[str]],  # noqa: UP006, UP045
        typer.Option(
            help="hour=2.5 (per hour of a trial), query=0.001, currency=EUR; defaults to the sweep's "
            "`prices`. Repeatable."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Render again whenever a trial finishes, until the sweep ends or Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option(help="--watch: seconds between two checks for new results.", min=0.1)] = 30.0,
    debug: Debug = False,
) -> None:
    """Render the HTML report of a sweep from its results and print its tables; also works while the sweep runs.

    For example:

      mea-ray report mea_ray_results/quickstart --png curve.png

      mea-ray report mea_ray_results/quickstart --only seed=0 --only model=resnet18 --price hour=2.5

      mea-ray report mea_ray_results/quickstart --watch --every 60

      mea-ray report mea_ray_results/budgets --record sweeps/results/budgets --note "two CPU cores"

      mea-ray report sweeps/results --page README.md --page docs/results.md
    """
    from mea_ray.cli import commands

    if page:
        commands.render_pages(Path(folder), page, images)
    elif record is not None:
        commands.put_on_record(folder, record, command, note)
    elif markdown or csv:
        commands.print_results_as("markdown" if markdown else "csv", folder)
    else:
        commands.render_report(folder, storage, png, every if watch else None, only=only or [], price=price or [])


class ProxyChoice(str, Enum):
    """The HTTP proxy in front of the replicas of a service."""

    auto = "auto"
    haproxy = "haproxy"
    ray = "ray"


@app.command(epilog=EPILOG)
def serve(
    victim: Annotated[Path, typer.Argument(help="Folder of a victim: of `mea-ray train`, or an artifact of a run.")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            help="Settings of the service, e.g. policy=top_k replicas=2; `mea-ray list config http`.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 chooses one.", min=0, max=65535)] = 8000,
    admin_port: Annotated[
        int,
        typer.Option(
            help="Port of the owner's page, which listens on this machine only; 0 chooses one.", min=0, max=65535
        ),
    ] = 8001,
    tls_cert: Annotated[Optional[Path], typer.Option(help="Certificate chain in PEM.")] = None,  # noqa: UP045
    tls_key: Annotated[Optional[Path], typer.Option(help="Its private key in PEM.")] = None,  # noqa: UP045
    state: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the service: keys, ledger, query log. Defaults to VICTIM.service."),
    ] = None,
    update: Annotated[
        bool,
        typer.Option("--update", help="Switch the service that runs in --state to this victim; no request is lost."),
    ] = False,
    proxy: Annotated[
        ProxyChoice,
        typer.Option(
            help="What accepts connections: Ray Serve's own proxy, HAProxy, which is faster for small requests, or "
            "auto: HAProxy where it is available."
        ),
    ] = ProxyChoice.ray,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Serve a victim over HTTP, with keys, budgets, rates, and a log for its owner, until Ctrl-C.

    For example:

      mea-ray serve victims/flowers policy=top_k policy.k=3

      mea-ray serve victims/flowers replicas=2 max_replicas=8 --host 0.0.0.0 --tls-cert chain.pem --tls-key key.pem

      mea-ray serve victims/flowers-2 --state victims/flowers.service --update
    """
    from mea_ray.cli import serve as serving

    if update:
        serving.update(victim, state)
        return
    tls = serving.tls_files(tls_cert, tls_key)
    serving.serve(victim, overrides or [], host, port, tls, admin_port, state, address, proxy.value)


@app.command(epilog=EPILOG)
def steal(
    file: Annotated[
        Path, typer.Argument(help="YAML file of an experiment, or of a sweep, whose base experiment is used.")
    ],
    overrides: Overrides = None,
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="URL of the service; defaults to thief.blackbox.url in the file."),
    ] = None,
    key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where to read the API key: env:NAME or file:PATH."),
    ] = None,
    api: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="YAML file that describes the API, if it is not `mea-ray serve`."),
    ] = None,
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the stolen models; defaults to stolen/NAME in the storage."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Steal the model behind a URL with the attack in the file: one substitute per budget. The owner is not involved.

    To continue after an interruption, run the same command again; no query is paid for twice.

    For example:

      mea-ray steal experiment.yaml --url http://127.0.0.1:8000 --key env:FLOWERS_KEY

      mea-ray steal experiment.yaml --url https://api.example/v2 --api example.yaml 'thief.budgets=[500,1000]'
    """
    from mea_ray.cli import steal as stealing

    stealing.steal(file, overrides or [], url, key, api, to)


@app.command(epilog=EPILOG)
def usage(
    victim: Annotated[Path, typer.Argument(help="Folder of a victim that is, or was, served.")],
    state: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the service; defaults to VICTIM.service."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, including the distances.")] = False,
    debug: Debug = False,
) -> None:
    """Show what each client of a service was charged, which answers it got, and whether it looks like a thief.

    For example:

      mea-ray usage victims/flowers
    """
    from mea_ray.cli import serve as serving

    serving.usage(victim, state, as_json)


@app.command(epilog=EPILOG)
def calibrate(
    file: Annotated[
        Path, typer.Argument(help="YAML file of one experiment, or of a sweep, whose base experiment is used.")
    ],
    overrides: Overrides = None,
    innocents: Annotated[int, typer.Option(help="Innocent models, trained from scratch; at least 2.")] = 20,
    stolen_innocents: Annotated[
        int, typer.Option(help="How many of them to steal with each budget, as controls for the theft.")
    ] = 8,
    marked: Annotated[
        int,
        typer.Option(help="Watermarked models, each with its own key, each stolen with each budget; at least 1."),
    ] = 8,
    record: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also write a record to this folder, e.g. sweeps/results/calibration_digits."),
    ] = None,
    note: Annotated[str, typer.Option(help="--record: a note for readers, e.g. about the machine.")] = "",
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Measure how often the proof is wrong: innocent, stolen innocent and stolen marked models against many keys.

    Prints for every statistic the stolen models that it recognises at 0 and 1% false accusations, the innocent models
    that the verdict would accuse with proof, and thresholds on WSR. A key's rank counts only if its classes are drawn
    (victim.watermark.key.classes=seed). To continue after an interruption, run the same command again.

    For example:

      mea-ray calibrate quickstart victim.watermark.key.classes=seed --innocents 24 --marked 16
    """
    from mea_ray.calibration.run import Numbers
    from mea_ray.cli import commands
    from mea_ray.config import build
    from mea_ray.report import calibration

    commands.check_address(address)
    numbers = build(Numbers, {"innocents": innocents, "stolen_innocents": stolen_innocents, "marked": marked})
    calibration.run(commands.read_base(file, overrides or []), numbers, address, record, note)


@app.command(name="list", epilog=EPILOG)
def list_(
    kind: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A kind of component, sweeps or config, or one component; everything if omitted."),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="One component of the kind, or a section of the config."),
    ] = None,
    debug: Debug = False,
) -> None:
    """List the components, with their settings and defaults; the settings of experiments and sweeps; the sweeps.

    The kinds are watermarks, combiners, aggregators, pretexts, attacks, removals, detections, models, datasets,
    policies and benchmarks.

    For example:

      mea-ray list

      mea-ray list watermarks

      mea-ray list watermarks mea_defender

      mea-ray list config service
    """
    from mea_ray.cli import catalogue
    from mea_ray.report.terminal import make_console

    catalogue.show(make_console(), kind, name)


for commands_ in (app, bench, keys):
    lay_out_help(commands_)


def _exit(failed: bool) -> NoReturn:
    raise typer.Exit(FAILED if failed else OK)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` when None.

    Returns:
        The exit code (see ``EPILOG``).
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the parent process, as some daemons do
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    state: dict[str, Any] = {}
    command = typer.main.get_command(app)
    from mea_ray.cli.errors import plain_warnings
    from mea_ray.cli.interrupts import answered, line_of

    arguments = sys.argv[1:] if argv is None else list(argv)
    verb = next((each for each in arguments if not each.startswith("-")), None)
    try:
        with answered(line_of(verb)) as say_so:
            return _run(command, arguments, state, plain_warnings, say_so)
    except Exception as raised:
        if state.get("debug"):
            raise
        from mea_ray.cli.errors import cause, report
        from mea_ray.report.terminal import error_panel, make_console

        described = report(cause(raised))
        make_console(stderr=True).print(error_panel(described.text, described.title))
        return described.code


def _run(command: Any, arguments: list[str], state: dict[str, Any], quiet: Any, say_so: Callable[[], None]) -> int:
    """Return the exit code of a command."""
    try:
        with quiet():
            command.main(args=arguments, prog_name="mea-ray", obj=state)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else OK if stop.code is None else FAILED
        if code == INTERRUPTED:  # typer turns Ctrl-C into this exit
            say_so()
        return code
    return OK


if __name__ == "__main__":
    sys.exit(main())
