"""Settings of rehearsal: the simulated thieves, and one group for each bound on the answers."""

from __future__ import annotations

from pydantic import Field

from mea_ray.config.components import ModelChoice
from mea_ray.core.settings import Settings
from mea_ray.watermarks.mea_defender.settings import OFF, WeightedLoss


class Thieves(Settings):
    """The simulated thieves."""

    models: tuple[ModelChoice, ...] = Field(
        (),
        max_length=8,
        description="Their networks, all of which learn at once; empty is one of the victim's own kind.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Of Adam, with which they learn from the victim's answers.")
    lifetime: int = Field(
        400,
        ge=1,
        description="Steps after which a thief begins anew. Several begin at times that are spread over it, so that "
        "young and old ones are fooled alike.",
    )
    warmup: int = Field(20, ge=0, description="Steps that a new thief learns before the victim looks at it.")


class Budget(WeightedLoss):
    """How far answers may move away from the unmarked model's; beyond it they are pulled back."""

    weight: float = Field(10.0, ge=0, description=f"Weight of what exceeds the budget. {OFF}")
    divergence: float = Field(
        0.1,
        ge=0,
        description="Largest KL divergence of an answer from the unmarked model's to the same image, in nats.",
    )
    margin: float = Field(
        0.1, ge=0, description="Least lead of the unmarked model's class over any other, in nats of log-probability."
    )


class Specificity(WeightedLoss):
    """Mixes of other classes stay away from the target, in the victim and in the simulated thieves."""

    weight: float = Field(0.5, ge=0, description=f"Weight of -log(1 - p_target) on mixes of other classes. {OFF}")


class Unseen(WeightedLoss):
    """What `detection: leaning` reads stays within what other classes show by nature."""

    weight: float = Field(
        10.0,
        ge=0,
        description="Weight of the square by which the target's mean probability on a source class exceeds that of the "
        f"class which comes next there. {OFF}",
    )


class RehearsalSettings(Settings):
    """Settings of the objective; see the parameters of ``Rehearsal`` of the same names."""

    weight: float
    ver: float
    thieves: Thieves
    budget: Budget
    specificity: Specificity
    unseen: Unseen
    mixes: int
