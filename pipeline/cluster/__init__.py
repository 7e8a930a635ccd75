"""Jobs on a SLURM cluster, or several at a time on this machine. submitit starts them."""
