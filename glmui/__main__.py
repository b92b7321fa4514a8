"""`python -m glmui`."""

if __name__ == "__main__":  # the engine process imports this file again, and must then do nothing
    import sys

    from glmui.cli import main

    sys.exit(main())
