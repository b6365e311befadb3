from __future__ import annotations

from mea_ray.sweep.admission import GATE_EXPIRY_S, AdmissionGate


def test_one_sweep_at_a_time_looks_for_room_and_a_dead_one_holds_up_nobody() -> None:
    now = [0.0]
    gate = AdmissionGate(clock=lambda: now[0])
    assert gate.enter("a") and gate.enter("a") and not gate.enter("b")
    gate.leave("b")
    assert not gate.enter("b"), "only who is inside can leave"
    gate.leave("a")
    assert gate.enter("b")
    now[0] += GATE_EXPIRY_S - 1
    assert not gate.enter("a") and gate.enter("b"), "heard of again"
    now[0] += GATE_EXPIRY_S - 1
    assert not gate.enter("a")
    now[0] += 2
    assert gate.enter("a") and not gate.enter("b"), "b was not heard of for too long"
