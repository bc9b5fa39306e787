"""Tests of `zgraph/server`."""
