"""Converts results of older schema versions to the current one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_CURRENT = re.compile(rb'\s*\{\s*"schema_version":\s*2\s*,')
Tree = dict[str, Any]


def upgraded(content: bytes) -> bytes:
    """Return the JSON of a result in the current schema version; other content is returned unchanged.

    Published records of version 1 leave out the version, as they leave out every default.
    """
    content = content.replace(b'"as_told"', b'"unchanged"')  # the old name of a value of thief.learning.answers
    if _CURRENT.match(content):  # current version: no need to parse it twice
        return content
    try:
        tree = json.loads(content)
        if tree.get("schema_version", 1) != 1:
            return content
        return json.dumps(from_version_1(tree)).encode()
    except (ValueError, TypeError, AttributeError, KeyError):
        return content  # the schema check reports the problem


def from_version_1(tree: Mapping[str, Any]) -> Tree:
    """Return a result of schema version 1 as one of version 2.

    Version 1 tested each WSR with a binomial against one rate. That test is dropped; the p-value is computed from the
    rank among the recorded null models.
    """
    upgraded: Tree = {**tree, "schema_version": 2}
    rates = [report["wsr"]["rate"] for report in tree.get("null_reports", ()) if report.get("wsr")]
    innocent = {id(report) for report in tree.get("null_reports", ())}
    for report in _reports(upgraded):
        report.pop("infringes_significance", None)
        wsr = report.get("wsr")
        if wsr is None or id(report) in innocent or not rates:
            report["p_value"] = None
        else:
            report["p_value"] = (1 + sum(rate >= wsr["rate"] for rate in rates)) / (len(rates) + 1)
    return upgraded


def _reports(tree: Tree) -> Iterator[Tree]:
    """Yield every report of a model in a result."""
    yield tree["victim_report"]
    yield from tree.get("null_reports", ())
    for rung in (*tree.get("rungs", ()), *tree.get("stolen_nulls", ())):
        yield rung["report"]
    for removal in tree.get("removals", ()):
        yield removal["before"]
        yield removal["after"]
