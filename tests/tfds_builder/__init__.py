"""A data set of a few rows, for reading by name; a package, as TFDS needs to find its files."""
