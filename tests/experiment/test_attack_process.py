"""The attack's process: what it is given, what it can reach, and what its owner takes from it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from mea_ray.attacks.base import Target
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import ExperimentConfig, SweepConfig, build, merge, write_yaml
from mea_ray.core.errors import AttackDied, AttackFailed, BadQuery, MeaRayError, OverBudget
from mea_ray.experiment.attack_process import parent, sandbox
from mea_ray.experiment.attack_process.fork_server import FORK_SERVER
from mea_ray.experiment.attack_process.protocol import MessagePipe, error_header, read_array, read_error
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.local import run_local
from mea_ray.experiment.theft import Theft
from mea_ray.models.build import build_model
from mea_ray.results.records import TrialResult
from mea_ray.verification.evidence import judge_rungs

ROOT = Path(__file__).parents[2]
TINY = {"name": "vgg_like", "width": 0.0625}
QUICK: dict[str, Any] = {
    "victim.model": TINY,
    "victim.training.epochs": 1,
    "thief.model": TINY,
    "thief.training.epochs": 1,
    "thief.budgets": [48, 96],
    "verification.samples": 50,
}
SECRETS = {
    "WANDB_API_KEY": "sentinel-wandb",
    "AWS_SECRET_ACCESS_KEY": "sentinel-aws",
    "AWS_ACCESS_KEY_ID": "sentinel-id",
    "HF_TOKEN": "sentinel-hf",
    "MY_PASSWORD": "sentinel-password",
    "CUDA_SECRET": "sentinel-cuda",
}


def quick(attack: Any = "distillation", storage: Path | None = None, **changes: Any) -> ExperimentConfig:
    tree: dict[str, Any] = {"data": {"name": "digits", "image_size": 12}}
    if storage is not None:
        tree["storage"] = str(storage)
    return build(ExperimentConfig, merge(tree, {**QUICK, "thief.attack": attack, **changes}))


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes an attack into a module of its own, which is plugged in from outside."""
    folder = tmp_path / "outside"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    count = iter(range(100))

    def write(body: str) -> str:
        name = f"outside_{os.getpid()}_{time.time_ns()}_{next(count)}"
        head = "import os, time\nimport numpy as np\nfrom mea_ray.attacks.query_attack import QueryAttack\n\n\n"
        (folder / f"{name}.py").write_text(head + textwrap.dedent(body))
        return f"{name}:Mine"

    yield write


def theft(attack: Any = "distillation") -> tuple[Theft, LocalBlackBox]:
    settings = quick(attack)
    data = load_splits(settings)
    torch.manual_seed(0)
    victim = build_model("vgg_like", data.shape, data.classes, {"width": 0.0625})
    ledger = Ledger()
    ledger.register("thief", 96)
    return Theft.of(settings, data), LocalBlackBox(victim, None, ledger, "thief")


def test_a_theft_apart_is_the_theft_in_one_process_bit_for_bit(tmp_path: Path) -> None:
    one, box = theft()
    here = TransferSet(tmp_path / "here")
    expected = [rung for _, rung in one.run([Target(box, here)])]
    _, box = theft()
    apart = TransferSet(tmp_path / "apart")
    result = [rung for _, rung in parent.steal(one, [Target(box, apart)])]
    assert [(r.budget, r.queries, r.epochs, r.curves) for r in result] == [
        (r.budget, r.queries, r.epochs, r.curves) for r in expected
    ]
    for rung, other in zip(result, expected, strict=True):
        ours, theirs = rung.model.state_dict(), other.model.state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert np.array_equal(apart.answers, here.answers) and np.array_equal(apart.indices, here.indices)
    assert box.ledger.charged("thief") == 96
    # A rung that is done is skipped, and stored answers are not asked again.
    _, box = theft()
    ((_, last),) = parent.steal(one, [Target(box, apart, {48})])
    assert last.budget == 96 and box.ledger.charged("thief") == 0


def test_the_environment_keeps_what_programs_need_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        **SECRETS,
        "PATH": "/bin",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "2",
        "LC_ALL": "C",
        "RAY_X": "1",
    }
    remaining = sandbox.short_environment(given, ["", "/a"])
    assert remaining == {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "2",
        "LC_ALL": "C",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), "/a"]),
        "PYTHONSAFEPATH": "1",
    }


