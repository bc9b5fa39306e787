"""Certificates: every graph computes what the one before it does, by a check that does not trust the passes.

`certificate` makes them, with torch; `record` is what they say, and reads without.
"""

from zgraph.certify.record import Certificate, Checked

__all__ = ["Certificate", "Checked"]
