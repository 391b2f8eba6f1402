"""K-means against faiss-cpu, on one rank and on two, and its peak memory for few and many regions.

Four parts, each a ratio within one run: seconds of an iteration (assignment, sums and new centroids of all rows) of
ours and of faiss.Kmeans, taking turns; one rank against two, one thread each, taking turns; the inertia of both
backends and of the iterations of faiss from the same starts; peak memory of a process that clusters a store on disk,
streamed.

python -m benchmarks.kmeans --rows 250000     a quicker look
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from threadpoolctl import threadpool_limits

from benchmarks.environment import RESULTS, environment, write_result
from simdetr.mining import pseudo_labels
from simdetr.mining.clustering_config import ClusteringConfig
from simdetr.mining.kmeans import _means, assign_blocks, fit_kmeans, sample_rows, spread_starts
from simdetr.mining.regions import Regions
from simdetr.mining.store import Manifest, ProposalRow, ProposalStore

DIMS, CLUSTERS = 256, 2048
IMAGES_PER_SHARD, REGIONS_PER_IMAGE = 512, 25


def features(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows around 4,000 centres of very different weight, as features of regions are; [rows, DIMS]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4000, DIMS, generator=torch.Generator().manual_seed(0))
    weights = 1 / torch.arange(1, 4001)
    parts = []
    for part in torch.empty(rows).split(1 << 15):
        own = torch.multinomial(weights, len(part), replacement=True, generator=generator)
        parts.append((centres[own] + torch.randn(len(part), DIMS, generator=generator)).to(dtype))
    return torch.cat(parts)


def clocks() -> np.ndarray:
    """Wall clock and this process's CPU time, in seconds; the latter counts all threads and no other process."""
    return np.array([time.perf_counter(), time.process_time()])


def ratios(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, object]:
    """Median seconds of both and the median of the ratios of neighbours, by wall clock and by CPU time."""
    result: dict[str, object] = {}
    for clock, name in enumerate(("wall", "cpu")):
        pairs = [(float(a[clock]), float(b[clock])) for a, b in zip(ours, theirs, strict=True)]
        result[name] = {
            "ours_s": round(statistics.median(a for a, _ in pairs), 3),
            "faiss_s": round(statistics.median(b for _, b in pairs), 3),
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
            "ratios": [round(a / b, 3) for a, b in pairs],
        }
    return result


def speed(rows: torch.Tensor, threads: int, repeats: int) -> dict[str, object]:
    """One iteration of ours and one of faiss in turns, on the same unit rows and centroids."""
    units = torch.nn.functional.normalize(rows, dim=1)
    centroids = units[:CLUSTERS].clone()
    options = {"niter": 1, "spherical": True, "min_points_per_centroid": 1, "max_points_per_centroid": len(rows)}
    ours, theirs = [], []
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        faiss.omp_set_num_threads(threads)
        for repeat in range(repeats + 1):  # the first pair warms up
            started = clocks()
            found = assign_blocks(units.split(1 << 13), centroids, spherical=True, backend="torch")
            _means(found.sums, found.counts, centroids, units[:CLUSTERS], spherical=True)
            ours.append(clocks() - started)
            solver = faiss.Kmeans(DIMS, CLUSTERS, **options)
            started = clocks()
            solver.train(units.numpy(), init_centroids=centroids.numpy())
            spent = clocks() - started
            # without what faiss does before the iteration; its CPU time is not told apart
            theirs.append(np.array([solver.iteration_stats[0]["time"], spent[1]]))
            if repeat == 0:
                ours.clear(), theirs.clear()
    result = ratios(ours, theirs)
    return {"threads": threads, "rows": len(rows), **result, "met": bool(result["wall"]["ratio"] <= 1.0)}


def both_threads(rows: torch.Tensor, repeats: int) -> list[dict[str, object]]:
    return [speed(rows, threads, repeats) for threads in (1, 2)]


