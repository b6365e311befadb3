"""Several accounts of one thief as one black box: each account sends, pays for and waits for only a share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from mea_ray.blackbox.validate import check_images
from mea_ray.core.errors import ConfigError, OverBudget
from mea_ray.core.types import Answers, BlackBox, FloatImages, Images


class CountingClient(BlackBox, Protocol):
    """A black box that counts its queried images, like `LocalBlackBox` and `ServiceClient`."""

    asked: int


def account_share(account: int, accounts: int, images: int) -> int:
    """Return how many of the first ``images`` images an account queries: image i goes to i modulo ``accounts``."""
    return (images - account + accounts - 1) // accounts


def account_names(client: str, accounts: int) -> list[str]:
    """Return the names of a thief's clients: ``client`` if there is one, else ``<client>-1`` and so on."""
    return [client] if accounts == 1 else [f"{client}-{number}" for number in range(1, accounts + 1)]


class Colluding:
    """Distributes the images of every query over accounts, round-robin; implements `types.BlackBox`.

    The account of an image depends only on the number of images queried before. So a resumed thief (``start_at``) sends
    every image to the same account as before, with the same request id, and nothing is charged twice.

    Args:
        accounts: The accounts, each of which has queried its `account_share` of ``start_at`` images.
        budget: Joint budget in images; None for no limit. A query that exceeds it is rejected as a whole.
        start_at: Images queried before, over all accounts.
        at_once: Query the accounts concurrently, each in a thread; otherwise sequentially.

    Attributes:
        asked: Images queried so far over all accounts, including ``start_at``.

    Raises:
        ConfigError: There are no accounts, or one has not queried its share.
    """

    def __init__(
        self, accounts: Sequence[CountingClient], *, budget: int | None = None, start_at: int = 0, at_once: bool = False
    ) -> None:
        shares = [account_share(index, len(accounts), start_at) for index in range(len(accounts))]
        if not accounts or [account.asked for account in accounts] != shares:
            raise ConfigError(
                f"{len(accounts)} accounts have queried {[account.asked for account in accounts]} images; give at "
                f"least one account, and open them at their shares of start_at={start_at}: {shares}"
            )
        self.accounts, self.asked = list(accounts), start_at
        self._budget, self._at_once = budget, at_once
        self._turn = threading.Lock()

    @property
    def classes(self) -> int:
        """Length of an answer: the number of classes, or of an encoder's features."""
        return self.accounts[0].classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        return self.accounts[0].image_shape

    @property
    def remaining(self) -> int | None:
        """Remaining images, over all accounts; None if one has no budget."""
        left = [account.remaining for account in self.accounts]
        known = [images for images in left if images is not None]
        return sum(known) if len(known) == len(left) else None

    def query(self, images: Images | FloatImages) -> Answers:
        """Answer images in their order, see `types.BlackBox.query`.

        After an error the same query can be repeated: nothing is charged twice.

        Raises:
            BadQuery: The images are invalid; no account was charged.
            OverBudget: The images exceed the budget; no account was charged.
        """
        check_images(images, self.image_shape)
        with self._turn:
            return self._query(images)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _turn=threading.Lock())

    def _query(self, images: Images | FloatImages) -> Answers:
        if self._budget is not None and self.asked + len(images) > self._budget:
            raise OverBudget("all accounts", len(images), self._budget - self.asked, self._budget)
        start, count = self.asked, len(self.accounts)
        owners = (start + np.arange(len(images))) % count
        places = {index: np.flatnonzero(owners == index) for index in range(count) if (owners == index).any()}
        try:
            parts = self._query_accounts([(self.accounts[index], images[own]) for index, own in places.items()])
        except BaseException:
            for index, account in enumerate(self.accounts):
                account.asked = account_share(index, count, start)
            raise
        answers = np.empty((len(images), self.classes), np.float32)
        for own, part in zip(places.values(), parts, strict=True):
            answers[own] = part
        self.asked += len(images)
        return answers

    def _query_accounts(self, parts: list[tuple[CountingClient, Images | FloatImages]]) -> list[Answers]:
        if not self._at_once or len(parts) == 1:
            return [account.query(images) for account, images in parts]
        with ThreadPoolExecutor(len(parts)) as threads:
            running = [threads.submit(account.query, images) for account, images in parts]
        return [answers.result() for answers in running]
