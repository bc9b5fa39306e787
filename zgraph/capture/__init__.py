"""From torch to the IR: torch.compile captures the model, AOTAutograd gives the joint graph, and it is translated."""

from zgraph.capture.fake import trace
from zgraph.capture.frontend import Compiled, Frontend, ParamInfo

__all__ = ["Compiled", "Frontend", "ParamInfo", "trace"]
