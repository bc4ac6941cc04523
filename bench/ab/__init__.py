"""The paired timing gate: the working tree against any revision, `python -m bench.ab REVISION`."""
