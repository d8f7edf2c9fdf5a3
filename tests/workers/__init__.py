"""Scripts that tests start by torchrun."""
