"""Certificates: every graph computes what the one before it does, by a check that does not trust the passes."""

from zgraph.certify.certificate import Certifier, certify

__all__ = ["Certifier", "certify"]
