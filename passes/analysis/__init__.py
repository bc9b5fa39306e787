"""What passes ask about a graph before they change it: dependencies, memory sharing, order."""
