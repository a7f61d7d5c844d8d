"""The benchmarks that docs/performance.md quotes: `bench/run [pipeline] [writes] [scale] [recall] [encoder]`."""
