"""From torch to the IR: torch.compile captures the model, AOTAutograd gives the joint graph, and it is translated."""

from zgraph.capture.calls import Call, capture_call
from zgraph.capture.fake import trace
from zgraph.capture.frontend import Compiled, Frontend, ParamInfo
from zgraph.capture.hooks import drop_gradient_hooks

__all__ = ["Call", "Compiled", "Frontend", "ParamInfo", "capture_call", "drop_gradient_hooks", "trace"]
