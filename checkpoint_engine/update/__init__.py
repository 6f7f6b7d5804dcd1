"""One update from call to report: what the ranks agree on, and what is done bucket by bucket."""
