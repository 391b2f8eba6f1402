"""Losses on their way to the host, and how often a training step waits for its device.

There need not be a GPU: tensors of torch's fake mode have a device and no data, so that whatever needs a value on the
host (``if tensor``, ``item``, ``nonzero``, indexing with booleans) raises, and every copy between devices is seen.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from simdetr.data.dataset import Batch
from simdetr.detectors import DetectionLoss, matcher
from simdetr.training.detection_task import DetectionTask, PendingLosses

NOTHING = Batch(torch.zeros(0, 3, 1, 1), torch.zeros(0, 1, 1, dtype=torch.bool), [])


def test_values_arrive_by_name():
    losses = {"loss": torch.tensor(2.5, requires_grad=True), "loss_ce": torch.tensor(1.0, dtype=torch.float64)}
    pending = PendingLosses(NOTHING, losses)
    values, finite = pending.read()
    assert {name: float(value) for name, value in values.items()} == {"loss": 2.5, "loss_ce": 1.0}
    assert finite and not any(value.requires_grad for value in values.values())
    assert pending.batch is NOTHING


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_broken_term_is_seen(value):
    values, finite = PendingLosses(NOTHING, {"loss": torch.tensor(1.0), "other": torch.tensor(value)}).read()
    assert not finite
    assert [name for name, term in values.items() if not torch.isfinite(term)] == ["other"]


def broken_on_one_rank(rank, address, folder):
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    values, finite = PendingLosses(NOTHING, {"loss": torch.tensor(float("nan") if rank else 1.0)}).read()
    torch.save({"loss": values["loss"], "finite": finite}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_all_ranks_hear_of_it(tmp_path):
    mp.spawn(broken_on_one_rank, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    sound, broken = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not sound["finite"] and not broken["finite"]
    assert sound["loss"] == 1.0 and broken["loss"].isnan()


class Copy(NamedTuple):
    """A copy between devices."""

    to: str
    waits: bool
    numel: int


class Copies(TorchDispatchMode):
    """Lists the copies between devices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        source = {value.device.type for value in args if isinstance(value, Tensor)}
        if isinstance(result, Tensor) and source and source != {result.device.type} and operator._schema.name in COPIES:
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
            self.seen.append(Copy(result.device.type, waits, result.numel()))
        return result


COPIES = ("aten::_to_copy", "aten::copy_", "aten::to")


class Event:
    def synchronize(self):
        """There is nothing to wait for."""


@pytest.fixture
def fake_gpu(monkeypatch):
    """What code for a GPU asks of one beside tensors."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    stream = type("Stream", (), {"record_event": lambda self: Event()})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    # the solver wants numbers, which fake tensors have not, also on the host
    monkeypatch.setattr(matcher, "_assign_layers", first_queries)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def first_queries(costs, counts):
    """An assignment for every layer."""
    with unset_fake_temporarily():
        images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        order = torch.cat([torch.arange(count) for count in counts])
        return matcher.Matches(*(indices.expand(len(costs), -1) for indices in (images, order, order)))


def batch_on(device, counts=(3, 1)):
    images = torch.randn(len(counts), 3, 64, 64, device=device)
    mask = torch.zeros(len(counts), 64, 64, dtype=torch.bool, device=device)
    targets = [
        {
            "labels": torch.zeros(count, dtype=torch.int64, device=device),
            "boxes": torch.full((count, 4), 0.5, device=device),
        }
        for count in counts
    ]
    return Batch(images, mask, targets)


VARIANTS = {"base": {}, "two-stage": {"with_box_refine": True, "two_stage": True}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("criterion", [None, DetectionLoss], ids=["own loss", "criterion"])
def test_a_step_waits_for_its_device_once(variant, criterion, fake_gpu, make_detector):
    with torch.device("cuda"):
        detector = make_detector(3, num_feature_levels=4, **VARIANTS[variant]).train()
    task = DetectionTask(detector, criterion=criterion and criterion())
    batch = batch_on("cuda")
    with Copies() as copies:
        loss = task.training_step(batch, 0)
    assert loss.device.type == "cuda" and loss.requires_grad
    matches = [copy for copy in copies.seen if copy.to == "cuda"]
    out = [copy for copy in copies.seen if copy.to == "cpu"]
    decoders = 1 + (variant == "two-stage")
    assert len(matches) == decoders and not any(copy.waits for copy in matches)
    # the costs of all layers and images, which matching needs, and the losses, which nobody waits for
    assert [copy.waits for copy in out] == [True, False]
    cells = sum(side**2 for side in (8, 4, 2, 1)) if variant == "two-stage" else 0
    assert out[0].numel == 2 * 3 * (2 * 8 + cells)


class Values(TorchDispatchMode):
    """Lists the operators that want a tensor's value on the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"):
            self.seen.append(name)
        return operator(*args, **(kwargs or {}))


def test_backward_pass_and_optimiser_need_no_values(make_detector):
    """The engine of the backward pass wants a real device, so this part runs on the CPU."""
    task = DetectionTask(make_detector(3, num_queries=4, with_box_refine=True, two_stage=True).train())
    optimiser = task.new_optimiser()
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for _ in range(2):  # the second step finds the optimiser's state
        loss = task.training_step(batch_on("cpu"), 0)
        with Values() as values:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.1)
            optimiser.step()
            optimiser.zero_grad()
        assert values.seen == []
    with Values() as values:
        loss.item()
    assert values.seen == ["_local_scalar_dense"]


def test_the_oracle_sees_what_it_should(fake_gpu):
    value = torch.ones(3, device="cuda")
    for needs_the_value in (lambda: bool(value.sum()), lambda: value.nonzero(), lambda: value[value > 0], value.tolist):
        with pytest.raises(Exception, match=r"aten\.|data-dependent|data dependent"):
            needs_the_value()
    with Copies() as copies:
        torch.tensor([1.0, 2.0], device="cpu").to("cuda")
        value.new_tensor([1.0, 2.0])
        value.cpu()
        value.to("cpu", non_blocking=True)
    assert [copy[:2] for copy in copies.seen[-2:]] == [("cpu", True), ("cpu", False)]
    assert [copy[:2] for copy in copies.seen[:-2]] == [("cuda", True)] * 2
