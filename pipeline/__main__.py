"""The command line, for `python -m pipeline` and `accelerate launch -m pipeline`."""

from pipeline.commands.main import main

if __name__ == "__main__":
    main()
