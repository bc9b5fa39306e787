"""The parts that make up a pass pipeline: the base class, recipes, pipelines, instruments."""
