"""Which model is better on the same held-out samples, and is the difference real?

compare             results of the same samples: paired differences, their errors, a verdict
compare_models      the same, from models, evaluated with common random numbers
repeat_seeds        seeds for repeats of an evaluation
stacking_weights    of a mixture of the models' densities
to_inference_data   results in the form that ArviZ reads
to_elpd             what ``arviz.compare`` takes
"""

from pyrodiff.comparison.comparing import compare
from pyrodiff.comparison.models import compare_models, repeat_seeds
from pyrodiff.comparison.paired import Difference
from pyrodiff.comparison.stacking import stacking_weights
from pyrodiff.comparison.summary import Comparison, Summary
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
