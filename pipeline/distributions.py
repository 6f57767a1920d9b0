"""Order statistics and histograms of counts, as manifests and reports hold them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.results import Distribution, Histogram

_MOST_BINS = 30


def distribution(values: npt.ArrayLike) -> Distribution:
    """The distribution of one or more whole numbers (words or tokens of a record)."""
    array = np.asarray(values, dtype=np.float64)
    low, high = int(array.min()), int(array.max())
    # Whole-number edges: a bin of 2.5 words would hold two counts in one place and three in the next.
    width = max(1, -(-(high - low + 1) // _MOST_BINS))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(array, bins=edges)
    return Distribution(
        n=len(array),
        minimum=float(low),
        median=float(np.median(array)),
        p95=float(np.percentile(array, 95)),
        maximum=float(high),
        histogram=Histogram(start=low, width=width, counts=counts.tolist()),
    )
