"""What a device is: memory, cores, arenas. Knows the operating system; must not know tensors' meaning or who computes."""
