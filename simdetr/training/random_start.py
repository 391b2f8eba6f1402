"""Is a detector about to learn on a backbone whose random weights it must not change? Detector in, an error out.

Frozen batch norm and frozen layers are for weights that were learnt: random ones stay random for good. Whether weights
came, by whatever way, is read off the network's normalisation layers, which no training leaves at their start.
"""

from __future__ import annotations

from torch import Tensor, nn

from simdetr.detectors.detector import Detector

_NAMES_SHOWN = 2


class RandomStartError(ValueError):
    """A training would start from random weights that are frozen."""


def fixed_parts(detector: Detector) -> list[str]:
    """Names of the feature network's parts that a training does not change: frozen batch norms, frozen parameters."""
    body = detector.get_submodule(detector.body_name)
    norms = [name for name, module in body.named_modules() if "FrozenBatchNorm" in type(module).__name__]
    # positions are often constants by design
    frozen = [
        name
        for name, parameter in body.named_parameters()
        if not parameter.requires_grad and not name.endswith("pos_embed")
    ]
    return [*norms, *frozen]


def is_untrained(network: nn.Module) -> bool:
    """Whether every normalisation layer is as it was made; False for a network without any, which does not tell."""
    batch_norms = [module for module in network.modules() if hasattr(module, "running_mean")]
    if batch_norms:
        return all(_all_are(norm.running_mean, 0.0) and _all_are(norm.running_var, 1.0) for norm in batch_norms)
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)]
    affine = [norm for norm in norms if norm.weight is not None and norm.bias is not None]
    return bool(affine) and all(_all_are(norm.weight, 1.0) and _all_are(norm.bias, 0.0) for norm in affine)


def _all_are(values: object, wanted: float) -> bool:
    return isinstance(values, Tensor) and bool((values == wanted).all())


def check_start(detector: Detector, fixed: list[str]) -> None:
    """Refuse a training that would keep random weights.

    Args:
        detector: With the weights that the training starts from.
        fixed: Its ``fixed_parts``.

    Raises:
        RandomStartError: Some parts are fixed, and the feature network was never trained.
    """
    if not fixed or not is_untrained(detector.get_submodule(detector.body_name)):
        return
    shown = ", ".join(fixed[:_NAMES_SHOWN]) + (", …" if len(fixed) > _NAMES_SHOWN else "")
    options = thawing(detector)
    or_learn = f", or let all of it learn ({', '.join(options)})" if options else ""
    raise RandomStartError(
        f"detector: its backbone starts from random weights, and {len(fixed)} of its parts are frozen ({shown}) and "
        "would stay random. Give it weights (pretrained_backbone: true, --model.backbone_weights FILE, or a trained "
        f"detector to start from){or_learn}."
    )


def thawing(detector: Detector) -> list[str]:
    """The arguments that would leave nothing of its backbone fixed, as ``name: value``, if it has others."""
    thawed = detector.thawed(detector.init_args)
    return [f"{name}: {str(value).lower()}" for name, value in _changed(detector.init_args, thawed).items()]


def _changed(before: dict[str, object], after: dict[str, object]) -> dict[str, object]:
    """What differs in nested arguments, by the innermost names."""
    found: dict[str, object] = {}
    for name, value in after.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            found |= _changed(old, value)
        elif value != old:
            found[name] = value
    return found
