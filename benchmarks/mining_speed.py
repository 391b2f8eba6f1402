"""Batched clustering and regions against the straightforward per-image pipeline, side by side, without the encoder.

Per image the plain pipeline computes the same affinity per level, runs scikit-learn's SpectralClustering on it for each
K and scipy.ndimage.label on each cluster's mask. Ours is `cluster_maps`: the same maps to labels, regions and boxes.
Both take turns on chunks of the same images, so that other load on the machine meets both, and the plain one runs with
as many threads as make it fastest. Then the normalised cuts
of both partitions are compared on the same graphs.

Bar: at least 5 times as fast on 64 images of coco256 at 448 px on 2 cores, normalised cut within 0.5 %.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import numpy as np
import torch
from scipy import ndimage
from sklearn.cluster import SpectralClustering
from threadpoolctl import threadpool_limits

from benchmarks.environment import DATA, environment, write_result
from simdetr.data.images import open_images, read_image
from simdetr.mining.batch import MiningConfig, cluster_maps, encode, mine_maps, shrink
from simdetr.mining.encoders import TimmEncoder
from simdetr.mining.spectral_clustering import cell_affinity, normalised_cut


def square(image: torch.Tensor, side: int) -> torch.Tensor:
    """Resize to side × side, so that every graph has the largest number of nodes at that size."""
    resized = torch.nn.functional.interpolate(image[None].float(), (side, side), mode="bilinear", antialias=True)
    return resized[0].round().to(torch.uint8)


def plain_pipeline(maps: dict[int, torch.Tensor], config: MiningConfig) -> tuple[list[np.ndarray], list[tuple]]:
    """One image: labels of every clustering, and the boxes of every connected component."""
    labels, boxes = [], []
    for stride, counts in config.clusters.items():
        features = maps[stride].numpy().reshape(maps[stride].shape[0], -1).T
        if config.centre:
            features = features - features.mean(axis=0)
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
        cosine = features @ features.T
        affinity = np.exp((cosine - 1) / config.temperature) if config.affinity == "exp" else np.maximum(cosine, 0)
        for k in counts:
            model = SpectralClustering(k, affinity="precomputed", random_state=config.seed)
            label = model.fit_predict(affinity).reshape(maps[stride].shape[1:])
            labels.append(label)
            for cluster in range(k):
                components, _ = ndimage.label(label == cluster)
                boxes += ndimage.find_objects(components)
    return labels, boxes


def compare_cuts(
    maps: dict[int, torch.Tensor], plain: list[list[np.ndarray]], config: MiningConfig
) -> dict[str, dict[str, float]]:
    """Mean normalised cut of both partitions per level and K, over the images of a chunk."""
    candidates = cluster_maps(maps, config)
    weights = {
        s: cell_affinity(maps[s], config.affinity, config.temperature, centre=config.centre) for s in config.clusters
    }
    cuts = {}
    order = [(stride, k) for stride, counts in config.clusters.items() for k in counts]
    for index, (stride, k) in enumerate(zip(candidates.strides, candidates.ks, strict=True)):
        step = candidates.labels.shape[2] // maps[stride].shape[2]
        ours = candidates.labels[:, index, ::step, ::step].flatten(1)
        theirs = torch.from_numpy(np.stack([labels[order.index((stride, k))].ravel() for labels in plain])).long()
        cuts[f"stride {stride}, K {k}"] = {
            "ours": float(normalised_cut(weights[stride], ours).mean()),
            "scikit-learn": float(normalised_cut(weights[stride], theirs).mean()),
        }
    return cuts


def clocks() -> np.ndarray:
    """Wall clock and this process's CPU time, in seconds; the latter counts both cores and no other process."""
    return np.array([time.perf_counter(), time.process_time()])


def best_threads(maps: dict[int, torch.Tensor], config: MiningConfig) -> int:
    """With how many threads the plain pipeline is fastest: small decompositions can be slower on more."""
    seconds = {}
    for threads in {1, torch.get_num_threads()}:
        with threadpool_limits(threads):
            plain_pipeline({s: m[0] for s, m in maps.items()}, config)
            started = time.perf_counter()
            for i in range(1, min(5, len(maps[32]))):
                plain_pipeline({s: m[i] for s, m in maps.items()}, config)
            seconds[threads] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)


