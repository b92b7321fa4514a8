"""ChatGLM-6B in plain torch. Read config, then layout and rotary, then model; checkpoint fills it."""
