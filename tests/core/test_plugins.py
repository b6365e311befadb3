"""Components from other packages: by path, by entry point, from the working directory; and what is wrong with some."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from mea_ray.attacks import ATTACKS
from mea_ray.blackbox import POLICIES
from mea_ray.cli.catalogue import TABLES, table
from mea_ray.cli.main import main
from mea_ray.cli.options import OK, USAGE
from mea_ray.config import ExperimentConfig, build, identity
from mea_ray.core import plugins
from mea_ray.core.errors import ConfigError
from mea_ray.data import DATASETS
from mea_ray.watermarks.aggregators import AGGREGATORS
from mea_ray.watermarks.combiners import COMBINERS

SOURCE = '''
"""Components of another package."""

from typing import Annotated

import numpy as np
from pydantic import Field

from mea_ray.attacks.knockoff import Knockoff
from mea_ray.core.settings import Settings
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.watermarks.combiners.base import Combiner
from mea_ray.watermarks.mea_defender.weighting import Weighting


class Pace(Settings):
    """How fast."""

    chunk: int = Field(8, ge=1, description="Images in a chunk.")


class Slow(Knockoff):
    """An attack that takes its time.

    Args:
        pace: How fast it asks.
        patience: How long it waits, in s.
    """

    version = 2

    def __init__(self, *, pace: Pace = Pace(), patience: Annotated[float, Field(gt=0)] = 1.0) -> None:
        super().__init__()
        self.pace, self.patience = pace, patience


class Positional(Knockoff):
    """Takes an option by position."""

    def __init__(self, patience: float = 1.0) -> None:
        super().__init__()


class Required(Knockoff):
    """Has an option without a default."""

    def __init__(self, *, patience: float) -> None:
        super().__init__()


class Unreadable(Knockoff):
    """Has an annotation that means nothing."""

    def __init__(self, *, patience: "Nothing" = 1.0) -> None:
        super().__init__()


class Mute:
    """A policy that lacks ``apply``."""

    source = "probabilities"


class Loud(Mute):
    """A policy."""

    def apply(self, probabilities, images):
        return probabilities.copy()


class Halfway(Combiner):
    """A combiner that mixes nothing."""


class Swap(Combiner):
    """A combiner.

    Args:
        often: Whether it swaps often.
    """

    def __init__(self, shape, fill, seed, *, often: bool = False) -> None:
        super().__init__(shape, fill, seed)
        self.often = often

    def mix(self, first, second, generator):
        return second


class First(Weighting):
    """An aggregator."""

    def aggregate(self, gradients, values):
        return gradients[0]


def load(*, images: int = 8) -> Dataset:
    """Black images.

    Args:
        images: Number of images in each part.
    """
    part = ImageSet(np.zeros((images, 1, 8, 8), np.uint8), np.arange(images) % 2, ("a", "b"))
    return Dataset("black", part, part)


knockoff = Knockoff
NUMBER = 3
'''

Install = Callable[..., None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on no search path with a package ``elsewhere``."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "__init__.py").write_text(SOURCE)
    (folder / "broken.py").write_text("import no_such_dependency\n")
    (folder / "wrong.py").write_text("class A(:\n")
    (folder / "leaving.py").write_text("import sys\n\nsys.exit(3)\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "elsewhere"]:
        monkeypatch.delitem(sys.modules, name)
    for kind in TABLES:
        monkeypatch.setattr(table(kind), "_foreign", {})
        monkeypatch.setattr(table(kind), "_schemas", {})
    return tmp_path


@pytest.fixture
def install(package: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install ``elsewhere`` with entry points, given as in a file ``entry_points.txt``."""

    def install(points: str, name: str = "elsewhere") -> None:
        about = package / f"{name}-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (about / "entry_points.txt").write_text(dedent(points))
        plugins._entry_points.cache_clear()
        if str(package) not in sys.path:
            monkeypatch.syspath_prepend(package)

    return install


