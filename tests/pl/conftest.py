"""Two processes of their own: a Trainer takes all ranks that there are."""

from tests.hf.conftest import _one_thread as _one_thread
from tests.hf.conftest import pair as pair