def test_an_attack_that_fails_says_why_and_where(outside: Any) -> None:
    attack = outside("""
        class Mine(QueryAttack):
            def queries(self, thief):
                yield np.arange(16)
                raise ValueError("no such luck")
        """)
    one, box = theft(attack)
    with pytest.raises(AttackFailed, match=r"^ValueError: no such luck$") as caught:
        list(parent.steal(one, [Target(box)]))
    assert "in queries" in str(caught.value.__cause__)


ASKS = """
class Mine(Attack):
    def run(self, blackbox, pool, *, budgets, make_model, training, seed, transfer=None, skip=(), learning=None,
            labels=None):
        {body}
        return iter(())
"""


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        ("blackbox.query(pool[:97])", OverBudget, "queried 97 images"),
        ("blackbox.query(pool[:0])", BadQuery, "at least 1 image, got 0"),
        ("blackbox.query(pool[:4].astype(np.float64))", BadQuery, "uint8 or float32"),
        ("blackbox.query(pool[:4, :, :2])", BadQuery, "must have shape"),
        ("blackbox.query(np.array([{'a': 1}], dtype=object))", BadQuery, "uint8 or float32"),
        ("blackbox.query(np.full((1, *pool.shape[1:]), np.nan, np.float32))", BadQuery, "without NaN"),
        ("os._exit(3)", AttackDied, "process ended"),
        ("os.kill(os.getpid(), 9)", AttackDied, "signal 9"),
        ("blackbox._wire.close(); time.sleep(0.5); os.kill(os.getpid(), 9)", AttackDied, "signal 9"),
        ("blackbox._wire.send({'do': 'register', 'client': 'rich', 'budget': 10**6})", AttackFailed, "'register'"),
        ("blackbox._wire.send({'do': 'charge', 'images': 0})", AttackFailed, "'charge'"),
        ("blackbox._wire.send({'do': 'done'})", AttackFailed, "'done' while budgets"),
        ("blackbox._wire.send({'do': 'rung', 'budget': 96})", AttackFailed, "owed are"),
        ("blackbox._wire.send({'do': 'rung', 'budget': 48, 'queries': 10**6})", AttackFailed, "owed are"),
        (
            "blackbox._wire.send(dict(do='rung', budget=48, queries=1, epochs=1, seconds=1, curves={}), b'x')",
            AttackFailed,
            "is not a vgg_like",
        ),
        ("blackbox._wire._connection.send_bytes(b'[1]' * 9)", AttackFailed, "an invalid message"),
        ("blackbox._wire._connection.send({'do': 'query'})", AttackFailed, "an invalid message"),
        ("blackbox._wire.send({'do': 'failed', 'kind': 'SystemExit', 'args': [0]})", AttackFailed, "^0$"),
        ("blackbox._wire.send({'do': 'failed', 'kind': 'RateLimited', 'args': []})", AttackFailed, "RateLimited"),
    ],
)
def test_whatever_an_attack_sends_ends_it_with_a_typed_error_and_charges_nothing(
    outside: Any, body: str, error: type[Exception], text: str
) -> None:
    from_outside = "from mea_ray.attacks.base import Attack\n" + ASKS.format(body=body)
    one, box = theft(outside(from_outside))
    with pytest.raises(error, match=text):
        list(parent.steal(one, [Target(box)]))
    assert box.ledger.charged("thief") == 0


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "opened"),)

    for dtype in ("object", "O", "uint8", ">u1", "V8", None, 7, ["uint8"]):
        with pytest.raises(BadQuery):
            read_array({"dtype": dtype, "shape": [1, 1, 1, 1]}, pickle.dumps(Bomb()), ("uint8", "float32"), 4)
    for shape in (None, "4", [1, 1, 1], [1, 1, 1, -1], [True, 1, 1, 1], [2**31, 1, 1, 1], [1.0, 1, 1, 1], [1, 1, 1, 2]):
        with pytest.raises(BadQuery):
            read_array({"dtype": "uint8", "shape": shape}, b"x", ("uint8", "float32"), 4)
    ours, theirs = Pipe()
    assert isinstance(theirs, Connection)
    theirs.send(Bomb())
    with pytest.raises(ValueError, match="."):
        MessagePipe(ours).receive()
    assert not (tmp_path / "opened").exists()


