"""What a remote storage is asked, request by request, on a real S3 server on loopback; and what nodes make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mea_ray.bench.object_store import LoopbackS3
from mea_ray.storage import remote, segments
from mea_ray.storage.remote import Storage
from mea_ray.storage.remote_lease import RemoteLease
from mea_ray.sweep.folder import SweepFolder

Node = Callable[[str], Storage]


@pytest.fixture
def node(s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A machine by name, with a cache of its own."""

    def on(name: str) -> Storage:
        monkeypatch.setattr(remote, "_cache_root", lambda: tmp_path / name)
        return Storage(s3.location(tmp_path.name))

    return on


def write(storage: Storage, relative: str, text: str) -> None:
    storage.path(relative).write_text(text)


def asked(s3: LoopbackS3, do: Callable[[], object]) -> list[str]:
    before = len(s3.log)
    do()
    return [method for method, _ in s3.log[before:]]


def test_a_file_is_one_put_and_an_old_one_none(s3: LoopbackS3, node: Node) -> None:
    storage = node("a")
    Storage(s3.location()).names("")  # a first request of a process looks for the service
    for name in ("one", "two", ".half"):
        write(storage, f"s/trials/t/{name}", name)
    assert asked(s3, lambda: storage.push("s/trials/t")) == ["PUT", "PUT"]
    assert asked(s3, lambda: storage.push("s/trials/t")) == []
    write(storage, "s/trials/t/two", "changed")
    write(storage, "s/trials/t/three", "new")
    assert asked(s3, lambda: storage.push("s/trials/t", last="one")) == ["PUT", "PUT"]
    assert node("b").pull_folder("s/trials/t")
    assert {p.name: p.read_text() for p in (node("b").root / "s/trials/t").iterdir()} == {
        "one": "one",
        "two": "changed",
        "three": "new",
    }


def test_what_was_fetched_is_fetched_again_only_when_it_was_changed(s3: LoopbackS3, node: Node) -> None:
    here = node("a")
    write(here, "s/x", "1")
    write(here, "s/y", "1")
    here.push("s")
    there = node("b")
    assert asked(s3, lambda: there.pull_folder("s")).count("GET") == 3  # a list, and two files
    assert asked(s3, lambda: node("b").pull_folder("s")) == ["GET"], "another process of the node"
    assert asked(s3, lambda: there.push("s")) == []
    stamp = (here.root / "s/x").stat().st_mtime_ns
    write(here, "s/x", "2")  # of the same size
    assert (here.root / "s/x").stat().st_mtime_ns != stamp
    # S3 tells times in whole seconds; this test need not wait for the next one.
    there._same.clear()
    import os

    os.utime(there.root / "s/x", ns=(1, 1))
    here.push("s")
    there.pull_folder("s")
    assert (there.root / "s/x").read_text() == "2"


def test_a_growing_file_is_sent_in_segments(s3: LoopbackS3, node: Node) -> None:
    driver, reader = node("a"), node("b")
    path = driver.path("s/events.jsonl")
    sent = s3.traffic().sent
    for number in range(4):
        with path.open("a") as file:
            file.write(f"line {number}\n" * 100)
        assert asked(s3, lambda: driver.push_grown("s/events.jsonl")) == ["PUT"]
        reader.pull_grown("s/events.jsonl")
        assert (reader.root / "s/events.jsonl").read_bytes() == path.read_bytes()
    assert s3.traffic().sent - sent == path.stat().st_size, "no byte twice"
    assert asked(s3, lambda: driver.push_grown("s/events.jsonl")) == []
    driver.merge_grown("s/events.jsonl")
    assert driver.names("s/events.jsonl.d") == [segments.name(0, path.stat().st_size)]
    reader.pull_grown("s/events.jsonl")
    late = node("c")
    late.pull_grown("s/events.jsonl")
    for one in (reader, late):
        assert (one.root / "s/events.jsonl").read_bytes() == path.read_bytes()


