"""From images to proposals and pseudo-labels: encoder, local clustering, regions, filters, global clustering."""

from simdetr.proposals.batch_mining import MiningConfig, cluster_maps, mine_batch, mine_maps
from simdetr.proposals.components import connected_components
from simdetr.proposals.filters import FILTERS, apply_filters
from simdetr.proposals.miner import mine
from simdetr.proposals.regions import Candidates, Regions
from simdetr.proposals.shards import ProposalRow
from simdetr.proposals.store import ProposalStore

__all__ = [
    "FILTERS",
    "Candidates",
    "MiningConfig",
    "ProposalRow",
    "ProposalStore",
    "Regions",
    "apply_filters",
    "cluster_maps",
    "connected_components",
    "mine",
    "mine_batch",
    "mine_maps",
]
