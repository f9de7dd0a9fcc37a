"""Console progress, the run folder, plots and the report."""
