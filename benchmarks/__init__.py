"""Benchmarks: what a step costs, beside a roofline of the same run, beside the error of the same step."""
