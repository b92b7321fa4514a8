"""What `glmui bench` measures, in processes of their own."""
