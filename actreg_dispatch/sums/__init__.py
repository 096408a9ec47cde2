"""The numerical promise: sums of any order, rounded as if they were exact."""