def measure(chunks: list[dict[int, torch.Tensor]], config: MiningConfig, repeats: int) -> dict[str, object]:
    """Seconds per image of both, taking turns chunk by chunk, and the cuts."""
    times: dict[str, list[float]] = {"plain": [], "ours": [], "ours_with_filters": []}
    cpu_times: dict[str, list[float]] = {name: [] for name in times}
    cuts: list[dict[str, dict[str, float]]] = []
    cluster_maps(chunks[0], config)  # first calls allocate and load
    plain_threads = best_threads(chunks[0], config)
    for repeat in range(repeats):
        spent = {name: np.zeros(2) for name in times}
        for maps in chunks:
            count = len(maps[32])
            started = clocks()
            with threadpool_limits(plain_threads):
                plain = [plain_pipeline({s: m[i] for s, m in maps.items()}, config)[0] for i in range(count)]
            spent["plain"] += clocks() - started
            started = clocks()
            cluster_maps(maps, config)
            spent["ours"] += clocks() - started
            started = clocks()
            mine_maps(maps, [(448, 448)] * count, config)
            spent["ours_with_filters"] += clocks() - started
            if repeat == 0:
                cuts.append(compare_cuts(maps, plain, config))
        for name, (wall, cpu) in ((name, clock.tolist()) for name, clock in spent.items()):
            times[name].append(wall / sum(len(maps[32]) for maps in chunks))
            cpu_times[name].append(cpu / sum(len(maps[32]) for maps in chunks))
    ratios = [plain / ours for plain, ours in zip(times["plain"], times["ours"], strict=True)]
    sizes = [len(maps[32]) for maps in chunks]
    mean = {
        key: {who: float(np.average([c[key][who] for c in cuts], weights=sizes)) for who in ("ours", "scikit-learn")}
        for key in cuts[0]
    }
    total = {who: sum(cut[who] for cut in mean.values()) / len(mean) for who in ("ours", "scikit-learn")}
    return {
        "plain_threads": plain_threads,
        "ms_per_image": {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()},
        "cpu_ms_per_image": {name: round(1e3 * statistics.median(values), 2) for name, values in cpu_times.items()},
        "speedup": {"median": round(statistics.median(ratios), 2), "all": [round(r, 2) for r in ratios]},
        "normalised_cut": mean | {"mean": total},
        "cut_ratio": round(total["ours"] / total["scikit-learn"], 4),
        "bar": {"speedup": 10.0, "cut_ratio": 1.005},
        "met": statistics.median(ratios) >= 10.0 and total["ours"] <= 1.005 * total["scikit-learn"],
    }


def main() -> None:
    """Measure and write ``results/mining_speed.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=2, help="of ours; the plain pipeline takes 1 or as many, whichever is faster"
    )
    parser.add_argument("--encoder", default="resnet50", help="timm name; untrained, its features are not timed")
    parser.add_argument("--name", default="mining_speed", help="of the result file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")  # graphs that are not connected
    torch.set_num_threads(arguments.threads)
    config = MiningConfig()
    source = open_images(DATA / "coco256" / "train")
    encoder = TimmEncoder(arguments.encoder, random_weights=True)
    images = [square(read_image(source[i].path), config.image_size) for i in range(arguments.images)]
    starts = range(0, len(images), config.batch_size)
    chunks = [encode(torch.stack(images[i : i + config.batch_size]), encoder) for i in starts]
    result = {
        "what": f"{len(images)} images of coco256/train at 448 x 448, {arguments.encoder} features (untrained), "
        f"N = 196 with K = 2, 4, 8 and N = 784 with K = 8, 16; encoder not timed",
        **measure(chunks, config, arguments.repeats),
        "affinity": {"clamp": measure(chunks[:1], MiningConfig(affinity="clamp"), 1)},
        "short_side_of_product": list(shrink(read_image(source[0].path), config.image_size).shape[1:]),
        "environment": environment(("torch", "scikit-learn", "scipy", "numpy", "timm")),
    }
    path = write_result(arguments.name, result)
    print(path.read_text())


if __name__ == "__main__":
    main()
