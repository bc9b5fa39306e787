"""The engine: a model, its optimizer and its schedule behind one object, from a DeepSpeed-style configuration."""
