"""Views depend on (seed, epoch, index) alone, and damaged images do not stop a training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simdetr.data.images import open_images
from simdetr.data.quarantine import Quarantine, TooManyUnreadableError
from simdetr.encoder_training.crops import EncoderData, Views

lightly = pytest.importorskip("lightly")


@pytest.fixture
def crops():
    from lightly.transforms.vicreg_transform import VICRegTransform

    return VICRegTransform(input_size=32, normalize=None, gaussian_blur=0.7, solarize_prob=0.5)


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_item_depends_on_seed_epoch_and_index_alone(scenes, crops):
    source = open_images(scenes)
    views = Views(source, crops, seed=5, epoch=2)
    expected = views[3]
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    views[1]
    assert same(views[3], expected)
    assert np.array_equal(np.random.get_state()[1], states[0])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[1])
    for other in (Views(source, crops, seed=6, epoch=2), Views(source, crops, seed=5, epoch=3)):
        assert not same(other[3], expected)
    assert not same(views[4], expected)
    assert not torch.equal(*expected)


def test_unreadable_image_is_replaced_and_listed(own_scenes, crops, tmp_path):
    source = open_images(own_scenes)
    source.path_of(source.ids[2]).write_bytes(b"no image")
    quarantine = Quarantine(tmp_path / "quarantine.csv", total=100)
    views = Views(source, crops, quarantine)
    assert views[2][0].shape == (3, 32, 32)
    assert list(quarantine.reasons) == [source.ids[2]]


def test_too_many_unreadable_images_stop(own_scenes, crops, tmp_path):
    source = open_images(own_scenes)
    source.path_of(source.ids[2]).write_bytes(b"no image")
    data = EncoderData(source, crops, 2, 0, 0, tmp_path / "quarantine.csv")  # one of six
    with pytest.raises(TooManyUnreadableError, match="1 of 6"):
        list(data.train_dataloader())


def test_batches_hold_every_image_once_and_resume_in_the_middle(scenes, crops, tmp_path):
    def loader(position=None):
        data = EncoderData(open_images(scenes), crops, 5, 0, 7, tmp_path / "quarantine.csv")
        if position is not None:
            data.load_state_dict(position)
        return data, data.train_dataloader()

    data, whole = loader()
    batches = []
    for batch in whole:
        batches.append(batch)
        if len(batches) == 1:
            position = data.state_dict()
    assert len(batches) == 3 and all(view.shape == (5, 3, 32, 32) for batch in batches for view in batch)
    assert all(len({float(view.sum()) for view in batch[0]}) == 5 for batch in batches)  # nothing twice in a batch
    _, rest = loader(position)
    assert all(same(a, b) for a, b in zip(rest, batches[1:], strict=True))


def test_fewer_images_than_a_batch_are_refused(scenes, crops, tmp_path):
    with pytest.raises(
        ValueError, match=r"batch_size: expected at most the number of images, got 13 for 12 in .*lower"
    ):
        EncoderData(open_images(scenes), crops, 13, 0, 0, tmp_path / "quarantine.csv")
