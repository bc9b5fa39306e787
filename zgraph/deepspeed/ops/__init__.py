"""`deepspeed.ops`: its optimizers, as those of zgraph and torch."""

from zgraph.deepspeed.absent import finder
from zgraph.deepspeed.ops import adagrad, adam, lion

__all__ = ["adagrad", "adam", "lion"]

__getattr__ = finder(
    __name__,
    {
        "lamb": "take zgraph.optim.AdamW: there is no LAMB",
        "aio": 'leave it out: offload_optimizer to "nvme" streams by itself',
        "sparse_attention": "take torch's scaled_dot_product_attention or flex_attention",
        "transformer": "take torch's or transformers' layer: kernels=\"triton\" fuses it",
        "op_builder": "leave it out: no op is built when it is first used",
    },
)
