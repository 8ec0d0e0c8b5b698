"""The benchmark: longattn beside what people would otherwise use, each checked against float64 before it is timed."""
