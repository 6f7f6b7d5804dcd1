"""Inside the inference engine: receive buckets and load them into the model."""
