"""Chosen samples travel in the key beside a scheme's own settings."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from watermark_sets import image_set

from mea_ray.core.errors import ConfigError
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.chosen_samples import ChosenSamples, chosen_of, with_chosen


@pytest.mark.parametrize("name", [name for name in WATERMARKS.names() if name != "none"])
def test_chosen_samples_touch_no_setting_of_any_scheme(name: str) -> None:
    train = image_set(400, (3, 32, 32))
    try:
        key = WATERMARKS.build(name).make_key(train, 0)
    except ConfigError as error:
        pytest.skip(str(error))
    assert key is not None
    assert chosen_of(key) is None, "a key that nobody chose samples for has none"
    samples = ChosenSamples(train.images[:5], None, candidates=9, passed=5, thieves=2, null_models=1, choosers=("a",))
    marked = with_chosen(key, samples)
    back = chosen_of(marked)
    assert back is not None and np.array_equal(back.images, samples.images)
    assert {**asdict(back), "images": None} == {**asdict(samples), "images": None}
    assert {**marked.settings, **key.settings} == marked.settings
    assert all(marked.tensors[each] is value for each, value in key.tensors.items())
