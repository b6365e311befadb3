"""A query service that someone else runs, reached by URL: for a thief that steals over HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np

from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.colluding import account_names, account_share
from mea_ray.blackbox.http import HttpBlackBox
from mea_ray.blackbox.prada import query_log_record
from mea_ray.blackbox.query_log import ClientLog
from mea_ray.config import BlackBoxConfig, ClientConfig, ExperimentConfig
from mea_ray.core.errors import ConfigError
from mea_ray.experiment.service_fit import check_fits
from mea_ray.experiment.theft import answers_received
from mea_ray.results.records import QueryLogRecord
from mea_ray.storage.files import at_home, read_at_most

Open = Callable[..., HttpBlackBox]

_LONGEST_KEY = 64 * 1024
"""Maximum number of bytes read from a key file."""


class RemoteService:
    """A service at ``thief.blackbox.url``; implements ``ports.QueryService``.

    The owner's log is not accessible: `seen` and `query_log` return empty records. The service enforces the API key's
    budget; this class enforces the config's, so that no attack queries more than configured.

    Args:
        config: The experiment.
        trial: Name of the trial; it distinguishes the requests of several trials with the same API key.
        transfer: The answers that the thief received so far.
        shape: (channels, height, width) of the thief's images.
        classes: Required length of an answer.
    """

    at_once = True

    def __init__(
        self,
        config: ExperimentConfig,
        trial: str,
        transfer: TransferSet,
        shape: tuple[int, int, int],
        classes: int | None,
    ) -> None:
        assert config.thief.blackbox is not None
        self.config, self.trial, self.transfer = config, trial, transfer
        self.shape, self.classes = shape, classes
        self.settings: BlackBoxConfig = config.thief.blackbox
        self._budgets: dict[str, int] = {}
        self._opened: dict[str, HttpBlackBox] = {}

    def __enter__(self) -> RemoteService:
        self._keys = read_keys(self.settings, self.config.thief.accounts)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for opened in self._opened.values():
            opened.close()

    def register(self, client: str, budget: int) -> None:
        """Set the budget of an account; the account itself is opened by the service's owner."""
        self._budgets[client] = budget

    def open(self, client: str, start_at: int) -> HttpBlackBox:
        """Return the black box of an account.

        Raises:
            ConfigError: The service takes images of another shape, or gives answers of another length, than the
                experiment's.
        """
        key = self._keys[self._accounts.index(client)]
        opened = open_url(
            self.settings,
            key,
            self.config.service.client,
            start_at=start_at,
            budget=self._budgets.get(client),
            request_prefix=f"{client}/",
        )
        check_fits(self.settings.url, opened.image_shape, opened.classes, self.shape, self.classes)
        self._opened[client] = opened
        return opened

    def charged(self, client: str) -> int:
        """Return the images charged to an account, as counted by this thief."""
        if client in self._opened:
            return self._opened[client].asked
        received = answers_received(self.config, self.transfer)
        return account_share(self._accounts.index(client), len(self._accounts), received)

    def seen(self, client: str) -> ClientLog:
        """Return an empty log: only the service's owner has one."""
        return ClientLog(0, np.zeros(0, np.int64), [], lost=True)

    def query_log(self, client: str) -> QueryLogRecord:
        """Return the record of an empty log."""
        return query_log_record(self.seen(client), 1 if self.config.encodes else self.classes or 1)

    @property
    def _accounts(self) -> list[str]:
        return account_names(self.trial, self.config.thief.accounts)


def open_url(
    settings: BlackBoxConfig,
    key: str | None,
    client: ClientConfig,
    *,
    start_at: int = 0,
    budget: int | None = None,
    request_prefix: str = "",
) -> HttpBlackBox:
    """Open the service at a URL: one of ``mea-ray serve``, or one that ``api`` describes."""
    if settings.api is None:
        return HttpBlackBox(settings.url, key, client, start_at=start_at, budget=budget, request_prefix=request_prefix)
    from mea_ray.blackbox.foreign import ForeignWire, load_api

    api = load_api(Path(settings.api))
    client = client.changed(request_images=min(client.request_images, api.max_request_images))
    wire = ForeignWire(api, key)
    bearer = None if any(name.lower() == "authorization" for name in api.headers) else key
    return HttpBlackBox(
        settings.url, bearer, client, start_at=start_at, budget=budget, request_prefix=request_prefix, wire=wire
    )


def read_keys(settings: BlackBoxConfig, accounts: int) -> list[str | None]:
    """Return the API key of each account; None if the service needs none.

    Raises:
        ConfigError: A variable or a file is missing, or there are not as many keys as accounts.
    """
    if not settings.key and accounts == 1:
        return [None]
    if len(settings.key) != accounts:
        raise ConfigError(
            f"thief.accounts={accounts} needs as many keys, thief.blackbox.key has {len(settings.key)}; list one each"
        )
    return [read_key(each) for each in settings.key]


def read_key(reference: str, option: str = "thief.blackbox.key") -> str:
    """Return the API key that ``env:NAME`` or ``file:PATH`` refers to.

    Args:
        reference: The reference.
        option: Name of the setting, for errors.

    Raises:
        ConfigError: There is no key, or its file cannot be read.
    """
    kind, _, name = reference.partition(":")
    if kind == "env":
        key = os.environ.get(name, "")
        where = f"the environment variable {name}"
    else:
        path = at_home(name, option)
        where = f"the file {path}"
        try:
            key = read_at_most(path, _LONGEST_KEY).decode("utf-8-sig")
        except OSError as error:
            why = f"cannot be read: {error.strerror}; check the path and its permissions"
            raise ConfigError(f"{option}={reference}: {where} {why}") from None
        except ValueError:  # no text, or no path
            key = ""
    if not key.strip() or not key.strip().isprintable():
        raise ConfigError(f"{option}={reference}: {where} contains no key; put the API key there")
    return key.strip()
