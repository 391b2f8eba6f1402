"""The stopwatches: slow decoding and slow encoding are seen where they are, and the rows are those of the loop."""

import time

import pytest
import torch

from simdetr.data.images import open_images
from simdetr.mining import preview as mining_time
from simdetr.mining.batch import MiningConfig
from simdetr.mining.colour_texture import ColourTextureEncoder
from simdetr.mining.preview import MiningTime, mine_timed, warm_up

CONFIG = MiningConfig(image_size=64, batch_size=4)
LATE_S = 0.05


class Slow(ColourTextureEncoder):
    def forward(self, images):
        time.sleep(LATE_S)
        return super().forward(images)


def test_parts_add_up():
    taken = MiningTime(images=10, total=5.0, decoding=3.0, waiting=1.0, encoder=1.5, cpu=7.5, batches=4)
    assert (taken.images_per_s, taken.clustering, taken.busy_cores) == (2, 2.5, 1.5)


def test_the_encoder_is_timed(scenes):
    rows, unreadable, taken = mine_timed(open_images(scenes), range(10), Slow(), CONFIG, "cpu")
    assert (len(rows), unreadable, taken.images, taken.batches) == (10, {}, 10, 3)
    assert taken.encoder >= 3 * LATE_S
    assert taken.encoder + taken.waiting <= taken.total
    assert taken.clustering == pytest.approx(taken.total - taken.encoder - taken.waiting)


def test_slow_decoding_is_waited_for(scenes, monkeypatch):
    from simdetr.mining import batch as image_loading

    read = image_loading.read_image
    monkeypatch.setattr(image_loading, "read_image", lambda record: (time.sleep(LATE_S), read(record))[1])
    _, _, taken = mine_timed(open_images(scenes), range(8), ColourTextureEncoder(), CONFIG, "cpu")
    assert taken.decoding >= 8 * LATE_S
    assert taken.waiting >= LATE_S  # for the first one at least, nothing else can be done


def test_a_warm_up_is_one_readable_image_on_a_processor_and_a_batch_elsewhere(own_scenes, monkeypatch):
    seen = []
    monkeypatch.setattr(mining_time, "mine_rows", lambda images, *_: seen.append([i.image_id for i in images]))
    source = open_images(own_scenes)
    source.path_of(source.ids[0]).write_bytes(b"")
    encoder = ColourTextureEncoder()
    warm_up(source, range(3), encoder, CONFIG, "cpu")
    warm_up(source, range(3), encoder, CONFIG, "cuda")
    assert seen == [[source.ids[1]], [source.ids[1]] * 3]


def test_computing_elsewhere_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    timed = mining_time._TimedEncoder(ColourTextureEncoder(), "cuda:1")
    timed(torch.zeros(1, 3, 32, 32))
    assert waited == ["cuda:1", "cuda:1"]
    assert timed.seconds > 0 and timed.calls == 1
