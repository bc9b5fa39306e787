"""DeepSpeed's JSON configuration: read, checked, and turned into options."""