def test_a_driver_on_another_machine_goes_on_with_a_growing_file(node: Node) -> None:
    first, second = node("a"), node("b")
    first.path("e").write_text("1 first\n2 first\n")
    first.push_grown("e")
    with first.path("e").open("a") as file:
        file.write("3 lost with its machine\n")
    second.pull_grown("e", to_go_on=True)
    with second.path("e").open("a") as file:
        file.write("3 second\n")
    second.push_grown("e")
    again = node("a")
    again.pull_grown("e", to_go_on=True)
    assert again.path("e").read_text() == "1 first\n2 first\n3 second\n"
    with again.path("e").open("a") as file:
        file.write("4 first\n")
    again.push_grown("e")
    again.pull_grown("e", to_go_on=True)
    second.pull_grown("e")
    assert second.path("e").read_text() == again.path("e").read_text() == "1 first\n2 first\n3 second\n4 first\n"


@pytest.mark.parametrize(
    ("names", "here", "wanted"),
    [
        ([(0, 5), (5, 9)], 0, [(0, 5), (5, 9)]),
        ([(0, 5), (5, 9)], 5, [(5, 9)]),
        ([(0, 5), (5, 9), (0, 9)], 5, [(0, 9)]),
        ([(0, 5), (5, 9), (0, 9), (9, 12)], 0, [(0, 9), (9, 12)]),
        ([(0, 5)], 7, []),
        ([(0, 5), (6, 9)], 0, [(0, 5)]),
    ],
)
def test_segments_that_complete_a_file(names: list[tuple[int, int]], here: int, wanted: list[tuple[int, int]]) -> None:
    result = segments.missing([segments.name(*each) for each in names] + ["folder.id"], here)
    assert result == [(start, segments.name(start, end)) for start, end in wanted]


def test_the_cache_of_a_sweep_that_was_deleted_and_begun_again_is_not_used(node: Node) -> None:
    old, worker = node("a"), node("b")
    identity = old.claim_cache("s", make=True)
    worker.adopt_cache("s", identity)
    for one in (old, worker):
        write(one, "s/results/t.json", "of the old sweep")
    old.push("s")
    assert old.claim_cache("s", make=True) == identity and (old.root / "s/results/t.json").exists()
    elsewhere = node("c")
    elsewhere.delete("s")
    again = elsewhere.claim_cache("s", make=True)
    assert again != identity
    worker.adopt_cache("s", again)
    assert not (worker.root / "s/results").exists()
    assert old.claim_cache("s") == again and not (old.root / "s/results").exists()
    elsewhere.delete("s")
    write(old, "s/results/t.json", "again")
    assert old.claim_cache("s") == "" and not (old.root / "s").exists()


def test_a_lease_makes_few_requests_while_it_is_held(s3: LoopbackS3, node: Node) -> None:
    storage = node("a")
    assert storage.remote is not None
    system, root = storage.remote
    lease = RemoteLease(system, f"{root}/leases", "x", beat_s=1000)
    assert lease.try_acquire()
    assert asked(s3, lambda: lease._beat(lease.token)) == ["PUT"]
    lease.release()


def test_the_ledgers_of_the_machine_that_drove_last_are_taken(
    s3: LoopbackS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(machine: str) -> SweepFolder:
        monkeypatch.setattr(remote, "_cache_root", lambda: tmp_path / machine)
        folder = SweepFolder(s3.location(tmp_path.name), "s")
        folder.fetch_ledgers()
        return folder

    def charge(folder: SweepFolder, text: str) -> None:
        (folder.path / "ledgers" / "k.sqlite").write_text(text)
        (folder.path / "ledgers" / "k.sqlite.queries").write_text("log")
        folder.keep_ledger(str(folder.path / "ledgers" / "k.sqlite"), "k.sqlite")

    def ledger(folder: SweepFolder) -> dict[str, str]:
        return {path.name: path.read_text() for path in (folder.path / "ledgers").glob("k.*")}

    charge(on("a"), "48 charged")
    (on("a").path / "ledgers" / "k.sqlite").write_text("64 charged")  # it was killed before this was copied
    assert ledger(on("a")) == {"k.sqlite": "64 charged", "k.sqlite.queries": "log"}, "its own are the newest"
    assert ledger(on("b")) == {"k.sqlite": "48 charged"}
    charge(on("b"), "96 charged")
    assert ledger(on("a")) == {"k.sqlite": "96 charged"}, "what is left here does not know what the other charged"
