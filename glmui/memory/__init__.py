"""What a model takes of which memory, told beforehand, and what to do where that is too much. No torch."""
