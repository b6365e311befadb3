"""Holds back the points of an adaptive search until their models and their service are ready.

The search suggests a point; its models are trained with their own resources before a trial takes a slot for it. Then
Tune gets it. The number of held and running points is at most the number of concurrent trials, so the search has as
many results to learn from as it would without holding back. Schedulers that pause trials until others have come as far
need more: then only held points count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from ray.tune.search import Searcher

from mea_ray.sweep.feeder import Feeder
from mea_ray.sweep.ready_trials import ReadyTrials


class Ahead(ReadyTrials):
    """Passes the suggestions of another searcher to Tune, each when its trial can run.

    Args:
        inner: The search.
        feeder: Trains the models of a point and starts its service.
        prepare: Called with a name for the point and a suggestion; tells the feeder what it needs.
        most: Points under way at once.
        samples: Points in all.
        only_ahead: Count held points only, for schedulers that pause trials until further ones have started.
    """

    def __init__(
        self,
        inner: Searcher | None = None,
        feeder: Feeder | None = None,
        prepare: Callable[[str, Mapping[str, Any]], None] = lambda name, config: None,
        *,
        most: int = 1,
        samples: int = 0,
        only_ahead: bool = False,
    ) -> None:
        super().__init__(feeder)
        self._inner, self._prepare, self._most, self._left = inner, prepare, most, samples
        self._only_ahead = only_ahead
        self._numbers = count()
        self._held: dict[str, dict[str, Any]] = {}
        self._no_more = False
        if inner is not None:
            self._metric, self._mode = inner.metric, inner.mode

    @property
    def inner(self) -> Searcher:
        """The search; None in a copy restored from one of Tune's files."""
        assert self._inner is not None
        return self._inner

    def __reduce__(self) -> tuple[Any, ...]:
        return Ahead, ()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Pass the space on."""
        return bool(self.inner.set_search_properties(metric, mode, config, **spec))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return a point that can run; None if there is none yet, ``FINISHED`` if there will be none."""
        if self._was_interrupted():
            return str(Searcher.FINISHED)
        self._ask()
        name = self.feeder.next_trial()
        if name is None:
            return str(Searcher.FINISHED) if self._no_more and not self._held else None
        self._names[trial_id] = name
        return self._held.pop(name)

    @property
    def _under_way(self) -> int:
        return len(self._held) + (0 if self._only_ahead else len(self._names))

    def _ask(self) -> None:
        """Ask the search for points, as many as may be under way."""
        while not self._no_more and self._left > 0 and self._under_way < self._most:
            name = f"point-{next(self._numbers)}"
            suggestion: Any = self.inner.suggest(name)  # or FINISHED, which is missing in its annotation
            if suggestion is None:
                return
            if suggestion == Searcher.FINISHED:
                self._no_more = True
                return
            self._left -= 1
            self._held[name] = suggestion
            self._prepare(name, suggestion)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a report on."""
        if trial_id in self._names:
            self.inner.on_trial_result(self._names[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Pass the end of a trial on."""
        if (name := self._names.get(trial_id)) is not None:
            super().on_trial_complete(trial_id, result, error)
            self.inner.on_trial_complete(name, result, error)
