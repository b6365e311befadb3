"""``mea-ray keys``, ``usage`` and what ``serve`` refuses, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
from http_service import save_victim

from mea_ray.cli.main import main
from mea_ray.service.http.keys import KEYS, KeyRing


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    return save_victim(tmp_path / "flowers")


def test_a_key_is_shown_once_and_alone(victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", str(victim), "alice", "--budget", "10"]) == 0
    output = capsys.readouterr()
    key = output.out.strip()
    assert "it is shown only once" in output.err
    record = KeyRing(victim.with_name("flowers.service") / KEYS).find(key)
    assert record is not None and record.budget == 10
    assert main(["keys", "limit", str(victim), "alice", "--budget", "none", "--rate", "5"]) == 0
    assert capsys.readouterr().out == "alice: budget none, rate 5 images/s\n"
    assert main(["keys", "list", str(victim)]) == 0
    assert "alice" in (listed := capsys.readouterr().out) and key not in listed
    assert main(["keys", "revoke", str(victim), "alice"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["keys", "limit", "{}", "alise", "--budget", "3"], "there is no client 'alise'"),
        (["keys", "limit", "{}", "alice"], "nothing to change"),
        (["keys", "limit", "{}", "alice", "--budget", "many"], "--budget many is not a number"),
        (["keys", "add", "/nowhere", "alice"], "/nowhere is not a victim's folder"),
        (["keys", "list", "."], ". is not a victim's folder, it has no model.safetensors"),
        (["usage", "{}"], "no client has queried"),
        (["serve", "{}", "polcy=top_k"], "polcy"),
        (["serve", "{}", "--tls-cert", "chain.pem"], "TLS needs both files"),
        (["serve", "/nowhere"], "there is no folder /nowhere"),
        (["serve", "{}", "--update"], "no service of"),
    ],
)
def test_mistakes_are_named(
    victim: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    main(["keys", "add", str(victim), "alice"])
    assert main([each.format(victim) for each in arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", " ").split())
