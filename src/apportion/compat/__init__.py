"""Names of other projects over ours, thin."""
