"""All errors that users and thieves can get, typed and picklable.

A message names the value, the constraint and the remedy. Errors store their constructor arguments in ``args`` so that
they survive pickling (an actor raises them in another process).
"""

from __future__ import annotations


def first_line(error: BaseException, longest: int = 200) -> str:
    """Return the first line of an error's text that is not blank, shortened; empty if there is none."""
    text = str(error).strip()
    return text.splitlines()[0][:longest] if text else ""


class MeaRayError(Exception):
    """Base class of all errors raised on purpose by mea_ray."""


class RenamedOption(FutureWarning):
    """An option has its name from the previous version, which the next version rejects."""


class ConfigError(MeaRayError):
    """A configuration that cannot be run, detected before any work starts."""


class DataError(MeaRayError):
    """A dataset that is missing, unreadable, or unsuitable for its use."""


class ArtifactError(MeaRayError):
    """A stored artifact (checkpoint, victim, key, result) is missing, damaged, or has another schema."""


class TrainingDiverged(MeaRayError):
    """The loss or the weights are no longer finite; the model is unusable.

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
    """A query that the victim's API rejects. Nothing was charged for it."""


class BadQuery(QueryError):
    """The images have the wrong shape, type or range, are empty, contain NaN, or are too many for one request."""


class UnknownClient(QueryError):
    """The client was never registered with the service."""


class WrongToken(QueryError):
    """The caller does not have the token of the account, or the secret of the service."""


class OverBudget(QueryError):
    """The query would exceed the client's budget; earlier answers remain valid.

    Args:
        client: Name of the client.
        asked: Number of images in the rejected query.
        remaining: Remaining budget, in images.
        budget: Budget, in images.
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
    """The client exceeds its rate limit.

    Args:
        client: Name of the client.
        retry_after_s: Seconds after which the same query would be accepted.
    """

    def __init__(self, client: str, retry_after_s: float) -> None:
        super().__init__(client, retry_after_s)
        self.client, self.retry_after_s = client, retry_after_s

    def __str__(self) -> str:
        return f"client {self.client!r} is over its rate; ask again in {self.retry_after_s:.3f} s"


class ServiceUnavailable(MeaRayError):
    """The victim service did not answer, even after repetitions of the query; answers already received are kept."""


class ReplicasAway(ServiceUnavailable):
    """All replicas of a service are being restarted for longer than a client waits.

    A trial that gets this error should release its slot: the replicas may be waiting for its CPUs.
    """


class StorageUnavailable(MeaRayError):
    """The storage is full or unavailable, and did not recover in time; finished work is kept.

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
    """An attack raised an error, or broke the rules of attacks; a retry would fail in the same way."""


class AttackDied(MeaRayError):
    """The process of an attack ended before the attack did, e.g. killed for lack of memory; it can be restarted.

    Args:
        how: How it ended.
    """

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how

    def __str__(self) -> str:
        return f"the attack: {self.how}; if it lacks memory, run fewer trials at once (raise resources.trial.cpus)"


class TrackingUnavailable(MeaRayError):
    """A tracking server cannot be reached, or rejects the data. Results are not affected."""


class LeaseLost(MeaRayError):
    """This process sent no heartbeat for so long that another one took over its exclusive work."""


class ClusterError(MeaRayError):
    """Ray could not run a step of the work; finished work is kept."""


class OutOfMemory(ClusterError):
    """A machine of the cluster ran out of memory in every attempt of a step; finished work is kept.

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
    """A GPU ran out of memory; in a training, even with batches split into the smallest parts.

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
    """A request id was reused for different images."""


class SuspectError(MeaRayError):
    """A suspect's file, function or service cannot be loaded, queried or interpreted, so there is no verdict."""
