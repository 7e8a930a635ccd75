"""Jobs on a SLURM cluster or side by side on this machine, through submitit."""