def _rank(rank: int, address: str, rows: int, repeats: int, out: str) -> None:
    """One rank with all rows and the other with none, then half each, in turns; rank 0 keeps the times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    everything = features(rows, 1, torch.float16)
    centroids = torch.nn.functional.normalize(everything[:CLUSTERS].float(), dim=1)
    alone = everything.split(1 << 13) if rank == 0 else ()
    shared = everything.split(1 << 13)[rank::2]
    spent: dict[str, list[list[float]]] = {"alone": [], "shared": []}
    for repeat in range(repeats + 1):
        for name, blocks in (("alone", alone), ("shared", shared)):
            dist.barrier()
            started = clocks()
            found = assign_blocks(blocks, centroids, spherical=True, backend="torch")
            _means(found.sums, found.counts, centroids, centroids, spherical=True)
            if repeat:
                spent[name].append((clocks() - started).tolist())
    times = [None, None]
    dist.all_gather_object(times, spent)
    if rank == 0:
        Path(out).write_text(json.dumps(times))
    dist.destroy_process_group()


def two_ranks(rows: int, repeats: int) -> dict[str, object]:
    """How much of twice the speed two ranks have, by wall clock, and how much more CPU time they take."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/times.json"
        mp.spawn(_rank, args=(f"{folder}/rendezvous", rows, repeats, out), nprocs=2)
        first, second = json.loads(Path(out).read_text())
    pairs = list(zip(first["alone"], first["shared"], second["shared"], strict=True))
    efficiency = [alone[0] / (2 * max(a[0], b[0])) for alone, a, b in pairs]
    return {
        "rows": rows,
        "one_rank_s": round(statistics.median(alone[0] for alone, _, _ in pairs), 3),
        "two_ranks_s": round(statistics.median(a[0] for _, a, _ in pairs), 3),
        "efficiency": round(statistics.median(efficiency), 3),
        "efficiencies": [round(value, 3) for value in efficiency],
        "efficiency_by_cpu_time": round(statistics.median(alone[1] / (a[1] + b[1]) for alone, a, b in pairs), 3),
        "bar": 0.85,
        "met": statistics.median(efficiency) >= 0.85,
    }


def agreement(rows: torch.Tensor, clusters: int, iterations: int) -> dict[str, float]:
    """Inertia of both backends and of faiss' own iterations from the same starts, as parts of ours."""
    options = {"max_iterations": iterations, "tolerance": -1.0}
    ours = fit_kmeans(rows, clusters, **options).inertia
    other = fit_kmeans(rows, clusters, **options, backend="faiss").inertia
    units = torch.nn.functional.normalize(rows, dim=1)
    sample = sample_rows([rows], clusters, spherical=True, seed=0)
    starts = spread_starts(sample, clusters, torch.Generator().manual_seed(0))
    options = {"niter": iterations, "spherical": True, "min_points_per_centroid": 1}
    solver = faiss.Kmeans(DIMS, clusters, max_points_per_centroid=len(rows), **options)
    solver.train(units.numpy(), init_centroids=starts.numpy())
    theirs = assign_blocks([units], torch.from_numpy(solver.centroids), spherical=True, backend="torch").inertia
    return {
        "rows": len(rows),
        "clusters": clusters,
        "iterations": iterations,
        "faiss_backend": round(other / ours, 6),
        "faiss_alone": round(theirs / ours, 6),
        "met": bool(max(abs(other / ours - 1), abs(theirs / ours - 1)) < 0.01),
    }


