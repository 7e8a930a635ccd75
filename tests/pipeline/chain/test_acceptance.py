"""The limits at which a stage is refused."""

import math

from pipeline.chain.plan import judge
from pipeline.recipes.schema import Accept
from pipeline.weights.published import Quality


def test_what_is_not_a_number_is_not_accepted() -> None:
    parent = Quality(0.4, 30.0, 0.96, 1.0)
    assert judge(Accept(psnr_drop=0.1), Quality(0.4, 29.95, 0.96, 1.0), parent) == []
    (refusal,) = judge(Accept(psnr_drop=0.1), Quality(0.4, math.nan, 0.96, math.nan), parent)
    assert refusal.startswith("psnr_drop is +nan")
