"""One word for an encoder in (``--encoder``), the config's options that mean it out.

A folder of ``simdetr encoder fit``, a timm model with its own weights, or a word for weights that a package carries;
anything else is for the config's section ``encoder``.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import timm

from simdetr.data.packaged_weights import PACKAGED
from simdetr.proposals.features import TimmEncoder
from simdetr.proposals.fitted_encoder import read_record

_FOLDER = "a folder of `simdetr encoder fit`"
_ELSE = "for weights of your own, see TimmEncoder in docs/encoders.md"


def encoder_options(encoder: str | None) -> tuple[str, ...]:
    """Options that put an encoder in place of the config's; later options may still change it.

    Weights of timm are fetched here, once, before any process of the run needs them.

    Args:
        encoder: a folder, a timm name such as ``resnet50.a1_in1k`` or a word of ``PACKAGED``; None leaves the config's.

    Raises:
        FileNotFoundError: a folder that is absent, or holds no finished training.
        ValueError: a name that timm does not know or has no weights for, or weights that cannot be fetched.
    """
    if encoder is None:
        return ()
    if Path(encoder).is_dir():
        read_record(encoder)
        return (_option("FittedEncoder", folder=str(encoder)),)
    if Path(encoder).exists() or any(separator in encoder for separator in "/\\"):
        what = "a file" if Path(encoder).exists() else "which is not there"
        raise FileNotFoundError(f"encoder: expected {_FOLDER} or a timm name, got {encoder}, {what}; {_ELSE}")
    if encoder in PACKAGED:
        PACKAGED[encoder].path()
        return (_option("TimmEncoder", model=encoder, pretrained=True),)
    _check_name(encoder)
    try:
        TimmEncoder(encoder, pretrained=True)
    except Exception as error:  # fetching fails in all kinds of ways
        raise ValueError(
            f"encoder: {encoder} of timm cannot be used: {error} Without a network, give {_FOLDER}; {_ELSE}"
        ) from error
    return (_option("TimmEncoder", model=encoder, pretrained=True),)


def _option(name: str, **arguments: object) -> str:
    return f"--encoder={json.dumps({'class_path': f'simdetr.proposals.{name}', 'init_args': arguments})}"


def _check_name(name: str) -> None:
    """Whether timm has this model, and weights for it."""
    known = timm.list_pretrained()
    models = {full.partition(".")[0] for full in known}
    if name in known or name in models:
        return
    near = difflib.get_close_matches(name, [*PACKAGED, *models, *known], n=3)
    tags = [full for full in known if full.partition(".")[0] == name.partition(".")[0]]
    hint = f"; it has {', '.join(tags[:5])}" if tags else f"; did you mean {', '.join(near)}?" if near else ""
    without = "has no weights for" if timm.is_model(name.partition(".")[0]) and not tags else "does not know"
    raise ValueError(
        f"encoder: expected {_FOLDER} or a timm model, got {name!r}, which is no folder here and which timm "
        f"{without}{hint}"
    )
