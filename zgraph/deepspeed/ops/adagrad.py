"""`deepspeed.ops.adagrad`, whose optimizer makes its state when it is made: here the parameters are others by then."""

from zgraph.deepspeed.absent import finder

__getattr__ = finder(
    __name__,
    {
        "DeepSpeedCPUAdagrad": 'name it in the configuration ("optimizer": {"type": "Adagrad"}), or give '
        "optimizer=torch.optim.Adagrad to initialize, which makes it",
    },
)
