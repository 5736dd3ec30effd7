"""OLMo 2: norms after alone; queries and keys normed over all heads."""

from atp_edge.model.families.record import AFTER_ALONE, Family, HeadNorms, Layout, said_biases

FAMILY = Family(
    model_type="olmo2",
    layout=Layout(norms=AFTER_ALONE, head_norms=HeadNorms(over="all")),
    biased=said_biases,
    reads=("attention_bias",),
)
