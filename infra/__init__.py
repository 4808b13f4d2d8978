"""What surrounds the product: demo data, benchmarks, images, dashboards."""
