"""How bytes travel in an update: one file per way. Nothing outside asks which way it is."""