def write_store(folder: Path, regions: int) -> None:
    """A store of so many regions, as mining writes it."""
    images = regions // REGIONS_PER_IMAGE
    store = ProposalStore.create(folder, Manifest({}, "none", "none", images, IMAGES_PER_SHARD, DIMS))
    few, ones = np.ones(REGIONS_PER_IMAGE, np.int16), np.ones(REGIONS_PER_IMAGE, np.float32)
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (REGIONS_PER_IMAGE, 1))
    for shard in range(store.manifest.num_shards):
        own = store.manifest.images_of(shard)
        values = features(len(own) * REGIONS_PER_IMAGE, shard).numpy().reshape(len(own), REGIONS_PER_IMAGE, DIMS)
        rows = [
            ProposalRow(f"{i}.jpg", 9, 9, Regions(boxes, v, area=ones, stride=few, k=few, cluster=few, score=ones))
            for i, v in zip(own, values, strict=True)
        ]
        store.write_shard(shard, rows)


def peak_mb() -> float:
    """Of this process since it began; getrusage would also tell what its parent had when it started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def cluster_once(folder: Path) -> dict[str, float]:
    """Cluster a store in this process, streamed; the peaks after importing, clustering and labelling, in MB."""
    torch.set_num_threads(1)
    pseudo_labels._KEEP_IN_MEMORY_BYTES = 0
    imported, started = peak_mb(), time.perf_counter()
    clustering = pseudo_labels.cluster_regions(ProposalStore(folder), ClusteringConfig(CLUSTERS, max_iterations=1))
    seconds, clustered = time.perf_counter() - started, peak_mb()
    labels = pseudo_labels.to_labels(ProposalStore(folder), len(clustering.labels), clustering)
    columns = (labels.offsets, labels.boxes_xyxy, labels.classes, labels.scores, labels.areas, labels.crowd)
    return {
        "regions": len(labels.classes),
        "labels_bytes_per_region": round(sum(column.nbytes for column in columns) / len(labels.classes), 1),
        "imported_mb": round(imported, 1),
        "peak_rss_mb": round(clustered, 1),
        "with_labels_mb": round(peak_mb(), 1),
        "seconds": round(seconds, 1),
        "seconds_per_pass": round(clustering.history[-1].seconds, 1),
    }


def memory(counts: list[int]) -> dict[str, object]:
    """Peak memory by number of regions, each store clustered by a process of its own."""
    runs = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            write_store(Path(folder), count)
            disk = sum(path.stat().st_size for path in Path(folder).iterdir())
            command = [sys.executable, "-m", "benchmarks.kmeans", f"--once={folder}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
            runs.append(json.loads(done.stdout) | {"store_mb": round(disk / 1e6, 1)})
    few, many = runs[0], runs[-1]
    return {
        "runs": runs,
        "difference": round(many["peak_rss_mb"] / few["peak_rss_mb"] - 1, 4),
        "bar": 0.10,
        "met": abs(many["peak_rss_mb"] / few["peak_rss_mb"] - 1) < 0.10,
    }


def main() -> None:
    """Measure and write ``results/kmeans.json``; parts that are not asked for are kept from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rank-rows", type=int, default=500_000)
    parser.add_argument("--regions", type=int, nargs=2, default=(500_000, 2_000_000), help="of the stores on disk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["speed", "ranks", "agreement", "memory"])
    parser.add_argument("--name", default="kmeans", help="of the result file")
    parser.add_argument("--once", type=Path, help="cluster this store in this process and print the peak")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(cluster_once(arguments.once)))
        return
    result: dict[str, object] = {"what": f"{DIMS} dimensions, {CLUSTERS} clusters, spherical, float32 products"}
    before = RESULTS / f"{arguments.name}.json"
    result |= json.loads(before.read_text()) if before.is_file() else {}
    parts = {
        "memory": lambda: memory(arguments.regions),
        "ranks": lambda: two_ranks(arguments.rank_rows, arguments.repeats),
        "agreement": lambda: agreement(features(100_000, 1), 256, 10),
        "speed": lambda: both_threads(features(arguments.rows, 1), arguments.repeats),
    }
    for part in arguments.parts:
        result[part] = parts[part]()
        result["environment"] = environment(("torch", "faiss-cpu", "numpy", "pyarrow"))
        path = write_result(arguments.name, result)
    print(path.read_text())


if __name__ == "__main__":
    main()