def test_errors_travel_as_plain_words_and_any_foreign_one_by_its_text() -> None:
    for error in (OverBudget("a", 3, 2, 9), BadQuery("why"), AttackDied("so")):
        copy = read_error(json.loads(json.dumps(error_header(error))))
        assert type(copy) is type(error) and str(copy) == str(error)
    assert str(read_error(error_header(KeyError("x")))) == "KeyError: 'x'"
    for header in (
        {},
        {"kind": "Exception"},
        {"kind": 7},
        {"kind": "OverBudget", "args": "x"},
        {"kind": "annotations"},
    ):
        assert isinstance(read_error(header), MeaRayError)


def test_it_ends_with_its_owner_and_with_its_theft(outside: Any) -> None:
    attack = outside("""
        class Mine(QueryAttack):
            def queries(self, thief):
                yield np.arange(16)
                while True:
                    time.sleep(1)
        """)
    one, box = theft(attack)
    rungs = parent.steal(theft()[0], [Target(theft()[1])])
    next(rungs)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    rungs.close()  # type: ignore[attr-defined]
    assert not psutil.pid_exists(max(before))
    # A process whose owner is killed: that of a forked owner, which never comes to an end by itself.
    read, write = os.pipe()
    owner = os.fork()
    if not owner:
        try:
            os.close(read)
            original = FORK_SERVER.fork

            def fork(fds: Any) -> int:
                pid = original(fds)
                os.write(write, f"{pid}\n".encode())
                return pid

            FORK_SERVER.fork = fork  # type: ignore[method-assign]
            list(parent.steal(one, [Target(box)]))
        finally:
            os._exit(1)
    os.close(write)
    child = psutil.Process(int(os.read(read, 32)))
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    child.wait(20)


