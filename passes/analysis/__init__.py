"""Analyses that passes run on a graph before they change it: dependencies, memory sharing, order."""
