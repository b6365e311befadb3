"""The base class of attacks, by a scripted attack that does all that an attack may do."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack_fakes import CLASSES, FAST, FAST_TRAINING, POOL, SHAPE, FakeBlackBox, Substitute, flat, same, steal

from mea_ray.attacks.base import Rung
from mea_ray.attacks.query_attack import Queries, Query, QueryAttack, Thief
from mea_ray.attacks.transfer import TransferSet, content_names
from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Answers, Images


class Scripted(QueryAttack):
    """Asks in turn 20 images of the pool, 10 that it makes of the answers, and 9 probes, which are worth all or none.

    Args:
        turns: Turns before it has nothing left to ask; None for no end.
        probes: How many; 0 leaves them out.
    """

    query_chunk = 8

    def __init__(self, turns: int | None = None, probes: int = 9) -> None:
        self.turns, self.probes = turns, probes
        self.closed = False

    def pool_needed(self, budgets: Sequence[int]) -> int:
        return 20

    def queries(self, thief: Thief) -> Queries:
        order = numpy_generator(thief.seed, "queries").permutation(len(thief.pool))
        turn = 0
        try:
            while turn != self.turns:
                chosen, order = order[:20], order[20:]
                answers = yield chosen
                made = (
                    thief.pool[chosen[:10]] + np.uint8(1) + answers[:10].argmax(1).astype(np.uint8)[:, None, None, None]
                )
                thief.log("sure", float(answers.max(1).mean()))
                yield made
                if self.probes:
                    probes = made[: self.probes].astype(np.float32) / 256
                    answers = yield Query(probes, learn=False, whole=True)
                    order = np.roll(order, int(1000 * answers.sum(0)[0]))
                turn += 1
        finally:
            self.closed = True


def one_go(budget: int, **rest: Any) -> tuple[FakeBlackBox, TransferSet, list[Rung]]:
    box, transfer = FakeBlackBox(), TransferSet()
    return box, transfer, steal(box, [budget], Scripted(), transfer=transfer, **rest)


def test_it_asks_in_chunks_and_sends_back_what_was_answered() -> None:
    box, transfer, _ = one_go(78)
    assert [len(query) for query in box.queries] == [8, 8, 4, 8, 2, 8, 1] * 2
    assert [query.dtype.name for query in box.queries[:7]] == ["uint8"] * 5 + ["float32"] * 2
    assert box.charged == len(transfer) == 78 == box.distinct()
    np.testing.assert_array_equal(
        np.concatenate([FakeBlackBox().query(query) for query in box.queries]), transfer.answers
    )


def test_probes_are_charged_and_stored_but_not_learnt(tmp_path: Path) -> None:
    box = FakeBlackBox()
    steal(box, [78], Scripted(), transfer=TransferSet(tmp_path))
    transfer = TransferSet(tmp_path)
    expected = [image for query in box.queries if query.dtype == np.uint8 for image in query]
    np.testing.assert_array_equal(transfer.training_images(POOL, 78), expected)
    np.testing.assert_array_equal(transfer.for_training(78), ([True] * 30 + [False] * 9) * 2)
    # Prefixes too, wherever they end.
    for count in (0, 15, 25, 30, 35, 39, 50, 65):
        remaining = int(transfer.for_training(count).sum())
        np.testing.assert_array_equal(
            transfer.training_images(POOL, count), np.array(expected[:remaining]).reshape(-1, *SHAPE)
        )


def test_a_probe_of_the_pool_is_not_learnt_either() -> None:
    class Peeking(QueryAttack):
        def queries(self, thief: Thief) -> Queries:
            yield Query(thief.pool[:5], np.arange(5), learn=False)
            yield np.arange(10, 30)

    transfer = TransferSet()
    steal(FakeBlackBox(), [25], Peeking(), transfer=transfer)
    np.testing.assert_array_equal(transfer.training_images(POOL, 25), POOL[10:30])


def test_a_query_is_cut_at_a_rung_unless_it_is_whole() -> None:
    box = FakeBlackBox()
    rungs = steal(box, [12, 25, 35, 60], Scripted())
    # At 35 five of nine probes could be paid for: none is asked, and the next rung asks them all.
    assert [rung.queries for rung in rungs] == [12, 25, 30, 60]
    assert [len(query) for query in box.queries] == [8, 4, 8, 5, 5, 8, 1, 8, 8, 4, 1]
    assert flat(box.queries) == flat(one_go(60)[0].queries)


@pytest.mark.parametrize("budget", [20, 24, 30, 33, 39, 70])
def test_a_substitute_depends_on_its_own_prefix_only(budget: int) -> None:
    (alone,) = one_go(budget)[2]
    for smaller in ([7], [20], [25, 29], [10, 15], [12, 19]):
        before = [rung for rung in smaller if rung < budget]
        after = steal(FakeBlackBox(), [*before, budget, 90], Scripted())[len(before)]
        (skipping,) = steal(FakeBlackBox(), [*before, budget], Scripted(), skip=before)
        for other in (after, skipping):
            assert same(alone.model, other.model)
            assert (alone.queries, alone.curves) == (other.queries, other.curves)


def test_curves_hold_what_was_logged_within_the_rung() -> None:
    small, large = steal(FakeBlackBox(), [30, 70], Scripted())
    assert [count for count, _ in small.curves["sure"]] == [20]
    assert [count for count, _ in large.curves["sure"]] == [20, 59]
    assert large.curves["sure"][0] == small.curves["sure"][0]


def test_a_thief_that_fails_at_any_query_goes_on_where_it_was(tmp_path: Path) -> None:
    budgets, whole = [25, 60], FakeBlackBox()
    model = steal(whole, budgets, Scripted())[1].model
    for number in range(len(whole.queries)):
        path = tmp_path / str(number)
        dying = FakeBlackBox(budget=60, fail_at=number)
        with pytest.raises(ConnectionError):
            steal(dying, budgets, Scripted(), transfer=TransferSet(path))
        stored = TransferSet(path)
        assert len(stored) == dying.asked
        resumed = FakeBlackBox(budget=60, paid=dying.paid, start_at=len(stored))
        rungs = steal(resumed, budgets, Scripted(), transfer=stored, skip={25} if number > 4 else ())
        assert flat(dying.queries + resumed.queries) == flat(whole.queries)
        assert resumed.charged == 60 and same(rungs[-1].model, model)


def test_a_process_killed_at_any_query_is_charged_nothing_twice(tmp_path: Path) -> None:
    """Nothing is written at a kill; the query under way is charged, its answer lost, and so are answers in memory."""

    class Patient(Scripted):
        query_chunk = 200  # 12 answers wait for a file, and a query of 9 or 10 is fewer

    budgets, folder = [25, 60], tmp_path / "t"

    def photograph(number: int) -> None:
        shutil.copytree(folder, tmp_path / str(number))

    whole = FakeBlackBox(on_query=photograph)
    model = steal(whole, budgets, Patient(), transfer=TransferSet(folder))[1].model
    paid, lost = list(whole.paid.items()), []
    for number in range(len(whole.queries)):
        stored = TransferSet(tmp_path / str(number))
        lost.append(sum(count for _, count in paid[:number]) - len(stored))
        box = FakeBlackBox(budget=60, paid=dict(paid[: number + 1]), start_at=len(stored))
        rungs = steal(box, budgets, Patient(), transfer=stored)
        assert flat(box.queries) == flat(whole.queries)[60 - box.asked :]
        assert box.charged == 60 and same(rungs[1].model, model)
    assert max(lost) > 0, "no answer waited for others, so that this test shows nothing"


def test_a_finished_transfer_set_asks_nothing_and_gives_the_same(tmp_path: Path) -> None:
    first = steal(FakeBlackBox(), [25, 60], Scripted(), transfer=TransferSet(tmp_path))
    silent = FakeBlackBox(budget=0)
    again = steal(silent, [25, 60], Scripted(), transfer=TransferSet(tmp_path))
    assert not silent.queries and all(same(a.model, b.model) for a, b in zip(first, again, strict=True))


class Fixed(QueryAttack):
    """Asks fixed images."""

    def __init__(self, *asks: Query) -> None:
        self.asks = asks

    def pool_needed(self, budgets: Sequence[int]) -> int:
        return 1

    def queries(self, thief: Thief) -> Queries:
        yield from self.asks


@pytest.mark.parametrize(
    "other",
    [
        Query(POOL[[1, 0, 2]], np.array([1, 0, 2])),
        Query(POOL[:3]),
        Query(POOL[1:4]),
        Query(POOL[:3], learn=False),
        Query((POOL[:3] / 255).astype(np.float32), learn=False),
    ],
    ids=["pool", "same", "made", "probe", "float"],
)
def test_a_foreign_transfer_set_is_refused(other: Query, request: pytest.FixtureRequest) -> None:
    transfer, box = TransferSet(), FakeBlackBox()
    steal(FakeBlackBox(), [3], Fixed(Query(POOL[:3])), transfer=transfer)
    if request.node.callspec.id == "same":
        assert len(steal(box, [3], Fixed(other), transfer=transfer)) == 1
    else:
        with pytest.raises(ArtifactError, match="another"):
            steal(box, [3], Fixed(other), transfer=transfer)
    assert not box.queries


def test_the_transfer_set_of_another_seed_is_refused() -> None:
    transfer = one_go(60)[1]
    with pytest.raises(ArtifactError, match="another seed"):
        steal(FakeBlackBox(), [60], Scripted(), transfer=transfer, seed=1)


def test_an_attack_with_nothing_left_to_ask_still_trains_every_rung() -> None:
    box = FakeBlackBox()
    rungs = steal(box, [30, 50, 60], Scripted(turns=1))
    assert [(rung.budget, rung.queries) for rung in rungs] == [(30, 30), (50, 39), (60, 39)]
    assert box.charged == 39


def test_the_attack_is_closed_when_the_thief_stops() -> None:
    attack = Scripted()
    rungs = attack.run(FakeBlackBox(), POOL, budgets=[10, 20], make_model=Substitute, training=FAST_TRAINING, seed=0)
    next(rungs)
    assert not attack.closed
    rungs.close()  # type: ignore[attr-defined]
    assert attack.closed


def test_small_queries_share_a_file(tmp_path: Path) -> None:
    class OneByOne(Scripted):
        query_chunk = 160

        def queries(self, thief: Thief) -> Queries:
            for index in range(100):
                yield np.array([index])

    steal(FakeBlackBox(), [95], OneByOne(), transfer=TransferSet(tmp_path))
    assert sorted(len(np.load(path)["indices"]) for path in tmp_path.glob("chunk-*")) == [5] + [10] * 9
    assert TransferSet(tmp_path).indices.tolist() == list(range(95))


def test_made_images_of_several_files_keep_their_places(tmp_path: Path) -> None:
    transfer, box = TransferSet(tmp_path), FakeBlackBox()
    made = [
        np.full((2, *SHAPE), value, np.uint8) + np.arange(2, dtype=np.uint8)[:, None, None, None] for value in (9, 50)
    ]
    transfer.append(np.array([3, 4]), box.query(POOL[3:5]), at_once=False)
    transfer.append(content_names(made[0]), box.query(made[0]), made=made[0], at_once=False)
    assert transfer.unwritten == 4 and len(TransferSet(tmp_path)) == 0
    assert len(transfer.indices) == 4  # a look between two files
    transfer.flush()
    transfer.append(content_names(made[1]), box.query(made[1]), at_once=False)
    transfer.append(content_names(made[1]), box.query(made[1]), made=made[1])
    for each in (transfer, TransferSet(tmp_path)):
        assert each.unwritten == 0 and len(each) == 8
        np.testing.assert_array_equal(each.training_images(POOL, 8), np.concatenate([POOL[3:5], *made]))
        assert each.for_training(8).tolist() == [True] * 4 + [False] * 2 + [True] * 2


def test_names_of_made_images_follow_from_their_content() -> None:
    names = content_names(POOL)
    assert names.dtype == np.int64 and (names < 0).all() and len(set(names.tolist())) == len(POOL)
    np.testing.assert_array_equal(names[5:9], content_names(POOL[5:9].copy()))


@pytest.mark.parametrize(
    ("images", "rest", "message"),
    [
        (POOL[:0], {}, "at least one image"),
        (POOL[0], {}, "at least one image"),
        (POOL[:3], {"indices": np.arange(2)}, "as many indices"),
        (POOL[:3] / np.float32(255), {}, "uint8"),
    ],
)
def test_an_impossible_query_is_refused(images: Images, rest: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Query(images, **rest)


class Yielding(Fixed):
    """Yields what it was given, as it is."""

    def __init__(self, *yielded: Any) -> None:
        self.yielded = yielded

    def queries(self, thief: Thief) -> Queries:
        for each in self.yielded:  # noqa: UP028 - a list cannot be sent answers
            yield each


@pytest.mark.parametrize("indices", [np.array([4, 2, 9]), np.array([4, 2, 9], np.int32), np.array([4, 2, 9], np.uint8)])
def test_positions_ask_images_of_the_pool(indices: Any) -> None:
    box, transfer = FakeBlackBox(), TransferSet()
    steal(box, [3], Yielding(indices), transfer=transfer)
    np.testing.assert_array_equal(box.queries[0], POOL[[4, 2, 9]])
    assert transfer.indices.tolist() == [4, 2, 9] and transfer.for_training(3).all()


def test_bytes_are_trained_on_and_floats_only_probe() -> None:
    box, transfer = FakeBlackBox(), TransferSet()
    made, probes = POOL[:3] + np.uint8(1), POOL[5:9].astype(np.float32) / 255
    steal(box, [7], Yielding(made, probes), transfer=transfer)
    assert [query.dtype.name for query in box.queries] == ["uint8", "float32"]
    assert transfer.for_training(7).tolist() == [True] * 3 + [False] * 4
    np.testing.assert_array_equal(transfer.training_images(POOL, 7), made)


@pytest.mark.parametrize(
    ("yielded", "message"),
    [
        ([1, 2], "yielded list"),
        (3, "yielded int"),
        (None, "yielded NoneType"),
        (np.array([0, 600]), "positions 0 to 600; the pool has images 0 to 599"),
        (np.array([-1]), "positions -1 to -1"),
        (np.array([0.5]), r"float64 \(1,\)"),
        (np.array([], np.int64), "at least one image"),
        (POOL[0], r"uint8 \(1, 8, 8\)"),
        (POOL[:2].astype(np.float64), "float64"),
    ],
    ids=str,
)
def test_a_yield_that_is_no_query_is_refused(yielded: Any, message: str) -> None:
    box = FakeBlackBox()
    with pytest.raises(DataError, match=message):
        steal(box, [3], Yielding(yielded))
    assert not box.queries


def test_queries_that_are_no_generator_are_refused() -> None:
    class Listing(Fixed):
        def queries(self, thief: Thief) -> Any:
            return [np.arange(3)]

    with pytest.raises(DataError, match="returned list; write it as a generator"):
        steal(FakeBlackBox(), [3], Listing())


def test_a_rung_with_nothing_to_learn_from_says_so() -> None:
    for attack in (Fixed(Query(POOL[:9], learn=False)), Fixed(Query(POOL[:9], whole=True))):
        with pytest.raises(DataError, match="a budget of 8 leaves nothing to train on"):
            steal(FakeBlackBox(), [8], attack)


def test_a_pool_need_not_fill_a_budget_but_what_the_attack_needs() -> None:
    assert steal(FakeBlackBox(), [35], Scripted(), pool=POOL[:20])[0].queries == 30
    with pytest.raises(ConfigError, match=r"holds 19 images, this attack needs 20 for thief\.budgets=\[35\]"):
        steal(FakeBlackBox(), [35], Scripted(), pool=POOL[:19])
    for budgets in ([], [0], [5, 5]):
        with pytest.raises(ConfigError, match="strictly ascending"):
            steal(FakeBlackBox(), budgets, Scripted(), pool=POOL[:19])


def test_labels_are_given_to_those_who_want_them_and_to_nobody_else() -> None:
    seen: list[Any] = []

    class Reading(Fixed):
        def queries(self, thief: Thief) -> Queries:
            seen.append(thief.labels)
            yield np.arange(10)

    class Wanting(Reading):
        uses_labels = True

    labels = np.arange(600) % 7
    steal(FakeBlackBox(), [10], Reading(), labels=labels)
    steal(FakeBlackBox(), [10], Wanting(), labels=labels)
    assert seen[0] is None and seen[1] is labels
    with pytest.raises(ConfigError, match="labels"):
        Wanting().run(FakeBlackBox(), POOL, budgets=[10], make_model=Substitute, training=FAST_TRAINING, seed=0)


@pytest.mark.parametrize("online", [False, True])
def test_an_attack_that_trains_online_receives_all_answers_before_its_substitute_is_read(online: bool) -> None:
    class Online(QueryAttack):
        def queries(self, thief: Thief) -> Queries:
            self.seen = 0
            for start in range(0, 600, 10):
                answers: Answers = yield np.arange(start, start + 10)
                self.seen += len(answers)

        def substitute(self, thief: Thief, budget: int) -> Rung:
            return Rung(budget, self.seen, thief.new_model("x"), 0, 0.0)

    attack = Online()
    attack.trains_online = online
    rungs = steal(FakeBlackBox(), [20, 35], attack)
    assert [rung.queries for rung in rungs] == ([20, 30] if online else [10, 30])


def test_a_thief_may_train_models_of_its_own_between_queries() -> None:
    class Between(QueryAttack):
        def queries(self, thief: Thief) -> Queries:
            self.models = []
            for start in range(0, 600, 50):
                yield np.arange(start, start + 50)
                images, answers = thief.training_set()
                np.testing.assert_array_equal(images, thief.pool[: start + 50])
                np.testing.assert_array_equal(answers, FakeBlackBox().query(images))
                model = thief.new_model("round", start)
                assert thief.fit(model, images, answers, "round", start, epochs=3).epochs == 3
                self.models.append(model)

    first, second = Between(), Between()
    one = steal(
        FakeBlackBox(), [110], first, training=FAST | {"early_stop_patience": 1}, learning={"validation_fraction": 0.5}
    )
    two = steal(
        FakeBlackBox(),
        [30, 110],
        second,
        training=FAST | {"early_stop_patience": 1},
        learning={"validation_fraction": 0.5},
    )
    assert len(first.models) == 2 and all(same(a, b) for a, b in zip(first.models, second.models, strict=True))
    assert same(one[0].model, two[1].model) and not same(first.models[0], first.models[1])


def test_answers_may_have_as_many_classes_as_the_victim_says() -> None:
    assert one_go(20)[1].answers.shape == (20, CLASSES)
