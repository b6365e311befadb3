"""Verdicts on suspects, from a small victim with two null models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_service import NAMES, ForeignService
from rich.console import Console
from tiny import TINY, config

from mea_ray.calibration import nulls as making
from mea_ray.calibration.models import with_innocents
from mea_ray.cli.verify import Options, terms
from mea_ray.core.errors import ConfigError, DataError, OverBudget, SuspectError, UnknownClient
from mea_ray.experiment.suspect.judging import Terms, held_out, verify_suspect
from mea_ray.experiment.victim import Victim
from mea_ray.experiment.victim.make import make_victim
from mea_ray.experiment.victim.nulls import keep, read_nulls, with_cost
from mea_ray.report import accusation
from mea_ray.service.http import admin

Ask = Callable[[Any], Any]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    """A victim of a few epochs, with two null models; one of them was stolen."""
    folder = tmp_path_factory.mktemp("owner")
    small = {"victim__training__epochs": 8, "thief__training__epochs": 1, "thief__budgets": [64]}
    made = make_victim(
        config(storage=str(folder / "storage"), thief__model=TINY, verification__samples=100, **small), "v"
    ).save(folder / "v", copies=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "use_resources", lambda *shares: None)
        for index in range(2):
            job = making.Job(with_innocents(made.config, 2), str(made.folder), index, True, (64,) if index else ())
            for record in making.measured(job):
                keep(made, record)
    return with_cost(made)


def asking(victim: Victim, change: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits) -> Ask:
    def ask(images: Any) -> Any:
        with torch.no_grad():
            return change(victim.model(torch.from_numpy(images))).numpy()

    return ask


def test_the_victim_itself_is_recognised_and_missing_evidence_is_listed(victim: Victim) -> None:
    verdict = verify_suspect(victim, asking(victim))
    assert verdict.report.wsr == victim.report.wsr and verdict.report.fidelity == 1
    assert {line.name: line.position for line in verdict.statistics}["log_probability"] == 1
    assert verdict.null_models == 2 and verdict.stolen_null_models == 1 and verdict.budget == 64
    assert not verdict.proved, "nobody committed to the key, and two null models prove nothing"
    assert any(reason.verdict == "not committed" for reason in verdict.reasons)
    assert any("mea-ray commit" in line for line in verdict.would_change)
    assert any("mea-ray nulls" in line for line in verdict.would_change)
    assert any("order" in note for note in verdict.notes)


def test_an_api_whose_budget_is_spent_is_named_with_what_it_answered(victim: Victim) -> None:
    ask = asking(victim)
    calls: list[int] = []

    def granting_two_requests(images: Any) -> Any:
        if len(calls) == 2:
            raise OverBudget("owner", len(images), 7, 300)
        calls.append(len(images))
        return ask(images)

    with pytest.raises(SuspectError) as refused:
        verify_suspect(victim, granting_two_requests)
    assert f"answered {sum(calls):,} images, and 7 of the key's budget of 300" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda logits: logits.softmax(1), "probabilities"),
        (lambda logits: logits.log_softmax(1), "logits"),
        (lambda logits: logits.argmax(1), "labels"),
    ],
)
def test_the_form_of_the_answers_changes_nothing_but_what_can_be_known(victim: Victim, change: Any, kind: str) -> None:
    plain, given = verify_suspect(victim, asking(victim)), verify_suspect(victim, asking(victim, change))
    assert given.suspect.outputs == kind and given.report.accuracy == plain.report.accuracy
    assert given.report.wsr == plain.report.wsr
    if kind == "labels":
        assert set(given.report.statistics) == {"wsr", "paired_labels", "lean_labels"}
        assert given.statistic == "paired_labels" and given.report.calibration_error is None
    else:
        assert given.report.statistics["log_probability"] == pytest.approx(
            plain.report.statistics["log_probability"], abs=1e-3
        )


def test_an_innocent_function_is_not_accused(victim: Victim) -> None:
    def constant(images: Any) -> Any:
        return np.eye(10, dtype=np.float32)[np.full(len(images), 2)] * 9 - 1

    verdict = verify_suspect(victim, constant)
    assert verdict.verdict in {"too poor to judge", "void"} and verdict.report.wsr is not None


def test_classes_in_another_order_are_matched_without_the_key(victim: Victim, tmp_path: Path) -> None:
    order = torch.tensor([3, 0, 5, 1, 2, 4, 9, 8, 7, 6])
    ask = asking(victim, lambda logits: logits[:, order.argsort()])
    (tmp_path / "classes.yaml").write_text(json.dumps({str(name): int(at) for name, at in enumerate(order)}))
    plain = verify_suspect(victim, asking(victim))
    for classes, word in ((str(tmp_path / "classes.yaml"), "named"), ("match", "matched")):
        verdict = verify_suspect(victim, ask, Terms(classes=classes))
        assert verdict.suspect.order == word and verdict.suspect.columns == tuple(order.tolist())
        assert verdict.report.accuracy == plain.report.accuracy and verdict.report.wsr == plain.report.wsr
    assert verify_suspect(victim, ask).verdict == "too poor to judge"


def test_the_page_says_all_of_it_and_is_the_owners_alone(victim: Victim, tmp_path: Path) -> None:
    verdict = verify_suspect(victim, asking(victim), Terms(command="mea-ray verify /home/ann/v --suspect <x>"))
    assert "ann/" not in verdict.model_dump_json() and "home" not in verdict.command
    written = accusation.write(tmp_path / "out", verdict, victim)
    assert [path.stat().st_mode & 0o777 for path in written] == [0o600, 0o600]
    assert json.loads(written[0].read_text())["verdict"] == verdict.verdict
    page = written[1].read_text()
    for text in (
        verdict.victim_sha256,
        accusation.headline(verdict),
        "&lt;x&gt;",
        "data:image/png;base64",
        *verdict.notes[:1],
    ):
        assert text in page.replace("&#39;", "'")
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    accusation.show(console, verdict)
    printed = console.export_text()
    assert accusation.headline(verdict) in printed and "What would change this" in printed


def test_what_cannot_be_judged_is_refused(victim: Victim, tmp_path: Path) -> None:
    empty = victim.save(tmp_path / "empty", copies=False)
    with pytest.raises(ConfigError, match="has no null models.*mea-ray nulls"):
        verify_suspect(empty, asking(victim))
    with pytest.raises(ConfigError, match="carries no watermark"):
        verify_suspect(replace(victim, key=None), asking(victim))
    card = victim.about.card.model_copy(update={"data_fingerprint": "other"})
    with pytest.raises(DataError, match="have changed.*data.path"):
        held_out(replace(victim, about=victim.about.model_copy(update={"card": card})))


def test_null_models_are_reused_and_stale_ones_are_not(victim: Victim) -> None:
    assert [(r.index, r.budget) for r in read_nulls(victim)] == [(0, None), (1, None), (1, 64)]
    assert victim.about.card.null_models == 2 and victim.about.card.accuracy_null is not None
    other = replace(victim, about=victim.about.model_copy(update={"weights_sha256": "other"}))
    assert read_nulls(other) == []
    # The first two are stolen now; of the second both are measured, and of the first the theft is left.
    left = making.left_to_do(victim, with_innocents(victim.config, 3), count=3, stolen=2)
    assert [(job.index, job.own, job.budgets) for job in left] == [(0, False, (64,)), (2, True, ())]
    assert making.left_to_do(victim, with_innocents(victim.config, 2), count=2, stolen=0) == []


@pytest.mark.parametrize(("top", "kind"), [(1, "labels"), (3, "top_k")])
def test_a_suspect_behind_a_foreign_api(victim: Victim, tmp_path: Path, top: int, kind: str) -> None:
    """Pictures go to it and names of classes come back, in another order than the victim's."""
    order = tuple(reversed(NAMES))
    service = ForeignService(victim.model, top=top, order=order)
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "classes.yaml").write_text(json.dumps({str(9 - at): at for at in range(10)}))
    options = Options(
        api=service.describe(tmp_path, victim.shape[1]),
        key=f"file:{tmp_path / 'key'}",
        classes=str(tmp_path / "classes.yaml"),
        outputs=kind,
    )
    with admin.served(service.app, 0) as url:
        verdict = verify_suspect(victim, url, terms(options))
        with pytest.raises((ConfigError, UnknownClient)):
            verify_suspect(victim, url, terms(replace(options, key="wrong")))
    assert verdict.suspect.outputs == kind and service.asked > 100
    assert verdict.report.accuracy == pytest.approx(victim.report.accuracy, abs=0.01)
    assert verdict.report.wsr is not None and victim.report.wsr is not None
    assert verdict.report.wsr.rate == pytest.approx(victim.report.wsr.rate, abs=0.05), "a PNG rounds a mixed image"
