"""The benchmarks that the README quotes: `bench/run [pipeline] [writes] [scale] [recall] [encoder]`."""
