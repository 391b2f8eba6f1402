"""What ``simdetr import`` and ``simdetr export`` do: checkpoints and runs in, files of other formats out."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console

from simdetr.data.label_files import read_labels, write_result
from simdetr.data.storage import check_writable

OUT = Console()


def import_detector(
    checkpoint: Path,
    out: Path = Path("runs/imported"),
    labels: Path | None = None,
    short_side: int | None = None,
    max_side: int | None = None,
    options: tuple[str, ...] = (),
) -> None:
    """Turn another project's detector into a detector folder: Deformable DETR, DETReg, ViDT, transformers.

    The architecture is read off names and shapes of tensors. What they do not tell is said, and can be told by dotted
    options: ``--detector.num_heads 4``, ``--detector.dilation true``.

    Args:
        checkpoint: A .pth of the original's code, or a folder that ``save_pretrained`` of transformers wrote.
        out: Detector folder to write; what predict, evaluate, finetune and export take.
        labels: COCO JSON of the data that it was trained on, for the names of its classes.
        short_side: Shorter side of images in pixels; 800 if the checkpoint does not say.
        max_side: Longest side of images in pixels; 1333 if the checkpoint does not say.
        options: ``--detector.name=value`` strings; dotted options on the command line end here.
    """
    from simdetr.exchange.convert import import_checkpoint

    categories = read_labels(labels).categories if labels is not None else ()
    sizes = {"short_side": short_side, "max_side": max_side}
    told = {name: pixels for name, pixels in sizes.items() if pixels is not None}
    OUT.print(import_checkpoint(checkpoint, out, detector_arguments(options), categories, told), soft_wrap=True)


def detector_arguments(options: tuple[str, ...]) -> dict[str, object]:
    """Arguments of a detector from ``--detector.name=value`` strings; values are YAML.

    Raises:
        ValueError: another section.
    """
    arguments: dict[str, object] = {}
    for option in options:
        name, _, value = option.partition("=")
        section, _, argument = name.removeprefix("--").partition(".")
        if section != "detector":
            raise ValueError(f"{name}: expected --detector.NAME, an argument of the detector.")
        arguments[argument] = yaml.safe_load(value)
    return arguments


def labels(run: Path, stage: int, out: Path) -> None:
    """Boxes of a stage, mined or relabelled, as COCO JSON with scores.

    Args:
        run: Run folder of ``pretrain``.
        stage: 0 = mined, j = relabelled by the detector of stage j.
        out: File to write: .json or .parquet.
    """
    from simdetr.training.run_folder import RunFolder

    folder = RunFolder(run)
    path = folder.labels(stage)
    if not path.is_file():
        done = [number for number in folder.stages() if folder.labels(number).is_file()]
        raise FileNotFoundError(f"stage: {run} has no labels of stage {stage}; it has those of stages {done}.")
    OUT.print(write_result(read_labels(path), out), soft_wrap=True)


def safetensors(checkpoint: Path, out: Path) -> None:
    """A detector as a folder of its own for simdetr, from a run or a .ckpt: safetensors and JSON.

    Args:
        checkpoint: Run folder, detector folder or checkpoint.
        out: Folder to write: model.safetensors and config.json.
    """
    from simdetr.exchange.convert import export_safetensors
    from simdetr.training.run_folder import detector_folder

    OUT.print(export_safetensors(detector_folder(checkpoint), out), soft_wrap=True)


def transformers(checkpoint: Path, out: Path) -> None:
    """A folder for AutoModelForObjectDetection.from_pretrained; Deformable DETR and transformers' own detectors.

    Args:
        checkpoint: Run folder, detector folder or checkpoint.
        out: Folder to write: model.safetensors, config.json and preprocessor_config.json.
    """
    from simdetr.exchange.convert import export_transformers
    from simdetr.training.run_folder import detector_folder

    OUT.print(export_transformers(detector_folder(checkpoint), out), soft_wrap=True)


def official(checkpoint: Path, out: Path) -> None:
    """A .pth under the names of the original code; Deformable DETR, DETReg and ViDT.

    Args:
        checkpoint: Run folder, detector folder or checkpoint.
        out: File to write, .pth; its tensors are in the entry ``model``.
    """
    check_writable(out)
    from simdetr.exchange.convert import export_official
    from simdetr.training.run_folder import detector_folder

    OUT.print(export_official(detector_folder(checkpoint), out), soft_wrap=True)


def onnx(
    checkpoint: Path,
    out: Path,
    verify: bool = False,
    image_size: tuple[int, int] | None = None,
    opset: int | None = None,
) -> None:
    """A file for onnxruntime and other engines, for any batch; images of any size where the network allows.

    Args:
        checkpoint: Run folder, detector folder or checkpoint.
        out: File to write, .onnx.
        verify: Run the file by onnxruntime and compare it with the detector; without a value.
        image_size: Height and width in pixels that all images have, as ``[800, 1088]``; any size when left out.
        opset: Version of ONNX's operators, 18 by default.
    """
    check_writable(out)
    from simdetr.exchange.onnx import export_onnx
    from simdetr.training.run_folder import detector_folder

    summary = export_onnx(detector_folder(checkpoint), out, verify=verify, image_size=image_size, opset=opset)
    OUT.print(summary, soft_wrap=True)
