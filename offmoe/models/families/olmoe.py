"""OLMoE (1B-7B): q and k normed over all heads together, softmax router without renormalisation."""

from offmoe.models.family import Family

FAMILY = Family(
    model_type="olmoe",
    arch="olmoe",
    published="OLMoE-1B-7B",
    qk_norm="full",
    renormalise=False,
)
