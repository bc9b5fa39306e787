"""Programs that show zgraph at work: `python -m examples.demo`, `python -m examples.finetune_smollm2`."""
