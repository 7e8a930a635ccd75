"""Stages that move a trained codec to a new architecture."""

import os

# OpenMP's threads spin while they wait, which on a shared machine takes the core from the thread they wait for: a step
# can take ten times as long. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
