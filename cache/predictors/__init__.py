"""The predictors by name: to add one, write its file and its line here."""

from offmoe.cache.predictors.base import Predictor
from offmoe.cache.predictors.gate import Gate
from offmoe.cache.predictors.linear import Linear
from offmoe.cache.predictors.markov import Markov
from offmoe.cache.predictors.nearest import Nearest
from offmoe.cache.predictors.oracle import Oracle
from offmoe.cache.predictors.previous import Previous

PREDICTORS: dict[str, type[Predictor]] = {
    "previous": Previous,
    "markov": Markov,
    "nearest": Nearest,
    "gate": Gate,
    "linear": Linear,
    "oracle": Oracle,
}
