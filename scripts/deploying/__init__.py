"""What stands around Flower's processes on a real network: certificates, keys, a proxy, unit files."""
