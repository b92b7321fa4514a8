"""Where models come from: what is in the data folder, and how it gets there."""
