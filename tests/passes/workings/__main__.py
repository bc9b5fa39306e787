"""Write the digests anew."""

from tests.passes.workings.cases import write

write()
