"""What this process may use of its machine: processor, device, threads, memory, signals, environment."""
