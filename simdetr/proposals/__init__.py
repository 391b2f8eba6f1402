"""From images to proposals and pseudo-labels: encoder, local clustering, regions, filters, global clustering."""

from simdetr.proposals.batch_mining import MiningConfig, cluster_maps, mine_batch, mine_maps
from simdetr.proposals.colour_texture import ColourTextureEncoder
from simdetr.proposals.components import connected_components
from simdetr.proposals.features import Encoder, TimmEncoder
from simdetr.proposals.filters import FILTERS, apply_filters
from simdetr.proposals.fitted_encoder import FittedEncoder
from simdetr.proposals.kmeans import KMeans, fit_kmeans
from simdetr.proposals.miner import mine
from simdetr.proposals.pseudo_labels import make_pseudo_labels
from simdetr.proposals.regions import Candidates, Regions
from simdetr.proposals.shards import ProposalRow
from simdetr.proposals.store import ProposalStore

__all__ = [
    "FILTERS",
    "Candidates",
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
