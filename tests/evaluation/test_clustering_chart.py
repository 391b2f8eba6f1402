import re

import numpy as np
import pytest

from simdetr.reports.charts import draw_clustering, size_histogram


def test_histogram_counts_every_class_once():
    sizes = np.array([0, 0, 1, 2, 3, 3, 4, 7, 8, 1024, 2047])
    assert size_histogram(sizes) == {
        "0": 2, "1": 1, "2–3": 3, "4–7": 2, "8–15": 1, "16–31": 0, "32–63": 0, "64–127": 0, "128–255": 0,
        "256–511": 0, "512–1,023": 0, "1,024–2,047": 2,
    }  # fmt: skip
    assert size_histogram(np.array([40, 40])) == {"32–63": 2}  # begins where there are any
    many = np.random.default_rng(0).integers(0, 10**6, 5000)
    assert sum(size_histogram(many).values()) == 5000


def test_chart_shows_counts_and_iterations():
    record = {"sizes": [1, 5, 6, 0], "inertia": [24.0, 12.0, 6.0], "regions": 12}
    svg = draw_clustering(record)
    assert svg.startswith("<svg") and svg == draw_clustering(record)
    assert "currentColor" in svg
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {"0", "1", "2–3", "4–7", "regions of a class", "inertia per region", "iteration"} <= set(texts)


def test_a_record_without_sizes_is_refused():
    with pytest.raises(ValueError, match="expected sizes, inertia and regions, got no sizes"):
        draw_clustering({"inertia": [1.0], "regions": 3})
