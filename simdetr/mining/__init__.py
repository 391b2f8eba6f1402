"""From images to proposals and pseudo-labels: encoder, local clustering, regions, filters, global clustering.

In reading order:

    encoders             images -> feature maps, by any timm backbone or one fitted on the user's images
    colour_texture       the encoder that needs no weights
    spectral_clustering  feature maps -> a cluster for every cell
    regions              clusters -> connected components, their boxes and pooled features
    filters              the five box filters
    level_sets           clusters -> shapes a few pixels fine
    ranking              shapes -> the few that look most like objects, with scores
    pace                 how fast it goes
    batch                all of these on one batch of images
    store                mined regions on disk: Parquet shards and a manifest
    miner                a whole image source -> a store, resumable, by many processes
    processes            starts those processes on one machine
    clustering_config    what a user can choose of the next one
    kmeans               global clustering of more features than fit in memory
    certainty            mined scores -> how likely each box is an object
    pseudo_labels        a store -> the labels T0
    preview              what mining a whole source would give and cost, from a few images
    rivals               other methods' proposals, to compare with
"""

from typing import TYPE_CHECKING

from simdetr.data.first_use import names_on_first_use

if TYPE_CHECKING:
    from simdetr.mining.batch import MiningConfig, cluster_maps, mine_batch, mine_maps
    from simdetr.mining.clustering_config import ClusteringConfig
    from simdetr.mining.colour_texture import ColourTextureEncoder
    from simdetr.mining.encoders import Encoder, FittedEncoder, TimmEncoder
    from simdetr.mining.filters import FILTERS, apply_filters
    from simdetr.mining.kmeans import KMeans, fit_kmeans
    from simdetr.mining.miner import mine
    from simdetr.mining.pseudo_labels import make_pseudo_labels
    from simdetr.mining.regions import Candidates, Regions, connected_components
    from simdetr.mining.store import ProposalRow, ProposalStore
else:
    __getattr__, __dir__ = names_on_first_use(
        __name__,
        {
            "batch": ("MiningConfig", "cluster_maps", "mine_batch", "mine_maps"),
            "clustering_config": ("ClusteringConfig",),
            "colour_texture": ("ColourTextureEncoder",),
            "encoders": ("Encoder", "FittedEncoder", "TimmEncoder"),
            "filters": ("FILTERS", "apply_filters"),
            "kmeans": ("KMeans", "fit_kmeans"),
            "miner": ("mine",),
            "pseudo_labels": ("make_pseudo_labels",),
            "regions": ("Candidates", "Regions", "connected_components"),
            "store": ("ProposalRow", "ProposalStore"),
        },
    )

__all__ = [
    "FILTERS",
    "Candidates",
    "ClusteringConfig",
    "ColourTextureEncoder",
    "Encoder",
    "FittedEncoder",
    "KMeans",
    "MiningConfig",
    "ProposalRow",
    "ProposalStore",
    "Regions",
    "TimmEncoder",
    "apply_filters",
    "cluster_maps",
    "connected_components",
    "fit_kmeans",
    "make_pseudo_labels",
    "mine",
    "mine_batch",
    "mine_maps",
]
