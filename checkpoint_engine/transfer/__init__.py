"""How bytes travel between ranks: streams, P2P reads, collective groups, shared memory."""
