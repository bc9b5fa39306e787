"""What passes are made of: the base class, recipes, pipelines, instruments."""
