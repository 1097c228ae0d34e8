"""What runs at the server: the round loop, its rules and the ServerApp."""
