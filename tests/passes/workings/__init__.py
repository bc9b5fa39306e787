"""What passes work out on the way to a program, as one digest each: problems, prices, choices and clocks.

Programs show only the choice that won. `python -m tests.passes.workings` writes the digests anew.
"""
