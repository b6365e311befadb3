"""The command `verify`: what it writes down of what was typed."""

from __future__ import annotations

import pytest

from mea_ray.cli.verify import _typed


@pytest.mark.parametrize("words", [["--key", "s3cret"], ["--key=s3cret"], ["--api", "a.yaml", "--key=s3cret"]])
def test_the_command_on_record_does_not_hold_the_key(words: list[str]) -> None:
    typed = _typed(["verify", "v", "--suspect", "https://api.example.org", *words], "s3cret")
    assert "s3cret" not in typed and "..." in typed
    assert _typed(["verify", "v"], None) == "mea-ray verify v"
