"""Pure planning: who sends which bytes in which bucket. No clocks, sockets or devices."""
