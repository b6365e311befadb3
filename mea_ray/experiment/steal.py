"""A theft without its owner: the model behind a URL is stolen with each budget. No watermark key is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mea_ray.attacks.base import Attack, Target
from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import ExperimentConfig, digest, identity, write_yaml
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.core.types import ImageSet, Splits
from mea_ray.evaluation import metrics
from mea_ray.experiment.attack_process import parent
from mea_ray.experiment.checks import build_network, pool_labels
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.journal import Warn
from mea_ray.experiment.remote_service import RemoteService
from mea_ray.experiment.theft import Theft, account_budgets, open_blackbox
from mea_ray.models.base import ImageModel
from mea_ray.results.records import Count, read_record
from mea_ray.storage.files import write_whole
from mea_ray.training.checkpoint import check_model, save_model
from mea_ray.training.device import threads

CLAIM = "theft.txt"
"""File that identifies the theft of a folder."""


class StolenRung(BaseModel):
    """One substitute.

    Attributes:
        budget: Its query budget, in images.
        queries: Images that were charged for it.
        accuracy: Accuracy on the test images of the thief's own data, in [0, 1]; None if their classes are not the
            service's.
        epochs: Epochs of its training.
        seconds: Wall time of its training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    budget: Count
    queries: Count
    accuracy: float | None
    epochs: Count
    seconds: float


def steal(
    config: ExperimentConfig,
    folder: Path,
    *,
    on_rung: Callable[[StolenRung, Path], None] = lambda rung, where: None,
    warn: Warn = lambda text: None,
) -> list[StolenRung]:
    """Steal the model behind ``thief.blackbox.url``: one fresh substitute per budget.

    Started again with the same folder, it resumes: no query is repeated, no substitute is trained again.

    Args:
        config: An experiment; its thief, its data and its seed are used. The victim in it is not.
        folder: Folder for answers (``transfer/``) and substitutes (``substitutes/BUDGET/``).
        on_rung: Called with each substitute and its folder.
        warn: Called with a message for each damaged file, whose step is repeated.

    Returns:
        The substitutes, by ascending budget.

    Raises:
        ConfigError: There is no URL, the settings do not fit the service, or the folder is another theft's.
        DataError: The thief's data cannot be read.
        ServiceUnavailable: The service does not answer; the answers so far are saved.
    """
    if config.thief.blackbox is None:
        raise ConfigError("no service to steal from is given; give a URL with --url, or set thief.blackbox.url")
    data = load_splits(config)
    attack: Attack = config.thief.attack.build()
    labelled = pool_labels(data) is not None
    thief = config.thief
    attack.check(len(data.thief_pool), thief.budgets, thief.training, thief.learning, labelled=labelled)
    build_network(thief.model, data.shape, data.classes)
    name = _name(config, data)
    _refuse_anothers(folder, name)
    transfer = TransferSet(folder / "transfer", on_damage=warn)
    finished = {budget: _finished(folder, budget, warn) for budget in thief.budgets}
    done = {budget: rung for budget, rung in finished.items() if rung is not None}
    for budget in sorted(done):
        on_rung(done[budget], _substitute(folder, budget))
    if len(done) < len(thief.budgets):
        # The substitutes have one output per class of the answers, so the classes must agree.
        classes = None if config.encodes else data.classes
        with RemoteService(config, name, transfer, data.shape, classes) as service:
            for account, budget in account_budgets(config, name).items():
                service.register(account, budget)
            blackbox = open_blackbox(config, name, transfer, service.open, at_once=service.at_once)
            _claim(config, folder, name)  # only now: a start that the service rejects leaves the folder free
            with threads(config.resources.trial.cpus):
                for _, rung in parent.steal(Theft.of(config, data), [Target(blackbox, transfer, set(done))]):
                    assert isinstance(rung.model, ImageModel)
                    stolen = StolenRung(
                        budget=rung.budget,
                        queries=rung.queries,
                        accuracy=None if config.encodes else _accuracy(rung.model, data.test),
                        epochs=rung.epochs,
                        seconds=rung.seconds,
                    )
                    where = _substitute(folder, rung.budget)
                    save_model(where, rung.model, {"role": "substitute", "trial": name})
                    write_whole(folder / "rungs" / f"{rung.budget}.json", stolen.model_dump_json(indent=1))
                    done[rung.budget] = stolen
                    on_rung(stolen, where)
    return [done[budget] for budget in thief.budgets]


def _name(config: ExperimentConfig, data: Splits) -> str:
    """Return the name of a theft, which follows from everything that determines its answers."""
    read = [data.fingerprint, data.pool_fingerprint]
    return digest(
        {"seed": config.seed, "splits": identity(config.splits), "thief": identity(config.thief), "data": read}
    )


def _refuse_anothers(folder: Path, name: str) -> None:
    path = folder / CLAIM
    if path.exists() and path.read_text(encoding="utf-8").strip() != name:
        raise ConfigError(f"{folder} holds another theft (other settings, data or URL); give another folder with --to")


def _claim(config: ExperimentConfig, folder: Path, name: str) -> None:
    """Record the theft that the folder belongs to."""
    write_whole(folder / CLAIM, name + "\n")
    write_yaml(config, folder / "config.yaml")


def _accuracy(model: ImageModel, test: ImageSet) -> float:
    return metrics.accuracy(metrics.predictions(model, test.images), test.labels)


def _finished(folder: Path, budget: int, warn: Warn) -> StolenRung | None:
    path = folder / "rungs" / f"{budget}.json"
    if not path.exists():
        return None
    rung = read_record(StolenRung, path)
    try:
        if rung is None:
            raise ArtifactError(f"{path} is damaged")
        check_model(_substitute(folder, budget))
    except ArtifactError as error:
        warn(f"{error}; the substitute of {budget} queries is trained again from the saved answers")
        return None
    return rung


def _substitute(folder: Path, budget: int) -> Path:
    return folder / "substitutes" / str(budget)
