"""The checks of an estimator, each under a name that says what is wrong where it fails."""
