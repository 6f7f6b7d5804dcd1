"""``checkpoint-engine certify``: are updates of this model in this engine right?

The yardstick is a fresh start from the same files. Only the command imports this room, and the
engines that it starts import ``certify.worker``.
"""
