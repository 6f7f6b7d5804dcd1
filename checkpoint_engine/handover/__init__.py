"""From the server to the worker beside it: addresses, sockets, messages, shared buffers."""
