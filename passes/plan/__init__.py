"""From the last graph to the programs of a step."""
