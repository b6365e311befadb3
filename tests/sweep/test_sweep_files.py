"""Every sweep file that is shipped: valid, planned, and runnable on the small data as far as that can be checked."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden import MadeUp

from mea_ray.attacks import ATTACKS
from mea_ray.config import ExperimentConfig, SweepConfig, build, load_sweep, merge
from mea_ray.storage.remote import Storage
from mea_ray.sweep.broker import ServiceSpec
from mea_ray.sweep.plan import Plan, plan
from mea_ray.sweep.search import check_metric

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
SEEDS = {"seed": 0, "victim.seed": 0}
NEEDED = {
    "quickstart",
    "loss_weights",
    "architectures",
    "budgets",
    "combiners",
    "ablation",
    "harder",
    "attacks",
    "data_free",
    "unlean",
    "unlean_cfw",
}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def planned(path: Path, *overrides: str) -> tuple[SweepConfig, Plan]:
    sweep = load_sweep(path, overrides)
    return sweep, plan(sweep, MadeUp())


def test_the_sweeps_of_the_paper_are_there() -> None:
    assert {path.stem for path in FILES} >= NEEDED


def test_a_sweep_is_valid_described_and_named_as_its_file(path: Path) -> None:
    sweep, plan = planned(path)
    assert sweep.name == path.stem
    assert len(sweep.description) > 40
    assert plan.trial_count >= 2
    assert not plan.duplicates
    check_metric(sweep)


def test_a_sweep_sets_nothing_twice(path: Path) -> None:
    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: Strict, node: yaml.MappingNode) -> dict[object, object]:
        keys = [loader.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(keys) == len(set(keys)), f"{path}: a key is set twice: {keys}"
        loader.flatten_mapping(node)  # `<<: *base` is no key, and what follows it may replace what it brings
        return dict(loader.construct_pairs(node))

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    yaml.load(path.read_text(encoding="utf-8"), Strict)  # noqa: S506 - a SafeLoader


def test_every_trial_could_run_on_the_small_data(path: Path) -> None:
    """The watermark's classes, networks and attack are held against real images; nothing is trained."""
    from mea_ray.experiment.checks import check
    from mea_ray.experiment.data import load_splits

    small = ["data={name: digits, image_size: 32}", "verification.samples=30"]
    if re.search("held_out: validation|deeptracer", path.read_text(encoding="utf-8")):  # both use these images
        small.append("splits.validation_fraction=0.4")
    if "mixture" in path.read_text(encoding="utf-8"):
        small.append("splits.thief_pool={name: mixture, parts: [{name: digits, image_size: 32}, {name: noise}]}")
    if "data: cifar100" in path.read_text(encoding="utf-8"):
        small += ["victim.watermark.source_classes=[0, 1]", "victim.watermark.target_class=2"]
    _, plan = planned(path, *small)
    data = load_splits(plan.trials[0].config)
    different: dict[str, Any] = {}
    for trial in plan.trials:
        # A sweep over whole thieves sets their budgets, too. Of trials that differ in their seeds one is checked.
        tree = merge(trial.config.resolved(), {"thief.budgets": [400]})
        different.setdefault(json.dumps(merge(tree, SEEDS), sort_keys=True), tree)
    for tree in different.values():
        check(build(ExperimentConfig, tree), data)


def test_plans_cost_what_the_paper_asks() -> None:
    sweep, budgets = planned(ROOT / "sweeps" / "budgets.yaml")
    assert sweep.base.thief.budgets == (10_000, 25_000, 50_000)
    assert (budgets.trial_count, budgets.victim_count, budgets.queries) == (3, 1, 150_000)
    assert sweep.base.victim.model.name == "vgg_like"
    _, architectures = planned(ROOT / "sweeps" / "architectures.yaml")
    assert (architectures.trial_count, architectures.victim_count) == (9, 3)
    _, combiners = planned(ROOT / "sweeps" / "combiners.yaml")
    assert (combiners.trial_count, combiners.victim_count) == (4, 4)


