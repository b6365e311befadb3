"""Stolen null models: stolen once for all trials with the same thief, independent of the watermark."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from mea_ray.attacks.base import Rung
from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import ExperimentConfig, Tree, digest
from mea_ray.core.errors import ArtifactError
from mea_ray.experiment.artifacts import Store, read_info
from mea_ray.experiment.names import Names
from mea_ray.experiment.ports import StealSome
from mea_ray.models.base import ImageModel
from mea_ray.storage.files import PATIENCE
from mea_ray.storage.lease import Lease
from mea_ray.training.checkpoint import DESCRIPTION, WEIGHTS, load_model, save_model

KIND = "stolen_nulls"


class StolenNulls:
    """Substitutes of null models as artifacts in a storage, one per null model and budget.

    The theft of a null model depends on the null model, the thief and the service, not on the victim. So the trials of
    a sweep over watermarks share them. An interrupted theft resumes after its last finished budget, with its saved
    answers.

    Args:
        store: The artifacts.
        config: The experiment.
        names: Its names.
        null: Loads a null model by its index.
    """

    def __init__(self, store: Store, config: ExperimentConfig, names: Names, null: Callable[[int], ImageModel]) -> None:
        self.store, self.config, self.names, self._null = store, config, names, null
        self._found: dict[str, Path] = {}

    def take(self, wanted: Mapping[int, Collection[int]], steal: StealSome) -> Iterator[tuple[int, Rung]]:
        """Yield substitutes with the index of their null model. Those that another process is stealing come last.

        Args:
            wanted: Budgets by null model index.
            steal: Steals null models, at most ``thief.training.stack`` at once.
        """
        busy: list[int] = []
        leased: dict[int, Lease] = {}
        try:
            for index in wanted:
                lease = self._lease(index)
                if self._complete(index):
                    yield from self._rungs([index], wanted, steal)
                elif lease.try_acquire():
                    leased[index] = lease
                else:
                    busy.append(index)
                if len(leased) == self.config.thief.training.stack:
                    yield from self._leased(leased, wanted, steal)
            yield from self._leased(leased, wanted, steal)
        finally:
            _release(leased)
        for index in busy:
            lease = self._lease(index)
            if lease.acquire(give_up=lambda index=index: self._complete(index), poll_s=self.store.poll_s):  # type: ignore[misc]
                yield from self._leased({index: lease}, wanted, steal)
            else:
                yield from self._rungs([index], wanted, steal)

    def drop(self) -> None:
        """Remove all of them; other trials that need them steal them again."""
        for index in range(self.config.verification.stolen_null_models):
            for budget in self.config.thief.budgets:
                self.store.storage.delete(f"artifacts/{KIND}/{self._name(index, budget)}")

    def _leased(
        self, leased: dict[int, Lease], wanted: Mapping[int, Collection[int]], steal: StealSome
    ) -> Iterator[tuple[int, Rung]]:
        """Yield the substitutes of null models whose leases this process has, and release the leases."""
        try:
            yield from self._rungs(list(leased), wanted, steal)
        finally:
            _release(leased)

    def _rungs(
        self, indices: Sequence[int], wanted: Mapping[int, Collection[int]], steal: StealSome
    ) -> Iterator[tuple[int, Rung]]:
        """Yield existing substitutes, then newly stolen ones."""
        budgets = self.config.thief.budgets
        left: dict[int, set[int]] = {}
        for index in indices:
            missing = set(wanted[index])
            for budget in sorted(missing):
                rung = self._load(index, budget)
                if rung is not None:
                    missing.remove(budget)
                    yield index, rung
            if missing:
                left[index] = missing
        if not left:
            return
        stolen = list(left)
        there = [{budget for budget in budgets if self._find(index, budget) is not None} for index in stolen]
        states = [f"artifacts/states/{KIND}-{self._theft(index)}" for index in stolen]
        transfers = [TransferSet(self.store.storage.root / each, on_damage=PATIENCE.notify) for each in states]
        for place, rung in steal(list(map(self._null, stolen)), transfers, there):
            index = stolen[place]
            self._keep(index, rung)
            if rung.budget in left[index]:
                yield index, rung
        for each in states:
            self.store.storage.delete(each)

    def _theft(self, index: int) -> str:
        return digest([self.names.theft, self.names.nulls[index]])

    def _name(self, index: int, budget: int) -> str:
        return digest([self.names.theft, self.names.nulls[index], budget])

    def _lease(self, index: int) -> Lease:
        return self.store.lease(KIND, self._theft(index))

    def _complete(self, index: int) -> bool:
        return all(self._find(index, budget) is not None for budget in self.config.thief.budgets)

    def _find(self, index: int, budget: int) -> Path | None:
        name = self._name(index, budget)
        try:
            folder = self.store.find(KIND, name)
        except ArtifactError:
            return None  # damaged: it is stolen again
        if folder is not None:
            self._found[name] = folder
        return folder

    def _load(self, index: int, budget: int) -> Rung | None:
        # Not checked by hash here: `load_model` does that anyway.
        folder = self._found.pop(self._name(index, budget), None) or self._find(index, budget)
        if folder is None:
            return None
        try:
            made, (model, _) = read_info(folder)["rung"], load_model(folder)
        except ArtifactError:
            return None  # another trial has removed it since
        curves = {name: [tuple(point) for point in points] for name, points in made.pop("curves").items()}
        return Rung(**made, model=model, curves=curves)

    def _keep(self, index: int, rung: Rung) -> None:
        model = rung.model
        assert isinstance(model, ImageModel)

        def write(folder: Path) -> Tree:
            save_model(folder, model, {"role": "stolen null model"})
            made = {name: getattr(rung, name) for name in ("budget", "queries", "epochs", "seconds", "curves")}
            return {"index": index, "rung": made}

        name = self._name(index, rung.budget)
        self.store.get_or_make(KIND, name, self.config, write, (WEIGHTS, DESCRIPTION))


def _release(leased: dict[int, Lease]) -> None:
    """Release leases, and forget them."""
    while leased:
        leased.popitem()[1].release()
