"""Pattern search for PyTorch models: training without gradients."""

from psfast.data import StateTrackingDataset, parity
from psfast.loop import fit
from psfast.models import DecoderOnlyTransformer, MaskedCrossEntropy
from psfast.objectives import Objective, objective
from psfast.optimizer import PatternSearch, PollReport
from psfast.reference import ReferencePatternSearch
from psfast.search_simplex import SimplexGradient

__version__ = "0.1.0"

__all__ = [
    "DecoderOnlyTransformer",
    "MaskedCrossEntropy",
    "Objective",
    "PatternSearch",
    "PollReport",
    "ReferencePatternSearch",
    "SimplexGradient",
    "StateTrackingDataset",
    "fit",
    "objective",
    "parity",
]
