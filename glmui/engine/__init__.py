"""What answers: the engine process, its client in the app process, and the families of models."""
