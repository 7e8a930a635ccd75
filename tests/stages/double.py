"""`hpcm` in float64, as a module for `accelerate launch -m double`. See test_processes.py for why."""

from kills import _compute_in_double

from pipeline.commands.main import main

if __name__ == "__main__":
    _compute_in_double()
    main()
