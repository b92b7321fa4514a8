"""The page: Gradio Blocks. Areas lay out, the desk acts, present.py turns values into words."""
