"""What an update will take, without a GPU: the real plan, on a cluster that is described."""

from checkpoint_engine.simulate.checkpoint import make_plan, read_headers, share_out
from checkpoint_engine.simulate.cluster import Algorithm, Cluster, Costs
from checkpoint_engine.simulate.engine import Simulation, Span
from checkpoint_engine.simulate.update import Prediction, predict

__all__ = [
    "Algorithm",
    "Cluster",
    "Costs",
    "Prediction",
    "Simulation",
    "Span",
    "make_plan",
    "predict",
    "read_headers",
    "share_out",
]
