"""Every error a user or a thief can meet, typed, and able to travel between processes.

A message names the value, the constraint and the remedy. Errors keep their constructor arguments in ``args`` so that
they survive pickling (an actor raises them in another process than the one that reads them).
"""

from __future__ import annotations


def first_line(error: BaseException, longest: int = 200) -> str:
    """Return the first line of an error's text that is not blank, shortened; empty if there is none."""
    text = str(error).strip()
    return text.splitlines()[0][:longest] if text else ""


class MeaRayError(Exception):
    """Base class of all errors raised on purpose by mea_ray."""


class RenamedOption(FutureWarning):
    """An option is written under the name that it had in the version before; the next version refuses that."""


class ConfigError(MeaRayError):
    """A configuration that cannot be run, found before any work started."""


class DataError(MeaRayError):
    """A dataset that is missing, unreadable, or does not fit what it is used for."""


class ArtifactError(MeaRayError):
    """A stored artifact (checkpoint, victim, key, result) is missing, damaged, or of another schema."""


class TrainingDiverged(MeaRayError):
    """The loss or the weights are no longer finite; the model that was trained is unusable.

    Args:
        epoch: Epoch of the failure, from 0.
        step: Batch within the epoch, from 0.
        terms: The loss terms of that batch; empty if the losses were finite and the weights were not.
    """

    def __init__(self, epoch: int, step: int, terms: dict[str, float]) -> None:
        super().__init__(epoch, step, terms)
        self.epoch, self.step, self.terms = epoch, step, terms

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.terms.items())
        return (
            f"training diverged in epoch {self.epoch}, step {self.step}: "
            f"{f'the loss is not finite ({values})' if values else 'the weights are not finite'}; lower "
            "training.learning_rate, set training.gradient_clip (e.g. 1.0), or set training.precision=float32"
        )


class QueryError(MeaRayError):
    """A query that the victim's API refuses. Nothing was charged for it."""


class BadQuery(QueryError):
    """The images have the wrong shape, type or range, are empty, hold NaN, or are too many for one request."""


class UnknownClient(QueryError):
    """The client was never registered with the service."""


class WrongToken(QueryError):
    """The caller does not show the token of the account, or the secret of the service, that it acts for."""


class OverBudget(QueryError):
    """The query would take the client past its budget; the images answered before stay the client's.

    Args:
        client: Name of the client.
        asked: Images in the refused query.
        remaining: Images the client may still ask.
        budget: Images the client was given.
    """

    def __init__(self, client: str, asked: int, remaining: int, budget: int) -> None:
        super().__init__(client, asked, remaining, budget)
        self.client, self.asked, self.remaining, self.budget = client, asked, remaining, budget

    def __str__(self) -> str:
        return (
            f"client {self.client!r} queried {self.asked} images with {self.remaining} of its budget of {self.budget} "
            "left; query fewer, or raise the client's budget (`thief.budgets`)"
        )


class RateLimited(QueryError):
    """The client asks faster than its rate allows.

    Args:
        client: Name of the client.
        retry_after_s: Seconds after which the same query would be let through.
    """

    def __init__(self, client: str, retry_after_s: float) -> None:
        super().__init__(client, retry_after_s)
        self.client, self.retry_after_s = client, retry_after_s

    def __str__(self) -> str:
        return f"client {self.client!r} is over its rate; ask again in {self.retry_after_s:.3f} s"


class ServiceUnavailable(MeaRayError):
    """The victim service did not answer although the query was repeated; answers already received are kept."""


class ReplicasAway(ServiceUnavailable):
    """All replicas of a service are being restarted, for longer than a client waits.

    A trial that meets this should give up its place: the replicas may be waiting for just these CPUs.
    """


class StorageUnavailable(MeaRayError):
    """The storage is full or away, and was not back in time; what is finished is kept.

    Args:
        place: The folder.
        why: ``full`` or ``away``.
        waited_s: Seconds waited for it.
        reason: The message of the operating system.
    """

    def __init__(self, place: str, why: str, waited_s: float, reason: str) -> None:
        super().__init__(place, why, waited_s, reason)
        self.place, self.why, self.waited_s, self.reason = place, why, waited_s, reason

    def __str__(self) -> str:
        remedy = "free some space" if self.why == "full" else "make it reachable again"
        return (
            f"storage {self.place} is {self.why} and was not back within {self.waited_s:.0f} s ({self.reason}); "
            f"{remedy}, then go on with --resume"
        )


class AttackFailed(MeaRayError):
    """An attack raised an error, or did what no attack may do; another try would end in the same way."""


class AttackDied(MeaRayError):
    """The process of an attack ended before the attack did, killed for want of memory, say; it may be started again.

    Args:
        how: How it ended.
    """

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how

    def __str__(self) -> str:
        return f"the attack: {self.how}; if it lacks memory, run fewer trials at once (raise resources.trial.cpus)"


class TrackingUnavailable(MeaRayError):
    """A tracking server cannot be reached, or refuses what it is sent. Results are not affected."""


class LeaseLost(MeaRayError):
    """This process was silent for so long that another one took over what only one may do at a time."""


class ClusterError(MeaRayError):
    """Ray could not do a step of the work; what is finished is kept."""


class OutOfMemory(ClusterError):
    """A machine of the cluster ran out of memory each time that a step was tried; what is finished is kept.

    Args:
        what: The step, e.g. ``training victim 2d1278fe``.
        attempts: Number of tries.
    """

    def __init__(self, what: str, attempts: int) -> None:
        super().__init__(what, attempts)
        self.what, self.attempts = what, attempts

    def __str__(self) -> str:
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        return (
            f"out of memory {times} while {self.what}; run fewer at once (raise resources.trial.cpus and "
            "resources.victim.cpus), use smaller data, models or batches, or a machine with more memory, then go on "
            "with --resume"
        )


class DeviceOutOfMemory(MeaRayError):
    """A GPU ran out of memory, in a training even with batches split into the smallest parts.

    Args:
        where: What was computed, e.g. ``a batch of 128 images, learnt in 4 parts``.
    """

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where

    def __str__(self) -> str:
        return (
            f"the GPU ran out of memory at {self.where}; lower training.batch_size (and raise "
            "training.accumulate_steps to match), use a smaller model, or raise resources.trial.gpus and "
            "resources.victim.gpus, so that fewer processes share the GPU"
        )


class RequestConflict(QueryError):
    """A request id was used again for other images than the first time."""


class SuspectError(MeaRayError):
    """A suspect's file, function or service cannot be loaded, queried or understood, so there is no verdict."""
