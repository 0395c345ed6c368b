"""Programs for developers: benchmarks, chaos tests, surveys and model makers."""
