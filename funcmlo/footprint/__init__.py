"""The memory that a hypergradient is going to take: what `program.memory` does."""
