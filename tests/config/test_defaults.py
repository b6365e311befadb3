"""A default that changes raises a version: otherwise other results would get the names of the old ones."""

from __future__ import annotations

import copy
import json

import defaults
import pytest

GOLDEN: defaults.Golden = json.loads(defaults.FILE.read_text(encoding="utf-8"))


def test_no_default_changed_without_a_version_that_rose() -> None:
    changed = defaults.silently_changed(GOLDEN, defaults.current())
    assert not changed, "raise `version` of the component, then run tests/helpers/defaults.py"


def test_the_file_knows_nearly_every_default() -> None:
    """New options may wait for the next run of tests/helpers/defaults.py, but not many of them."""
    now = {(owner, path) for owner, entry in defaults.current().items() for path in entry["defaults"]}
    known = {(owner, path) for owner, entry in GOLDEN.items() for path in entry["defaults"]}
    assert len(now) > 500
    assert len(now - known) < len(now) / 20, "run tests/helpers/defaults.py, so that the new ones are watched, too"


@pytest.mark.parametrize(
    ("owner", "path", "group"),
    [("attacks/knockoff", "policy", None), ("watermarks/mea_carrier", "carrier.rho", "carrier")],
)
def test_a_changed_default_is_noticed_until_a_version_rises(owner: str, path: str, group: str | None) -> None:
    now = copy.deepcopy(GOLDEN)
    now[owner]["defaults"][path] = "another"
    (result,) = defaults.silently_changed(GOLDEN, now)
    assert result.startswith(f"{owner}: {path} was ") and result.endswith("is 'another'")
    raised = copy.deepcopy(now)
    raised[owner]["version"] += 1
    assert defaults.silently_changed(GOLDEN, raised) == []
    if group is not None:
        now[owner]["groups"][group] += 1
        assert defaults.silently_changed(GOLDEN, now) == []


def test_new_and_removed_options_ask_for_no_version() -> None:
    now = copy.deepcopy(GOLDEN)
    now["attacks/knockoff"]["defaults"]["new"] = 1
    del now["attacks/knockoff"]["defaults"]["policy"]
    del now["attacks/jbda"]
    assert defaults.silently_changed(GOLDEN, now) == []
