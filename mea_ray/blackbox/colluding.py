"""Several accounts of one thief as one black box: each account alone sees less, spends less, and waits less."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from mea_ray.core.errors import ConfigError, OverBudget
from mea_ray.core.types import Answers, BlackBox, FloatImages, Images


class Account(BlackBox, Protocol):
    """A black box that numbers the images it asked, as `LocalBlackBox` and `ServiceClient` do."""

    asked: int


def share(account: int, accounts: int, images: int) -> int:
    """Return how many of the first ``images`` images go to an account: image i is account i modulo ``accounts``'s."""
    return (images - account + accounts - 1) // accounts


def account_names(client: str, accounts: int) -> list[str]:
    """Return the names of a thief's clients: its own if it has one, else ``<client>-1`` and so on."""
    return [client] if accounts == 1 else [f"{client}-{number}" for number in range(1, accounts + 1)]


class Colluding:
    """Deals the images of every query out over accounts, one each in turn; implements `types.BlackBox`.

    Whose turn it is follows from the number of images asked before, so a thief who resumes (``start_at``) sends every
    image to the account that it was sent to before, under the same request ids: nothing is charged twice.

    Args:
        accounts: The accounts, each of which has asked its ``share`` of ``start_at`` images.
        budget: Images that all of them may ask; None for no limit. A query that would cross it is refused as a whole.
        start_at: Images asked before, over all accounts.
        at_once: Ask the accounts at the same time, each in a thread; otherwise one after the other.

    Raises:
        ConfigError: There are no accounts, or one has not asked its share.
    """

    def __init__(
        self, accounts: Sequence[Account], *, budget: int | None = None, start_at: int = 0, at_once: bool = False
    ) -> None:
        shares = [share(index, len(accounts), start_at) for index in range(len(accounts))]
        if not accounts or [account.asked for account in accounts] != shares:
            raise ConfigError(
                f"{len(accounts)} accounts have asked {[account.asked for account in accounts]} images; give at least "
                f"one account, and open them at their shares of start_at={start_at}: {shares}"
            )
        self.accounts, self.asked = list(accounts), start_at
        self._budget, self._at_once = budget, at_once

    @property
    def classes(self) -> int:
        """Numbers in an answer: classes, or the length of an embedding."""
        return self.accounts[0].classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        return self.accounts[0].image_shape

    @property
    def remaining(self) -> int | None:
        """Images that may still be asked, over all accounts; None if one has no budget."""
        left = [account.remaining for account in self.accounts]
        known = [images for images in left if images is not None]
        return sum(known) if len(known) == len(left) else None

    def query(self, images: Images | FloatImages) -> Answers:
        """Answer images in their order, see `types.BlackBox.query`.

        After an error the same query may be asked again: what an account was charged of it is not charged twice.
        """
        if self._budget is not None and self.asked + len(images) > self._budget:
            raise OverBudget("all accounts", len(images), self._budget - self.asked, self._budget)
        turn, count = self.asked, len(self.accounts)
        owners = (turn + np.arange(len(images))) % count
        places = {index: np.flatnonzero(owners == index) for index in range(count) if (owners == index).any()}
        try:
            parts = self._ask([(self.accounts[index], images[own]) for index, own in places.items()])
        except BaseException:
            for index, account in enumerate(self.accounts):
                account.asked = share(index, count, turn)
            raise
        answers = np.empty((len(images), self.classes), np.float32)
        for own, part in zip(places.values(), parts, strict=True):
            answers[own] = part
        self.asked += len(images)
        return answers

    def _ask(self, asks: list[tuple[Account, Images | FloatImages]]) -> list[Answers]:
        if not self._at_once or len(asks) == 1:
            return [account.query(images) for account, images in asks]
        with ThreadPoolExecutor(len(asks)) as threads:
            under_way = [threads.submit(account.query, images) for account, images in asks]
        return [answers.result() for answers in under_way]