@pytest.fixture
def here(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the folder of ``elsewhere`` the working directory."""
    monkeypatch.chdir(package)


@pytest.mark.usefixtures("here")
def test_a_component_of_the_working_directory_is_built_from_a_config() -> None:
    given = {"name": "elsewhere:Slow", "patience": 3, "pace": {"chunk": 2}}
    config = build(ExperimentConfig, {"thief": {"attack": given}})
    attack = config.thief.attack.build()
    assert (type(attack).__name__, attack.patience, attack.pace.chunk) == ("Slow", 3.0, 2)
    assert config.resolved()["thief"]["attack"] == given
    assert build(ExperimentConfig, config.resolved()) == config
    assert identity(config)["thief"] == {"attack": {**given, "patience": 3.0, "@version": 2}}
    assert DATASETS.build("elsewhere:load", images=4).train.classes == 2
    assert COMBINERS.build("elsewhere:Swap", (1, 8, 8), (0.0,), 0, often=True).often
    assert POLICIES.build("elsewhere:Loud").source == "probabilities"
    assert AGGREGATORS.build("elsewhere:First").aggregate([7, 8], [1.0, 2.0]) == 7
    with pytest.raises(ConfigError, match=r"victim.watermark.weights.method: aggregator 'elsewhere:Slow' must derive"):
        build(ExperimentConfig, {"victim": {"watermark": {"name": "mea_defender", "weights": "elsewhere:Slow"}}})
    marked = {"victim": {"watermark": {"name": "mea_defender", "weights": "elsewhere:First"}}}
    assert build(ExperimentConfig, marked).victim.watermark.params["weights"].method == "elsewhere:First"


@pytest.mark.usefixtures("here")
def test_options_of_another_package_are_checked_as_ours_are() -> None:
    with pytest.raises(ConfigError, match=r"attack 'elsewhere:Slow': patience=0: Input should be greater than 0"):
        ATTACKS.check("elsewhere:Slow", {"patience": 0})
    with pytest.raises(ConfigError, match=r"pace.chunk=0"):
        ATTACKS.check("elsewhere:Slow", {"pace": {"chunk": 0}})
    with pytest.raises(ConfigError, match=r"no parameter 'patiense'; did you mean 'patience'\?"):
        ATTACKS.check("elsewhere:Slow", {"patiense": 1})
    assert [(p.name, p.range, p.doc) for p in ATTACKS.parameters("elsewhere:Slow")] == [
        ("pace.chunk", ">= 1", "Images in a chunk."),
        ("patience", "> 0", "How long it waits, in s."),
    ]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("attacks", "nowhere.at_all:Slow", r"cannot import 'nowhere.at_all': ModuleNotFoundError.*install its package"),
        ("attacks", "elsewhere.missing:Slow", "No module named 'elsewhere.missing'; install its package"),
        ("attacks", "elsewhere.broken:Slow", "No module named 'no_such_dependency'; repair the module"),
        ("attacks", "elsewhere.wrong:A", "SyntaxError"),
        ("attacks", "elsewhere.leaving:A", "SystemExit"),
        ("attacks", "elsewhere:Slo", r"module 'elsewhere' has no 'Slo'; did you mean 'Slow'\?"),
        ("attacks", "elsewhere:NUMBER", "must be a class that derives from mea_ray.attacks.base.Attack, got 3"),
        ("attacks", "elsewhere:load", "must be a class"),
        ("attacks", "os:system", "must be a class"),
        (
            "attacks",
            "elsewhere:Pace",
            "must derive from mea_ray.attacks.base.Attack, got a class that derives from",
        ),
        ("models", "elsewhere:Slow", "must derive from mea_ray.models.base.ImageModel"),
        ("attacks", "elsewhere:Positional", "takes .'patience'. by position.*keyword-only"),
        ("attacks", "elsewhere:Required", "options without a default: patience"),
        ("attacks", "elsewhere:Unreadable", "its options cannot be read: NameError"),
        ("policies", "elsewhere:Mute", "lacks apply of mea_ray.blackbox.policies.AnswerPolicy"),
        ("combiners", "elsewhere:Halfway", "must define mix"),
        ("datasets", "elsewhere:Slow", "must be a function"),
        ("attacks", "a:b:c", "unknown attack 'a:b:c'"),
        ("attacks", "elsewhere:", "unknown attack 'elsewhere:'.*package.module:Attribute"),
        ("attacks", ":Slow", "unknown attack ':Slow'"),
        ("attacks", "..elsewhere:Slow", "unknown attack"),
        ("benchmarks", "elsewhere:Slow", "unknown benchmark"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_config_is_read(kind: str, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        table(kind).check(name, {})


def test_the_working_directory_hides_no_installed_module(here: None, package: Path) -> None:
    (package / "colorsys.py").write_text("Slow = None\n")
    sys.modules.pop("colorsys", None)
    with pytest.raises(ConfigError, match="module 'colorsys' has no 'Slow'"):
        ATTACKS.check("colorsys:Slow", {})


def test_an_entry_point_is_a_component_by_its_name(install: Install) -> None:
    install("[mea_ray.attacks]\nslow = elsewhere:Slow\n[mea_ray.datasets]\nblack = elsewhere:load\n")
    assert "slow" in ATTACKS.names() and ATTACKS.origin("slow") == "elsewhere 1.2"
    assert ATTACKS.build("slow", patience=2).patience == 2.0
    assert (ATTACKS.version("slow"), ATTACKS.origin("knockoff")) == (2, "")
    assert len(DATASETS.build("black").train) == 8
    with pytest.raises(ConfigError, match=r"unknown attack 'slov'; did you mean 'slow'\?"):
        ATTACKS.check("slov", {})


def test_a_name_of_ours_hides_an_entry_point_and_says_so(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("[mea_ray.attacks]\nknockoff = elsewhere:Slow\n")
    with pytest.warns(UserWarning, match=r"attack 'knockoff' is our own and hides elsewhere:Slow \(elsewhere 1.2\)"):
        assert ATTACKS.resolve("knockoff").__module__ == "mea_ray.attacks.knockoff"
    assert main(["list"]) == OK
    assert "knockoff hides elsewhere:Slow (elsewhere 1.2)" in capsys.readouterr().out


def test_a_name_that_two_packages_give_is_refused(install: Install) -> None:
    install("[mea_ray.attacks]\nslow = elsewhere:Slow\n")
    install("[mea_ray.attacks]\nslow = elsewhere:Required\n", name="another")
    with pytest.raises(ConfigError, match=r"several packages.*elsewhere:Slow \(elsewhere 1.2\)"):
        ATTACKS.check("slow", {})


def test_a_package_that_is_found_twice_counts_once(install: Install) -> None:
    install("[mea_ray.attacks]\nslow = elsewhere:Slow\n")
    install("[mea_ray.attacks]\nslow = elsewhere:Slow\n", name="elsewhere_again")
    assert ATTACKS.build("slow").patience == 1.0


def test_list_shows_components_of_other_packages_and_survives_broken_ones(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("[mea_ray.attacks]\nslow = elsewhere:Slow\nbad = elsewhere.broken:X\nworse = elsewhere.leaving:X\n")
    assert main(["list"]) == OK
    output = capsys.readouterr().out
    assert "An attack that takes its time. [elsewhere 1.2]" in output
    assert output.count("cannot be used") == 2
    assert main(["list", "attacks"]) == OK
    output = capsys.readouterr().out
    assert "pace.chunk" in output and "no_such_dependency" in output
    assert main(["list", "attacks", "elsewhere:Slow"]) == OK
    assert "How long it waits, in s." in capsys.readouterr().out
    assert main(["list", "attacks", "bad"]) == USAGE
    assert "no_such_dependency" in capsys.readouterr().err


def test_the_check_of_other_packages_holds_for_our_own_components() -> None:
    for kind in TABLES:
        known = table(kind)
        for name in known.entries if known.group else ():
            if (kind, name) != ("pretexts", "none"):  # learns from labels, so it is no pretext
                plugins.check(name, known.resolve(name), known.base, known.arguments)
