"""The settings of an experiment and of a sweep, read from YAML and overridden by ``key.path=value``."""

from mea_ray.config.components import (
    AttackChoice,
    Choice,
    CombinerChoice,
    Config,
    DataChoice,
    DetectionChoice,
    ModelChoice,
    PolicyChoice,
    PretextChoice,
    RemovalChoice,
    WatermarkChoice,
)
from mea_ray.config.experiment import (
    DetectionConfig,
    ExperimentConfig,
    RemovalConfig,
    SplitsConfig,
    ThiefConfig,
    VerificationConfig,
    VictimConfig,
)
from mea_ray.config.identity import digest, identity
from mea_ray.config.loading import build, load_experiment, load_stored, load_sweep, write_yaml
from mea_ray.config.overrides import load_tree, merge, set_path
from mea_ray.config.running import (
    BlackBoxConfig,
    ClientConfig,
    RateConfig,
    ResourcesConfig,
    RoleResources,
    ServiceConfig,
    ServingConfig,
    TrackingConfig,
)
from mea_ray.config.sweep import RESERVED_NAMES, PricesConfig, SchedulerConfig, SearchConfig, SelectConfig, SweepConfig
from mea_ray.config.training import LearningConfig, TrainingConfig
from mea_ray.core.settings import Tree

__all__ = [
    "RESERVED_NAMES",
    "AttackChoice",
    "BlackBoxConfig",
    "Choice",
    "ClientConfig",
    "CombinerChoice",
    "Config",
    "DataChoice",
    "DetectionChoice",
    "DetectionConfig",
    "ExperimentConfig",
    "LearningConfig",
    "ModelChoice",
    "PolicyChoice",
    "PretextChoice",
    "PricesConfig",
    "RateConfig",
    "RemovalChoice",
    "RemovalConfig",
    "ResourcesConfig",
    "RoleResources",
    "SchedulerConfig",
    "SearchConfig",
    "SelectConfig",
    "ServiceConfig",
    "ServingConfig",
    "SplitsConfig",
    "SweepConfig",
    "ThiefConfig",
    "TrackingConfig",
    "TrainingConfig",
    "Tree",
    "VerificationConfig",
    "VictimConfig",
    "WatermarkChoice",
    "build",
    "digest",
    "identity",
    "load_experiment",
    "load_stored",
    "load_sweep",
    "load_tree",
    "merge",
    "set_path",
    "write_yaml",
]