HOSTILE = """
    import contextlib, ctypes, gc, glob, json, re, socket, sqlite3, subprocess, sys
    from pathlib import Path

    def processes(part=""):  # of others, by number: /proc may not be listed, and its own threads have numbers
        own = os.listdir("/proc/self/task")
        found = [str(pid) for pid in range(1, 1 << 16) if os.path.exists(f"/proc/{pid}")]
        return [f"/proc/{pid}/{part}".rstrip("/") for pid in found if pid not in own]


    class Mine(QueryAttack):
        def queries(self, thief):
            self.reached, self.tried = [], 0
            own = thief.transfer.path
            storage = Path(os.environ["TMPDIR"]) if own is None else own.parents[3]
            for name, attempt in list(vars(type(self)).items()):
                if name.startswith("try_"):
                    self.tried += 1
                    try:
                        found = attempt(self, thief, storage)
                    except Exception as error:
                        found = None
                        self.last = repr(error)
                    if found:
                        self.reached.append(f"{name[4:]}: {found}"[:300])
            (own / "loot.json").write_text(json.dumps([self.tried, self.reached]))
            yield from thief.query_pool(16)

        # what its memory and its environment hold
        def try_environment(self, thief, storage):
            return [k for k, v in os.environ.items() if "sentinel" in v]

        def try_secrets_by_name(self, thief, storage):
            words = ("KEY", "TOKEN", "SECRET", "PASS", "RAY_", "WANDB", "AWS")
            return [k for k in os.environ if any(w in k.upper() for w in words)]

        def try_environment_of_others(self, thief, storage):
            found = []
            for path in processes("environ"):
                try:
                    if b"sentinel" in Path(path).read_bytes():
                        found.append(path)
                except OSError:
                    pass
            return found

        def try_objects(self, thief, storage):
            names = {"Key", "Splits", "ExperimentConfig", "LocalBlackBox", "ServiceClient", "Ledger", "VictimService",
                     "FixedShapePasses", "Proofs", "Verifier", "StoredModels"}
            return [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in names]

        def try_networks(self, thief, storage):
            import torch
            return [type(o).__name__ for o in gc.get_objects() if isinstance(o, torch.nn.Module)]

        def try_frames(self, thief, storage):
            frame, found = sys._getframe(), []
            while frame is not None:
                for name in ("victim", "key", "data", "config", "secret", "account", "service", "ledger", "model"):
                    if name in frame.f_locals:
                        found.append((frame.f_code.co_name, name))
                frame = frame.f_back
            return found

        def try_settings_of_the_watermark(self, thief, storage):
            return [o for o in gc.get_objects() if isinstance(o, dict) and "source_classes" in o and "target_class" in o
                    and not callable(o["target_class"]) and isinstance(o["target_class"], int)]

        # the victim's files
        def try_victim_files(self, thief, storage):
            found = []
            for folder, _, files in os.walk(storage):
                for file in files:
                    path = Path(folder, file)
                    if path.is_relative_to(thief.transfer.path):
                        continue
                    try:
                        path.read_bytes()
                        found.append(str(path))
                    except OSError:
                        pass
            return found

        def try_key_by_link(self, thief, storage):
            os.symlink(storage / "artifacts", thief.transfer.path / "link")
            return "link made"

        def try_the_ledger(self, thief, storage):
            found = []
            for path in storage.glob("**/*.sqlite"):
                try:
                    with sqlite3.connect(path, timeout=0) as database:
                        database.execute("UPDATE clients SET budget = 1000000")
                    found.append(str(path))
                except sqlite3.Error:
                    pass
            return found

        def try_other_trials(self, thief, storage):
            trial = thief.transfer.path.parent
            for name in ("partial.json", "config.yaml", "../../results/forged.json", "../other"):
                (trial / name).write_text("{}")
                return name

        def try_delete(self, thief, storage):
            for path in storage.rglob("*"):
                if path.is_file() and not path.is_relative_to(thief.transfer.path):
                    path.unlink()
                    return str(path)

        def try_home(self, thief, storage):
            import pwd
            home = Path(pwd.getpwuid(os.getuid()).pw_dir)
            found = []
            for name in (".netrc", ".ssh", ".aws", ".config", ".bashrc", ".profile"):
                try:
                    found += [name] if (home / name).is_dir() and os.listdir(home / name) else []
                    found += [name] if (home / name).is_file() and (home / name).read_bytes() else []
                except OSError:
                    pass
            return found

        # other processes and Ray
        def try_memory_of_others(self, thief, storage):
            found = []
            for path in processes("mem"):
                if path.split("/")[2] == str(os.getpid()):
                    continue
                try:
                    open(path, "rb").close()
                    found.append(path)
                except OSError:
                    pass
            return found

        def try_signals(self, thief, storage):
            found = []
            for path in processes():
                pid = int(path.split("/")[2])
                if pid != os.getpid():
                    try:
                        os.kill(pid, 0)
                        found.append(pid)
                    except OSError:
                        pass
            return found

        def try_files_of_others(self, thief, storage):
            found = []
            for path in (f"{fds}/{number}" for fds in processes("fd") for number in range(64)):
                try:
                    found += [os.readlink(path)] if path.split("/")[2] != str(os.getpid()) else []
                except OSError:
                    pass
            return found

        def try_ports(self, thief, storage):
            found = []
            for table in ("/proc/net/tcp", "/proc/net/tcp6"):
                for line in Path(table).read_text().splitlines()[1:]:
                    address, state = line.split()[1], line.split()[3]
                    if state == "0A":
                        port = int(address.rpartition(":")[2], 16)
                        try:
                            socket.create_connection(("127.0.0.1", port), 0.2).close()
                            found.append(port)
                        except OSError:
                            pass
            return found

        def try_unix_sockets(self, thief, storage):
            found = []
            for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
                name = line.split()[7:]
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    try:
                        with socket.socket(socket.AF_UNIX, kind) as connection:
                            connection.connect(name[0].replace("@", "\\0") if name else "")
                            found.append(name)
                    except OSError:
                        pass
            return found

        def try_the_clients_of_ray(self, thief, storage):
            return [m for m in sys.modules if m == "ray" or m.startswith("wandb")]

        def try_ray(self, thief, storage):
            import ray
            text = ""
            for path in processes("cmdline"):
                with contextlib.suppress(OSError):
                    text += Path(path).read_text(errors="replace") + " "
            addresses = set(re.findall(r"--gcs-address=([0-9.:]+)", text))
            for address in sorted(addresses)[:1]:
                ip, _, port = address.partition(":")
                with socket.create_connection((ip, int(port)), 1):
                    return address

        def try_another_program(self, thief, storage):
            told = subprocess.run(["/bin/cat", *map(str, storage.glob("**/key.json"))], capture_output=True)
            return told.stdout.decode()

        # what it has by right
        def try_the_labels(self, thief, storage):
            return thief.labels is not None

        def try_the_wire(self, thief, storage):
            boxes = [o for o in gc.get_objects() if type(o).__name__ == "PipedBlackBox"]
            fields = {"do": "query", "client": "other", "account": ["other", ""], "request_id": "x" * 500}
            images = np.ascontiguousarray(thief.pool[:1])
            answer, _ = boxes[0]._ask({**fields, "dtype": "uint8", "shape": [0, *images.shape[1:]]}, b"")
            return answer
    """


