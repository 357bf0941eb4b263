"""Pattern search for PyTorch models: training without gradients."""

from psfast.models import DecoderOnlyTransformer, MaskedCrossEntropy

__version__ = "0.1.0"

__all__ = ["DecoderOnlyTransformer", "MaskedCrossEntropy"]
