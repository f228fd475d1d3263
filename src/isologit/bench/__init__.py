"""Load on any server over HTTP and what comes of it; and the engine's own throughput and latency, in process."""