@pytest.mark.parametrize("name", ["baselines", "baselines_digits", "cfw_digits"])
def test_every_baseline_gets_as_many_settings_as_ours_on_validation_images_and_other_seeds(name: str) -> None:
    tuning, tried = planned(ROOT / "sweeps" / f"{name}_tuning.yaml")
    report, visible = planned(ROOT / "sweeps" / f"{name}.yaml")
    assert tuning.select is not None and tuning.base.splits.held_out == "validation"
    assert report.base.splits.held_out == "test" and not tuning.listed_seeds & report.listed_seeds
    assert tuning.listed_seeds == set(tuning.select.seeds) and len(report.listed_seeds) == 3

    def settings(result: Plan) -> Counter[str]:
        return Counter(trial.config.victim.watermark.name for trial in result.trials if trial.config.seed in {0, 10})

    counts = settings(tried)
    assert set(counts.values()) == {5} and counts.keys() == settings(visible).keys()
    reported = [trial.config.victim.watermark for trial in visible.trials]
    assert all(any(trial.config.victim.watermark == each for trial in tried.trials) for each in reported)
    chosen = {"sweep": f"{name}_tuning", "metric": "wsr", "constraints": {"victim_gap": 0.02}, "seeds": [0, 1, 2]}
    select = build(SweepConfig, {**report.resolved(), "select": chosen}).select
    assert select is not None and report.select in (None, select)


def test_searches_look_at_validation_images() -> None:
    for path in FILES:
        sweep = load_sweep(path)
        assert sweep.search.name != "optuna" or sweep.base.splits.held_out == "validation", path.name


def test_harder_settings_can_be_swept_with_any_attack_in_one_file() -> None:
    sweep, plan = planned(
        ROOT / "sweeps" / "harder.yaml",
        "space={service.policy: {grid: [label_only, {name: top_k, k: 2}, {name: rounded}, {name: noise, sigma: 0.2}]},"
        " service.rate: {grid: [null, {images_per_second: 50, burst: 10}]}, thief.accounts: {grid: [1, 2]},"
        f" thief.attack.name: {{grid: [{', '.join(ATTACKS.names())}]}}}}",
    )
    assert plan.trial_count == 4 * 2 * 2 * len(ATTACKS.names()) and plan.victim_count == 1
    served = {ServiceSpec.of(trial.config, "v", Storage("/v")).key for trial in plan.trials}
    assert len(served) == 4 * 2, "trials share the services of their settings, whatever attacks"
    _, shipped = planned(ROOT / "sweeps" / "harder.yaml")
    assert (shipped.trial_count, shipped.victim_count) == (5 * 5, 1)
    assert len({ServiceSpec.of(trial.config, "v", Storage("/v")).key for trial in shipped.trials}) == 5


def test_the_budgets_sweep_takes_parquet_data_from_the_command_line() -> None:
    sweep, _ = planned(ROOT / "sweeps" / "budgets.yaml", "data.name=parquet", "data.path=some/folder")
    assert sweep.base.data.params["path"] == "some/folder"


def test_the_quickstart_is_what_it_promises() -> None:
    sweep, plan = planned(ROOT / "sweeps" / "quickstart.yaml")
    assert sweep.base.data.name == "digits"
    assert sweep.base.tracking.wandb == "offline"
    schemes = [trial.config.victim.watermark.build().schemes for trial in plan.trials]
    assert {(scheme.name, scheme.key_draw.classes) for several in schemes for scheme in several} == {
        ("mea_defender", "seed"),
        ("mea_carrier", "seed"),
    }, "the paper's scheme and ours, with drawn keys"
    assert plan.victim_count == 2
    assert {trial.config.thief.learning.answers for trial in plan.trials} == {"unchanged", "unlean", "argmax"}
    assert plan.trial_count == 6 and len(sweep.base.thief.budgets) >= 3
    # Two keys of 360 each: a proof is possible after Holm's correction for all rungs, with these few null models.
    suspects = plan.trial_count * len(sweep.base.thief.budgets)
    assert 2 * suspects / 360 ** len(schemes[0]) <= sweep.base.verification.significance < 2 * suspects / 360
    nulls = sweep.base.verification
    assert plan.null_count == nulls.null_models == nulls.stolen_null_models >= 3, "controls, at every budget"
    # It must fit a laptop with two cores: both services, one trial at a time at least.
    service = sweep.base.service
    assert isinstance(sweep.max_services, int)
    replicas = sweep.max_services * service.replicas * service.cpus_per_replica
    assert replicas + 2 * sweep.base.resources.trial.cpus <= 2