def charged(ledgers: Path) -> dict[str, int]:
    total: dict[str, int] = {}
    for path in ledgers.glob("*.sqlite"):
        ledger = Ledger(path)
        total |= {client: ledger.charged(client) for client in ledger.clients()}
        ledger.close()
    return total


@pytest.mark.parametrize("where", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_hostile_attack_reaches_nothing(
    where: str, tmp_path: Path, outside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "mea_ray.experiment.attack_process.fork_server.FORK_SERVER._control", None
    )  # with this environment
    storage = tmp_path / "storage"
    settings = quick(outside(HOSTILE), storage)
    other = storage / "s" / "trials" / "other" / "transfer"
    if where == "local":
        # What is set in this process does not show in its /proc/PID/environ; a process that was started with it does.
        with subprocess.Popen(["sleep", "300"], env={**os.environ, **SECRETS}) as holder:
            try:
                ended = run_local(settings, "s")
            finally:
                holder.kill()
        folder, result = ended.folder, ended.result
    else:
        # A Ray of its own: the workers of one that runs already would know neither the module nor this environment.
        sweep = build(SweepConfig, {"name": "s", "base": settings.resolved(), "space": {"seed": {"grid": [0]}}})
        write_yaml(sweep, tmp_path / "s.yaml")
        done = subprocess.run(
            [sys.executable, "-m", "mea_ray", "sweep", str(tmp_path / "s.yaml")],
            cwd=tmp_path / "outside",
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "outside")])},
            capture_output=True,
            text=True,
            timeout=1200,  # for what hangs
        )
        assert done.returncode == 0, done.stdout + done.stderr
        folder = storage / "s"
        (result,) = (TrialResult.load(path) for path in (folder / "results").glob("*.json"))
    assert not other.exists()
    tried, reached = json.loads(next(folder.glob("trials/*/transfer/loot.json")).read_text())
    print(f"{tried} attempts, reached:", *reached, sep="\n  ")
    assert tried == HOSTILE.count("def try_")
    # Without Landlock (an old kernel, or not Linux) files and processes of the same account are open: see SECURITY.md.
    version = sandbox.version()
    by_design = OPEN_WITHOUT_LANDLOCK if not version else {"signals"} if version < 6 else set()
    by_design |= set() if sandbox.closes_sockets() else {"ports", "ray", "unix_sockets"}
    assert {each.partition(":")[0] for each in reached} <= by_design, reached
    assert result.queries_charged == result.answers_stored == 96 and charged(folder / "ledgers") == {result.trial: 96}


OPEN_WITHOUT_LANDLOCK = {
    *("environment_of_others", "victim_files", "key_by_link", "the_ledger", "other_trials", "delete", "home"),
    *("memory_of_others", "files_of_others", "another_program", "signals"),
}


def test_a_trial_whose_charges_are_not_its_answers_is_void(tmp_path: Path, outside: Any) -> None:
    attack = outside("""
        class Mine(QueryAttack):
            def queries(self, thief):
                import gc
                (box,) = [o for o in gc.get_objects() if type(o).__name__ == "PipedBlackBox"]
                box.query(thief.pool[-8:])  # paid for, and kept out of the transfer set
                yield from thief.query_pool(16)
        """)
    settings = quick(attack, tmp_path)
    with pytest.raises(OverBudget):
        run_local(settings, "greedy")
    attack = outside("""
        class Mine(QueryAttack):
            def query_cost(self, budgets):
                return max(budgets) + 8
            def queries(self, thief):
                import gc
                (box,) = [o for o in gc.get_objects() if type(o).__name__ == "PipedBlackBox"]
                box.query(thief.pool[-8:])
                yield from thief.query_pool(16)
        """)
    result = run_local(quick(attack, tmp_path), "sly").result
    assert result.unaccounted == (104, 96)
    judgements = judge_rungs([result])
    assert judgements and {each.verdict for each in judgements.values()} == {"not accounted"}
    (reason,) = [each for each in next(iter(judgements.values())).reasons if each.verdict == "not accounted"]
    assert reason.text == "The service charged 104 images and the transfer set holds 96 answers: the trial is void."
