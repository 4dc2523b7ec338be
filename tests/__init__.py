"""Tests of the package; this is imported before PyTorch is."""

import os

# pytest runs as many processes as there are cores, and what they start inherits this.
# Threads beside them would only wait for each other: small operations then take many
# times the processor time.
os.environ.setdefault('OMP_NUM_THREADS', '1')
