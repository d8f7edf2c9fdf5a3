"""`python -m paper_repro`."""

import os

# A spinning OpenMP barrier can cost up to 60 times on shared cores; it is configured before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from paper_repro.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
