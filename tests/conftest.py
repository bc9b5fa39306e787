"""What all tests share."""

import logging

logging.getLogger("torch.__trace").propagate = False  # thousands of lines beside a failure, none of them of use
