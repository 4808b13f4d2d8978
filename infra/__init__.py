"""Demo, benchmarks, documentation, images and dashboards."""
