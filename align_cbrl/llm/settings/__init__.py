"""What recipes read from YAML: one dataclass a file, each with a `build` that returns objects of the library."""
