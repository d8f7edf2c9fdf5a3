"""The benchmark runner's data sets: real ones, checked by SHA-256, none of them committed to the project."""

from paper_repro.data.base import DataError, Dataset
from paper_repro.data.catalogue import DATASETS, load

__all__ = ["DATASETS", "DataError", "Dataset", "load"]
