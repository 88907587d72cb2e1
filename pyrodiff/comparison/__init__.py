"""Which model is better on the same held-out samples, and is the difference real?

compare             results of the same samples: paired differences, their errors, a verdict
compare_models      the same for models, which it evaluates with common random numbers
repeat_seeds        seeds for repeated evaluations
stacking_weights    weights of the mixture of the models that predicts best
to_inference_data   results in the form that ArviZ reads
to_elpd             results in the form that ``arviz.compare`` takes
"""

from pyrodiff.comparison.common_noise import compare_models, repeat_seeds
from pyrodiff.comparison.comparing import compare
from pyrodiff.comparison.comparison import Comparison, Summary
from pyrodiff.comparison.difference import Difference
from pyrodiff.comparison.stacking import stacking_weights
from pyrodiff.likelihood.arviz import to_elpd, to_inference_data

__all__ = [
    "Comparison",
    "Difference",
    "Summary",
    "compare",
    "compare_models",
    "repeat_seeds",
    "stacking_weights",
    "to_elpd",
    "to_inference_data",
]
