"""Record what an engine's own loader does with a checkpoint, and repeat it as plain copies."""
